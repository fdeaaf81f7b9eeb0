"""Moving averages along the sequence: exponential ones, damped or turning, and running moments."""

import math

import jax
import jax.numpy as jnp

from attn_kernels.recurrence import diagonal_recurrence
from attn_lab.ops.convolution import long_conv

__all__ = ["complex_ema", "damped_ema", "timestep_norm"]

ACTIVATIONS = {"silu": jax.nn.silu, "none": lambda x: x}
FORMS = ("auto", "chunk", "associative", "recurrent", "fft")


def damped_ema(
    x: jax.Array,
    alpha: jax.Array,
    delta: jax.Array,
    beta: jax.Array,
    gamma: jax.Array,
    omega: jax.Array,
    *,
    bidirectional: bool = False,
    activation: str = "silu",
    initial_state: jax.Array | None = None,
    return_state: bool = False,
    form: str = "auto",
    truncation: int | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """N damped exponential moving averages of every channel, read together.

        p = sigmoid(delta),    q = 1 - sigmoid(delta) sigmoid(alpha)
        h_tn = q_n h_{t-1,n} + p_n beta_n x_t
        y_t = activation(sum_n gamma_n h_tn / sqrt(N) + omega x_t)

    Args:
      x: `[B, T, C]`.
      alpha, delta, beta, gamma: `[C, N]`; if bidirectional `[2 C, N]`, whose second half is of the
        averages from the end backwards. Both directions see the present token.
      omega: `[C]`.
      bidirectional: whether averages run both ways.
      activation: "silu" or "none".
      initial_state: h before x, `[B, C, N]`, by default 0.
      return_state: whether to return the last h as well.
      form: of `diagonal_recurrence` ("auto", "chunk", "associative", "recurrent"), or "fft", which
        convolves with the impulse response in O(T log T) and holds `[C, N, T]`.
      truncation: at most so many taps of the impulse response are used; this needs "fft", which is
        then what "auto" stands for.

    Returns:
      `[B, T, C]` in the dtype of x; with `return_state` also `[B, C, N]` in float32 or better.

    Raises:
      ValueError: if shapes do not fit, a name is unknown, or a state meets `bidirectional` or
        `truncation`.

    Source: Ma et al., Mega, 2022, arXiv 2209.10655.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    _check_form(form)
    channels = x.shape[-1] * (2 if bidirectional else 1)
    _check_shapes((channels,), alpha=alpha, delta=delta, beta=beta, gamma=gamma)
    _check_shapes(x.shape[-1:], omega=omega[:, None])
    if return_state or initial_state is not None:
        name = "bidirectional" if bidirectional else "truncation" if truncation else None
        if name:
            raise ValueError(f"initial_state and return_state need no {name}, got both")
    if truncation is not None:
        if truncation < 1 or form not in ("auto", "fft"):
            raise ValueError(
                f"truncation must be positive, with form 'fft', got {truncation} with {form!r}"
            )
        form = "fft"
    wide = jnp.result_type(jnp.float32, x, alpha, delta, beta, gamma, omega)
    inputs, omega = x.astype(wide), omega.astype(wide)
    alpha, delta, beta, gamma = (a.astype(wide) for a in (alpha, delta, beta, gamma))
    log_decay = _log_one_minus_product(alpha, delta)
    write, read = jax.nn.sigmoid(delta) * beta, gamma / math.sqrt(gamma.shape[-1])
    ways = zip(*(jnp.split(a, 2 if bidirectional else 1) for a in (log_decay, write, read)))
    y, state = _averages(inputs, *next(ways), initial_state, form, truncation)
    for way in ways:
        y = y + _averages(inputs[:, ::-1], *way, None, form, truncation)[0][:, ::-1]
    y = ACTIVATIONS[activation](y + omega * inputs).astype(x.dtype)
    return (y, state) if return_state else y


def complex_ema(
    x: jax.Array,
    alpha: jax.Array,
    delta: jax.Array,
    theta: jax.Array,
    gamma: jax.Array,
    omega: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    return_state: bool = False,
    form: str = "auto",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """N damped moving averages of every channel that turn in the complex plane, read together.

        p = sigmoid(alpha),    q_n = (1 - p_n sigmoid(delta_n)) e^{2 pi i n sigmoid(theta) / N}
        h_tn = q_n h_{t-1,n} + p_n x_t,    n = 1..N
        y_t = Re(sum_n gamma_n h_tn) / sqrt(N) + omega x_t

    Args:
      x: `[B, T, C]`.
      alpha, delta: `[C, N]`.
      theta, omega: `[C]`.
      gamma: `[C, N, 2]`, real and imaginary parts.
      initial_state: h before x, `[B, C, N, 2]`, by default 0.
      return_state: whether to return the last h as well.
      form: as in `damped_ema`.

    Returns:
      `[B, T, C]` in the dtype of x; with `return_state` also `[B, C, N, 2]` in float32 or better.

    Raises:
      ValueError: if shapes do not fit or the form is unknown.

    Source: Ma et al., Megalodon, 2024, arXiv 2404.08801.
    """
    _check_form(form)
    if gamma.ndim != 3 or gamma.shape[-1] != 2:
        raise ValueError(f"gamma must be [C, N, 2], got {list(gamma.shape)}")
    _check_shapes(x.shape[-1:], alpha=alpha, delta=delta, gamma=gamma[..., 0])
    _check_shapes(x.shape[-1:], theta=theta[:, None], omega=omega[:, None])
    wide = jnp.result_type(jnp.float32, x, alpha, delta, theta, gamma, omega)
    inputs, size = x.astype(wide), alpha.shape[-1]
    alpha, delta, theta, omega = (a.astype(wide) for a in (alpha, delta, theta, omega))
    turns = jnp.arange(1, size + 1, dtype=wide) / size * jax.nn.sigmoid(theta)[:, None]
    log_decay = jax.lax.complex(_log_one_minus_product(alpha, delta), 2 * math.pi * turns)
    read = _complex(gamma.astype(wide)) / math.sqrt(size)
    start = None if initial_state is None else _complex(initial_state.astype(wide))
    write = jax.nn.sigmoid(alpha).astype(read.dtype)
    y, state = _averages(inputs, log_decay, write, read, start, form)
    y = (y + omega * inputs).astype(x.dtype)
    return (y, jnp.stack([state.real, state.imag], -1)) if return_state else y


def _averages(x, log_decay, write, read, state, form, truncation=None):
    """Outputs and last state of moving averages whose parameters `[C, N]` are constant."""
    if form != "fft":
        return diagonal_recurrence(
            x,
            log_decay,
            write=write,
            read=read,
            initial_state=state,
            return_state=True,
            form=form,
        )
    length = x.shape[1]
    steps = jnp.arange(1, length + 1)
    powers = jnp.exp(log_decay[..., None] * steps)
    from_one = jnp.ones_like(powers[..., :1])
    response = jnp.concatenate([from_one, powers[..., :-1]], -1)

    def contract(pattern, *arrays):
        return jnp.einsum(pattern, *arrays, precision=jax.lax.Precision.HIGHEST)

    y = long_conv(x, contract("cn,cnt->ct", read * write, response[..., :truncation]).real)
    last = contract("btc,cnt->bcn", x.astype(powers.dtype), write[..., None] * response[..., ::-1])
    if state is not None:
        y = y + contract("bcn,cnt->btc", read * state, powers).real
        last = last + powers[..., -1] * state
    return y, last


def _log_one_minus_product(a, b):
    """`log(1 - sigmoid(a) sigmoid(b))`, exact where it is close to 0 and where it is far below."""
    # The odds of the difference against the product are `e^-a + e^-b + e^(-a - b)`.
    return jax.nn.log_sigmoid(jnp.logaddexp(jnp.logaddexp(-a, -b), -a - b))


def _complex(pairs):
    return jax.lax.complex(pairs[..., 0], pairs[..., 1])


def _check_form(form):
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")


def _check_shapes(channels, **arrays):
    size = next(iter(arrays.values())).shape[-1]
    for name, a in arrays.items():
        if a.shape != (*channels, size):
            raise ValueError(f"{name} must be of {channels[0]} channels and N={size}: {a.shape}")


def timestep_norm(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    prior_mean: jax.Array | None = None,
    prior_var: jax.Array | None = None,
    *,
    num_groups: int,
    prior_count: int | jax.Array = 0,
    eps: float = 1e-5,
    return_state: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array, jax.Array]:
    """Group norm by the mean and variance of all steps so far: `(x - M_t) / sqrt(V_t + eps)`.

    The result is multiplied by `1 + weight`, and `bias` is added. A prior counts as that many
    earlier steps; without any, the first step is normalised by itself.

    Args:
      x: `[B, T, C]`.
      weight, bias: `[C]`.
      prior_mean, prior_var: `[G]` or `[B, G]`, by default 0 and 1.
      num_groups: G, groups of `C / G` consecutive channels that share their moments.
      prior_count: steps that the prior stands for.
      eps: added to the variance.
      return_state: whether to return M and V of the last step as well: the prior of the next call,
        whose `prior_count` is T more.

    Returns:
      `[B, T, C]` in the dtype of x; with `return_state` also M and V, `[B, G]` in float32 or
      better.

    Raises:
      ValueError: if shapes do not fit.

    Source: Ma et al., Megalodon, 2024, arXiv 2404.08801.
    """
    batch, length, channels = x.shape
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups={num_groups} must divide the channels {channels}")
    for name, a in (("weight", weight), ("bias", bias)):
        if a.shape != (channels,):
            raise ValueError(f"{name} must be [C] = [{channels}], got {list(a.shape)}")
    wide = jnp.result_type(jnp.float32, x, weight, bias)
    groups = x.astype(wide).reshape(batch, length, num_groups, -1)
    prior_mean = jnp.zeros(num_groups, wide) if prior_mean is None else prior_mean.astype(wide)
    prior_var = jnp.ones(num_groups, wide) if prior_var is None else prior_var.astype(wide)
    for name, a in (("prior_mean", prior_mean), ("prior_var", prior_var)):
        if a.shape not in ((num_groups,), (batch, num_groups)):
            raise ValueError(f"{name} must be [G] or [B, G], G = {num_groups}: {list(a.shape)}")
    mean = groups.mean(-1)
    steps = jnp.ones((1, length, 1), wide), mean, jnp.square(groups - mean[..., None]).mean(-1)
    steps = jax.lax.associative_scan(_join_moments, steps, axis=1)
    prior = jnp.asarray(prior_count, wide), prior_mean[..., None, :], prior_var[..., None, :]
    _, mean, var = _join_moments(prior, steps)
    y = (groups - mean[..., None]) / jnp.sqrt(var + eps)[..., None]
    y = y.reshape(x.shape) * (1 + weight.astype(wide)) + bias
    y = y.astype(x.dtype)
    return (y, mean[:, -1], var[:, -1]) if return_state else y


def _join_moments(a, b):
    """Count, mean and variance of two sets together, without the difference of two squares."""
    count = a[0] + b[0]
    part, rest = a[0] / count, b[0] / count
    mean = part * a[1] + rest * b[1]
    return count, mean, part * a[2] + rest * b[2] + part * rest * jnp.square(b[1] - a[1])
