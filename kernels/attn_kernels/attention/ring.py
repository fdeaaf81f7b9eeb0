"""Ring attention inside `jax.shard_map`: keys and values travel from device to device."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import linear_call

from attn_kernels import parallel
from attn_kernels.attention import streaming
from attn_kernels.attention.mask import Mask
from attn_kernels.attention.normalizer import Normalizer
from attn_kernels.attention.tile import Place, Tile, accumulation_dtype, empty_stats
from attn_kernels.layout import Layout
from attn_kernels.varying import varying


def ring(tile: Tile, *, axis_name: str, order: str = "contiguous", rank: jax.Array | None = None):
    """Attention of a device's queries to the keys of all devices, which travel around a ring.

    Each step joins the output and the statistics over one device's keys to those so far. Devices
    whose keys the mask's bounds rule out for every query are not asked for theirs; where they rule
    them out for a device's own queries alone, its step computes nothing. The derivative goes round
    again from the final statistics, the gradients of keys and values travel with them and then
    home: memory is that of the device's own part, in both directions.

    Returns:
      The output `[B, H, T / N, Dv]` in float32 or better, and the statistics of the rows.

    Source: Liu et al., 2023, arXiv 2310.01889.
    """
    length = tile.q.shape[2]
    if tile.k.shape[2] != length:
        raise ValueError(
            f"a device must hold as many keys as queries, got {tile.k.shape[2]} and {length}"
        )
    layout = Layout(order, jax.lax.axis_size(axis_name), length)
    leaves, treedef = jax.tree.flatten(tile)
    roles = roles_of(tile, leaves, layout)
    plan = Ring(treedef, roles, layout, axis_name, *reach(tile.mask, layout))
    rank = parallel.rank_of(axis_name, rank)
    return _ring(plan, *varying((rank, leaves), (rank, leaves)))


def reach(mask: Mask | None, layout: Layout) -> tuple[int, int]:
    """How many steps back, and ahead, keys must travel to meet all queries that may see them.

    Together the steps are fewer than the devices. Bounds of the mask that are not known before the
    program runs rule nothing out.
    """
    shards = layout.shards
    if mask is None:
        return shards - 1, 0
    ranks = np.arange(shards)
    first, last = (layout.positions(ranks, index) for index in (0, layout.length - 1))
    with jax.ensure_compile_time_eval():
        some, _ = mask.tile(first[:, None], last[:, None], first, last)
        some = np.broadcast_to(np.asarray(some), (shards, shards))
    needed = [s for s in ranks[1:] if some[ranks, ranks - s].any()]
    stops = [0, *needed, shards]
    gap = max(itertools.pairwise(stops), key=lambda ends: (ends[1] - ends[0], ends[0]))
    return int(gap[0]), shards - int(gap[1])


@dataclasses.dataclass(frozen=True)
class Ring:
    """What a ring knows before it runs.

    Attributes:
      treedef: of the tile.
      roles: of every leaf: "stays" with its device, "moves" with the keys, or is "sliced": has the
        columns of all keys.
      layout: of queries and keys alike.
      axis_name: of the devices.
      back, ahead: how many devices before and after it a device hears from.
    """

    treedef: jax.tree_util.PyTreeDef
    roles: tuple[str, ...]
    layout: Layout
    axis_name: str
    back: int
    ahead: int

    def select(self, leaves, moving: bool):
        """The leaves that move, or the others; None in the place of the rest."""
        return [x if (role == "moves") == moving else None for x, role in zip(leaves, self.roles)]

    def columns(self, leaves, rank):
        """The leaves with the columns of the keys of device `rank` alone."""
        index = self.layout.positions(rank, jnp.arange(self.layout.length))
        return [
            jnp.take(x, index, 3) if role == "sliced" and x is not None else x
            for x, role in zip(leaves, self.roles)
        ]

    def part(self, leaves, own, rank) -> Tile:
        """The queries of device `own` against the keys of device `rank`."""
        tile = self.treedef.unflatten(self.columns(leaves, rank))
        place = place_of(own, rank, self.layout, self.layout)
        if tile.normalizer.silent is not None:
            tile = dataclasses.replace(tile, normalizer=_KeysAlone(tile.normalizer))
        return dataclasses.replace(tile, place=place)

    def changed(self, leaves, dots, stats, own, rank):
        """`streaming.change` of a part."""
        of_place = [None, None]
        part, dots = self.part(leaves, own, rank), [*self.columns(dots, rank), *of_place]
        return streaming.change(part, dots, stats)

    def visit(self, tile: Tile, function, carry):
        """`function(carry)`, or `carry` if no query of the device may see a key of the part."""
        if tile.mask is None:
            return function(carry)
        ends = jnp.array([0, self.layout.length - 1])
        some, _ = tile.mask.tile(*tile.place.queries(ends), *tile.place.keys(ends))
        return function(carry) if some is True else jax.lax.cond(some, function, lambda c: c, carry)

    def tour(self, own, moving, home, carry, step):
        """Brings the keys of all devices in reach to this one, and what it makes of them home.

        Args:
          own: the number of this device.
          moving: arrays of this device, which travel.
          home: zeros, which travel beside them and come back.
          carry: what stays.
          step: `step(rank, moving, home, carry)`, with the arrays of device `rank`, returns the new
            `home` and `carry`.
        """
        count = self.layout.shards

        def shift(arrays, by):
            pairs = [(n, (n + by) % count) for n in range(count)]
            return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis_name, pairs), arrays)

        def leg(first, last, way, carry):
            """Visits from the devices `way * first` to `way * last` before this one."""

            def body(state, n):
                moving, home, carry = state
                following = shift(moving, way)  # under way while this step computes
                home, carry = step((own - way * n) % count, moving, home, carry)
                return (following, shift(home, way), carry), None

            state = shift(moving, way * first) if first else moving, home, carry
            if last > first:
                state, _ = jax.lax.scan(body, state, jnp.arange(first, last))
            result, carry = step((own - way * last) % count, *state)
            return shift(result, -way * last) if last else result, carry

        result, carry = leg(0, self.back, 1, carry)
        if self.ahead:
            more, carry = leg(1, self.ahead, -1, carry)
            result = jax.tree.map(jnp.add, result, more)
        return result, carry


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _ring(plan: Ring, own, leaves):
    tile = plan.treedef.unflatten(leaves)
    normalizer, fixed = tile.normalizer, plan.select(leaves, False)

    def step(rank, moving, home, carry):
        part = plan.part(_either(fixed, moving), own, rank)

        def add(carry):
            (out, old), (more, new) = carry, streaming.attend(part)
            stats = normalizer.combine(old, new)
            kept = out * normalizer.rescale(old, stats)
            return kept + more * normalizer.rescale(new, stats), stats

        return home, plan.visit(part, add, carry)

    shape = (*tile.q.shape[:3], tile.v.shape[3])
    start = jnp.zeros(shape, accumulation_dtype(tile.q)), empty_stats(tile)
    return plan.tour(own, plan.select(leaves, True), (), varying(start, leaves), step)[1]


@functools.partial(_ring.defjvp, symbolic_zeros=True)
def _ring_jvp(plan: Ring, primals, tangents):
    """A linear map that goes round the ring, whose transpose goes round it too."""
    (own, leaves), (_, dots) = primals, tangents
    out, stats = _ring(plan, own, leaves)
    still = jax.custom_derivatives.SymbolicZero
    dots = [None if isinstance(dot, still) else dot.astype(out.dtype) for dot in dots]
    moves = tuple(dot is not None for dot in dots)
    maps = functools.partial(_change, plan), functools.partial(_pull, plan, moves)
    # `linear_call` wants all of its linear arguments to be unknown, or none.
    dots = jax.lax.optimization_barrier(varying(dots, leaves))
    return (out, stats), linear_call(*maps, (own, leaves, out, stats), dots)


def _change(plan: Ring, known, dots):
    """The tangents of the output and of the statistics."""
    own, leaves, out, stats = known

    def step(rank, moving, home, carry):
        every = map(_either, (plan.select(leaves, False), plan.select(dots, False)), moving)
        primal, tangent = every

        def add(carry):
            return jax.tree.map(jnp.add, carry, plan.changed(primal, tangent, stats, own, rank))

        return home, plan.visit(plan.part(primal, own, rank), add, carry)

    moving = plan.select(leaves, True), plan.select(dots, True)
    start = varying(jax.tree.map(jnp.zeros_like, (out, stats)), leaves)
    _, terms = plan.tour(own, moving, (), start, step)
    return streaming.close(plan.treedef, leaves, dots, out, stats, terms)


def _pull(plan: Ring, moves, known, cotangents):
    """The transpose of `_change` for the leaves that move."""
    own, leaves, out, stats = known
    zeros = [jnp.zeros(x.shape, out.dtype) if moved else None for x, moved in zip(leaves, moves)]
    zeros = varying(zeros, leaves)

    def closing(dots, terms):
        return streaming.close(plan.treedef, leaves, dots, out, stats, terms)

    staying, terms = jax.linear_transpose(closing, zeros, (out, stats))(cotangents)

    def step(rank, moving, home, carry):
        primal = _either(plan.select(leaves, False), moving)

        def add(carry):
            change = functools.partial(plan.changed, primal, stats=stats, own=own, rank=rank)
            (more,) = jax.linear_transpose(change, zeros)(terms)
            more = plan.select(more, True), plan.select(more, False)
            return jax.tree.map(jnp.add, carry, more)

        return plan.visit(plan.part(primal, own, rank), add, (home, carry))

    home, staying = plan.select(zeros, True), plan.select(staying, False)
    return _either(*plan.tour(own, plan.select(leaves, True), home, staying, step))


def _either(first, second):
    """Two lists, each with None where the other has its entries, as one."""
    return [b if a is None else a for a, b in zip(first, second)]


def roles_of(tile: Tile, leaves, layout: Layout) -> tuple[str, ...]:
    """What becomes of every leaf while keys travel: see `Ring`."""
    apart = 4 + len(jax.tree.leaves(tile.score))
    if layout.shards > 1 and layout.length == 1 and len(leaves) > apart:
        raise ValueError("a device must hold at least 2 positions: T is not above the devices")

    def role(x):
        if x.shape[3] == 1:
            return "stays"
        if x.shape[3] == layout.shards * layout.length:
            return "sliced"
        if x.shape[3] == layout.length and x.shape[2] == 1:
            return "moves"
        raise ValueError(
            f"an operand of shape {x.shape} must have the columns of all "
            f"{layout.shards * layout.length} keys"
        )

    return "stays", "moves", "moves", *["stays"] * (apart - 3), *map(role, leaves[apart:])


def place_of(q_rank, k_rank, q_layout: Layout, k_layout: Layout) -> Place:
    """The place of the queries of one device against the keys of another."""
    ranks = (jnp.full((1, 1, 1, 1), rank, jnp.int32) for rank in (q_rank, k_rank))
    return Place(*ranks, q_layout, k_layout)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("whole",), meta_fields=())
@dataclasses.dataclass(frozen=True)
class _KeysAlone(Normalizer):
    """A normaliser without its silent key, which the ring counts once."""

    whole: Normalizer

    def partial(self, scores):
        return self.whole.partial(scores)

    def combine(self, a, b):
        return self.whole.combine(a, b)

    def weight(self, scores, stats):
        return self.whole.weight(scores, stats)

    def rescale(self, old, new):
        return self.whole.rescale(old, new)

    def influence(self, scores, stats):
        return self.whole.influence(scores, stats)
