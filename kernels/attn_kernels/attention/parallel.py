"""Attention whose queries and keys are spread over devices, inside `jax.shard_map`.

Every function takes the tile of one device: its queries, and its keys and values. Operands with a
query axis belong to its queries; those with a key axis alone to its keys; those with both have the
columns of all keys, in natural order. Positions that masks and modifications see are global.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from attn_kernels import parallel
from attn_kernels.attention import streaming
from attn_kernels.attention.mask import Mask
from attn_kernels.attention.ring import place_of, ring, roles_of
from attn_kernels.attention.score_mod import ScoreMod
from attn_kernels.attention.tile import Tile
from attn_kernels.layout import Layout, deal, undeal

Rank = jax.Array | None  # the number of the device, `axis_index` if it is None
LEADING = 4  # leaves of a tile before those of its parts: q, k, v and scale


def allgather(
    tile: Tile,
    *,
    axis_name: str,
    order: str = "contiguous",
    rank: Rank = None,
    attend: Callable = streaming.attend,
):
    """Attention of a device's queries to the keys of all devices, which it gathers first.

    The derivative of the gathering is a reduction that leaves every device the sums for its keys.

    Returns:
      As `ring`; memory grows with the keys of all devices.

    Source: Llama Team, The Llama 3 Herd of Models, 2024, arXiv 2407.21783.
    """
    count, length = jax.lax.axis_size(axis_name), tile.q.shape[2]
    layout = Layout(order, count, tile.k.shape[2])
    natural = np.argsort(layout.permutation())
    leaves, treedef = jax.tree.flatten(tile)

    def gather(x, role, axis):
        if role != "moves":
            return x
        x = jax.lax.all_gather(x, axis_name, axis=axis, tiled=True)
        return x if order == "contiguous" else jnp.take(x, natural, axis)

    roles = roles_of(tile, leaves, layout)
    leaves = [
        gather(x, role, 2 if n < LEADING else 3) for n, (x, role) in enumerate(zip(leaves, roles))
    ]
    whole = Layout("contiguous", 1, count * layout.length)
    rank = parallel.rank_of(axis_name, rank)
    place = place_of(rank, 0, Layout(order, count, length), whole)
    return attend(dataclasses.replace(treedef.unflatten(leaves), place=place))


def all_to_all(
    tile: Tile, *, axis_name: str, rank: Rank = None, attend: Callable = streaming.attend
):
    """Attention of some heads over all positions, sequences having been exchanged for heads.

    Operands have no query or key axis split: with a head axis they are those of the device's heads.
    Keys and values whose heads the devices do not divide are repeated as often as need be.

    Returns:
      As `ring`, for a contiguous layout.

    Raises:
      ValueError: if the devices do not divide the heads.

    Source: Jacobs et al., 2023, arXiv 2309.14509.
    """
    count, heads = jax.lax.axis_size(axis_name), tile.q.shape[1]
    if heads % count:
        raise ValueError(f"all_to_all over {count} devices needs them to divide the {heads} heads")
    first = parallel.rank_of(axis_name, rank) * (heads // count)
    q, k, v = (to_heads(x, 1, 2, axis_name) for x in (tile.q, tile.k, tile.v))
    out, stats = attend(dataclasses.replace(_numbered(tile, 0, first), q=q, k=k, v=v))
    back = functools.partial(
        jax.lax.all_to_all, axis_name=axis_name, split_axis=2, concat_axis=1, tiled=True
    )
    return jax.tree.map(back, (out, stats))


def to_heads(x: jax.Array, heads: int, sequence: int, axis_name: str) -> jax.Array:
    """All positions of some heads for some positions of all heads, whose axes are given.

    Heads that the devices do not divide are repeated, as often as it takes.
    """
    count = jax.lax.axis_size(axis_name)
    x = jnp.repeat(x, math.lcm(x.shape[heads], count) // x.shape[heads], heads)
    return jax.lax.all_to_all(x, axis_name, heads, sequence, tiled=True)


def across_devices(attend: Callable, kernel: bool = False) -> Callable:
    """`attend`, over the devices of `sequence_parallel` where this context applies to a tile.

    A `kernel` is run on every device's rows and heads where no sequence is shared, too.
    """
    found = parallel.current(kernel)
    if found is None:
        return attend

    run = {
        "ring": functools.partial(ring, order=found.order),
        "allgather": functools.partial(allgather, order=found.order, attend=attend),
        "all_to_all": functools.partial(all_to_all, attend=attend),
    }[found.mode]
    order = "contiguous" if found.mode == "all_to_all" else found.order

    def over(tile):
        shared = found.splits(tile.q.shape[2], tile.k.shape[2], order=order)
        if not shared and not kernel:
            return attend(tile)
        along = found.axis if shared else None
        batch, heads = tile.q.shape[:2]
        over_batch = found.dividing(found.batch, batch)
        over_heads = () if tile.score is not None else found.dividing(found.heads, heads)
        count = math.prod(found.mesh.shape[axis] for axis in over_heads)
        k, v = (
            jnp.repeat(x, math.lcm(x.shape[1], count) // x.shape[1], 1) for x in (tile.k, tile.v)
        )
        leaves, treedef = jax.tree.flatten(dataclasses.replace(tile, k=k, v=v))
        axes = [2, 2, 2, *[None] * (1 + len(jax.tree.leaves(tile.score)))]
        whole = P(over_batch, over_heads, along)
        specs = [P() if axis is None else whole for axis in axes]
        for x in leaves[len(axes) :]:
            axis = next((n for n in (2, 3) if x.shape[n] > 1), None) if shared else None
            spec = [over_batch, over_heads, None, None]
            if shared and found.mode == "all_to_all":
                axis, spec[1] = None, (*over_heads, found.axis)
            spec = [names if x.shape[n] > 1 else None for n, names in enumerate(spec)]
            if axis is not None:
                spec[axis] = found.axis
            axes.append(axis)
            specs.append(P(*spec))

        def local(rank, leaves):
            where = dict(axis_name=found.axis, rank=rank)
            dealt = [
                x if axis is None or not shared else deal(x, axis, order, **where)
                for x, axis in zip(leaves, axes)
            ]
            part = treedef.unflatten(dealt)
            firsts = [
                jax.lax.axis_index(names) * size if names else 0
                for names, size in zip((over_batch, over_heads), part.q.shape)
            ]
            part = _numbered(part, *firsts)
            if not shared:
                return attend(part)
            results = run(part, **where)
            return jax.tree.map(lambda x: undeal(x, 2, order, **where), results)

        # Nothing is left to the compiler: exchanges of its own could end up in branches that only
        # some of the devices take.
        return found.shard_map(local, (specs,), whole, alone=False)(leaves)

    return over


def _numbered(tile: Tile, batch, head) -> Tile:
    """A tile whose first row and head have these numbers for its mask and modification."""
    firsts = tuple(jnp.full((1, 1, 1, 1), first, jnp.int32) for first in (batch, head))
    mask, mod = tile.mask, tile.score_mod
    if mask is not None:
        mask = Mask(_MaskFrom(mask.predicate), (*firsts, *mask.operands))
    if mod is not None:
        mod = ScoreMod(_ModFrom(mod.function), (*firsts, *mod.operands))
    return dataclasses.replace(tile, mask=mask, score_mod=mod)


@dataclasses.dataclass(frozen=True)
class _MaskFrom:
    """A predicate whose first operands are the numbers of the first row of the batch and head."""

    function: Callable

    def __call__(self, b, h, q_index, k_index, batch, head, *operands):
        return self.function(b + batch, h + head, q_index, k_index, *operands)

    def tile(self, *ranges):
        return Mask(self.function).tile(*ranges)


@dataclasses.dataclass(frozen=True)
class _ModFrom:
    """A score modification with the first operands of `_MaskFrom`."""

    function: Callable

    def __call__(self, score, b, h, q_index, k_index, batch, head, *operands):
        return self.function(score, b + batch, h + head, q_index, k_index, *operands)
