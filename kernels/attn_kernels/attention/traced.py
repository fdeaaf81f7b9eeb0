"""What kernels trace into their tiles, and which tiles they visit.

Kernels differ in how they move data. What they compute of the scores of a tile, and of the
derivatives of its weights, is here.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from attn_kernels.attention import elementwise
from attn_kernels.attention.ahead import source
from attn_kernels.attention.alike import alike, answers
from attn_kernels.attention.elementwise import KEYS, PAIRS, PLACE, QUERIES, over
from attn_kernels.attention.mask import EMPTY, FULL, PARTIAL, Mask
from attn_kernels.attention.normalizer import Normalizer, Softmax
from attn_kernels.attention.tile import Tile
from attn_kernels.attention.toeplitz import toeplitz


@dataclasses.dataclass(frozen=True)
class Parts:
    """Mask, score modification and normaliser of a call, as functions of a kernel's own arrays.

    The sink of a softmax is not among them: it is what rows start from. A `place` is b, h and the
    positions of queries and keys; it, scores and leaves only have to broadcast.

    Attributes:
      treedef: of the three.
      axes: which of "q" and "k" each of their leaves has.
      moving: which of the leaves have derivatives.
      primitives: what the kernel has.
    """

    treedef: jax.tree_util.PyTreeDef
    axes: tuple[str, ...]
    moving: tuple[int, ...]
    primitives: frozenset[str]

    def __post_init__(self):
        mask, score_mod, normalizer = self.treedef.unflatten(range(len(self.axes)))
        softmax = isinstance(normalizer, Softmax)
        object.__setattr__(self, "masked", mask is not None)
        object.__setattr__(self, "of_mask", len(jax.tree.leaves(mask)))  # the first leaves
        object.__setattr__(self, "softmax", softmax)
        object.__setattr__(self, "plain", softmax and score_mod is None)

    def perturbed(self, leaves) -> "Parts":
        """The same, those leaves alone moving that are said to be perturbed."""
        moving = tuple(n for n in self.moving if leaves[n].perturbed)
        return dataclasses.replace(self, moving=moving)

    def allowed(self, place, leaves) -> list[jax.Array]:
        """Conditions that all hold for the pairs that the mask allows."""
        args, shapes = (*place, *leaves), self._shapes()
        return self._evaluate(self._allowed, args, shapes, wanted=elementwise.conditions)

    def value(self, scores, place, leaves, like=None, stored=()) -> jax.Array:
        """The modified scores if softmax normalises, else the weights.

        Args:
          scores, place, leaves: arrays.
          like: positions of a query and a key, if comparisons of positions come out as of these.
          stored: the variables of `toeplitz`, if they are at hand.
        """
        if self.plain:
            return scores
        args, shapes = (scores, *place, *leaves), (PAIRS, *self._shapes())
        (value,) = self._evaluate(self._value, args, shapes, like=like, stored=stored)
        return over(value, scores.shape)

    def slopes(
        self, scores, cotangent, place, leaves, moving=None, rows="", reduce=None, like=None
    ) -> list[jax.Array]:
        """The `value`, and the derivatives along scores and moving leaves.

        Args:
          scores, cotangent, place, leaves, like: as of `value`.
          moving: the leaves along which they are wanted, by default all that move.
          rows: "q" or "k", if derivatives of leaves that have no other axis are to be vectors, and
            such leaves may be; else all are pair by pair.
          reduce: sums pairs to a vector.
        """
        if self.plain:
            return [scores, cotangent]
        moving = self.moving if moving is None else moving
        args, shapes = (scores, cotangent, *place, *leaves), self._shapes(moving, rows)
        function = functools.partial(self._slopes, moving)
        shapes = PAIRS, PAIRS, *shapes
        value, slopes, *found = self._evaluate(function, args, shapes, reduce, like)
        summed = [self._summed(n, rows) for n in moving]
        whole = scores.shape
        return [
            *(over(x, whole) for x in (value, slopes)),
            *(over(x, whole[:1] if one else whole) for x, one in zip(found, summed, strict=True)),
        ]

    def _summed(self, n, rows):
        return bool(rows) and set(self.axes[n]) <= set(rows)

    def _evaluate(self, function, args, shapes, reduce=None, like=None, wanted=None, stored=()):
        def known(jaxpr, consts):
            if like:
                return answers(jaxpr, consts, self._positions(args), *map(np.int32, like))
            return dict(zip(self.toeplitz(jaxpr), stored, strict=True))

        known = known if like or stored else None
        given = self.primitives, reduce, known, wanted, self._positions(args)
        return elementwise.evaluate(function, args, shapes, *given)

    def _positions(self, args):
        """Which of the arguments of a function are positions of queries and keys."""
        first = len(args) - len(self.axes) - len(PLACE) + 2
        return first, first + 1

    def alike(self, leaves, lengths, blocks, full) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Tiles in which all comparisons of positions come out alike: see `alike.alike`."""
        closed = self.closed(leaves)
        positions = self._positions(closed.jaxpr.invars)
        return alike(closed.jaxpr, closed.consts, positions, lengths, blocks, full)

    def closed(self, leaves) -> jax.extend.core.ClosedJaxpr:
        """The function that `value` evaluates, for leaves of these dtypes."""
        dtypes = [jnp.float32, *[jnp.int32] * len(PLACE), *(x.dtype for x in leaves)]
        shapes = PAIRS, *self._shapes()
        args = [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, dtypes, strict=True)]
        return jax.make_jaxpr(self._value)(*args)

    def toeplitz(self, jaxpr) -> list:
        """The variables of that function that tiles can be read of: see `toeplitz.toeplitz`."""
        q, k = self._positions(jaxpr.invars)
        known = [q - 2, q - 1, *(k + 1 + n for n, axes in enumerate(self.axes) if not axes)]
        return toeplitz(jaxpr, (q, k), known)

    def obstacle(self, leaves) -> str | None:
        """Why the kernel cannot trace the functions, None if it can."""
        dtypes = [jnp.int32] * len(PLACE) + [x.dtype for x in leaves]
        scores = jnp.float32
        checks = []
        if self.masked:
            checks.append(("mask", self._allowed, dtypes, self._shapes()))
        if not self.plain:
            shapes = PAIRS, PAIRS, *self._shapes(self.moving)
            name = "score_mod and normalizer"
            slopes = functools.partial(self._slopes, self.moving)
            checks.append((name, slopes, [scores, scores, *dtypes], shapes))
        for name, function, dtypes, shapes in checks:
            args = [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, dtypes, strict=True)]
            if found := elementwise.obstacle(function, args, self.primitives):
                return f"{name}: {found}"
        return None

    def _shapes(self, moving=(), rows=""):
        """The shapes in which functions get a place and the leaves.

        Leaves that move stand for every pair or every row, as their derivatives are to do.
        """
        lengths = {"q": QUERIES, "k": KEYS}

        def shape(n, axes):
            if n in moving:
                axes = rows if self._summed(n, rows) else "qk"
            return tuple(lengths[a] if a in axes else 1 for a in "bhqk")

        return [*PLACE, *(shape(n, axes) for n, axes in enumerate(self.axes))]

    def _allowed(self, *args):
        place, leaves = args[: len(PLACE)], args[len(PLACE) :]
        return self.treedef.unflatten(leaves)[0].allowed(*place)

    def _value(self, scores, *args):
        place, leaves = args[: len(PLACE)], args[len(PLACE) :]
        _, score_mod, normalizer = self.treedef.unflatten(leaves)
        if score_mod is not None:
            scores = score_mod(scores, *place).astype(scores.dtype)
        return scores if self.softmax else normalizer.weight(scores, ())

    def _slopes(self, moving, scores, cotangent, *args):
        at = [len(PLACE) + n for n in moving]

        def function(scores, *moving):
            replaced = list(args)
            for n, x in zip(at, moving):
                replaced[n] = x
            return self._value(scores, *replaced)

        value, pull = jax.vjp(function, scores, *(args[n] for n in at))
        return value, *pull(cotangent)


def parts_of(
    tile: Tile, primitives: frozenset[str]
) -> tuple[Parts, list[jax.Array], jax.Array | None]:
    """The functions of a tile, their leaves (all that may have derivatives moving), and the sink.

    Args:
      tile: the tile.
      primitives: what the kernel has.
    """
    softmax = isinstance(tile.normalizer, Softmax)
    normalizer = Softmax() if softmax else tile.normalizer
    leaves, treedef = jax.tree.flatten((tile.mask, tile.score_mod, normalizer))
    first = len(jax.tree.leaves(tile.mask))
    axes = tuple("q" * (x.shape[2] > 1) + "k" * (x.shape[3] > 1) for x in leaves)
    moving = tuple(
        n for n, x in enumerate(leaves) if n >= first and jnp.issubdtype(x.dtype, jnp.inexact)
    )
    return (
        Parts(treedef, axes, moving, primitives),
        leaves,
        tile.normalizer.sink if softmax else None,
    )


def refusal(tile: Tile, primitives: frozenset[str], dtypes: tuple[str, ...]) -> str | None:
    """Why a kernel with these primitives cannot serve a tile, None if it can."""
    for name in "qkv":
        dtype = getattr(tile, name).dtype
        if dtype.name not in dtypes:
            return f"it takes {', '.join(dtypes)}; {name} is {dtype}"
    if tile.score is not None:
        return "scores are inner products of queries and keys; drop the score"
    if tile.place is not None:
        return "it does not work on a part of a sequence that devices share"
    normalizer = tile.normalizer
    if not isinstance(normalizer, Softmax) and type(normalizer).partial is not Normalizer.partial:
        return f"normalizer: it has softmax and weights without statistics, not {normalizer}"
    parts, leaves, _ = parts_of(tile, primitives)
    return parts.obstacle(leaves)


def tile_lists(
    mask: Mask | None, lengths: tuple[int, int], blocks: tuple[int, int], rows: str, every=False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The blocks that every block of rows meets.

    Args:
      mask: the pattern.
      lengths, blocks: T and S, and how many queries and keys a tile has.
      rows: "q" or "k", whose blocks are the rows.
      every: whether to meet empty ones too.

    Returns:
      As `listed` without marks.
    """
    return listed(tile_kinds(mask, lengths, blocks, every), rows)


def tile_kinds(mask, lengths, blocks, every=False) -> jax.Array:
    """`[B|1, H|1, T tiles, S tiles]`, concrete if the mask is; see `tile_lists`."""
    counts = [-(-length // block) for length, block in zip(lengths, blocks)]
    mask = mask and source(mask)
    concrete = not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(mask))
    with jax.ensure_compile_time_eval() if concrete else contextlib.nullcontext():
        kinds = jnp.full(counts, FULL, jnp.int32)
        if mask is not None:
            kinds = mask.block_map(*lengths, *blocks)
        kinds = kinds.reshape((1,) * (4 - kinds.ndim) + kinds.shape)
        ragged = [
            (np.arange(count) + 1) * block > length
            for count, block, length in zip(counts, blocks, lengths)
        ]
        kinds = jnp.where(ragged[0][:, None] | ragged[1], jnp.minimum(kinds, PARTIAL), kinds)
        return jnp.maximum(kinds, PARTIAL) if every else kinds


def listed(kinds: jax.Array, rows: str, marks=0, most: int = 0) -> tuple[jax.Array, ...]:
    """Lists of tiles.

    Args:
      kinds: from `tile_kinds`.
      rows: "q" or "k", whose blocks are the rows.
      marks: of tiles, up to `most`: full ones come in the order of theirs, greatest first.

    Returns:
      int32 `[B|1, H|1, rows, n]`, the numbers of the blocks, full ones first, and `[B|1, H|1,
      rows]` each: how many have the greatest mark, the next one or that, ..., how many are full,
      and how many there are. n is the largest of these, if the kinds are concrete, else the number
      of columns.
    """
    concrete = not isinstance(kinds, jax.core.Tracer)
    with jax.ensure_compile_time_eval() if concrete else contextlib.nullcontext():
        kinds = jnp.where(kinds == FULL, FULL + marks, kinds)
        kinds = jnp.swapaxes(kinds, 2, 3) if rows == "k" else kinds
        order = jnp.argsort(-kinds, axis=-1, stable=True).astype(jnp.int32)
        least = (*range(FULL + most, EMPTY, -1),)
        counts = [(kinds >= kind).sum(-1, dtype=jnp.int32) for kind in least]
        if concrete:
            order = order[..., : max(1, int(counts[-1].max()))]
    return order, *counts


def given(cotangents, results):
    """The cotangents of results, symbolic zeros as arrays."""
    return jax.tree.map(
        lambda x, like: jnp.zeros_like(like) if isinstance(x, SymbolicZero) else x,
        cotangents,
        results,
        is_leaf=lambda x: isinstance(x, SymbolicZero),
    )


def reduced(x: jax.Array, like: jax.Array) -> jax.Array:
    """Sums over the axes that `like` lacks."""
    axes = tuple(n for n in range(4) if like.shape[n] == 1 < x.shape[n])
    return x.sum(axes, keepdims=True).astype(like.dtype)


def grouped(x: jax.Array, like: jax.Array) -> jax.Array:
    """Sums `[B, H, n, D]` over the query heads of every head of `like`."""
    if x.shape == like.shape:
        return x.astype(like.dtype)
    batch, heads, length, dim = like.shape
    x = x.reshape(batch, heads, -1, length, dim)
    return x.sum(2, dtype=jnp.float32).astype(like.dtype)


def slopes_of(leaves: list[jax.Array], slopes: dict[int, jax.Array]) -> list[jax.Array]:
    """The cotangents of all leaves from those by number, `[B, H, T|1, S|1]`."""

    def none(x):
        exact = jnp.issubdtype(x.dtype, jnp.inexact)
        return jnp.zeros_like(x) if exact else np.zeros(x.shape, jax.dtypes.float0)

    return [reduced(slopes[n], x) if n in slopes else none(x) for n, x in enumerate(leaves)]
