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
ASKED = 256  # tiles along an axis
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
        same |= name == "convert_element_type" and exact(eqn)
        dtype, divided = eqn.outvars[0].aval.dtype, name == "div" and given[0] != KNOWN
        # A quotient of integers is rounded.
        same |= alone and (name == "mul" or (divided and jnp.issubdtype(dtype, jnp.floating)))
        if same or (alone and dtype != jnp.bool_ and (name in GROWS or divided)):
            kinds[eqn.outvars[0]] = most if same else GROWING
    return found


def exact(eqn) -> bool:
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
      full: the tiles that count, `[..., rows, columns]`.

    Returns:
      A mark for every tile, `[rows, columns]`, 0 for none, and the pairs of positions whose answers
      the marks 1, 2, ... stand for.
    """
    full = full.reshape(-1, *full.shape[-2:]).any(0)
    # Where there are too many tiles to ask each of them, groups of them are asked.
    group = -(-max(full.shape) // ASKED)
    weights = np.pad(full, [(0, -n % group) for n in full.shape])
    weights = weights.reshape(len(weights) // group, group, -1, group).sum((1, 3))
    firsts, lasts = [], []
    for count, block, shift in zip(weights.shape, blocks, (lengths[1] - lengths[0], 0)):
        firsts.append(np.arange(count, dtype=np.int32) * block * group + shift)
        lasts.append(firsts[-1] + block * group - 1)
    found = [
        [*answers(jaxpr, consts, positions, q[:, None], k).values()]
        for q in (firsts[0], lasts[0])
        for k in (firsts[1], lasts[1])
    ]
    found = np.array([[np.broadcast_to(x, weights.shape) for x in corner] for corner in found])
    rows, columns = np.nonzero(np.all(found == found[0], (0, 1)) & (weights > 0))
    marks, pairs = np.zeros(weights.shape, np.int32), []
    if found.shape[1] and len(rows):
        distinct = dict(axis=1, return_index=True, return_inverse=True)
        _, examples, which = np.unique(found[0][:, rows, columns], **distinct)
        which = which.ravel()
        often = np.bincount(which, weights[rows, columns])
        for n in np.argsort(-often)[:MOST]:
            if often[n] * WORTH >= full.sum():
                at = examples[n]
                pairs.append((int(firsts[0][rows[at]]), int(firsts[1][columns[at]])))
                marks[rows[which == n], columns[which == n]] = len(pairs)
    marks = marks.repeat(group, 0).repeat(group, 1)
    return marks[: full.shape[0], : full.shape[1]], pairs
