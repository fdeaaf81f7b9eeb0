"""The entry to engine 2: one contract, three forms."""

import functools
import importlib
import math

import jax
import jax.numpy as jnp

from attn_kernels import gpu, tpu
from attn_kernels import parallel as devices
from attn_kernels.recurrence import definition, mosaic_tpu, parallel
from attn_kernels.recurrence.chunked import chunked
from attn_kernels.recurrence.segments import apart
from attn_kernels.varying import varying_like

FORMS = ("auto", "chunk", "recurrent", "parallel")
IMPLEMENTATIONS = (None, "xla", "mosaic_tpu", "mosaic_gpu", "triton")
KERNELS = {"mosaic_tpu": "TPU kernel", "mosaic_gpu": "GPU kernel", "triton": "Triton kernel"}
CACHED = 2**26  # bytes of states that a GPU reads again from its cache
SHORT = 8  # below, steps cost less than the matrices of a chunk


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    beta: jax.Array | None = None,
    scale: float | jax.Array | None = None,
    initial_state: jax.Array | None = None,
    return_state: bool = False,
    segment_ids: jax.Array | None = None,
    form: str = "auto",
    chunk_size: int = 64,
    sub_chunk_size: int = 16,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Causal linear attention: a matrix that decays, is written by keys and read by queries.

        R_t = Diag(exp(log_decay_t)) S_{t-1}
        S_t = R_t + k_t v_t^T                          without beta
        S_t = R_t + beta_t k_t (v_t - R_t^T k_t)^T     with beta, the delta rule
        o_t = scale S_t^T q_t

    H is the largest head count of the arguments; each that has fewer is repeated, head h reading
    head `h // (H / K)`. States and sums are in float32, or float64 if an argument is.

    Args:
      q, k: `[B, T, H, D]`.
      v: `[B, T, H, Dv]`.
      log_decay: natural logs, at most 0, `[B, T, H]`, or `[B, T, H, D]` per key channel; None is no
        decay. -inf forgets exactly, with finite gradients.
      beta: write strengths `[B, T, H]`, usually in (0, 1); None writes additively. The delta rule
        wants keys of norm at most `sqrt(2 / beta)`: beyond, its state grows without bound.
      scale: a number, by default `1 / sqrt(D)`.
      initial_state: `[B, H, D, Dv]`, by default 0.
      return_state: whether to return the last state as well.
      segment_ids: integers `[B, T]`: where the id changes, the state is forgotten, so that the
        documents of a packed row are apart. A negative id is padding, at either end or between:
        its output is 0 and it leaves the state as it is. `initial_state` belongs to the first
        segment, the returned state to the last.
      form: "recurrent" (a scan over T, whose derivative keeps T states), "parallel" (materialises
        `[T, T]`, with decay per channel `[T, T, D]`), "chunk" (matrix products and a scan over
        chunks, whose derivative keeps one state a chunk) or "auto" (recurrent for short T, else
        chunk). All are differentiable any number of times, in both modes.
      chunk_size: steps a chunk.
      sub_chunk_size: with decay per channel, the steps whose `[C, C, D]` products a chunk sums
        outright; longer ones are matrix products. The TPU kernel has matrix products alone.
      implementation: the program of the chunk form: "xla", "mosaic_tpu" (a Pallas kernel, for sums
        in float32, D and Dv up to 256 and chunks of 8, 16, 32, 64 or 128 steps, differentiable once
        in reverse mode; it runs in interpret mode on a CPU), "mosaic_gpu" (a Pallas kernel for
        Hopper GPUs: q, k and v in bfloat16, additive writes, no decay or one a head, chunks of 64
        steps, differentiable once in reverse mode; on a CPU in interpret mode), "triton" (kernels
        for GPUs in jax-triton: q, k and v in bfloat16 or float16, D and Dv up to 512, all but the
        delta rule with decay per channel, chunks of 64 steps, differentiable once in reverse mode;
        on a CPU by Triton's interpreter), or None for the kernel on a TPU, and on a Hopper GPU
        "mosaic_gpu" where B H is more than half its multiprocessors and "triton" elsewhere, where
        they serve the call, and XLA otherwise. With several devices None takes a kernel of TPUs
        only inside `jax.shard_map` or `sequence_parallel`.

    Returns:
      `[B, T, H, Dv]` in the dtype of v; with `return_state` also the state `[B, H, D, Dv]` in the
      dtype of the sums.

    Raises:
      ValueError: if shapes do not fit, or a form, size or implementation is unknown.
      NotImplementedError: if the named implementation cannot serve the call.

    Source: Katharopoulos et al., 2020, arXiv 2006.16236; Yang et al., 2023, arXiv 2312.06635;
    Yang et al., 2024, arXiv 2406.06484 and 2412.06464.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be None, 'xla', 'mosaic_tpu', 'mosaic_gpu' or 'triton', "
            f"got {implementation!r}"
        )
    if implementation in KERNELS and form not in ("auto", "chunk"):
        raise _refused(implementation, f"it has no form {form!r}")
    kernel = implementation == "mosaic_tpu"
    if implementation is None and tpu.available():
        kernel = form in ("auto", "chunk")
    for name, size in ("chunk_size", chunk_size), ("sub_chunk_size", sub_chunk_size):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    arrays = q, k, v, log_decay, beta, scale, initial_state
    chunks = form == "chunk" or (form == "auto" and q.shape[1] >= SHORT)
    if implementation is None and chunks and gpu.available():
        implementation = _chosen(*arrays, chunk_size)
    if implementation in ("mosaic_gpu", "triton"):
        out, state = _on_gpu(implementation, *arrays, segment_ids, chunk_size)
        return (out, state) if return_state else out
    arrays, state = _checked(q, k, v, log_decay, beta, scale, initial_state)
    if segment_ids is not None:
        arrays = apart(segment_ids, *arrays)
    arrays = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), arrays)

    def run(arrays, state):
        if form == "recurrent" or (form == "auto" and not implementation and q.shape[1] < SHORT):
            return definition.recurrent(*arrays, state)
        if form == "parallel":
            return definition.parallel(*arrays, state)
        reason = mosaic_tpu.refusal(state, chunk_size)
        if kernel and not reason:
            return mosaic_tpu.chunked(*arrays, state, chunk_size)
        if kernel and implementation:
            raise _refused(implementation, reason)
        return chunked(*arrays, state, chunk_size, sub_chunk_size)

    of_steps = jax.tree.map(lambda x: 2, arrays)
    run = parallel.over_devices(parallel.linear, run, of_steps, q.shape[1], kernel)
    out, state = run(arrays, state)
    out = jnp.swapaxes(out, 1, 2).astype(v.dtype)
    return (out, state) if return_state else out


def step(
    state: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    beta: jax.Array | None = None,
    scale: float | jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One step of `linear_attention`, for decoding: T of them equal one call on T positions.

    Args:
      state: `[B, H, D, Dv]`.
      q, k: `[B, H, D]`.
      v: `[B, H, Dv]`.
      log_decay: `[B, H]` or `[B, H, D]`.
      beta: `[B, H]`.
      scale: a number, by default `1 / sqrt(D)`.
      implementation: "xla", "triton" (a kernel for GPUs that reads and writes the state once, for
        sums in float32, with the derivatives of XLA; on a CPU by Triton's interpreter), or None for
        XLA's, but for the delta rule on a Hopper GPU with states of more than 64 MiB, which XLA
        would read twice from memory, Triton's where it serves the call.

    Returns:
      The output `[B, H, Dv]` in the dtype of v, and the state after the step.

    Raises:
      ValueError: if shapes do not fit, or an implementation is unknown.
      NotImplementedError: if the named implementation cannot serve the call.
    """
    if implementation not in (None, "xla", "triton"):
        raise ValueError(f"implementation must be None, 'xla' or 'triton', got {implementation!r}")
    one = jax.tree.map(lambda x: x[:, None], dict(q=q, k=k, v=v, log_decay=log_decay, beta=beta))
    checked = functools.partial(_checked, **one, scale=scale)

    def obstacle():
        _, wide = jax.eval_shape(lambda state: checked(initial_state=state), state)
        sums = "" if wide.dtype == jnp.float32 else f"sums are in {wide.dtype}"
        return gpu.missing_triton() or sums

    read_twice = beta is not None and 4 * state.size > CACHED
    if implementation is None and read_twice and gpu.available():
        implementation = "xla" if obstacle() else "triton"
    if implementation == "triton":
        if reason := obstacle():
            raise NotImplementedError(f"the Triton kernel of step: {reason}")
        from attn_kernels.recurrence.triton import step as on_gpu

        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        if isinstance(scale, jax.Array):  # whose derivative may be wanted
            q, scale = q.astype(jnp.float32) * scale, 1.0
        state = state.astype(jnp.float32)
        return on_gpu.step(state, q, k, v, log_decay, beta, float(scale))
    arrays, state = checked(initial_state=state)
    out, state = definition.update(state, *jax.tree.map(lambda x: x[:, 0], arrays))
    return out.astype(v.dtype), state


def match_heads(*arrays: jax.Array | None, axis: int = 2) -> list[jax.Array | None]:
    """Repeats the heads of every array up to the largest head count; None stays None.

    Raises:
      ValueError: if a head count does not divide the largest.
    """
    heads = max(x.shape[axis] for x in arrays if x is not None)
    for x in arrays:
        if x is not None and heads % x.shape[axis]:
            raise ValueError(
                f"an argument of shape {x.shape} has {x.shape[axis]} heads, which do not divide "
                f"the {heads} of another"
            )
    return jax.tree.map(lambda x: jnp.repeat(x, heads // x.shape[axis], axis), list(arrays))


def _refused(implementation, reason):
    return NotImplementedError(f"the {KERNELS[implementation]} of linear_attention: {reason}")


def _on_gpu(
    implementation, q, k, v, log_decay, beta, scale, initial_state, segment_ids, chunk_size
):
    """The chunk form by the kernels for GPUs, which read arrays as they are given."""
    arrays = q, k, v, log_decay, beta, scale, initial_state
    if reason := _obstacle(implementation, *arrays, chunk_size):
        raise _refused(implementation, reason)
    if segment_ids is not None:
        gates = jnp.zeros((1, 1, 1), jnp.float32) if log_decay is None else log_decay
        per_head = gates.ndim == 3
        gates = gates[..., None] if per_head else gates
        q, k, v, gates, beta = apart(segment_ids, q, k, v, gates, beta)
        log_decay = gates[..., 0] if per_head else gates
    if initial_state is None:
        _, state = jax.eval_shape(lambda: _checked(*arrays))
        zeros = jnp.zeros(state.shape, state.dtype)
        initial_state = varying_like(zeros, (q, k, v, log_decay, beta))
    if scale is None:
        scale = 1 / math.sqrt(q.shape[3])
    factor = scale if isinstance(scale, jax.Array) else None  # whose derivative may be wanted
    scale = 1.0 if factor is not None else float(scale)
    delta = {} if beta is None else dict(beta=beta)
    kernels = _module(implementation)
    out, state = kernels.chunked(q, k, v, log_decay, initial_state, scale, **delta)
    return (out if factor is None else (out * factor).astype(v.dtype)), state


def _chosen(q, k, v, log_decay, beta, *rest):
    """The kernel for GPUs that takes a call that names none, None for XLA.

    Pallas' is the fastest where sequences fill the device side by side; where they are cut into
    parts, and for all that it lacks, it is Triton's.
    """
    heads = max(x.shape[2] for x in (q, k, v, log_decay) if x is not None)
    filled = q.shape[0] * heads > gpu.MULTIPROCESSORS // 2
    for name in ("mosaic_gpu", "triton") if filled else ("triton",):
        if not _obstacle(name, q, k, v, log_decay, beta, *rest):
            return name
    return None


def _obstacle(implementation, q, k, v, log_decay, beta, scale, initial_state, chunk_size):
    """Why kernels for GPUs cannot serve a call, None if they can."""
    if implementation == "triton" and (reason := gpu.missing_triton()):
        return reason
    if devices.current(kernel=True) is not None:
        return "it is not run by the devices of a mesh"
    checked = functools.partial(_checked, q, k, v, log_decay, beta, scale, initial_state)
    (_, _, _, gates, strengths), state = jax.eval_shape(checked)
    return _module(implementation).refusal(q, k, v, gates, strengths, state, chunk_size)


def _module(implementation):
    return importlib.import_module(f"attn_kernels.recurrence.{implementation}")


def _checked(q, k, v, log_decay, beta, scale, initial_state):
    """q, k, v, log_decay, beta with matched heads in the dtype of the sums, and the state."""
    given = dict(q=q, k=k, v=v, log_decay=log_decay, beta=beta, initial_state=initial_state)
    given = {name: x for name, x in given.items() if x is not None}
    ranks = dict(q=(4,), k=(4,), v=(4,), log_decay=(3, 4), beta=(3,), initial_state=(4,))
    layouts = dict(log_decay="[B, T, H] or [B, T, H, D]", beta="[B, T, H]")
    layouts |= dict(v="[B, T, H, Dv]", initial_state="[B, H, D, Dv]")
    for name, x in given.items():
        if jnp.ndim(x) not in ranks[name] or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise ValueError(
                f"{name} must be floating {layouts.get(name, '[B, T, H, D]')}, "
                f"got {jnp.result_type(x)}{list(jnp.shape(x))}"
            )
    batch, length, _, dim = q.shape
    if not length:
        raise ValueError(f"q must have at least one position, got shape {q.shape}")
    for name, x in given.items():
        if name != "initial_state" and x.shape[:2] != (batch, length):
            raise ValueError(f"{name} {x.shape} must have the batch and length of q {q.shape}")
    for name, x in ("k", k), ("log_decay", log_decay):
        if x is not None and x.ndim == 4 and x.shape[3] != dim:
            raise ValueError(f"{name} {x.shape} must have the dim {dim} of q {q.shape}")

    wide = functools.reduce(jnp.promote_types, (x.dtype for x in given.values()), jnp.float32)
    scale = jnp.asarray(1 / math.sqrt(dim) if scale is None else scale, wide)
    if scale.ndim:
        raise ValueError(f"scale must be a number, got shape {scale.shape}")
    q, k, v, log_decay, beta = match_heads(
        *(None if x is None else x.astype(wide) for x in (q, k, v, log_decay, beta))
    )
    if log_decay is None:
        log_decay = jnp.zeros((1, length, 1, 1), wide)
    elif log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    beta = None if beta is None else beta[..., None]

    shape = batch, v.shape[2], dim, v.shape[3]
    if initial_state is not None and initial_state.shape != shape:
        raise ValueError(
            f"initial_state must be [B, H, D, Dv] = {list(shape)}, got {list(initial_state.shape)}"
        )
    state = jnp.zeros(shape, wide) if initial_state is None else initial_state.astype(wide)
    arrays = q * scale, k, v, log_decay, beta
    return arrays, varying_like(state, arrays)
