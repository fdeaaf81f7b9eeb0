"""The recurrence in chunks on Hopper GPUs: additive writes, with one gate a head or none.

A program walks a head from chunk to chunk, forward for the outputs and backward for the
derivatives, with its state, or the cotangent of it, in registers. Of its warpgroups all but one
compute, each for 64 channels; the last fetches the steps. What the tensor cores read is in tiles of
64 x 64.

The equations are those of `chunked`. The derivatives by chunks, with W = exp(b_t - b_s) for s <= t,
S before the chunk and S' the cotangent of the state behind it, are

    dq = scale ((do v^T W) k + exp(b) do S^T)
    dk = scale (do v^T W)^T q + exp(b_C - b) v S'^T
    dv = scale (q k^T W)^T do + exp(b_C - b) k S'
    S' <- exp(b_C) S' + scale (q exp(b))^T do
"""

import dataclasses
import functools
import itertools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from attn_kernels import gpu
from attn_kernels.recurrence.decay import FORGOTTEN, matmul
from attn_kernels.varying import varying

WGMMA = plgpu.Layout.WGMMA
ROWS, COLUMNS = WGMMA.reduce(1), WGMMA.reduce(0)
SIZE = 64  # steps of a chunk, and channels of a tile
WIDEST = 128  # channels that one program has of keys and of values
STEP = 1 / 8  # of the coarse part of sums of gates, which is exact
# Vectors of a chunk: coarse and fine sums, exp(b), exp(b_C - b), and the sums again, as a load can
# have one layout.
GATES = 6
SUMS = 4  # vectors that gradients of gates are made of


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Problem:
    """What is known of a call when it is traced.

    Attributes:
      heads: H.
      dims, widths: how many blocks of channels a key and a value have.
      channels: of a block.
      scale: of the outputs.
      gated: whether the derivatives of gates are wanted.
    """

    heads: int
    dims: int
    widths: int
    channels: int
    scale: float
    gated: bool

    @property
    def tiles(self):
        return self.channels // SIZE

    @property
    def programs(self):
        """A head has one for each block of its keys and each of its values."""
        return self.heads * self.dims * self.widths

    def head(self, program, x, kind: str):
        """Of an array `[B, T, heads, channels]`, what a program reads."""
        blocks, of = {"k": (self.dims, self.widths), "v": (self.widths, 1)}[kind]
        at = lax.rem(_divided(program, of), jnp.int32(blocks)) if blocks > 1 else 0
        return self.shared(program, x.shape[2] // blocks) * blocks + at

    def shared(self, program, heads):
        """Of so many heads, the one of a program."""
        return _divided(program, self.dims * self.widths * (self.heads // heads))


def _divided(x, by: int):
    return lax.div(x, jnp.int32(by)) if by > 1 else x


def refusal(q, k, v, log_decay, beta, state, chunk_size: int) -> str | None:
    """Why the kernels cannot serve a call, None if they can."""
    if not gpu.supported():
        return f"it needs JAX 0.11.1, which needs Python 3.12; this is {jax.__version__}"
    if beta is not None:
        return "it has no delta rule"
    if log_decay.shape[-1] > 1:
        return "it has no decay per channel"
    if {x.dtype for x in (q, k, v)} != {jnp.dtype(jnp.bfloat16)}:
        return f"q, k and v are bfloat16, not {q.dtype}, {k.dtype}, {v.dtype}"
    if state.dtype != jnp.float32:
        return f"states are in float32, not {state.dtype}"
    if chunk_size != SIZE:
        return f"chunk_size is {SIZE}, it was {chunk_size}"
    return None


def registers(computing, fetching, number, action):
    if not gpu.interpreted() and computing + fetching > 2:
        plgpu.set_max_registers(number, action=action)


def summed(*parts, meanwhile=lambda: None):
    """`start + sum of a b` for every part `(start, [(a, b), ...])`, the products at the same time.

    b is in shared memory, a there or in registers. `meanwhile` is called before they are waited
    for.
    """

    def start(x, pairs):
        if x is None:
            (a, b), *_ = pairs
            x = jnp.zeros((a.shape[0], b.shape[1]), jnp.float32)
            return plgpu.layout_cast(x, WGMMA)
        return x

    starts = [start(*part) for part in parts]
    products = [pairs for _, pairs in parts]
    if gpu.interpreted():
        found = [
            x + sum(jnp.dot(a[...], b[...], preferred_element_type=jnp.float32) for a, b in pairs)
            for x, pairs in zip(starts, products)
        ]
        meanwhile()
        return found

    def body(accs):
        for acc, pairs in zip(accs, products):
            for a, b in pairs:
                plgpu.wgmma(acc, a, b)
        meanwhile()

    return pl.run_state(body)([plgpu.ACC.init(x) for x in starts])


def over(vector, axis=0):
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, (SIZE, SIZE), [axis]), WGMMA)


def between(gates, columns_are_later: bool):
    """exp(b_t - b_s) for s <= t, else 0; t along rows or, as asked, columns."""

    def at(n, layout):
        return plgpu.load(gates.at[n], layout=layout, optimized=False)

    sums = [over(at(n, ROWS)) - over(at(n + 4, COLUMNS), 1) for n in (0, 1)]
    row, column = (
        plgpu.broadcasted_iota(jnp.int32, (SIZE, SIZE), axis, layout=WGMMA) for axis in (0, 1)
    )
    total = sums[0] + sums[1]
    total, seen = (-total, row <= column) if columns_are_later else (total, row >= column)
    return jnp.where(seen, jnp.exp(jnp.where(seen, total, 0.0)), 0.0)


def factors(gates):
    """exp(b) and exp(b_C - b) along rows, and exp(b_C)."""
    carried, kept = (plgpu.load(gates.at[n], layout=ROWS, optimized=False) for n in (2, 3))
    return over(carried), over(kept), gates[2, SIZE - 1]


def wide(smem):
    return smem[...].astype(jnp.float32)


def put(smem, value):
    smem[...] = value.astype(smem.dtype)


def tile(count):
    transforms = plgpu.TilingTransform((8, SIZE)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM((count, SIZE, SIZE), jnp.bfloat16, transforms=transforms)


def gates_smem(slots):
    return plgpu.SMEM((slots, GATES, SIZE), jnp.float32)


def block(n):
    return pl.ds(n * SIZE, SIZE)


def outputs(problem, q, k, v, gates, state, keep: bool):
    """The outputs `[B, T', heads widths, channels]`, and by programs the last states.

    With `keep` also the states before chunks. A program takes one block of keys after another, and
    adds what they give to its outputs.
    """
    batch, length, tiles, slots = q.shape[0], gates.shape[3], problem.tiles, 3
    count, channels, dims, widths = length // SIZE, problem.channels, problem.dims, problem.widths

    def kernel(q_ref, k_ref, v_ref, gates_ref, first_ref, *refs):
        out_ref, last_ref, *states_ref = refs[: 2 + keep]

        def body(q_smem, k_smem, v_smem, gate_smem, states, scratch, staged, ready, used):
            at, b, wg = (lax.axis_index(x) for x in ("programs", "batch", "wg"))

            def program(d):
                return lax.div(at, widths) * (dims * widths) + d * widths + lax.rem(at, widths)

            @pl.when(wg < tiles)
            def _():
                registers(tiles, 1, 232, "increase")
                mine = [states.at[wg * tiles + i] for i in range(tiles)]

                def step(d, n, state):
                    slot = lax.rem(d * count + n, slots)
                    now = gate_smem.at[slot]
                    plgpu.barrier_wait(ready.at[slot])
                    carried, kept, whole = factors(now)
                    values = v_smem.at[slot * tiles + wg]
                    put(scratch.at[wg], wide(values) * kept)
                    plgpu.commit_smem()
                    for ref, (i, x) in itertools.product(states_ref, enumerate(mine)):
                        place = ref.at[b, program(d), n, block(i), block(wg)]
                        plgpu.copy_smem_to_gmem(x, place)
                    queries = [q_smem.at[slot * tiles + i] for i in range(tiles)]
                    keys = [k_smem.at[slot * tiles + i] for i in range(tiles)]
                    weights, out, *state = summed(
                        (None, [(x, y.T) for x, y in zip(queries, keys)]),
                        (None, [*zip(queries, mine)]),
                        *((x * whole, [(y.T, scratch.at[wg])]) for x, y in zip(state, keys)),
                    )
                    weights = (weights * between(now, False)).astype(jnp.bfloat16)

                    def meanwhile():
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        for smem, x in zip(mine, state):
                            put(smem, x)

                    (out,) = summed((out * carried, [(weights, values)]), meanwhile=meanwhile)
                    plgpu.barrier_arrive(used.at[slot])
                    place = out_ref.at[b, block(n), at, block(wg)]
                    deliver(staged.at[wg], place, out * problem.scale, dims > 1 and d > 0)
                    return state

                @pl.loop(0, dims)
                def _(d):
                    def place(ref, i):
                        return ref.at[b, program(d), block(i), block(wg)]

                    state = [
                        plgpu.load(place(first_ref, i), layout=WGMMA, optimized=False)
                        for i in range(tiles)
                    ]
                    for smem, x in zip(mine, state):
                        put(smem, x)
                    state = lax.fori_loop(0, count, functools.partial(step, d), state)
                    for i, x in enumerate(state):
                        place(last_ref, i)[...] = x
                    plgpu.wait_smem_to_gmem(0)  # what is added to has to be there

            @pl.when(wg == tiles)
            def _():
                registers(tiles, 1, 40, "decrease")

                @pl.loop(0, dims * count)
                def _(m):
                    (d, n), slot = (lax.div(m, count), lax.rem(m, count)), lax.rem(m, slots)

                    @pl.when(m >= slots)
                    def _():
                        plgpu.barrier_wait(used.at[slot])

                    arrive = ready.at[slot]
                    for ref, smem, kind in (
                        (q_ref, q_smem, "k"),
                        (k_ref, k_smem, "k"),
                        (v_ref, v_smem, "v"),
                    ):
                        fetch(problem, ref, smem, slot, kind, b, n, program(d), arrive)
                    fetch_gates(problem, gates_ref, gate_smem.at[slot], b, n, program(d), arrive)

                drain(used, dims * count, slots)

        pl.run_scoped(
            body,
            *(tile(slots * tiles) for _ in range(3)),
            gates_smem(slots),
            tile(tiles**2),
            tile(tiles),
            tile(tiles),
            plgpu.Barrier(num_arrivals=3 * tiles + 1, num_barriers=slots),
            plgpu.Barrier(num_arrivals=tiles, num_barriers=slots),
            collective_axes="wg",
        )

    lead = batch, problem.programs
    shapes = [
        jax.ShapeDtypeStruct((batch, length, problem.heads * widths, channels), v.dtype),
        jax.ShapeDtypeStruct((*lead, channels, channels), jnp.float32),
        jax.ShapeDtypeStruct((*lead, count, channels, channels), v.dtype),
    ]
    return call(problem, kernel, shapes[: 2 + keep], q, k, v, gates, state)


def deliver(smem, place, x, add):
    """Copies x through shared memory to a place, or adds it to what is there."""
    if gpu.interpreted():  # by what has no copies that add
        x, add = x + jnp.where(add, place[...].astype(x.dtype), 0.0), False
    put(smem, x)
    plgpu.commit_smem()
    if add is False:
        plgpu.copy_smem_to_gmem(smem, place)
        return

    @pl.when(add)
    def _():
        plgpu.copy_smem_to_gmem(smem, place, reduction_op="add")

    @pl.when(jnp.logical_not(add))
    def _():
        plgpu.copy_smem_to_gmem(smem, place)


def slopes(problem, q, k, v, gates, states, d_out, d_last):
    """dq, dk, dv `[B, T', P, channels]`, of the first state, and what those of gates are made of.

    The last are `[B, P, tiles, 4, T']`, to be summed over tiles: at every step the products of q
    with dq, of k with what pairs give dk and with what the state gives it, and at the steps of a
    chunk, in any order, those of the state before it with its cotangent.
    """
    batch, length, tiles, slots = q.shape[0], gates.shape[3], problem.tiles, 2
    count, channels, spares = length // SIZE, problem.channels, max(0, 2 - problem.tiles)

    def kernel(*refs):
        q_ref, k_ref, v_ref, do_ref, gates_ref, states_ref, d_last_ref = refs[:7]
        dq_ref, dk_ref, dv_ref, d_first_ref, sums_ref = refs[7:12]

        def body(
            q_smem, k_smem, v_smem, do_smem, gate_smem, states, d_states, scratch, spare, sums,
            ready, used, ready_states, used_states, written, read,
        ):  # fmt: skip
            program, b, wg = (lax.axis_index(x) for x in ("programs", "batch", "wg"))

            @pl.when(wg < tiles)
            def _():
                registers(tiles, 1, 232, "increase")
                free = [d_states.at[wg * tiles + j] for j in range(tiles)]
                free = [*free, *(spare.at[wg] for _ in range(spares))]

                def step(m, d_state):
                    n, slot = count - 1 - m, lax.rem(m, slots)
                    now = gate_smem.at[slot]
                    every = range(tiles)
                    queries, keys, values, douts = (
                        [x.at[slot * tiles + i] for i in every]
                        for x in (q_smem, k_smem, v_smem, do_smem)
                    )
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    for j, x in enumerate(d_state):
                        put(d_states.at[wg * tiles + j], x)
                    plgpu.barrier_wait(ready.at[slot])
                    carried, kept, whole = factors(now)
                    carried = carried * problem.scale
                    my_q, my_k = q_smem.at[slot * tiles + wg], k_smem.at[slot * tiles + wg]
                    put(scratch.at[wg], wide(my_q) * carried)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(written)
                    plgpu.barrier_wait(written)
                    before = [states.at[wg * tiles + j] for j in every]

                    def save(number, x):
                        if problem.gated:
                            sums.at[wg, number][...] = x

                    def leave(ref, smem):
                        place = ref.at[b, pl.ds(n * SIZE, SIZE), program, block(wg)]
                        plgpu.copy_smem_to_gmem(smem, place)

                    plgpu.barrier_wait(ready_states)
                    inner = [wide(x) * y for x, y in zip(before, d_state)]
                    save(3, sum(inner[1:], inner[0]).sum(1) * whole)
                    d_state = summed(
                        *((x * whole, [(scratch.at[wg].T, y)]) for x, y in zip(d_state, douts))
                    )

                    (pairs,) = summed((None, [(x, y.T) for x, y in zip(douts, values)]))
                    pairs = (pairs * (between(now, False) * problem.scale)).astype(jnp.bfloat16)
                    (dq,) = summed((None, [(x, y.T) for x, y in zip(douts, before)]))
                    plgpu.barrier_arrive(used_states)
                    (dq,) = summed((dq * carried, [(pairs, my_k)]))
                    save(0, (wide(my_q) * dq).sum(1))
                    put(scratch.at[wg], dq)

                    later = between(now, True) * problem.scale
                    (pairs,) = summed((None, [(x, y.T) for x, y in zip(values, douts)]))
                    pairs = (pairs * later).astype(jnp.bfloat16)
                    dk, dk_pairs = summed(
                        (None, [(x, d_states.at[wg * tiles + j].T) for j, x in enumerate(values)]),
                        (None, [(pairs, my_q)]),
                    )
                    dk, keys_of_mine = dk * kept, wide(my_k)
                    save(1, (keys_of_mine * dk_pairs).sum(1))
                    save(2, (keys_of_mine * dk).sum(1))
                    dk = dk + dk_pairs
                    pairs, dv = summed(
                        (None, [(x, y.T) for x, y in zip(keys, queries)]),
                        (None, [(x, d_states.at[i * tiles + wg]) for i, x in enumerate(keys)]),
                    )
                    plgpu.barrier_arrive(read)
                    pairs = (pairs * later).astype(jnp.bfloat16)
                    (dv,) = summed((dv * kept, [(pairs, do_smem.at[slot * tiles + wg])]))
                    plgpu.barrier_arrive(used.at[slot])
                    plgpu.barrier_wait(read)
                    put(free[0], dk)
                    put(free[1], dv)
                    plgpu.commit_smem()
                    leave(dq_ref, scratch.at[wg])
                    leave(dk_ref, free[0])
                    leave(dv_ref, free[1])
                    if problem.gated:
                        place = sums_ref.at[b, program, wg, :, pl.ds(n * SIZE, SIZE)]
                        plgpu.copy_smem_to_gmem(sums.at[wg], place)
                    return d_state

                def place(ref, j):
                    return ref.at[b, program, block(wg), block(j)]

                d_state = [
                    plgpu.load(place(d_last_ref, j), layout=WGMMA, optimized=False)
                    for j in range(tiles)
                ]
                d_state = lax.fori_loop(0, count, step, d_state)
                for j, x in enumerate(d_state):
                    place(d_first_ref, j)[...] = x
                plgpu.wait_smem_to_gmem(0)

            @pl.when(wg == tiles)
            def _():
                registers(tiles, 1, 40, "decrease")

                @pl.loop(0, count)
                def _(m):
                    n, slot = count - 1 - m, lax.rem(m, slots)

                    @pl.when(m >= slots)
                    def _():
                        plgpu.barrier_wait(used.at[slot])

                    arrive = ready.at[slot]
                    for ref, smem, kind in (
                        (q_ref, q_smem, "k"),
                        (k_ref, k_smem, "k"),
                        (v_ref, v_smem, "v"),
                        (do_ref, do_smem, "v"),
                    ):
                        fetch(problem, ref, smem, slot, kind, b, n, program, arrive)
                    fetch_gates(problem, gates_ref, gate_smem.at[slot], b, n, program, arrive)

                    @pl.when(m >= 1)
                    def _():
                        plgpu.barrier_wait(used_states)

                    for i, j in itertools.product(range(tiles), repeat=2):
                        plgpu.copy_gmem_to_smem(
                            states_ref.at[b, program, n, block(i), block(j)],
                            states.at[i * tiles + j],
                            ready_states,
                        )

                drain(used, count, slots)
                plgpu.barrier_wait(used_states)

        pl.run_scoped(
            body,
            *(tile(slots * tiles) for _ in range(4)),
            gates_smem(slots),
            tile(tiles**2),
            tile(tiles**2),
            tile(tiles),
            tile(tiles if spares else 1),
            plgpu.SMEM((tiles, SUMS, SIZE), jnp.float32),
            plgpu.Barrier(num_arrivals=4 * tiles + 1, num_barriers=slots),
            plgpu.Barrier(num_arrivals=tiles, num_barriers=slots),
            plgpu.Barrier(num_arrivals=tiles**2),
            plgpu.Barrier(num_arrivals=tiles),
            plgpu.Barrier(num_arrivals=tiles),
            plgpu.Barrier(num_arrivals=tiles),
            collective_axes="wg",
        )

    step = jax.ShapeDtypeStruct((batch, length, problem.programs, channels), v.dtype)
    shapes = [
        *[step] * 3,
        jax.ShapeDtypeStruct(d_last.shape, jnp.float32),
        jax.ShapeDtypeStruct((batch, problem.programs, tiles, SUMS, length), jnp.float32),
    ]
    return call(problem, kernel, shapes, q, k, v, d_out, gates, states, d_last)


def fetch(problem, ref, smem, slot, kind, b, n, program, barrier):
    """The tiles of a chunk of `[B, T, heads, channels]`."""
    head = problem.head(program, ref, kind)
    for i in range(problem.tiles):
        place = ref.at[b, pl.ds(n * SIZE, SIZE), head, block(i)]
        plgpu.copy_gmem_to_smem(place, smem.at[slot * problem.tiles + i], barrier)


def fetch_gates(problem, ref, smem, b, n, program, barrier):
    row = b if ref.shape[0] > 1 else 0
    place = ref.at[row, problem.shared(program, ref.shape[1]), :, pl.ds(n * SIZE, SIZE)]
    plgpu.copy_gmem_to_smem(place, smem, barrier)


def drain(used, count, slots):
    """Waits for what was given back last."""

    @pl.loop(max(count - slots, 0), count)
    def _(n):
        plgpu.barrier_wait(used.at[lax.rem(n, slots)])


def call(problem, kernel, shapes, *args):
    """Runs a kernel, a program for every head and block of channels of its first result."""
    batch, _, programs, _ = shapes[0].shape
    return plgpu.kernel(
        kernel,
        out_type=shapes,
        grid=(programs, batch),
        grid_names=("programs", "batch"),
        num_threads=problem.tiles + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if gpu.interpreted() else False,
    )(*args)


def chunked(q, k, v, log_decay, state, scale: float):
    """The outputs and the last state, differentiable once in reverse mode.

    Args:
      q, k, v: `[B, T, heads, D]`, whose heads divide H.
      log_decay: `[B, T, heads]`, or None.
      state: `[B, H, D, Dv]`.
      scale: a number.
    """
    batch, length = q.shape[:2]
    heads, dim, width = state.shape[1:]
    channels = SIZE if max(dim, width) <= SIZE else WIDEST
    dims, widths = -(-dim // channels), -(-width // channels)
    problem = Problem(heads, dims, widths, channels, float(scale), log_decay is not None)

    def blocks(x):
        """`[B, T, heads n, channels]`, with lengths that copies can have."""
        x = jnp.pad(x, ((0, 0), (0, -length % 8), (0, 0), (0, -x.shape[3] % channels)))
        return x.reshape(*x.shape[:2], -1, channels)

    ends = (0, -dim % channels), (0, -width % channels)
    state = jnp.pad(state, ((0, 0), (0, 0), *ends))
    state = state.reshape(batch, heads, dims, channels, widths, channels)
    state = jnp.swapaxes(state, 3, 4).reshape(batch, problem.programs, channels, channels)
    if log_decay is None:
        log_decay = jnp.zeros((1, length, 1), jnp.float32)
    log_decay = jnp.pad(jnp.swapaxes(log_decay, 1, 2), ((0, 0), (0, 0), (0, -length % SIZE)))
    args = blocks(q), blocks(k), blocks(v), log_decay, state
    out, last = _run(problem, *varying(args, args))
    out = out[:, :length].reshape(batch, length, heads, widths * channels)
    last = last.reshape(batch, heads, dims, widths, channels, channels)
    last = jnp.swapaxes(last, 3, 4).reshape(batch, heads, dims * channels, widths * channels)
    return out[..., :width], last[:, :, :dim, :width]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(problem, q, k, v, log_decay, state):
    out, last = _run_fwd(problem, q, k, v, log_decay, state, keep=False)[0]
    return out, last


def _run_fwd(problem, q, k, v, log_decay, state, keep=True):
    gates = _gates(log_decay)
    out, last, *states = outputs(problem, q, k, v, gates, state, keep)
    return (out, last), (q, k, v, log_decay, gates, states)


def _run_bwd(problem, saved, cotangents):
    q, k, v, log_decay, gates, states = saved
    d_out, d_last = cotangents
    batch = d_out.shape[0]
    dq, dk, dv, d_first, sums = slopes(problem, q, k, v, gates, *states, d_out, d_last)

    def collected(x, like, kind):
        """The sum over programs that read the same."""
        x = x[:, : like.shape[1]]
        shape = batch, like.shape[1], problem.heads, problem.dims, problem.widths
        x = x.reshape(*shape, problem.channels)
        axis, blocks = {"k": (4, problem.dims), "v": (3, problem.widths)}[kind]
        heads = like.shape[2] // blocks
        if x.shape[axis] == 1 and heads == problem.heads:
            return x.reshape(like.shape)
        x = x.astype(jnp.float32).sum(axis).reshape(*shape[:2], heads, -1, blocks, problem.channels)
        return x.sum(3).reshape(like.shape).astype(like.dtype)

    d_decay = jnp.zeros_like(log_decay)
    if problem.gated:
        d_decay = _gate_slopes(problem, log_decay, sums)
    d_arrays = collected(dq, q, "k"), collected(dk, k, "k"), collected(dv, v, "v")
    return *d_arrays, d_decay, d_first


_run.defvjp(_run_fwd, _run_bwd)


def _sums(*terms):
    """Sums over the steps of a chunk: of every `x, counts` x at those u that `counts(u, t)`, at t.

    They are a product with a matrix of 0 and 1: running sums would be several slow programs.
    """
    shape = terms[0][0].shape
    chunks = [x.reshape(*shape[:-1], -1, SIZE) for x, _ in terms]
    counted = [counts(*np.indices((SIZE, SIZE))) for _, counts in terms]
    found = matmul(jnp.concatenate(chunks, -1), np.concatenate(counted).astype(np.float32))
    return found.reshape(shape)


def _gates(log_decay):
    """What the kernels read of gates: `[B, H, T']` to `[B, H, 6, T']`."""
    g = jnp.maximum(log_decay, FORGOTTEN).astype(jnp.float32)
    coarse = jnp.round(g / STEP) * STEP
    coarse, fine = _sums((jnp.stack([coarse, g - coarse]), np.less_equal))
    until_end = _sums((g, np.greater))
    return jnp.stack([coarse, fine, jnp.exp(coarse + fine), jnp.exp(until_end), coarse, fine], 2)


def _gate_slopes(problem, log_decay, sums):
    """A gate is in the weights of all pairs around it, and in what the state passes through it."""
    heads = log_decay.shape[1]
    group = problem.programs // heads * problem.tiles
    sums = sums.reshape(sums.shape[0], heads, group, *sums.shape[-2:]).sum(2)
    by_query, by_key, by_state, inner = (sums[:, :, n] for n in range(SUMS))
    paired = by_query - by_key
    found = _sums((paired, np.greater_equal), (by_state, np.less), (inner, lambda u, t: u >= 0))
    return jnp.where(log_decay > FORGOTTEN, found, 0).astype(log_decay.dtype)
