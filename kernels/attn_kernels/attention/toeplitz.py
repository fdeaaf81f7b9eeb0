"""What a modification computes of the differences of positions, found before a kernel starts.

Such numbers are a Toeplitz matrix: tiles whose first query and key are equally far apart have the
same. Near a diagonal, where comparisons of positions have no common answer, there are few such
tiles, and a kernel that reads them need not compute them for every pair.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from attn_kernels.attention.alike import exact
from attn_kernels.attention.elementwise import SAME, SHAPES, needed, run, steps_of
from attn_kernels.varying import varying

WORTH = 8  # steps for every pair that a number in memory has to save


def toeplitz(jaxpr, positions: Sequence[int], known: Sequence[int]) -> list:
    """The variables that differences of positions determine, in float32.

    They are those that are used together with something else, and none if computing them takes few
    steps.

    Args:
      jaxpr: of an elementwise function.
      positions: which of its arguments are those of queries and keys.
      known: which are numbers, or differ by batch and head alone.
    """
    fixed = {*jaxpr.constvars, *(jaxpr.invars[n] for n in known)}
    # By how much they grow where all positions grow by one.
    drifts, used = {jaxpr.invars[n]: 1 for n in positions}, []
    for eqn in jaxpr.eqns:
        atoms = [None if isinstance(x, Literal) or x in fixed else x for x in eqn.invars]
        if not any(atoms):
            fixed.update(eqn.outvars)
            continue
        drift = _drift(eqn, [0 if x is None else drifts.get(x) for x in atoms])
        used += atoms if drift is None else []
        drifts.update(dict.fromkeys(eqn.outvars, drift))
    used += [x for x in jaxpr.outvars if not isinstance(x, Literal)]
    found = [x for x in dict.fromkeys(used) if drifts.get(x) == 0 and x.aval.dtype == jnp.float32]
    before, after = (steps_of(needed(jaxpr, jaxpr.outvars, read)) for read in ([], found))
    return found if before - after > WORTH * len(found) else []


def _drift(eqn, given):
    """By how much a result grows where all positions grow by one, None if that is not constant."""
    if None in given:
        return None
    if not any(given):
        return 0
    name = eqn.primitive.name
    if name in SHAPES | SAME or (name == "convert_element_type" and exact(eqn)):
        return given[0]
    if name == "neg":
        return -given[0]
    return {"add": sum(given), "sub": given[0] - given[-1]}.get(name)


@functools.partial(jax.jit, static_argnames=("parts", "lead", "shift", "offsets", "sizes"))
def tiles(leaves, *, parts, lead, shift, offsets: range, sizes) -> list[jax.Array]:
    """The Toeplitz matrices of a modification, in tiles.

    Args:
      leaves: as kernels read them.
      parts: of these leaves.
      lead: B and H.
      shift: the position of the first query.
      offsets: of tiles, by how much the number of the first query exceeds that of the first key.
      sizes: how many queries and keys a tile has.

    Returns:
      float32 `[B|1, H|1, offsets, queries, keys]` each.
    """

    def aligned(*arrays):
        return varying(jnp.broadcast_arrays(*arrays), arrays)

    shape = *lead, len(offsets), *sizes
    b, h, n, q, k = (x.astype(jnp.int32) for x in jnp.ogrid[(*map(slice, shape),)])
    place = b, h, shift + offsets.start + n * offsets.step + q, k
    closed = parts.closed(leaves)
    args = [None, *place, *(x[..., None, None, None] for x in leaves)]
    options = dict(wanted=parts.toeplitz(closed.jaxpr), aligned=aligned)
    found = run(closed.jaxpr, closed.consts, args, parts.primitives, **options)
    return [jnp.broadcast_to(x, (*x.shape[:2], *shape[2:])) for x in found]
