"""Attention on Hopper GPUs, by kernels into which mask, modification and normaliser are traced.

Three kernels share one shape: `outputs`, `row_slopes` for the derivatives along queries, and
`column_slopes` for those along keys (see `warpgroups`).
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from attn_kernels import gpu
from attn_kernels.attention import traced
from attn_kernels.attention.ahead import ahead
from attn_kernels.attention.blocks import KERNELS, Blocks, blocks_of, fitting
from attn_kernels.attention.elementwise import COMMON, over
from attn_kernels.attention.lists import Known, Lists
from attn_kernels.attention.score_tile import LOG2E, ScoreTile
from attn_kernels.attention.tile import Tile
from attn_kernels.attention.traced import Parts, parts_of
from attn_kernels.attention.warpgroups import (
    BOTH,
    COLUMNS,
    LANES,
    LEAST,
    STEPS,
    Pairs,
    along_rows,
    plus_product,
    product,
    run,
    two_products,
    zeros,
)
from attn_kernels.varying import varying

WIDEST = 256
PRIMITIVES = COMMON | {"square"}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Problem:
    """What is known of a call when it is traced.

    Attributes:
      parts: mask, modification and normaliser.
      heads: H.
      lengths: T and S.
      growing: whether scores are known to grow with products of queries and keys.
      exact: whether derivatives of operands are sums in which the rounding of outputs would add up.
      pattern: the mask, if it is known then.
      pairs: which leaves have a number for every pair that is fetched with the blocks of columns.
      most_bytes: that what is found of tiles before a kernel may take: as many as the queries.
      forward, rows, columns: the blocks of the three kernels.
    """

    parts: Parts
    heads: int
    lengths: tuple[int, int]
    growing: bool
    exact: bool
    pattern: Known | None
    pairs: tuple[int, ...]
    most_bytes: int
    forward: Blocks
    rows: Blocks
    columns: Blocks

    def fetched(self, leaves, held: int) -> list[Pairs]:
        """The leaves of `pairs`, queries along the rows of programs (`held` 0) or keys (1)."""
        return [Pairs(leaves[n], held) for n in self.pairs]


def refusal(tile: Tile) -> str | None:
    """Why the kernels cannot serve a tile, None if they can."""
    if not gpu.supported():
        return f"it needs JAX 0.11.1, which needs Python 3.12; this is {jax.__version__}"
    if tile.summing:
        tile = dataclasses.replace(tile, v=tile.k)
    if reason := traced.refusal(tile, PRIMITIVES, ("bfloat16", "float16")):
        return reason
    if len({x.dtype for x in (tile.q, tile.k, tile.v)}) > 1:
        return f"q, k and v are of one dtype, not {tile.q.dtype}, {tile.k.dtype}, {tile.v.dtype}"
    if max(tile.q.shape[3], tile.v.shape[3]) > WIDEST:
        return f"D and Dv are at most {WIDEST}, got {tile.q.shape[3]} and {tile.v.shape[3]}"
    return None


def outputs(problem, blocks, q, k, v, scale, sink, leaves, lists):
    """`[B, T', H, Dv]`, and for softmax the maximum and the sum `[B, H, T']`.

    Without v, of other weights the sum, and of softmax its two alone.
    """
    batch = q.shape[0]
    extra = [scale] if sink is None else [scale, sink]

    def compute(program, extra, leaf_refs, _):
        scale = extra[0][0]
        (q_held, *_), ((keys, *pairs), *values) = program.held, program.fetched
        (k_ready, *v_ready), (k_used, *v_used) = program.ready, program.used
        top, total = zeros(blocks.rows) - jnp.inf, zeros(blocks.rows)
        if sink is not None:
            top, total = along_rows(program, extra[1], blocks.rows) * LOG2E, total + 1.0

        @pl.when(program.some > 0)
        def _():
            plgpu.barrier_wait(k_ready.at[program.slot(0)])

        pl.when(program.wg == 1)(program.turn)

        def step(n, carry, kind):
            whole = functools.partial(visit, n, kind, None)
            if kind.whole or program.halves is None or blocks.columns == LEAST:
                return whole(carry)
            half = program.halves(n)
            part = functools.partial(visit, n, kind, jnp.minimum(half, 1))
            return lax.cond(half == BOTH, whole, part, carry)

        def visit(n, kind, half, carry):
            out, top, total = carry
            tile = ScoreTile(problem, blocks, program, n, leaf_refs, pairs, 0, kind, half=half)
            slot, shape = tile.slot, tile.shape
            columns = pl.ds(tile.first, shape[1])

            def meanwhile():
                leaves = tile.load()
                program.turn()
                return leaves

            products, leaves = product(q_held, keys.at[slot, columns].T, meanwhile)
            tile.take(leaves)
            plgpu.barrier_arrive(k_used.at[slot])
            if problem.parts.softmax:
                factor = scale * LOG2E
                if not problem.parts.plain:
                    products, factor = tile.value(products * scale), LOG2E
                elif not problem.growing:
                    products, factor = products * factor, 1.0
                products = tile.clear(products, -jnp.inf)
                new = jnp.maximum(top, products.max(axis=1) * factor)
                finite = jnp.where(new == -jnp.inf, 0.0, new)
                weights = jnp.exp2(products * factor - over(finite, shape))
                rescale = jnp.exp2(top - finite)
                out = out * over(rescale, out.shape) if values else None
                top, total = new, total * rescale + weights.sum(axis=1)
            else:
                weights = tile.clear(tile.value(products * scale))
                total = total if values else total + weights.sum(axis=1)

            def await_keys():
                @pl.when(n + 1 < program.some)
                def _():
                    plgpu.barrier_wait(k_ready.at[program.slot(n + 1)])

            if not values:
                await_keys()
                return out, top, total
            weights = weights.astype(q.dtype)
            out, top, total, weights = lax.optimization_barrier((out, top, total, weights))
            program.leave()
            plgpu.barrier_wait(v_ready[0].at[slot])
            program.enter()
            out = plus_product(out, weights, values[0][0].at[slot, columns], await_keys)
            plgpu.barrier_arrive(v_used[0].at[slot])
            return out, top, total

        out = zeros(blocks.rows, v.shape[-1]) if values else None
        out, top, total = program.loop(step, (out, top, total))
        pl.when(program.wg == 0)(program.turn)
        stats = [top * (1 / LOG2E), total] if problem.parts.softmax else [total]
        if not values:
            return stats
        if not problem.parts.softmax:
            return [out]
        out = out * over(1 / jnp.where(total > 0, total, 1.0), out.shape)
        rest = [out - out.astype(q.dtype).astype(jnp.float32)] if problem.exact else []
        return [out, *rest, *stats]

    rows = lists.order.shape[2] * blocks.held
    results, spare = [], []
    if v is not None:
        results = [jax.ShapeDtypeStruct((batch, rows, problem.heads, v.shape[-1]), q.dtype)]
        spare = list(results) if q.shape[-1] != v.shape[-1] else []
        results *= 1 + (problem.exact and problem.parts.softmax)
    stats = jax.ShapeDtypeStruct((batch, problem.heads, rows), jnp.float32)
    results += [stats] * (2 if problem.parts.softmax else v is None)
    fetched = [[k, *problem.fetched(leaves, 0)], *([] if v is None else [[v]])]
    return run(problem, blocks, [q], fetched, extra, lists, leaves, results, compute, spare)


def row_slopes(problem, blocks, q, k, v, dout, lse, lost, scale, leaves, lists):
    """dq `[B, T', H, D]`, and the slopes of leaves that move, with the numbers of those.

    Leaves without keys have them by rows, and those with both axes by pairs. Without v and dout,
    the derivatives of weights are what they lose.
    """
    shape = blocks.rows, blocks.columns
    batch, dim = q.shape[0], q.shape[-1]
    by_rows = [n for n in problem.parts.moving if "k" not in problem.parts.axes[n]]
    by_pairs = [n for n in problem.parts.moving if problem.parts.axes[n] == "qk"]
    moving = *by_rows, *by_pairs

    def compute(program, extra, leaf_refs, pair_refs):
        lse, lost = (along_rows(program, ref, blocks.rows) for ref in extra[:2])
        scale = extra[2][0]
        (q_held, *dout_held), ((keys, *pairs), *values) = program.held, program.fetched
        (k_ready, *v_ready), (k_used, *v_used) = program.ready, program.used

        def step(n, carry, kind):
            return program.unless_empty(n, kind, functools.partial(visit, n, kind), carry)

        def visit(n, kind, carry):
            dq, sums = carry
            tile = ScoreTile(problem, blocks, program, n, leaf_refs, pairs, 0, kind, moving)
            slot = tile.slot
            plgpu.barrier_wait(k_ready.at[slot])

            def weighted(products, leaves):
                tile.take(leaves)
                if not problem.parts.softmax:
                    return products, None, leaves
                return products, tile.weights(products, scale, over(lse, shape)), leaves

            first, weight_slopes = (q_held, keys.at[slot].T), None
            if values:
                (products, weights, leaves), weight_slopes = two_products(
                    first,
                    (dout_held[0], values[0][0].at[slot].T),
                    lambda: plgpu.barrier_wait(v_ready[0].at[slot]),
                    tile.load,
                    weighted,
                )
                plgpu.barrier_arrive(v_used[0].at[slot])
            else:
                products, weights, leaves = weighted(*product(*first, tile.load))
            tile.take(leaves)
            _, slopes, *moved = tile.slopes(
                products, scale, weights, weight_slopes, over(lost, shape)
            )
            for ref, x in zip(pair_refs, moved[len(sums) :]):
                ref[(program.b, program.h, *tile.at)] = x.astype(ref.dtype)
            sums = [x + y for x, y in zip(sums, moved)]
            dq = plus_product(dq, slopes.astype(q.dtype), keys.at[slot])
            plgpu.barrier_arrive(k_used.at[slot])
            return dq, sums

        sums = [zeros(blocks.rows) for _ in by_rows]
        dq, sums = program.loop(step, (zeros(blocks.rows, dim), sums))
        return [dq * scale, *sums]

    rows = lists.order.shape[2] * blocks.held
    sums = jax.ShapeDtypeStruct((batch, problem.heads, rows), jnp.float32)
    results = [jax.ShapeDtypeStruct((batch, rows, problem.heads, dim), q.dtype)]
    results += [sums] * len(by_rows)
    columns = -(-problem.lengths[1] // blocks.columns) * blocks.columns
    pairs = jax.ShapeDtypeStruct((batch, problem.heads, rows, columns), jnp.float32)
    extra, direct = [lse, lost, scale], [pairs] * len(by_pairs)
    held, fetched = [q], [[k, *problem.fetched(leaves, 0)]]
    if v is not None:
        held, fetched = [*held, dout], [*fetched, [v]]
    found = run(
        problem, blocks, held, fetched, extra, lists, leaves, results, compute, direct=direct
    )
    return found, moving


def column_slopes(problem, blocks, q, k, v, dout, lse, lost, scale, leaves, lists, wanted="kv"):
    """dk, dv `[B, S', H, .]` by query head, and the slopes of leaves with keys alone by columns.

    The last come with dk; `wanted` may be one of "k" and "v" alone, and is "k" without v and dout.
    """
    shape, softmax = (blocks.rows, blocks.columns), problem.parts.softmax
    batch, dims = q.shape[0], {"k": k.shape[-1], "v": None if v is None else v.shape[-1]}
    moving = [n for n in problem.parts.moving if problem.parts.axes[n] == "k"]
    by_columns = moving if "k" in wanted else []

    def compute(program, extra, leaf_refs, _):
        scale = extra[0][0]
        k_held, *v_held = program.held
        (queries, *numbers), *others = program.fetched
        pairs = [numbers.pop(0) for _ in problem.pairs]
        (q_ready, *dout_ready), (q_used, *dout_used) = program.ready, program.used
        if others:
            (douts, *more), dout_ready, dout_used = others[0], dout_ready[0], dout_used[0]
            numbers += more

        def step(n, carry, kind):
            return program.unless_empty(n, kind, functools.partial(visit, n, kind), carry)

        def visit(n, kind, carry):
            sums, columns = carry
            tile = ScoreTile(problem, blocks, program, n, leaf_refs, pairs, 1, kind, by_columns)
            slot = tile.slot

            def at_queries(n):
                if not numbers:
                    return None
                x = plgpu.load(numbers[n].at[slot], layout=COLUMNS, optimized=False)
                return lax.broadcast_in_dim(x, shape, [1])

            def weighted(products, leaves):
                tile.take(leaves)
                if not softmax and "k" in wanted:
                    return products, None, leaves
                return products, tile.weights(products, scale, at_queries(0)), leaves

            def await_douts():
                plgpu.barrier_wait(dout_ready.at[slot])

            plgpu.barrier_wait(q_ready.at[slot])
            first, weight_slopes = (k_held, queries.at[slot].T), None
            if v_held:
                (products, weights, leaves), weight_slopes = two_products(
                    first, (v_held[0], douts.at[slot].T), await_douts, tile.load, weighted
                )
            else:
                products, weights, leaves = weighted(*product(*first, tile.load))
                if others:
                    await_douts()
            tile.take(leaves)
            if "k" in wanted:
                weights, slopes, *moved = tile.slopes(
                    products, scale, weights, weight_slopes, at_queries(-1)
                )
                columns = [x + y for x, y in zip(columns, moved)]
            sums = dict(sums)
            if "v" in wanted:
                sums["v"] = plus_product(sums["v"], weights.astype(q.dtype), douts.at[slot])
            if others:
                plgpu.barrier_arrive(dout_used.at[slot])
            if "k" in wanted:
                sums["k"] = plus_product(sums["k"], slopes.astype(q.dtype), queries.at[slot])
            plgpu.barrier_arrive(q_used.at[slot])
            return sums, columns

        start = {x: zeros(blocks.rows, dims[x]) for x in wanted}
        sums, columns = program.loop(step, (start, [zeros(blocks.rows) for _ in by_columns]))
        if "k" in wanted:
            sums = sums | {"k": sums["k"] * scale}
        return [*(sums[x] for x in wanted), *columns]

    rows = lists.order.shape[2] * blocks.held
    results = [jax.ShapeDtypeStruct((batch, rows, problem.heads, dims[x]), q.dtype) for x in wanted]
    spare = results if wanted == "v" and dims["k"] != dims["v"] else []
    results += [jax.ShapeDtypeStruct((batch, problem.heads, rows), jnp.float32)] * len(by_columns)
    lse, losses = ([lse], [lost]) if softmax else ([], [])
    queries = [q, *problem.fetched(leaves, 1), *lse]
    if v is None:
        held, fetched = [k], [[*queries, lost]]
    elif wanted == "v":
        held, fetched = [k], [queries, [dout]]
    else:
        held, fetched = [k, v], [queries, [dout, *losses]]
    found = run(
        problem,
        blocks,
        held,
        fetched,
        [scale],
        lists,
        leaves,
        results,
        compute,
        spare,
        last_first=False,
    )
    return found, by_columns


def attend(tile: Tile):
    """The output `[B, H, T, Dv]` in the dtype of v, and the statistics of the rows.

    It is differentiable once, in reverse mode.
    """
    known = not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tile.mask))
    pattern = Known(tile.mask) if known else None
    if tile.mask is not None:
        mask = ahead(tile.mask, tile.q.shape[2], tile.k.shape[2], PRIMITIVES)
        tile = dataclasses.replace(tile, mask=mask)
    parts, leaves, sink = parts_of(tile, PRIMITIVES)
    lengths, width = (tile.q.shape[2], tile.k.shape[2]), tile.v.shape[3]
    q, k, *v = (
        jnp.pad(
            jnp.swapaxes(x, 1, 2),
            ((0, 0), (0, -x.shape[2] % STEPS), (0, 0), (0, -x.shape[3] % LANES)),
        )
        for x in (tile.q, tile.k, *([] if tile.summing else [tile.v]))
    )
    v = None if tile.summing else v[0]
    kind = "plain" if parts.plain else "modified" if parts.softmax else "weights"
    dims = [x.shape[3] for x in (k, v) if x is not None]
    pairs = _of_pairs(parts, leaves)
    blocks = {name: blocks_of(name, max(dims), q.dtype, kind) for name in KERNELS}
    smaller = [fitting(name, x, dims, len(pairs)) for name, x in blocks.items()]
    pairs, blocks = ((), blocks.values()) if None in smaller else (pairs, smaller)
    growing = not isinstance(tile.scale, jax.core.Tracer) and float(tile.scale) > 0
    heads, most = tile.q.shape[1], q.nbytes
    problem = Problem(parts, heads, lengths, growing, False, pattern, pairs, most, *blocks)
    args = q, k, v, tile.scale, sink, leaves
    out, stats = _attend(problem, *varying(args, args))
    if tile.summing:
        return out[..., None], tuple(x[..., None] for x in stats)
    return jnp.swapaxes(out[:, : lengths[0], :, :width], 1, 2), tuple(x[..., None] for x in stats)


def _of_pairs(parts, leaves) -> tuple[int, ...]:
    """Which leaves of modification and normaliser have a number of 16 bits for every pair."""
    return tuple(
        n
        for n, (x, axes) in enumerate(zip(leaves, parts.axes))
        if n >= parts.of_mask and axes == "qk" and x.dtype in (jnp.bfloat16, jnp.float16)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(problem, *args):
    return _outputs(problem, *args)[0]


def _outputs(problem, q, k, v, scale, sink, leaves):
    """The outputs with the statistics and, if `problem.exact`, what rounding took from outputs."""
    laid, lists, whole = _prepared(problem, problem.forward, "q", leaves)
    first = None
    if sink is not None:
        shape = *sink.shape[:2], problem.lengths[0]
        first = _to(whole, jnp.broadcast_to(sink[..., 0], shape).astype(jnp.float32))
    lists = lists.storing(problem, q.shape[0], laid)
    args = q, k, v, scale.reshape(1), first, laid, lists
    blocks, dims = problem.forward, [x.shape[3] for x in (k, v) if x is not None]
    if lists.short:
        count = q.shape[0] * problem.heads * lists.order.shape[2]
        blocks = blocks.in_turns(count, "outputs", dims, len(problem.pairs))
    found = outputs(problem, blocks, *args)
    stats = tuple(x[:, :, : problem.lengths[0]] for x in found if x.ndim == 3)
    out, *rest = [x[:, : q.shape[1]] for x in found if x.ndim == 4] or [None]
    if v is None:
        return ((jnp.sign(stats[1]), stats) if len(stats) > 1 else (stats[0], ())), None
    return (out, stats), rest[0] if rest else None


def _prepared(problem, blocks, rows, leaves, every=False):
    """The leaves as kernels read them, the lists of tiles, and T in whole blocks."""
    pattern = problem.pattern or Known(problem.parts.treedef.unflatten(leaves)[0])
    sizes = blocks.held, blocks.columns
    sizes = sizes if rows == "q" else sizes[::-1]
    whole = {a: -(-n // size) * size for a, n, size in zip("qk", problem.lengths, sizes)}

    def lay_out(x, axes, fetched):
        ends = [whole[a] - n if a in axes else 0 for a, n in zip("qk", x.shape[2:])]
        x = jnp.pad(x, ((0, 0), (0, 0), (0, ends[0]), (0, ends[1])), mode="edge")
        x = x.reshape(*x.shape[:2], *(x.shape[2 + "qk".index(a)] for a in axes))
        x = jnp.swapaxes(x, 2, 3) if axes == "qk" and rows == "k" and not fetched else x
        if x.dtype == jnp.bool_:
            return x.astype(jnp.int32)
        exact = jnp.issubdtype(x.dtype, jnp.floating) and axes != "qk"
        return x.astype(jnp.float32) if exact else x

    lists = Lists.of(problem, pattern.mask, blocks, rows, leaves, every)
    fetched = [n in problem.pairs for n in range(len(leaves))]
    laid = [lay_out(*each) for each in zip(leaves, problem.parts.axes, fetched)]
    return laid, lists, whole["q"]


def _to(length, x):
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2])))


def _forward(problem, *args):
    primals = jax.tree.map(lambda x: x.value, args)
    parts = problem.parts.perturbed(args[5])
    exact = bool(parts.moving) or (args[4] is not None and args[4].perturbed)
    problem = dataclasses.replace(problem, parts=parts, exact=exact)
    results, rest = _outputs(problem, *primals)
    return results, (problem, primals, results, rest)


def _backward(_, saved, cotangents):
    problem, (q, k, v, scale, sink, leaves), results, rest = saved
    (out, stats), (dout, dstats) = results, traced.given(cotangents, results)
    parts, length, dsink = problem.parts, problem.lengths[0], None
    lse = lost = jnp.zeros((q.shape[0], problem.heads, length), jnp.float32)
    given = None if v is None else dout.astype(q.dtype)
    # Slopes by pairs are written as they are met, so that zeros must be met too.
    dense = any(parts.axes[n] == "qk" for n in parts.moving)

    def kernel(function, blocks, rows, lost, **kwargs):
        laid, lists, whole = _prepared(problem, blocks, rows, leaves, dense and rows == "q")
        vectors = _to(whole, lse), _to(whole, lost), scale.reshape(1)
        return function(problem, blocks, q, k, v, given, *vectors, laid, lists, **kwargs)

    if parts.softmax:
        top, total = stats
        some = jnp.where(total > 0, total, 1)
        lse = jnp.where(total > 0, top * LOG2E + jnp.log2(some), 0)
    if v is None:
        inner, lost = dout * out, -dout
    else:
        exact = out.astype(jnp.float32) if rest is None else out.astype(jnp.float32) + rest
        inner = (given.astype(jnp.float32) * exact).sum(-1)
        inner = jnp.swapaxes(inner[:, :length], 1, 2)
    if parts.softmax:
        lost = lost + inner - total * dstats[1]
    if sink is not None:
        silent = jnp.exp(sink.astype(top.dtype) - top[..., None])
        dsink = traced.reduced(silent * (dstats[1] - inner / some)[..., None], sink)
    slopes = {}
    (dq, *by_rows), places = kernel(row_slopes, problem.rows, "q", lost)
    for n, x in zip(places, by_rows):
        x = x[:, :, :length]
        slopes[n] = x[..., : problem.lengths[1]] if x.ndim == 4 else x[..., None]
    dv = None
    if v is None:
        (dk, *by_columns), places = kernel(column_slopes, problem.columns, "k", lost, wanted="k")
    elif q.shape[3] + v.shape[3] <= WIDEST:
        (dk, dv, *by_columns), places = kernel(column_slopes, problem.columns, "k", lost)
    else:  # both at once do not fit into registers
        (dk, *by_columns), places = kernel(column_slopes, problem.columns, "k", lost, wanted="k")
        (dv,), _ = kernel(column_slopes, problem.columns, "k", lost, wanted="v")
    for n, x in zip(places, by_columns):
        slopes[n] = x[:, :, None, : problem.lengths[1]]

    def grouped(x, like):
        x = jnp.swapaxes(x[:, : like.shape[1]], 1, 2)
        return jnp.swapaxes(traced.grouped(x, jnp.swapaxes(like, 1, 2)), 1, 2)

    dq = dq[:, : q.shape[1]]
    dscale = jnp.vdot(dq.astype(jnp.float32), q.astype(jnp.float32)) / scale
    leaf_slopes = traced.slopes_of(leaves, slopes)
    dv = None if v is None else grouped(dv, v)
    return dq, grouped(dk, k), dv, dscale, dsink, leaf_slopes


_attend.defvjp(_forward, _backward, symbolic_zeros=True)
