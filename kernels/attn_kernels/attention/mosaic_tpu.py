"""Attention on TPUs, by Pallas kernels into which mask, modification and normaliser are traced.

Three kernels share one shape: `outputs`, `row_slopes` for the derivatives along queries and
`column_slopes` for those along keys. Each holds a block of rows (of keys, in the last) and meets
the blocks of the other axis that the mask leaves, in the order of a list that it has before it
starts: full ones first, on which the predicate is not evaluated.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attn_kernels import tpu
from attn_kernels.attention import traced
from attn_kernels.attention.elementwise import COMMON
from attn_kernels.attention.tile import Tile
from attn_kernels.attention.traced import Parts, parts_of, tile_lists
from attn_kernels.varying import varying

BLOCK = 512  # queries and keys of a tile, or fewer: multiples of LANES
LANES = 128
WIDEST = 512  # dimensions of a head: blocks of more do not fit into VMEM
LISTED = 2**17  # blocks in a list: more do not fit into SMEM
PRIMITIVES = COMMON | {
    "ceil",
    "erf",
    "erf_inv",
    "integer_pow",
    "floor",
    "is_finite",
    "log1p",
    "logistic",
    "not",
    "pow",
    "rem of floats",
}


def refusal(tile: Tile) -> str | None:
    """Why the kernels cannot serve a tile, None if they can."""
    if reason := traced.refusal(tile, PRIMITIVES, ("float32", "bfloat16")):
        return reason
    if max(tile.q.shape[3], tile.v.shape[3]) > WIDEST:
        return f"D and Dv are at most {WIDEST}, got {tile.q.shape[3]} and {tile.v.shape[3]}"
    problem, *_ = problem_of(tile)
    lists = functools.partial(tile_lists, tile.mask, problem.lengths, problem.blocks, "q")
    listed = math.prod(jax.eval_shape(lists)[0].shape)
    if listed > LISTED:
        return f"lists of tiles have at most {LISTED} entries, this call needs {listed}"
    return None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Problem:
    """What is known of a call when it is traced.

    Attributes:
      parts: mask, modification and normaliser.
      lengths, blocks: T and S, and how many queries and keys a tile has.
    """

    parts: Parts
    lengths: tuple[int, int]
    blocks: tuple[int, int]

    @property
    def whole(self) -> tuple[int, int]:
        """T and S in whole blocks."""
        return tuple(-(-n // block) * block for n, block in zip(self.lengths, self.blocks))


def problem_of(tile: Tile):
    """The problem of a tile, the leaves of its parts and the sink."""
    parts, leaves, sink = parts_of(tile, PRIMITIVES)
    lengths = tile.q.shape[2], tile.k.shape[2]
    blocks = tuple(min(BLOCK, -(-n // LANES) * LANES) for n in lengths)
    return Problem(parts, lengths, blocks), leaves, sink


def attend(tile: Tile):
    """The output `[B, H, T, Dv]` in the dtype of v, and the statistics of the rows.

    It is differentiable once, in reverse mode.
    """
    problem, leaves, sink = problem_of(tile)
    args = tile.q, tile.k, tile.v, tile.scale, sink, leaves
    return _attend(problem, *varying(args, args))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(problem, *args):
    return _outputs(problem, *args)


def _forward(problem, *args):
    primals = jax.tree.map(lambda x: x.value, args)
    problem = dataclasses.replace(problem, parts=problem.parts.perturbed(args[5]))
    results = _outputs(problem, *primals)
    return results, (problem, primals, results)


def _backward(_, saved, cotangents):
    problem, (q, k, v, scale, sink, leaves), results = saved
    (out, stats), (dout, dstats) = results, traced.given(cotangents, results)
    rows, dsink = [], None
    if problem.parts.softmax:
        top, total = stats
        inverse = 1 / jnp.where(total > 0, total, 1)
        inner = dout.astype(jnp.float32) * out.astype(jnp.float32)
        inner = inner.sum(-1, keepdims=True)
        rows = [jnp.where(top == -jnp.inf, 0, top), inverse, inner - total * dstats[1]]
        if sink is not None:
            silent = jnp.exp(sink.astype(top.dtype) - top)
            dsink = traced.reduced(silent * (dstats[1] - inner * inverse), sink)
    arrays = q, k, v, dout, scale, leaves, rows
    dq, of_rows = _row_slopes(problem, *arrays)
    dk, dv, of_columns = _column_slopes(problem, *arrays)
    dk, dv = traced.grouped(dk, k), traced.grouped(dv, v)
    dscale = jnp.vdot(dq.astype(jnp.float32), q.astype(jnp.float32)) / scale
    return dq, dk, dv, dscale, dsink, traced.slopes_of(leaves, of_rows | of_columns)


_attend.defvjp(_forward, _backward, symbolic_zeros=True)


class Tiles:
    """What a kernel sees of its tile.

    Attributes:
      first, last: whether this is the first or the last step of a block of rows.
      place: b, h and the positions of queries and keys, of all pairs.
    """

    def __init__(self, problem: Problem, rows: str, lists: "Lists", leaf_refs):
        self.problem, self._leaf_refs = problem, leaf_refs
        b, h, i, step = (pl.program_id(n) for n in range(4))
        self.first, self.last = step == 0, step == pl.num_programs(3) - 1
        self._full, self._some = lists.visited(b, h, i, step)
        met = lists.met(b, h, i, step)
        self._index = [
            jax.lax.broadcasted_iota(jnp.int32, problem.blocks, axis) + start * block
            for axis, (start, block) in enumerate(
                zip((i, met) if rows == "q" else (met, i), problem.blocks)
            )
        ]
        shift = problem.lengths[1] - problem.lengths[0]
        self.place = b, h, self._index[0] + shift, self._index[1]

    def visit(self, step):
        """`step(whole)`, if the mask leaves the tile any pair; whole if it leaves all."""
        pl.when(self._full)(functools.partial(step, True))
        pl.when(self._some)(functools.partial(step, False))

    def number(self, ref):
        """The entry `[B|1, H|1]` of this tile."""
        return ref[tuple(n if size > 1 else 0 for n, size in zip(self.place, ref.shape))]

    def leaf(self, ref, axes):
        """A number, a column of queries, a row of keys, or all pairs."""
        if not axes:
            return self.number(ref)
        x = ref[...]
        x = x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
        return x.T if axes == "q" else x

    @property
    def leaves(self):
        return list(map(self.leaf, self._leaf_refs, self.problem.parts.axes))

    def clear(self, x, whole, empty=0.0):
        """`x` for pairs that exist and are allowed."""
        if whole:
            return x
        sides = zip(self._index, self.problem.lengths, self.problem.whole)
        for index, length, filled in sides:
            x = x if length == filled else jnp.where(index < length, x, empty)
        if self.problem.parts.masked:
            for allowed in self.problem.parts.allowed(self.place, self.leaves):
                x = jnp.where(jnp.broadcast_to(allowed, x.shape), x, empty)
        return x


@dataclasses.dataclass(frozen=True)
class Lists:
    """Lists of tiles, flat, as arrays or as references in a kernel: see `tile_lists`."""

    order: jax.Array
    full: jax.Array
    some: jax.Array
    shape: tuple[int, int, int, int]

    def _row(self, b, h, i):
        batch, heads, rows, _ = self.shape
        return (jnp.minimum(b, batch - 1) * heads + jnp.minimum(h, heads - 1)) * rows + i

    def met(self, b, h, i, step):
        """The number of the block that a step meets; after the last one, this again."""
        row = self._row(b, h, i)
        last = jnp.maximum(self.some[row] - 1, 0)
        return self.order[row * self.shape[3] + jnp.minimum(step, last)]

    def visited(self, b, h, i, step):
        """Whether that block is full, and whether it is partial."""
        row = self._row(b, h, i)
        full, some = self.full[row], self.some[row]
        return step < full, (step >= full) & (step < some)


def _run(problem, rows, body, inputs, leaves, results, scratch, every=False):
    """What `body(tiles, inputs, results, scratch)` writes in all tiles.

    Arrays are `[B|1, n, x, y]`, with n dividing the heads. Their axes say what x and y are: "q" or
    "k", of which a tile has a block, or " ", of which it has all. Without axes they are numbers.

    Args:
      rows: "q" or "k", of which a block is held while those of the other are met.
      inputs: pairs of an array and its axes.
      results: pairs of a type and its axes.
      scratch: shapes of float32.
    """
    sizes, blocks = dict(zip("qk", problem.whole)), dict(zip("qk", problem.blocks))
    batch, heads = inputs[0][0].shape[:2]
    mask = problem.parts.treedef.unflatten(leaves)[0]
    lists = tile_lists(mask, problem.lengths, problem.blocks, rows, every)
    shape = lists[0].shape

    def spec(array, axes):
        if not axes:
            return pl.BlockSpec(memory_space=pltpu.SMEM)
        sides = [blocks.get(a, n) for a, n in zip(axes, array.shape[2:])]

        def index(b, h, i, step, *refs):
            at = {rows: i, "qk".replace(rows, ""): Lists(*refs, shape).met(b, h, i, step), " ": 0}
            b = b if array.shape[0] > 1 else 0
            return b, jax.lax.div(h, jnp.int32(heads // array.shape[1])), *(at[a] for a in axes)

        return pl.BlockSpec((None, None, *sides), index)

    def lay_out(x, axes):
        x = x.astype(jnp.int32) if x.dtype == jnp.bool_ else x
        if not axes:
            x = x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
            return x.reshape(x.shape[:2])
        ends = [sizes.get(a, n) - n for a, n in zip(axes, x.shape[2:])]
        return jnp.pad(x, ((0, 0), (0, 0), *((0, end) for end in ends)), mode="edge")

    kinds = {"": "", "q": " q", "k": " k", "qk": "qk"}
    rows_of = {"q": lambda x: jnp.swapaxes(x, 2, 3)}
    inputs = [*inputs]
    count = len(inputs)
    for x, axes in zip(leaves, problem.parts.axes):
        inputs.append((rows_of.get(axes, lambda x: x)(x), kinds[axes]))
    laid = [lay_out(x, axes) for x, axes in inputs]
    specs = [spec(x, axes) for x, (_, axes) in zip(laid, inputs)]
    whole = [
        x.update(shape=(*x.shape[:2], *(sizes.get(a, n) for a, n in zip(axes, x.shape[2:]))))
        for x, axes in results
    ]

    def kernel(order, full, some, *refs):
        refs = iter(refs)
        given, leaf_refs, written, kept = (
            [next(refs) for _ in range(n)] for n in (count, len(leaves), len(results), len(scratch))
        )
        tiles = Tiles(problem, rows, Lists(order, full, some, shape), leaf_refs)
        body(tiles, given, written, kept)

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(batch, heads, *shape[2:]),
        in_specs=specs,
        out_specs=[spec(x, axes) for x, axes in results],
        scratch_shapes=[pltpu.VMEM(x, jnp.float32) for x in scratch],
    )
    args = *(x.reshape(-1) for x in lists), *laid
    found = tpu.run(kernel, args, whole, grid=grid)
    return [x[tuple(map(slice, like.shape))] for x, (like, _) in zip(found, results)]


def _dot(a, b, axis_of_a, axis_of_b):
    dims = (((axis_of_a,), (axis_of_b,)), ((), ()))
    # Products of bfloat16 are exact, and the compiler takes no other precision for them.
    precision = jax.lax.Precision.DEFAULT if a.dtype == b.dtype == jnp.bfloat16 else None
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def _outputs(problem, q, k, v, scale, sink, leaves):
    """The output and, for softmax, the maximum and the sum `[B, H, T, 1]`."""
    parts, block = problem.parts, problem.blocks[0]
    batch, heads, length, _ = q.shape
    along = "q" if sink is not None and sink.shape[2] > 1 else ""

    def body(tiles, inputs, results, scratch):
        q, k, v, scale, *first = inputs
        out, *stats = results
        sums, *rows = scratch

        @pl.when(tiles.first)
        def _():
            sums[...] = jnp.zeros_like(sums)
            if parts.softmax:
                top = tiles.leaf(first[0], along) if first else -jnp.inf
                rows[0][...] = jnp.broadcast_to(top, (block, 1))
                rows[1][...] = jnp.full((block, 1), 1.0 if first else 0.0)

        @tiles.visit
        def _(whole):
            scores = _dot(q[...], k[...], 1, 1) * tiles.number(scale)
            values = v[...]
            scores = parts.value(scores, tiles.place, tiles.leaves)
            if not parts.softmax:
                weights = tiles.clear(scores, whole)
                sums[...] += _dot(weights.astype(values.dtype), values, 1, 0)
                return
            scores = tiles.clear(scores, whole, -jnp.inf)
            old = rows[0][...]
            top = jnp.maximum(old, scores.max(axis=1, keepdims=True))
            finite = jnp.where(top == -jnp.inf, 0.0, top)
            weights, kept = jnp.exp(scores - finite), jnp.exp(old - finite)
            rows[0][...] = top
            rows[1][...] = rows[1][...] * kept + weights.sum(axis=1, keepdims=True)
            sums[...] = sums[...] * kept + _dot(weights.astype(values.dtype), values, 1, 0)

        @pl.when(tiles.last)
        def _():
            if not parts.softmax:
                out[...] = sums[...].astype(out.dtype)
                return
            total = rows[1][...]
            out[...] = (sums[...] / jnp.where(total > 0, total, 1.0)).astype(out.dtype)
            stats[0][...], stats[1][...] = rows[0][...].T, total.T

    inputs = [(q, "q "), (k, "k "), (v, "k "), (scale.reshape(1, 1, 1, 1), "")]
    results = [(_array(batch, heads, length, v.shape[3], dtype=v.dtype), "q ")]
    scratch = [(block, v.shape[3])]
    if parts.softmax:
        results += [(_array(batch, heads, 1, length), " q")] * 2
        scratch += [(block, 1)] * 2
    if sink is not None:
        inputs.append((jnp.swapaxes(sink, 2, 3), " q") if along else (sink, ""))
    out, *stats = _run(problem, "q", body, inputs, leaves, results, scratch)
    return out, tuple(jnp.swapaxes(x, 2, 3) for x in stats)


def _row_slopes(problem, q, k, v, dout, scale, leaves, rows):
    """The derivatives along queries, and along leaves without keys, or of all pairs, by number."""
    parts = problem.parts
    alone = [n for n in parts.moving if "k" not in parts.axes[n]]
    pairs = [n for n in parts.moving if parts.axes[n] == "qk"]
    batch, heads, length, dim = q.shape

    def body(tiles, inputs, results, scratch):
        dq, *of_rows = scratch

        @pl.when(tiles.first)
        def _():
            for ref in scratch:
                ref[...] = jnp.zeros_like(ref)

        @tiles.visit
        def _(whole):
            _, slopes, moved = _slopes(problem, tiles, whole, *inputs)
            keys = inputs[1][...]
            dq[...] += _dot(slopes.astype(keys.dtype), keys, 1, 0)
            for ref, n in zip(of_rows, alone):
                ref[...] += moved[n].sum(axis=1, keepdims=True)
            for ref, n in zip(results[1 + len(alone) :], pairs):
                ref[...] = moved[n]

        @pl.when(tiles.last)
        def _():
            results[0][...] = (dq[...] * tiles.number(inputs[4])).astype(q.dtype)
            for ref, found in zip(results[1:], of_rows):
                ref[...] = found[...].T

    results = [(_array(*q.shape, dtype=q.dtype), "q ")]
    results += [(_array(batch, heads, 1, length), " q")] * len(alone)
    results += [(_array(batch, heads, *problem.lengths), "qk")] * len(pairs)
    scratch = [(problem.blocks[0], dim), *[(problem.blocks[0], 1)] * len(alone)]
    inputs = _inputs(q, k, v, dout, scale, rows)
    # What is written pair by pair must be written where the mask leaves nothing, too.
    dq, *found = _run(problem, "q", body, inputs, leaves, results, scratch, every=bool(pairs))
    of_rows = [jnp.swapaxes(x, 2, 3) for x in found[: len(alone)]]
    return dq, dict(zip([*alone, *pairs], [*of_rows, *found[len(alone) :]]))


def _column_slopes(problem, q, k, v, dout, scale, leaves, rows):
    """The derivatives along keys and values by query head, and along leaves with keys alone."""
    parts = problem.parts
    alone = [n for n in parts.moving if parts.axes[n] == "k"]
    batch, heads = q.shape[:2]

    def body(tiles, inputs, results, scratch):
        dk, dv, *of_columns = scratch

        @pl.when(tiles.first)
        def _():
            for ref in scratch:
                ref[...] = jnp.zeros_like(ref)

        @tiles.visit
        def _(whole):
            weights, slopes, moved = _slopes(problem, tiles, whole, *inputs)
            queries, douts = inputs[0][...], inputs[3][...]
            dk[...] += _dot(slopes.astype(queries.dtype), queries, 0, 0)
            dv[...] += _dot(weights.astype(douts.dtype), douts, 0, 0)
            for ref, n in zip(of_columns, alone):
                ref[...] += moved[n].sum(axis=0, keepdims=True)

        @pl.when(tiles.last)
        def _():
            dk[...] = dk[...] * tiles.number(inputs[4])
            for ref, found in zip(results, scratch):
                ref[...] = found[...].astype(ref.dtype)

    results = [
        # Sums over the query heads of a group are yet to come.
        (_array(batch, heads, *x.shape[2:], dtype=x.dtype if x.shape[1] == heads else "f4"), "k ")
        for x in (k, v)
    ]
    results += [(_array(batch, heads, 1, problem.lengths[1]), " k")] * len(alone)
    block = problem.blocks[1]
    scratch = [(block, k.shape[3]), (block, v.shape[3]), *[(1, block)] * len(alone)]
    inputs = _inputs(q, k, v, dout, scale, rows)
    dk, dv, *found = _run(problem, "k", body, inputs, leaves, results, scratch)
    return dk, dv, dict(zip(alone, found))


def _inputs(q, k, v, dout, scale, rows):
    """The inputs of the kernels of derivatives, with their axes."""
    rows = [(jnp.swapaxes(x, 2, 3), " q") for x in rows]
    scale = scale.reshape(1, 1, 1, 1)
    return [(q, "q "), (k, "k "), (v, "k "), (dout, "q "), (scale, ""), *rows]


def _slopes(problem, tiles, whole, q, k, v, dout, scale, *rows):
    """The weights of a tile, and the derivatives along its scores and, by number, its leaves."""
    parts, place, leaves = problem.parts, tiles.place, tiles.leaves
    scores = _dot(q[...], k[...], 1, 1) * tiles.number(scale)
    slopes = _dot(dout[...], v[...], 1, 1)
    clear = functools.partial(tiles.clear, whole=whole)
    if parts.softmax:
        top, inverse, lost = (ref[...].T for ref in rows)
        below = jnp.minimum(parts.value(scores, place, leaves) - top, 0.0)
        weights = clear(jnp.exp(below) * inverse)
        _, *found = parts.slopes(scores, weights * (slopes - lost), place, leaves)
    else:
        weights, *found = parts.slopes(scores, clear(slopes), place, leaves)
        weights = clear(weights)
    slopes, *moved = map(clear, found)
    return weights, slopes, dict(zip(parts.moving, moved))
