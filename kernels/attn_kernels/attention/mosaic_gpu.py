"""Attention on Hopper GPUs, by kernels into which mask, modification and normaliser are traced.

Three kernels share one shape: `outputs`, `row_slopes` for the derivatives along queries, and
`column_slopes` for those along keys. A program has three warpgroups. Two compute, each for a block
of rows that it holds in shared memory; the third fetches the blocks of the other axis that the mask
leaves, in the order of a list: full ones first, on which the predicate is not evaluated.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from attn_kernels.attention import traced
from attn_kernels.attention.elementwise import COMMON
from attn_kernels.attention.tile import Tile
from attn_kernels.attention.traced import Parts, parts_of, tile_lists
from attn_kernels.varying import varying

LOG2E = math.log2(math.e)
WGMMA = plgpu.Layout.WGMMA
ROWS, COLUMNS = WGMMA.reduce(1), WGMMA.reduce(0)
COMPUTING = 2  # warpgroups of a program that compute
LANES = 64  # dimensions of a head are padded to a multiple
WIDEST = 256
PRIMITIVES = COMMON | {"atan2", "clamp", "cos", "erf", "log2", "round", "sin", "square"}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of a kernel.

    Attributes:
      rows: how many a warpgroup holds.
      columns: how many it gets at once.
      slots: for how many blocks of these there is room.
    """

    rows: int
    columns: int
    slots: int


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Problem:
    """What is known of a call when it is traced.

    Attributes:
      parts: mask, modification and normaliser.
      heads: H.
      lengths: T and S.
      forward, rows, columns: the blocks of the three kernels.
    """

    parts: Parts
    heads: int
    lengths: tuple[int, int]
    forward: Blocks
    rows: Blocks
    columns: Blocks


def refusal(tile: Tile) -> str | None:
    """Why the kernels cannot serve a tile, None if they can."""
    if jax.version.__version_info__ < (0, 11, 1):
        return f"it needs JAX 0.11.1, which needs Python 3.12; this is {jax.__version__}"
    if reason := traced.refusal(tile, PRIMITIVES, ("bfloat16", "float16")):
        return reason
    if len({x.dtype for x in (tile.q, tile.k, tile.v)}) > 1:
        return f"q, k and v are of one dtype, not {tile.q.dtype}, {tile.k.dtype}, {tile.v.dtype}"
    if max(tile.q.shape[3], tile.v.shape[3]) > WIDEST:
        return f"D and Dv are at most {WIDEST}, got {tile.q.shape[3]} and {tile.v.shape[3]}"
    return None


def blocks_of(dim: int) -> tuple[Blocks, Blocks, Blocks]:
    """The blocks of the three kernels for a head dimension."""
    if dim <= 128:
        return Blocks(64, 128, 2), Blocks(64, 64, 2), Blocks(64, 64, 2)
    return Blocks(64, 64, 2), Blocks(64, 64, 1), Blocks(64, 64, 1)


class Tiles:
    """The tile of scores of a computing warpgroup: positions, operands and functions of them.

    Its arrays are two-dimensional, queries along `axis` 0 or 1.
    """

    def __init__(self, problem: Problem, refs, b, h, starts, shape, q_axis: int):
        self.problem, self.parts, self.refs = problem, problem.parts, refs
        self.b, self.h, self.starts, self.shape = b, h, starts, shape
        self.axis = {"q": q_axis, "k": 1 - q_axis}
        self.leaves = [self._leaf(n) for n in range(len(refs))]

    @property
    def at(self):
        """Where the tile is in an array whose last axes are laid out like it."""
        axes = sorted(self.axis, key=self.axis.get)
        return tuple(pl.ds(self.starts[a], n) for a, n in zip(axes, self.shape))

    def vector(self, ref, along: str, lead):
        """Numbers of a row of the reference at the tile's queries or keys, for all pairs."""
        axis = self.axis[along]
        ref = ref.at[(*lead, pl.ds(self.starts[along], self.shape[axis]))]
        x = plgpu.load(ref, layout=(ROWS, COLUMNS)[axis], optimized=False)
        return lax.broadcast_in_dim(x, self.shape, [axis])

    def of_row(self, ref):
        return self.vector(ref, "q", (self.b, self.h))

    def _leaf(self, n):
        ref, axes = self.refs[n], self.parts.axes[n]
        lead = tuple(i if size > 1 else 0 for i, size in zip((self.b, self.h), ref.shape))
        if axes == "qk":
            return plgpu.load(ref.at[(*lead, *self.at)], layout=WGMMA, optimized=False)
        if axes:
            return self.vector(ref, axes, lead)
        # Derivatives of what all pairs share stay apart until they are summed by rows.
        x = ref[lead]
        return lax.broadcast_in_dim(x, self.shape, []) if n in self.parts.moving else x

    def index(self, along: str):
        iota = plgpu.broadcasted_iota(jnp.int32, self.shape, self.axis[along], layout=WGMMA)
        return iota + self.starts[along]

    @property
    def place(self):
        shift = self.problem.lengths[1] - self.problem.lengths[0]
        return self.b, self.h, self.index("q") + shift, self.index("k")

    def allowed(self):
        """Which pairs count; queries and keys beyond the end do not."""
        q_len, k_len = self.problem.lengths
        exist = (self.index("q") < q_len) & (self.index("k") < k_len)
        if not self.parts.masked:
            return exist
        allowed = self.parts.allowed(self.place, self.leaves)
        return exist & jnp.broadcast_to(allowed, self.shape)

    def value(self, scores):
        """The modified scores if softmax normalises, else the weights."""
        return self.parts.value(scores, self.place, self.leaves)

    def slopes(self, scores, weight_slopes, lse, lost, whole: bool):
        """The weights, the derivatives of the scores, and those of the leaves that move.

        Args:
          scores: before modification.
          weight_slopes: the derivatives of the weights.
          lse, lost: of softmax, log2 of the denominator and what all slopes of a row lose.
          whole: whether every pair is allowed.
        """

        def clear(x):
            return x if whole else jnp.where(allowed, x, 0.0)

        allowed = None if whole else self.allowed()
        place, leaves = self.place, self.leaves
        if not self.parts.softmax:
            found = self.parts.slopes(scores, clear(weight_slopes), place, leaves)
            return tuple(map(clear, found))
        weights = clear(jnp.exp2(self.value(scores) * LOG2E - lse))
        slopes = weights * (weight_slopes - lost)
        _, *slopes = self.parts.slopes(scores, slopes, place, leaves)
        # What a modification makes of a slope of 0 may be NaN.
        return weights, *(slopes if self.parts.plain else map(clear, slopes))


@dataclasses.dataclass
class Program:
    """What a computing warpgroup works with.

    Attributes:
      b, h: batch and query head.
      start: the position of its first row.
      full, some: how many fetched blocks are full, and how many there are.
      block: the number of the n-th of them on its axis.
      held: its blocks of rows, in shared memory.
      fetched, ready, used: the slots of the fetched blocks, and their barriers.
      turn: passes the tensor cores to the other warpgroup and waits for them.
    """

    wg: jax.Array
    b: jax.Array
    h: jax.Array
    start: jax.Array
    full: jax.Array
    some: jax.Array
    block: Callable
    held: Sequence
    fetched: Sequence
    ready: Sequence
    used: Sequence
    passing: object

    def turn(self):
        plgpu.barrier_arrive(self.passing)
        plgpu.barrier_wait(self.passing)

    def loop(self, step, carry):
        """`step(n, carry, whole)` for all fetched blocks."""
        carry = lax.fori_loop(0, self.full, functools.partial(step, whole=True), carry)
        return lax.fori_loop(self.full, self.some, functools.partial(step, whole=False), carry)


def run(
    problem, blocks, held, fetched, extra, lists, leaves, results, compute, spare=(), direct=()
):
    """The arrays that `compute(program, extra, leaves, direct)` gives for every block of rows.

    Args:
      held, fetched: arrays `[B, n, heads, dim]`, the fetched ones a pair.
      extra: arrays that are read where they are.
      spare: results that have no held block of their size to leave through.
      direct: shapes of more results, which `compute` itself writes.
      lists: from `tile_lists`.
      results: shapes, `[B, n, H, dim]` or `[B, H, n]`, n a multiple of two blocks of rows.
    """
    batch, dtype = held[0].shape[0], held[0].dtype
    slots, rows = blocks.slots, blocks.rows
    inputs = [*held, *fetched, *extra, *lists, *leaves]

    def kernel(*refs):
        refs = list(refs)
        parts = []
        for n in (len(held), 2, len(extra), 3, len(leaves), len(results), len(direct)):
            parts.append(refs[:n])
            del refs[:n]

        def body(held_smem, spare_smem, fetched_smem, vectors, arrived, ready, used, passing):
            held_refs, fetched_refs, extra_refs, list_refs, leaf_refs, result_refs, direct_refs = (
                parts
            )
            b, h, i = (lax.axis_index(name) for name in ("batch", "heads", "tiles"))
            wg = lax.axis_index("wg")
            order, full, some = list_refs
            at = (b if full.shape[0] > 1 else 0, h if full.shape[1] > 1 else 0, i)

            def head(ref):
                return lax.div(h, jnp.int32(problem.heads // ref.shape[2]))

            def block(n):
                return order[(*at, n)]

            @pl.when(wg < COMPUTING)
            def _():
                registers(232, "increase")
                start = (i * COMPUTING + wg) * rows
                mine = [x.at[wg] for x in held_smem]
                for ref, smem in zip(held_refs, mine):
                    plgpu.copy_gmem_to_smem(
                        ref.at[b, pl.ds(start, rows), head(ref)], smem, arrived.at[wg]
                    )
                    plgpu.barrier_wait(arrived.at[wg])
                program = Program(
                    wg,
                    b,
                    h,
                    start,
                    full[at],
                    some[at],
                    block,
                    mine,
                    fetched_smem,
                    ready,
                    used,
                    passing,
                )
                found = compute(program, extra_refs, leaf_refs, direct_refs)
                free = [*mine, *(x.at[wg] for x in spare_smem)]
                numbers = iter(range(vectors.shape[0]))
                for value, ref in zip(found, result_refs):
                    if value.ndim == 1:
                        smem, place = vectors.at[next(numbers), wg], (b, h, pl.ds(start, rows))
                    else:
                        smem = next(x for x in free if x.shape == value.shape)
                        free.remove(smem)
                        place = b, pl.ds(start, rows), h
                    smem[...] = value.astype(smem.dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(smem, ref.at[place])
                plgpu.wait_smem_to_gmem(0)

            @pl.when(wg == COMPUTING)
            def _():
                registers(40, "decrease")

                @pl.loop(0, some[at])
                def _(n):
                    slot = lax.rem(n, jnp.int32(slots))
                    columns = pl.ds(block(n) * blocks.columns, blocks.columns)
                    for ref, smem, barrier, free in zip(fetched_refs, fetched_smem, ready, used):

                        @pl.when(n >= slots)
                        def _(free=free):
                            plgpu.barrier_wait(free.at[slot])

                        plgpu.copy_gmem_to_smem(
                            ref.at[b, columns, head(ref)], smem.at[slot], barrier.at[slot]
                        )

                @pl.loop(jnp.maximum(some[at] - slots, 0), some[at])
                def _(n):
                    for free in used:
                        plgpu.barrier_wait(free.at[lax.rem(n, jnp.int32(slots))])

        def shared(count, length, x):
            transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
            return plgpu.SMEM((count, length, x.shape[-1]), dtype, transforms=transforms)

        number = max(1, sum(len(x.shape) == 3 for x in results))
        pl.run_scoped(
            body,
            [shared(COMPUTING, rows, x) for x in held],
            [shared(COMPUTING, rows, x) for x in spare],
            [shared(slots, blocks.columns, x) for x in fetched],
            plgpu.SMEM((number, COMPUTING, rows), jnp.float32),
            plgpu.Barrier(num_barriers=COMPUTING),
            [plgpu.Barrier(num_barriers=slots) for _ in fetched],
            [plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=slots) for _ in fetched],
            plgpu.Barrier(num_arrivals=COMPUTING),
            collective_axes="wg",
        )

    return plgpu.kernel(
        kernel,
        out_type=[*results, *direct],
        grid=(problem.heads, lists[0].shape[2], batch),
        grid_names=("heads", "tiles", "batch"),
        num_threads=COMPUTING + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpreted() else False,
    )(*inputs)


def interpreted() -> bool:
    """Whether there is no GPU: products then take arrays, and registers are not counted."""
    return jax.default_backend() == "cpu"


def registers(number, action):
    if not interpreted():
        plgpu.set_max_registers(number, action=action)


def product(a, b, meanwhile=lambda: None):
    """a b of two blocks in shared memory; `meanwhile` is done before it is waited for."""

    def body(acc):
        plgpu.wgmma(acc, a, b)
        meanwhile()
        return acc[...]

    return pl.run_scoped(body, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def plus_product(sums, a, b, meanwhile=lambda: None):
    """sums + a b, with b in shared memory."""
    if interpreted():
        meanwhile()
        return sums + jnp.dot(a, b[...], preferred_element_type=jnp.float32)

    def body(acc):
        plgpu.wgmma(acc, a, b)
        meanwhile()

    return pl.run_state(body)(plgpu.ACC.init(sums))


def zeros(*shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA if len(shape) > 1 else ROWS)


def along_rows(program, ref, rows):
    """The numbers of `[B|1, H|1, n]` at the rows of a program."""
    lead = tuple(i if size > 1 else 0 for i, size in zip((program.b, program.h), ref.shape))
    return plgpu.load(ref.at[(*lead, pl.ds(program.start, rows))], layout=ROWS, optimized=False)


def over(vector, shape):
    return lax.broadcast_in_dim(vector, shape, [0])


def outputs(problem, blocks, q, k, v, scale, sink, leaves, lists):
    """`[B, T', H, Dv]`, and for softmax the maximum and the sum `[B, H, T']`."""
    shape = blocks.rows, blocks.columns
    batch, dim = q.shape[0], v.shape[-1]
    extra = [scale] if sink is None else [scale, sink]

    def compute(program, extra, leaf_refs, _):
        scale = extra[0][0]
        (q_held, *_), (keys, values) = program.held, program.fetched
        (k_ready, v_ready), (k_used, v_used) = program.ready, program.used
        top, total = zeros(blocks.rows) - jnp.inf, zeros(blocks.rows)
        if sink is not None:
            top, total = along_rows(program, extra[1], blocks.rows) * LOG2E, total + 1.0

        @pl.when(program.some > 0)
        def _():
            plgpu.barrier_wait(k_ready.at[0])

        pl.when(program.wg == 1)(program.turn)

        def step(n, carry, whole):
            out, top, total = carry
            slot = lax.rem(n, jnp.int32(blocks.slots))
            scores = product(q_held, keys.at[slot].T, program.turn)
            plgpu.barrier_arrive(k_used.at[slot])
            starts = {"q": program.start, "k": program.block(n) * blocks.columns}
            tile = Tiles(problem, leaf_refs, program.b, program.h, starts, shape, 0)
            scores = scores * (scale * LOG2E) if tile.parts.plain else tile.value(scores * scale)
            if problem.parts.softmax:
                scores = scores if tile.parts.plain else scores * LOG2E
                scores = scores if whole else jnp.where(tile.allowed(), scores, -jnp.inf)
                new = jnp.maximum(top, scores.max(axis=1))
                finite = jnp.where(new == -jnp.inf, 0.0, new)
                weights = jnp.exp2(scores - over(finite, shape))
                rescale = jnp.exp2(top - finite)
                out = out * over(rescale, out.shape)
                top, total = new, total * rescale + weights.sum(axis=1)
            else:
                weights = scores if whole else jnp.where(tile.allowed(), scores, 0.0)
            weights = weights.astype(q.dtype)
            out, top, total, weights = lax.optimization_barrier((out, top, total, weights))
            plgpu.barrier_arrive(program.passing)
            plgpu.barrier_wait(v_ready.at[slot])
            plgpu.barrier_wait(program.passing)

            def await_keys():
                @pl.when(n + 1 < program.some)
                def _():
                    plgpu.barrier_wait(k_ready.at[lax.rem(n + 1, jnp.int32(blocks.slots))])

            out = plus_product(out, weights, values.at[slot], await_keys)
            plgpu.barrier_arrive(v_used.at[slot])
            return out, top, total

        out, top, total = program.loop(step, (zeros(blocks.rows, dim), top, total))
        pl.when(program.wg == 0)(program.turn)
        if not problem.parts.softmax:
            return [out]
        out = out * over(1 / jnp.where(total > 0, total, 1.0), out.shape)
        return [out, top * (1 / LOG2E), total]

    rows = lists[0].shape[2] * COMPUTING * blocks.rows
    results = [jax.ShapeDtypeStruct((batch, rows, problem.heads, dim), q.dtype)]
    if problem.parts.softmax:
        results += [jax.ShapeDtypeStruct((batch, problem.heads, rows), jnp.float32)] * 2
    spare = [] if q.shape[-1] == dim else results[:1]
    return run(problem, blocks, [q], [k, v], extra, lists, leaves, results, compute, spare)


def row_slopes(problem, blocks, q, k, v, dout, lse, lost, scale, leaves, lists):
    """dq `[B, T', H, D]`, and the slopes of leaves that move, with what number they have there.

    Leaves without keys have them by rows, and those with both axes by pairs.
    """
    shape = blocks.rows, blocks.columns
    batch, dim = q.shape[0], q.shape[-1]
    by_rows = [m for m, n in enumerate(problem.parts.moving) if "k" not in problem.parts.axes[n]]
    by_pairs = [m for m, n in enumerate(problem.parts.moving) if problem.parts.axes[n] == "qk"]

    def compute(program, extra, leaf_refs, pair_refs):
        lse_ref, lost_ref, scale_ref = extra
        scale = scale_ref[0]
        (q_held, dout_held), (keys, values) = program.held, program.fetched
        (k_ready, v_ready), (k_used, v_used) = program.ready, program.used
        lse, lost = (along_rows(program, ref, blocks.rows) for ref in (lse_ref, lost_ref))

        def step(n, carry, whole):
            dq, sums = carry
            slot = lax.rem(n, jnp.int32(blocks.slots))
            starts = {"q": program.start, "k": program.block(n) * blocks.columns}
            tile = Tiles(problem, leaf_refs, program.b, program.h, starts, shape, 0)
            plgpu.barrier_wait(k_ready.at[slot])
            scores = product(q_held, keys.at[slot].T) * scale
            plgpu.barrier_wait(v_ready.at[slot])
            weight_slopes = product(dout_held, values.at[slot].T)
            plgpu.barrier_arrive(v_used.at[slot])
            _, slopes, *moved = tile.slopes(
                scores, weight_slopes, over(lse, shape), over(lost, shape), whole
            )
            sums = [x + moved[m].sum(axis=1) for x, m in zip(sums, by_rows)]
            for ref, m in zip(pair_refs, by_pairs):
                ref[(program.b, program.h, *tile.at)] = moved[m].astype(ref.dtype)
            dq = plus_product(dq, slopes.astype(q.dtype), keys.at[slot])
            plgpu.barrier_arrive(k_used.at[slot])
            return dq, sums

        dq, sums = program.loop(
            step, (zeros(blocks.rows, dim), [zeros(blocks.rows) for _ in by_rows])
        )
        return [dq * scale, *sums]

    rows = lists[0].shape[2] * COMPUTING * blocks.rows
    results = [jax.ShapeDtypeStruct((batch, rows, problem.heads, dim), q.dtype)]
    results += [jax.ShapeDtypeStruct((batch, problem.heads, rows), jnp.float32)] * len(by_rows)
    columns = -(-problem.lengths[1] // blocks.columns) * blocks.columns
    pairs = jax.ShapeDtypeStruct((batch, problem.heads, rows, columns), jnp.float32)
    extra, direct = [lse, lost, scale], [pairs] * len(by_pairs)
    found = run(
        problem, blocks, [q, dout], [k, v], extra, lists, leaves, results, compute, direct=direct
    )
    return found, [*by_rows, *by_pairs]


def column_slopes(problem, blocks, q, k, v, dout, lse, lost, scale, leaves, lists):
    """dk, dv `[B, S', H, .]` by query head, and the slopes of leaves with keys alone by columns."""
    shape = blocks.rows, blocks.columns
    batch, (dim, value_dim) = q.shape[0], (k.shape[-1], v.shape[-1])
    by_columns = [m for m, n in enumerate(problem.parts.moving) if problem.parts.axes[n] == "k"]

    def compute(program, extra, leaf_refs, _):
        lse_ref, lost_ref, scale_ref = extra
        scale = scale_ref[0]
        (k_held, v_held), (queries, douts) = program.held, program.fetched
        (q_ready, dout_ready), (q_used, dout_used) = program.ready, program.used

        def step(n, carry, whole):
            dk, dv, sums = carry
            slot = lax.rem(n, jnp.int32(blocks.slots))
            starts = {"k": program.start, "q": program.block(n) * blocks.columns}
            tile = Tiles(problem, leaf_refs, program.b, program.h, starts, shape, 1)
            plgpu.barrier_wait(q_ready.at[slot])
            scores = product(k_held, queries.at[slot].T) * scale
            plgpu.barrier_wait(dout_ready.at[slot])
            weight_slopes = product(v_held, douts.at[slot].T)
            lse, lost = tile.of_row(lse_ref), tile.of_row(lost_ref)
            weights, slopes, *moved = tile.slopes(scores, weight_slopes, lse, lost, whole)
            sums = [x + moved[m].sum(axis=1) for x, m in zip(sums, by_columns)]
            dv = plus_product(dv, weights.astype(q.dtype), douts.at[slot])
            plgpu.barrier_arrive(dout_used.at[slot])
            dk = plus_product(dk, slopes.astype(q.dtype), queries.at[slot])
            plgpu.barrier_arrive(q_used.at[slot])
            return dk, dv, sums

        start = (
            zeros(blocks.rows, dim),
            zeros(blocks.rows, value_dim),
            [zeros(blocks.rows) for _ in by_columns],
        )
        dk, dv, sums = program.loop(step, start)
        return [dk * scale, dv, *sums]

    rows = lists[0].shape[2] * COMPUTING * blocks.rows
    results = [
        jax.ShapeDtypeStruct((batch, rows, problem.heads, n), q.dtype) for n in (dim, value_dim)
    ]
    results += [jax.ShapeDtypeStruct((batch, problem.heads, rows), jnp.float32)] * len(by_columns)
    extra = [lse, lost, scale]
    return run(
        problem, blocks, [k, v], [q, dout], extra, lists, leaves, results, compute
    ), by_columns


def attend(tile: Tile):
    """The output `[B, H, T, Dv]` in the dtype of v, and the statistics of the rows.

    It is differentiable once, in reverse mode.
    """
    parts, leaves, sink = parts_of(tile, PRIMITIVES)
    lengths, width = (tile.q.shape[2], tile.k.shape[2]), tile.v.shape[3]
    q, k, v = (
        jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0),) * 3 + ((0, -x.shape[3] % LANES),))
        for x in (tile.q, tile.k, tile.v)
    )
    blocks = blocks_of(max(q.shape[3], v.shape[3]))
    problem = Problem(parts, tile.q.shape[1], lengths, *blocks)
    args = q, k, v, tile.scale, sink, leaves
    out, stats = _attend(problem, *varying(args, args))
    return jnp.swapaxes(out[..., :width], 1, 2), tuple(x[..., None] for x in stats)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(problem, *args):
    return _outputs(problem, *args)


def _outputs(problem, q, k, v, scale, sink, leaves):
    laid, lists, whole = _prepared(problem, problem.forward, "q", leaves)
    first = None
    if sink is not None:
        shape = *sink.shape[:2], problem.lengths[0]
        first = _to(whole, jnp.broadcast_to(sink[..., 0], shape).astype(jnp.float32))
    out, *stats = outputs(problem, problem.forward, q, k, v, scale.reshape(1), first, laid, lists)
    length = problem.lengths[0]
    return out[:, :length], tuple(x[:, :, :length] for x in stats)


def _prepared(problem, blocks, rows, leaves, every=False):
    """The leaves as kernels read them, the lists of tiles, and T in whole blocks."""
    mask = problem.parts.treedef.unflatten(leaves)[0]
    held, fetched = COMPUTING * blocks.rows, blocks.columns
    sizes = (held, fetched) if rows == "q" else (fetched, held)
    whole = {a: -(-n // size) * size for a, n, size in zip("qk", problem.lengths, sizes)}

    def lay_out(x, axes):
        ends = [whole[a] - n if a in axes else 0 for a, n in zip("qk", x.shape[2:])]
        x = jnp.pad(x, ((0, 0), (0, 0), (0, ends[0]), (0, ends[1])), mode="edge")
        x = x.reshape(*x.shape[:2], *(x.shape[2 + "qk".index(a)] for a in axes))
        x = jnp.swapaxes(x, 2, 3) if axes == "qk" and rows == "k" else x
        if x.dtype == jnp.bool_:
            return x.astype(jnp.int32)
        exact = jnp.issubdtype(x.dtype, jnp.floating) and axes != "qk"
        return x.astype(jnp.float32) if exact else x

    lists = tile_lists(mask, problem.lengths, sizes, rows, every)
    laid = [lay_out(x, axes) for x, axes in zip(leaves, problem.parts.axes)]
    return laid, lists, whole["q"]


def _to(length, x):
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2])))


def _forward(problem, *args):
    primals = jax.tree.map(lambda x: x.value, args)
    problem = dataclasses.replace(problem, parts=problem.parts.perturbed(args[5]))
    results = _outputs(problem, *primals)
    return results, (problem, primals, results)


def _backward(_, saved, cotangents):
    problem, (q, k, v, scale, sink, leaves), results = saved
    (out, stats), (dout, dstats) = results, traced.given(cotangents, results)
    dout = dout.astype(q.dtype)
    (batch, length, heads, _), parts, dsink = q.shape, problem.parts, None
    lse = lost = jnp.zeros((batch, heads, length), jnp.float32)
    if parts.softmax:
        top, total = stats
        some = jnp.where(total > 0, total, 1)
        lse = jnp.where(total > 0, top * LOG2E + jnp.log2(some), 0)
        inner = jnp.einsum("bthd,bthd->bht", dout, out, preferred_element_type=jnp.float32)
        lost = inner - total * dstats[1]
        if sink is not None:
            silent = jnp.exp(sink.astype(top.dtype) - top[..., None])
            dsink = traced.reduced(silent * (dstats[1] - inner / some)[..., None], sink)
    # Slopes by pairs are written as they are met, so that zeros must be met too.
    dense = any(parts.axes[n] == "qk" for n in parts.moving)

    def kernel(function, blocks, rows):
        laid, lists, whole = _prepared(problem, blocks, rows, leaves, dense and rows == "q")
        vectors = _to(whole, lse), _to(whole, lost), scale.reshape(1)
        return function(problem, blocks, q, k, v, dout, *vectors, laid, lists)

    slopes = {}
    (dq, *by_rows), places = kernel(row_slopes, problem.rows, "q")
    for m, x in zip(places, by_rows):
        x = x[:, :, :length]
        slopes[parts.moving[m]] = x[..., : problem.lengths[1]] if x.ndim == 4 else x[..., None]
    (dk, dv, *by_columns), places = kernel(column_slopes, problem.columns, "k")
    for m, x in zip(places, by_columns):
        slopes[parts.moving[m]] = x[:, :, None, : problem.lengths[1]]

    def grouped(x, like):
        x = jnp.swapaxes(x[:, : problem.lengths[1]], 1, 2)
        return jnp.swapaxes(traced.grouped(x, jnp.swapaxes(like, 1, 2)), 1, 2)

    dq = dq[:, :length]
    dscale = jnp.vdot(dq.astype(jnp.float32), q.astype(jnp.float32)) / scale
    leaf_slopes = traced.slopes_of(leaves, slopes)
    return dq, grouped(dk, k), grouped(dv, v), dscale, dsink, leaf_slopes


_attend.defvjp(_forward, _backward, symbolic_zeros=True)
