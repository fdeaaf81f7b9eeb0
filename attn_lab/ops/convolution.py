"""Causal depthwise convolutions over the sequence, short and long."""

import jax
import jax.numpy as jnp

__all__ = ["base_conv", "h3", "hyena", "long_conv", "short_conv"]


def short_conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    state: jax.Array | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Causal depthwise convolution of a few taps: `y_t = sum_i kernel_i x_{t-K+1+i} + bias`.

    Args:
      x: `[B, T, C]`.
      kernel: `[K, C]`; the last tap multiplies the current position.
      bias: `[C]`.
      state: the K - 1 inputs before x, `[B, K - 1, C]`; by default 0.

    Returns:
      `[B, T, C]` in the dtype of x; with `state` also the state after x, for the next call.

    Raises:
      ValueError: if shapes do not fit.
    """
    _check_input(x)
    if kernel.ndim != 2 or not kernel.shape[0] or kernel.shape[1] != x.shape[2]:
        raise ValueError(f"kernel must be [K, C] with C = {x.shape[2]}, got {list(kernel.shape)}")
    _check_channels("bias", bias, x)
    (batch, length, channels), taps = x.shape, kernel.shape[0]
    past = (batch, taps - 1, channels)
    if state is not None and state.shape != past:
        raise ValueError(f"state must be [B, K - 1, C] = {list(past)}, got {list(state.shape)}")
    before = jnp.zeros(past, x.dtype) if state is None else state.astype(x.dtype)
    seen = jnp.concatenate([before, x], 1)
    wide = jnp.result_type(jnp.float32, x.dtype, kernel.dtype)
    y = sum(kernel[i].astype(wide) * seen[:, i : i + length] for i in range(taps))
    y = (y if bias is None else y + bias).astype(x.dtype)
    return y if state is None else (y, seen[:, length:])


def long_conv(
    x: jax.Array, kernel: jax.Array, skip: jax.Array | None = None, *, form: str = "fft"
) -> jax.Array:
    """Causal depthwise convolution as long as the sequence.

        y_t = sum_{s<=t} kernel_{t-s} x_s + skip x_t

    Args:
      x: `[B, T, C]`.
      kernel: `[C, L]`, the first entry for the current position; cut, or filled with 0, to T.
      skip: `[C]`.
      form: "fft" (O(T log T)) or "direct" (O(T L)).

    Returns:
      `[B, T, C]` in the dtype of x.

    Raises:
      ValueError: if shapes do not fit or the form is unknown.
    """
    _check_input(x)
    _check_channels("skip", skip, x)
    if kernel.ndim != 2 or not kernel.shape[1] or kernel.shape[0] != x.shape[2]:
        raise ValueError(f"kernel must be [C, L] with C = {x.shape[2]}, got {list(kernel.shape)}")
    length, wide = x.shape[1], jnp.result_type(jnp.float32, x.dtype, kernel.dtype)
    inputs, taps = x.astype(wide), kernel[:, :length].T.astype(wide)
    if form == "fft":
        size = 1 << (2 * length - 1).bit_length()  # at least 2T: nothing wraps around
        spectrum = jnp.fft.rfft(inputs, size, axis=1) * jnp.fft.rfft(taps, size, axis=0)
        y = jnp.fft.irfft(spectrum, size, axis=1)[:, :length]
    elif form == "direct":
        y = jax.lax.conv_general_dilated(
            inputs,
            taps[::-1, None],
            window_strides=(1,),
            padding=[(len(taps) - 1, 0)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=x.shape[2],
            precision=jax.lax.Precision.HIGHEST,
        )
    else:
        raise ValueError(f"form must be 'fft' or 'direct', got {form!r}")
    return (y if skip is None else y + skip * inputs).astype(x.dtype)


def base_conv(
    x: jax.Array,
    conv_kernel: jax.Array,
    conv_bias: jax.Array,
    proj_kernel: jax.Array,
    proj_bias: jax.Array,
) -> jax.Array:
    """A gated convolution with its residual: `(short_conv(x) + b) * (x W + c) + x`.

    Args:
      x: `[B, T, C]`.
      conv_kernel: `[K, C]`, as in `short_conv`.
      conv_bias: b, `[C]`.
      proj_kernel: W, `[C, C]`.
      proj_bias: c, `[C]`.

    Returns:
      `[B, T, C]` in the dtype of x.

    Raises:
      ValueError: if shapes do not fit.

    Source: Arora et al., 2023, arXiv 2312.04927.
    """
    _check_input(x)
    _check_channels("conv_bias", conv_bias, x)
    _check_channels("proj_bias", proj_bias, x)
    if proj_kernel.shape != 2 * x.shape[2:]:
        raise ValueError(f"proj_kernel must be {list(2 * x.shape[2:])}, got {proj_kernel.shape}")
    y = short_conv(x, conv_kernel, conv_bias) * (x @ proj_kernel + proj_bias) + x
    return y.astype(x.dtype)


def h3(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    shift_kernel: jax.Array,
    shift_skip: jax.Array,
    diag_kernel: jax.Array,
    diag_skip: jax.Array,
    *,
    form: str = "fft",
) -> jax.Array:
    """Two long convolutions with gates between, which compare keys across time.

        k' = shift_kernel * k + shift_skip k,  y_t = (S_t)^T q_t,
        S = diag_kernel * (k' v^T) + diag_skip (k' v^T)

    with causal convolutions in time and outer products of the channels of a head. At D = 1 channel
    a head that is `y = q (diag_kernel * (k' v) + diag_skip k' v)`.

    Args:
      q, k, v: `[B, T, C]`.
      shift_kernel, shift_skip: `[C, L]` and `[C]`.
      diag_kernel, diag_skip: `[H, L]` and `[H]`, of every head; C = H D.
      form: of the convolutions, as in `long_conv`.

    Returns:
      `[B, T, C]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit.

    Source: Fu et al., 2022, arXiv 2212.14052.
    """
    _check_input(v)
    heads = len(diag_kernel)
    if q.shape != v.shape or k.shape != v.shape or not heads or v.shape[2] % heads:
        raise ValueError(
            "q, k and v must be [B, T, C] and diag_kernel [H, L] with H dividing C, got "
            f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)} and {list(diag_kernel.shape)}"
        )
    wide = jnp.result_type(q, k, v, shift_kernel, diag_kernel, jnp.float32)
    q, k, out = q.astype(wide), k.astype(wide), v.astype(wide)
    pairs = outer_pairs(long_conv(k, shift_kernel, shift_skip, form=form), out, heads)
    each = pairs.shape[-1] // heads
    kernel, skip = jnp.repeat(diag_kernel, each, 0), jnp.repeat(diag_skip, each)
    return read_pairs(q, long_conv(pairs, kernel, skip, form=form), heads).astype(v.dtype)


def outer_pairs(k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
    """`k v^T` of every head, `[B, T, H D D]`."""
    k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (k, v))
    return (k[..., :, None] * v[..., None, :]).reshape(*k.shape[:2], -1)


def read_pairs(q: jax.Array, pairs: jax.Array, heads: int) -> jax.Array:
    """`(k v^T)^T q` of every head, `[B, T, C]`."""
    q = q.reshape(*q.shape[:2], heads, -1, 1)
    pairs = pairs.reshape(*q.shape[:-1], -1)
    return (q * pairs).sum(-2).reshape(*q.shape[:2], -1)


def hyena(
    x1: jax.Array,
    x2: jax.Array,
    v: jax.Array,
    kernel: jax.Array,
    skip: jax.Array,
    *,
    form: str = "fft",
) -> jax.Array:
    """A long convolution gated before and after: `x2 (kernel * (x1 v) + skip x1 v)`.

    Args:
      x1, x2, v: `[B, T, C]`.
      kernel, skip: `[C, L]` and `[C]`, as in `long_conv`.
      form: as in `long_conv`.

    Returns:
      `[B, T, C]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit.

    Source: Poli et al., Hyena Hierarchy, 2023, arXiv 2302.10866.
    """
    _check_input(v)
    if x1.shape != v.shape or x2.shape != v.shape:
        raise ValueError(f"x1, x2 and v must agree, got {x1.shape}, {x2.shape} and {v.shape}")
    gated = x1.astype(jnp.result_type(x1, v, jnp.float32)) * v
    return (x2 * long_conv(gated, kernel, skip, form=form)).astype(v.dtype)


def _check_input(x):
    if x.ndim != 3 or not x.shape[1] or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating [B, T, C], got {x.dtype}{list(x.shape)}")


def _check_channels(name, parameter, x):
    if parameter is not None and parameter.shape != x.shape[2:]:
        raise ValueError(f"{name} must be [C] = {list(x.shape[2:])}, got {list(parameter.shape)}")
