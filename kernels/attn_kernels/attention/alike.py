"""Tiles whose pairs answer every comparison of positions alike.

A modification may ask in which bucket a distance is. In most tiles all pairs give one answer, and
most of these tiles give the same one: a kernel that is traced for it need not ask.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from attn_kernels.attention.elementwise import SAME, SHAPES, run

COMPARISONS = {"ge", "gt", "le", "lt"}
GROWS = {"ceil", "clamp", "convert_element_type", "floor", "max", "min", "round"}
MOST = 2  # answers that have a loop: those before the diagonal, say, and behind it
WORTH = 8  # one that fewer tiles than one in so many give has none
# A variable is known, or a sum of multiples of positions, or it grows or falls with such a sum.
KNOWN, SUM, GROWING = range(3)


def comparisons(jaxpr, positions: Sequence[int]) -> list:
    """The variables that say on which side of a line through all pairs a pair is.

    Args:
      jaxpr: of a function.
      positions: which of its arguments are those of queries and keys.
    """
    kinds = {jaxpr.invars[n]: SUM for n in positions} | dict.fromkeys(jaxpr.constvars, KNOWN)
    found = []
    for eqn in jaxpr.eqns:
        given = [KNOWN if isinstance(x, Literal) else kinds.get(x) for x in eqn.invars]
        if None in given or len(eqn.outvars) > 1:
            continue
        name, most, alone = eqn.primitive.name, max(given), sum(map(bool, given)) == 1
        if name in COMPARISONS and most and (alone or most == SUM):
            found.append(eqn.outvars[0])
            continue
        same = most == KNOWN or name in SHAPES | SAME | {"neg"}
        same |= name in ("add", "sub") and (alone or most == SUM)
        same |= name == "convert_element_type" and _exact(eqn)
        same |= alone and (name == "mul" or (name == "div" and given[0] != KNOWN))
        boolean = eqn.outvars[0].aval.dtype == jnp.bool_
        if same or (name in GROWS and alone and not boolean):
            kinds[eqn.outvars[0]] = most if same else GROWING
    return found


def _exact(eqn) -> bool:
    """Whether a conversion leaves positions, and sums of them, as they are."""
    before, after = eqn.invars[0].aval.dtype, eqn.params["new_dtype"]
    whole = jnp.issubdtype(before, jnp.integer)
    kept = jnp.issubdtype(after, jnp.number if whole else jnp.floating)
    return kept and jnp.dtype(after).itemsize >= 4


def answers(jaxpr, consts, positions: Sequence[int], queries, keys) -> dict:
    """What the comparisons say at positions of queries and keys, of which arrays are concrete."""
    args = [None] * len(jaxpr.invars)
    for n, x in zip(positions, (queries, keys), strict=True):
        args[n] = x
    wanted = comparisons(jaxpr, positions)
    with jax.ensure_compile_time_eval():
        found = run(jaxpr, consts, args, wanted=wanted)
    return {x: np.asarray(y) for x, y in zip(wanted, found, strict=True)}


def alike(jaxpr, consts, positions, lengths, blocks, full) -> tuple[np.ndarray, list[tuple]]:
    """Which tiles give an answer that many give.

    Args:
      jaxpr, consts, positions: as of `answers`.
      lengths: T and S.
      blocks: how many queries and keys a tile has.
      full: the tiles that count, `[..., rows, columns]`; the others may not be marked.

    Returns:
      A mark for every tile, `[rows, columns]`, 0 for none, and the pairs of positions whose answers
      the marks 1, 2, ... stand for.
    """
    counts = [-(-length // block) for length, block in zip(lengths, blocks)]
    marks, pairs = np.zeros(counts, np.int32), []
    firsts = [np.arange(n, dtype=np.int32) * block for n, block in zip(counts, blocks)]
    queries, keys = firsts[0] + lengths[1] - lengths[0], firsts[1]
    found = [
        [*answers(jaxpr, consts, positions, q[:, None], k).values()]
        for q in (queries, queries + blocks[0] - 1)
        for k in (keys, keys + blocks[1] - 1)
    ]
    if not found[0]:
        return marks, pairs
    found = np.array([[np.broadcast_to(x, counts) for x in corner] for corner in found])
    one = np.all(found == found[0], (0, 1)) & full.reshape(-1, *counts).any(0)
    if not one.any():
        return marks, pairs
    _, first, inverse, often = np.unique(
        found[0][:, one], axis=1, return_index=True, return_inverse=True, return_counts=True
    )
    rows, columns = np.nonzero(one)
    for n in np.argsort(-often)[:MOST]:
        if often[n] * WORTH >= full.reshape(-1, *counts).any(0).sum():
            pairs.append((int(queries[rows[first[n]]]), int(keys[columns[first[n]]])))
            marks[rows[inverse.ravel() == n], columns[inverse.ravel() == n]] = len(pairs)
    return marks, pairs
