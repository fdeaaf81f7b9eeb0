"""Programs of warpgroups on Hopper GPUs: all but one compute, the last fetches for them.

A computing warpgroup holds a block of rows in shared memory. The blocks of the other axis that the
mask leaves arrive in the order of a list: full ones first, on which the predicate is not evaluated.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from attn_kernels import gpu

WGMMA = plgpu.Layout.WGMMA
ROWS, COLUMNS = WGMMA.reduce(1), WGMMA.reduce(0)
LANES = 64  # dimensions of a head are padded to a multiple
STEPS = 8  # and lengths, for copies of blocks
LEAST = 64  # columns that a warpgroup takes or passes over
BOTH, NONE = -1, 2  # in place of the number of one half of a block
# By computing warpgroups, the registers of theirs and of the one that fetches.
REGISTERS = {2: (232, 40), 3: (160, 32)}


@dataclasses.dataclass(frozen=True)
class Pairs:
    """An array `[B|1, H|1, n, m]` whose blocks are fetched, each warpgroup's own.

    Attributes:
      array: numbers of 16 bits.
      held: which of the last two axes is that of the rows of a program.
    """

    array: jax.Array
    held: int

    def in_order(self, along_rows, along_columns):
        """Both in the order of the last two axes."""
        return (along_rows, along_columns)[:: -1 if self.held else 1]


@dataclasses.dataclass
class Program:
    """What a computing warpgroup works with.

    Attributes:
      b, h: batch and query head.
      start: the position of its first row.
      kinds: of fetched blocks, and up to how many of these each of them is.
      words: those of its blocks of the last kind, `[n, columns / 32, held]`, or None.
      offsets, stored: of the lists.
      halves: gives which half of a block it needs: see the lists. None if it needs all.
      block: the number of the n-th of them on its axis.
      slot: where it is.
      held: its blocks of rows, in shared memory.
      fetched, ready, used: the slots of the fetched blocks, and their barriers.
      passing: a barrier for two warpgroups that take turns, None for more.
    """

    wg: jax.Array
    b: jax.Array
    h: jax.Array
    start: jax.Array
    kinds: Sequence
    words: object
    offsets: range | None
    stored: Sequence
    halves: Callable | None
    block: Callable
    slot: Callable
    held: Sequence
    fetched: Sequence
    ready: Sequence
    used: Sequence
    passing: object

    @property
    def some(self):
        """How many blocks it fetches."""
        return self.kinds[-1][1]

    def leave(self):
        """Leaves the tensor cores to the other warpgroup."""
        if self.passing is not None:
            plgpu.barrier_arrive(self.passing)

    def enter(self):
        if self.passing is not None:
            plgpu.barrier_wait(self.passing)

    def turn(self):
        self.leave()
        self.enter()

    def unless_empty(self, n, kind, visit, carry):
        """`visit(carry)`, but for a block in which the warpgroup has no pair."""
        if kind.whole or self.halves is None:
            return visit(carry)

        def leave(carry):
            for ready, used in zip(self.ready, self.used):
                plgpu.barrier_wait(ready.at[self.slot(n)])
                plgpu.barrier_arrive(used.at[self.slot(n)])
            return carry

        return lax.cond(self.halves(n) == NONE, leave, visit, carry)

    def loop(self, step, carry):
        """`step(n, carry, kind)` for all fetched blocks."""
        first = 0
        for kind, end in self.kinds:
            carry = lax.fori_loop(first, end, functools.partial(step, kind=kind), carry)
            first = end
        return carry


def run(
    problem,
    blocks,
    held,
    fetched,
    extra,
    lists,
    leaves,
    results,
    compute,
    spare=(),
    direct=(),
    last_first=True,
):
    """The arrays that `compute(program, extra, leaves, direct)` gives for every block of rows.

    Args:
      held: arrays `[B, n, heads, dim]`.
      fetched: lists of such arrays, of numbers `[B, H, n]` and of `Pairs`, that arrive together.
      extra: arrays that are read where they are.
      spare: results that have no held block of their size to leave through.
      direct: shapes of more results, which `compute` itself writes.
      last_first: whether programs for the last rows go first.
      lists: of the blocks that programs visit.
      results: shapes, `[B, n, H, dim]` or `[B, H, n]`, n a multiple of two blocks of rows.
    """
    batch, dtype = held[0].shape[0], held[0].dtype
    slots, rows, groups = blocks.slots, blocks.rows, blocks.warpgroups
    heads, tiles = problem.heads, lists.order.shape[2]
    total = heads * tiles * batch
    programs = min(blocks.programs or total, total)
    buffers = 1 if programs == total else 2
    arrays = [x.array if isinstance(x, Pairs) else x for x in itertools.chain(*fetched)]
    listed = [lists.order, *lists.counts]
    words, halves = ([] if x is None else [x] for x in (lists.words, lists.halves))
    inputs = [*held, *arrays, *extra, *listed, *words, *halves, *lists.stored, *leaves]

    def kernel(*refs):
        refs = list(refs)
        parts = []
        known = listed, words, halves, lists.stored
        for n in map(len, (held, *fetched, extra, *known, leaves, results, direct)):
            parts.append(refs[:n])
            del refs[:n]

        def body(held_smem, spare_smem, fetched_smem, vectors, arrived, left, ready, used, passing):
            held_refs, *fetched_refs, extra_refs, list_refs, word_refs = parts[: len(fetched) + 4]
            half_refs, stored_refs, leaf_refs, result_refs, direct_refs = parts[len(fetched) + 4 :]
            wg = lax.axis_index("wg")
            order, *counts = list_refs

            def each(known, work):
                """`work(at, turn, more, before, known)` for each block of rows of this program.

                Where `at` is b, h and the number of the block, `known(at)` is read one turn ahead.
                `work` gives how many blocks of columns it took; `before` is their sum so far.
                """
                first = lax.axis_index("programs")
                count = divide(total - 1 - first, programs)[0] + 1

                def place(turn):
                    # Programs that run at once read the same keys: those of few heads.
                    n, b = divide(first + turn * programs, batch)
                    h, i = divide(n, tiles)
                    # Late queries of causal masks meet the most keys, and early keys the most
                    # queries: the longest blocks of rows go first.
                    return b, h, tiles - 1 - i if last_first else i

                def step(turn, carry):
                    before, now = carry
                    more = turn + 1 < count
                    ahead = known(place(jnp.where(more, turn + 1, turn))) if buffers > 1 else now
                    return before + work(place(turn), turn, more, before, now), ahead

                now = known(place(0))
                if buffers == 1:
                    return step(0, (0, now))[0]
                return lax.fori_loop(0, count, step, (jnp.int32(0), now))[0]

            def buffer(turn, w):
                """Where a warpgroup has its rows."""
                return lax.rem(turn, buffers) * groups + w if buffers > 1 else w

            def head(ref, h):
                return lax.div(h, jnp.int32(problem.heads // ref.shape[2]))

            def listed_at(b, h, i):
                return (*lead(order, b, h), i)

            def ends(at):
                # They arrive together, not one by one where each is needed.
                return lax.optimization_barrier([x[listed_at(*at)] for x in counts])

            def compute_rows(at, turn, more, before, ends):
                (b, h, i), row = at, listed_at(*at)
                start = i * blocks.held + wg * rows
                mine = [x.at[buffer(turn, wg)] for x in held_smem]
                plgpu.barrier_wait(arrived.at[buffer(turn, wg)])
                if buffers > 1:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                    @pl.when((turn > 0) & more)
                    def _():
                        plgpu.barrier_arrive(left.at[buffer(turn + 1, wg)])

                program = Program(
                    wg,
                    b,
                    h,
                    start,
                    [*zip(lists.kinds, ends)],
                    word_refs[0].at[(*lead(word_refs[0], b, h), i)] if word_refs else None,
                    lists.offsets,
                    stored_refs,
                    (lambda n: half_refs[0][(*row, n - ends[-2], wg)]) if half_refs else None,
                    lambda n: order[(*row, n)],
                    lambda n: blocks.slot(before + n),
                    mine,
                    fetched_smem,
                    ready,
                    used,
                    passing if groups == 2 else None,
                )
                found = compute(program, extra_refs, leaf_refs, direct_refs)
                free = [*mine, *(x.at[wg] for x in spare_smem)]
                numbers = iter(range(vectors.shape[0]))
                for value, ref in zip(found, result_refs):
                    if value.ndim == 1:
                        smem, place = vectors.at[next(numbers), wg], (b, h, pl.ds(start, rows))
                    else:
                        place = b, pl.ds(start, rows), h
                        at_hand = [n for n, x in enumerate(free) if x.shape == value.shape]
                        if not at_hand:  # what left before has to be out of it
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                            free = [*mine, *(x.at[wg] for x in spare_smem)]
                            at_hand = [n for n, x in enumerate(free) if x.shape == value.shape]
                        smem = free.pop(at_hand[0])
                    smem[...] = value.astype(smem.dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(smem, ref.at[place])
                return ends[-1]

            def beginning(at):
                row = listed_at(*at)
                return lax.optimization_barrier((counts[-1][row], order[(*row, 0)]))

            def fetch_columns(at, turn, more, before, beginning):
                (b, h, i), row = at, listed_at(*at)
                some, first = beginning
                for w in range(groups):

                    @pl.when(turn >= buffers)
                    def _(w=w):
                        plgpu.barrier_wait(left.at[buffer(turn, w)])

                    for ref, smem in zip(held_refs, held_smem):
                        place = b, pl.ds(i * blocks.held + w * rows, rows), head(ref, h)
                        own = buffer(turn, w)
                        plgpu.copy_gmem_to_smem(ref.at[place], smem.at[own], arrived.at[own])

                def fetch(n, number):
                    slot = blocks.slot(before + n)
                    columns = pl.ds(number * blocks.columns, blocks.columns)
                    for part, refs, smems, barrier, free in zip(
                        fetched, fetched_refs, fetched_smem, ready, used
                    ):

                        @pl.when(before + n >= slots)
                        def _(free=free):
                            plgpu.barrier_wait(free.at[slot])

                        for x, ref, smem in zip(part, refs, smems):
                            if isinstance(x, Pairs):
                                for w in range(groups):
                                    mine = pl.ds(i * blocks.held + w * rows, rows)
                                    plgpu.copy_gmem_to_smem(
                                        ref.at[(*lead(ref, b, h), *x.in_order(mine, columns))],
                                        smem.at[slot, w],
                                        barrier.at[slot],
                                    )
                                continue
                            vector = len(ref.shape) == 3
                            place = (b, h, columns) if vector else (b, columns, head(ref, h))
                            plgpu.copy_gmem_to_smem(ref.at[place], smem.at[slot], barrier.at[slot])
                    # Which block is next is read before there is room for it.
                    return order[(*row, jnp.minimum(n + 1, order.shape[3] - 1))]

                lax.fori_loop(0, some, fetch, first)
                return some

            @pl.when(wg < groups)
            def _():
                registers(REGISTERS[groups][0], "increase")
                each(ends, compute_rows)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(wg == groups)
            def _():
                registers(REGISTERS[groups][1], "decrease")
                all_of_them = each(beginning, fetch_columns)

                @pl.loop(jnp.maximum(all_of_them - slots, 0), all_of_them)
                def _(n):
                    for free in used:
                        plgpu.barrier_wait(free.at[blocks.slot(n)])

        def shared(count, length, x):
            transforms = plgpu.TilingTransform((STEPS, LANES)), plgpu.SwizzleTransform(128)
            if isinstance(x, Pairs):
                shape = count, groups, *x.in_order(rows, length)
                return plgpu.SMEM(shape, x.array.dtype, transforms=transforms)
            if len(x.shape) == 3:
                return plgpu.SMEM((count, length), jnp.float32)
            return plgpu.SMEM((count, length, x.shape[-1]), dtype, transforms=transforms)

        def arrivals(part):
            return sum(groups if isinstance(x, Pairs) else 1 for x in part)

        number = max(1, sum(len(x.shape) == 3 for x in results))
        pl.run_scoped(
            body,
            [shared(buffers * groups, rows, x) for x in held],
            [shared(groups, rows, x) for x in spare],
            [[shared(slots, blocks.columns, x) for x in part] for part in fetched],
            plgpu.SMEM((number, groups, rows), jnp.float32),
            plgpu.Barrier(num_arrivals=len(held), num_barriers=buffers * groups),
            plgpu.Barrier(num_barriers=buffers * groups),
            [plgpu.Barrier(num_arrivals=arrivals(part), num_barriers=slots) for part in fetched],
            [plgpu.Barrier(num_arrivals=groups, num_barriers=slots) for _ in fetched],
            plgpu.Barrier(num_arrivals=groups),
            collective_axes="wg",
        )

    return plgpu.kernel(
        kernel,
        out_type=[*results, *direct],
        grid=(programs,),
        grid_names=("programs",),
        num_threads=groups + 1,
        thread_name="wg",
        # Rows are reduced within warps, which need no memory for it.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=plgpu.InterpretGPUParams() if gpu.interpreted() else False,
    )(*inputs)


def divide(n, size):
    """The quotient and the rest."""
    return lax.div(n, jnp.int32(size)), lax.rem(n, jnp.int32(size))


def registers(number, action):
    if not gpu.interpreted():
        plgpu.set_max_registers(number, action=action)


def product(a, b, meanwhile):
    """a b of two blocks in shared memory, and what `meanwhile` gives, before it is waited for."""

    def body(acc):
        plgpu.wgmma(acc, a, b)
        found = meanwhile()
        return acc[...], found

    return pl.run_scoped(body, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def two_products(first, second, ready, meanwhile, between):
    """`between(a b, ...)` and c d, the second product running meanwhile.

    Args:
      first, second: a and b, c and d, in shared memory.
      ready: waits for the second.
      meanwhile: what it gives before the first is waited for is the other argument of `between`.
      between: a function of arrays.
    """
    if gpu.interpreted():
        found = between(*product(*first, meanwhile))
        ready()
        return found, product(*second, lambda: None)[0]

    def body(one, other):
        plgpu.wgmma(one, *first)
        ready()
        plgpu.wgmma(other, *second)
        loaded = meanwhile()
        found = between(plgpu.wgmma_accumulator_load(one, wait_n=1), loaded)
        return lax.optimization_barrier(found), other[...]

    shapes = [(a.shape[0], b.shape[1]) for a, b in (first, second)]
    return pl.run_scoped(body, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def plus_product(sums, a, b, meanwhile=lambda: None):
    """sums + a b, with b in shared memory."""
    if gpu.interpreted():
        meanwhile()
        return sums + jnp.dot(a, b[...], preferred_element_type=jnp.float32)

    def body(acc):
        plgpu.wgmma(acc, a, b)
        meanwhile()

    return pl.run_state(body)(plgpu.ACC.init(sums))


def zeros(*shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA if len(shape) > 1 else ROWS)


def lead(ref, b, h):
    """Where `[B|1, H|1, ...]` has what is of a batch and a head."""
    return tuple(n if size > 1 else 0 for n, size in zip((b, h), ref.shape))


def along_rows(program, ref, rows):
    """The numbers of `[B|1, H|1, n]` at the rows of a program."""
    ref = ref.at[(*lead(ref, program.b, program.h), pl.ds(program.start, rows))]
    return plgpu.load(ref, layout=ROWS, optimized=False)
