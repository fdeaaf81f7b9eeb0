"""A recurrence whose state is a vector a channel: moving averages and diagonal state spaces."""

import functools

import jax
import jax.numpy as jnp

from attn_kernels import gpu
from attn_kernels import parallel as devices
from attn_kernels.recurrence import parallel
from attn_kernels.recurrence.decay import decayed
from attn_kernels.varying import varying_like

FORMS = ("auto", "chunk", "associative", "recurrent")
IMPLEMENTATIONS = (None, "xla", "triton")
SHORT = 8  # below, steps cost less than a tree of them


def diagonal_recurrence(
    x: jax.Array,
    log_decay: jax.Array,
    *,
    write: jax.Array | None = None,
    read: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    return_state: bool = False,
    form: str = "auto",
    chunk_size: int = 64,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Every channel of x is written into N numbers that decay by themselves and are read together.

        h_tn = exp(log_decay_tn) h_{t-1,n} + write_tn x_t,    y_t = Re sum_n read_tn h_tn

    States and sums are in float32, float64 if an argument is, and complex if an argument is.

    Args:
      x: `[B, T, C]`.
      log_decay: natural logs, whose real part is at most 0, constant in time `[C, N]` or
        `[B, T, C, N]`. Complex ones turn the state by their imaginary part. -inf forgets exactly.
      write, read: `[C, N]` or `[B, T, C, N]`; None is 1.
      initial_state: `[B, C, N]`, by default 0.
      return_state: whether to return the last state as well.
      form: "recurrent" (a scan over T, whose derivative keeps T states), "associative" (a tree over
        T of depth log T, which holds `[B, T, C, N]`), "chunk" (such trees within chunks, one after
        another: it holds one state a chunk, in its derivative too) or "auto" (recurrent for short
        T, else chunk). All are differentiable any number of times, in both modes.
      chunk_size: steps a chunk.
      implementation: "xla", "triton" (a kernel for GPUs, for real sums in float32 and N up to 256,
        differentiable once in reverse mode; it has no form, and on a CPU runs by Triton's
        interpreter), or None for Triton's on a Hopper GPU where it serves the call and T is not
        short, and XLA otherwise.

    Returns:
      `[B, T, C]` in the dtype of x; with `return_state` also the state `[B, C, N]` in the dtype of
      the sums.

    Raises:
      ValueError: if shapes do not fit, or a form, size or implementation is unknown.
      NotImplementedError: if the named implementation cannot serve the call.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be None, 'xla' or 'triton', got {implementation!r}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    arrays, state = _checked(x, log_decay, write, read, initial_state)
    if implementation is None and gpu.available() and x.shape[1] >= SHORT:
        implementation = "xla" if _obstacle(x, state, form) else "triton"
    if implementation == "triton":
        if reason := _obstacle(x, state, form):
            raise NotImplementedError(f"the Triton kernel of diagonal_recurrence: {reason}")
        from attn_kernels.recurrence.triton import diagonal as on_gpu

        y, state = on_gpu.walk(x, log_decay, write, read, state)
        return (y, state) if return_state else y
    axes = {name: 1 if a.ndim > 2 else -1 for name, a in arrays.items()}
    run = functools.partial(_run, form=form, chunk_size=chunk_size)
    run = parallel.over_devices(parallel.diagonal, run, axes, x.shape[1])
    y, state = run(arrays, state)
    y = y.astype(x.dtype)
    return (y, state) if return_state else y


def _obstacle(x, state, form):
    """Why the kernel cannot serve a call, None if it can."""
    if form != "auto":
        return f"it has no form {form!r}"
    if reason := gpu.missing_triton():
        return reason
    if devices.current(kernel=True) is not None:
        return "it is not run by the devices of a mesh"
    from attn_kernels.recurrence.triton import diagonal as on_gpu

    return on_gpu.refusal(x, state, state.shape[-1])


def _run(arrays, state, *, form, chunk_size):
    """The outputs `[B, T, C]` and the last state."""
    fixed = {name: a for name, a in arrays.items() if a.ndim < 3}
    steps = {name: a for name, a in arrays.items() if name not in fixed}
    batch, length, _ = steps["x"].shape
    if form == "recurrent" or (form == "auto" and length < SHORT):
        steps = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), steps)
        state, y = jax.lax.scan(functools.partial(_step, fixed), state, steps)
        return jnp.moveaxis(y, 0, 1), state
    size = length if form == "associative" else min(chunk_size, length)
    whole = length - length % size

    def cut(a):
        a = a[:, :whole].reshape(a.shape[0], -1, size, *a.shape[2:])
        return jnp.moveaxis(a, 1, 0)

    tree = functools.partial(_tree, fixed)
    body = tree if size == length else jax.checkpoint(tree, prevent_cse=False)
    state, y = jax.lax.scan(body, state, jax.tree.map(cut, steps))
    y = jnp.moveaxis(y, 0, 1).reshape(batch, whole, -1)
    if whole < length:
        state, rest = tree(state, jax.tree.map(lambda a: a[:, whole:], steps))
        y = jnp.concatenate([y, rest], 1)
    return y, state


def _step(fixed, state, step):
    """One step; the arrays are `[B, C, N]` or `[C, N]`."""
    now = fixed | step
    state = decayed(state[..., None], now["log_decay"])[..., 0]
    state = state + now["write"] * now["x"][..., None]
    return state, (now["read"] * state).sum(-1).real


def _tree(fixed, state, steps):
    """Some steps at once, as a tree of pairs; the arrays are `[B, S, C, N]` or `[C, N]`.

    Pairs carry the sum of the log decays, not its exponential, which would round at every branch.
    """
    now = fixed | steps
    written = now["write"] * now["x"][..., None].astype(state.dtype)
    log_decay, written = jnp.broadcast_arrays(now["log_decay"], written)

    def join(first, second):
        (g, h), (g_next, h_next) = first, second
        return g + g_next, h * jnp.exp(g_next) + h_next

    log_decay, states = jax.lax.associative_scan(join, (log_decay, written), axis=1)
    states = states + jnp.exp(log_decay) * state[:, None]
    return states[:, -1], (now["read"] * states).sum(-1).real


def _checked(x, log_decay, write, read, initial_state):
    """The arrays in the dtype of the sums, and the state."""
    if x.ndim != 3 or not x.shape[1] or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating [B, T, C], got {x.dtype}{list(x.shape)}")
    batch, length, channels = x.shape
    size = log_decay.shape[-1] if log_decay.ndim else 0
    given = dict(log_decay=log_decay, write=write, read=read, initial_state=initial_state)
    given = {name: a for name, a in given.items() if a is not None}
    for name, a in given.items():
        layouts = (channels, size), (batch, length, channels, size)
        layouts = ((batch, channels, size),) if name == "initial_state" else layouts
        if a.shape not in layouts or not jnp.issubdtype(a.dtype, jnp.inexact):
            wanted = " or ".join(str(list(shape)) for shape in layouts)
            raise ValueError(
                f"{name} must be floating or complex {wanted}, got {a.dtype}{list(a.shape)}"
            )
    wide = jnp.result_type(jnp.float32, x.dtype, *(a.dtype for a in given.values()))
    shape = batch, channels, size
    state = jnp.zeros(shape, wide) if initial_state is None else initial_state.astype(wide)
    arrays = {"write": jnp.ones((), wide), "read": jnp.ones((), wide)}
    arrays |= {name: a.astype(wide) for name, a in given.items() if name != "initial_state"}
    arrays["x"] = x.astype(jnp.finfo(wide).dtype)
    return arrays, varying_like(state, arrays)
