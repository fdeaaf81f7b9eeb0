"""What a mask computes of queries alone, or of keys alone, computed before a kernel starts.

A predicate may divide positions into coordinates, say of a grid: a few steps for every query and
key, but many for every pair of them. Such steps become operands, one number a position.
"""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from attn_kernels.attention import elementwise
from attn_kernels.attention.elementwise import SAME, SHAPES
from attn_kernels.attention.mask import Mask
from attn_kernels.attention.operand import operand

AXES = {2: "q", 3: "k"}  # by the number of the argument that holds positions
WORTH = 2  # steps; a kernel takes fewer itself


@dataclasses.dataclass(frozen=True)
class Ahead:
    """A predicate whose last operands are what it computes of positions along one axis.

    Attributes:
      predicate: the whole of it.
      count: how many operands that one has.
    """

    predicate: Callable
    count: int

    def __call__(self, *args):
        given, ready = args[: 4 + self.count], args[4 + self.count :]
        jaxpr, consts = _traced(self.predicate, given)
        known = {x: y.astype(x.aval.dtype) for x, y in zip(_alone(jaxpr), ready, strict=True)}
        return elementwise.run(jaxpr, consts, given, known=known)[0]


def ahead(mask: Mask, q_len: int, k_len: int, primitives: frozenset[str]) -> Mask:
    """The same mask, with what it computes of positions along one axis as operands.

    Args:
      mask: the pattern.
      q_len, k_len: T and S.
      primitives: what the kernel has; a mask that needs others stays as it is.
    """
    args = elementwise.stand_ins(mask.operands)
    if elementwise.obstacle(mask.predicate, args, primitives):
        return mask
    jaxpr, consts = _traced(mask.predicate, args)
    found = _alone(jaxpr)
    if not found:
        return mask
    positions = jnp.arange(q_len, dtype=jnp.int32) + (k_len - q_len), jnp.arange(k_len)
    whole = [None, None, *positions, *(None for _ in mask.operands)]
    values = elementwise.run(jaxpr, consts, whole, wanted=[*found])
    # A kernel has no vectors of booleans.
    values = [x.astype(jnp.int32) if x.dtype == jnp.bool_ else x for x in values]
    operands = [operand(x, AXES[n]) for x, n in zip(values, found.values())]
    return Mask(Ahead(mask.predicate, len(mask.operands)), (*mask.operands, *operands))


def source(mask: Mask) -> Mask:
    """The mask that `ahead` was given."""
    if not isinstance(mask.predicate, Ahead):
        return mask
    return Mask(mask.predicate.predicate, mask.operands[: mask.predicate.count])


def _traced(predicate, args):
    closed = jax.make_jaxpr(predicate)(*args)
    return closed.jaxpr, closed.consts


def _alone(jaxpr) -> dict:
    """Of a predicate the variables to be computed ahead, and the argument that each is made of.

    They are made in `WORTH` steps or more of positions along one axis, and are used together with
    something else.
    """
    needs = {x: frozenset([n]) for n, x in enumerate(jaxpr.invars)}
    steps = dict.fromkeys(jaxpr.invars, 0)
    origin, found = {}, {}

    def use(atoms: Iterable):
        for x in atoms:
            if not isinstance(x, Literal) and steps.get(x, 0) >= WORTH:
                found.setdefault(origin.get(x, x), *needs[x])

    for eqn in jaxpr.eqns:
        inputs = [x for x in eqn.invars if not isinstance(x, Literal)]
        needed = frozenset().union(*(needs.get(x, frozenset()) for x in inputs))
        (axis, *others) = needed or (None,)
        sizes = {x.aval.size for x in eqn.outvars}
        whole = axis in AXES and not others and sizes == {jaxpr.invars[axis].aval.size}
        if not whole:
            use(inputs)
        free = eqn.primitive.name in SHAPES | SAME
        count = max((steps.get(x, 0) for x in inputs), default=0) + (not free)
        for x in eqn.outvars:
            needs[x], steps[x] = needed, count if whole else 0
            if free and whole:
                origin[x] = origin.get(inputs[0], inputs[0])
    use(jaxpr.outvars)
    return found
