"""Sampling from a decoder."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from attn_lab.models.decoder import DecoderLM


def generate(
    model: DecoderLM,
    prompt: jax.Array,
    *,
    max_new_tokens: int,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> jax.Array:
    """Continues prompts token by token with the model's cache: one prefill, then one scan.

    Args:
      model: a decoder.
      prompt: integers `[B, T]`, T at least 1.
      max_new_tokens: how many to add.
      key: of the random choices.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: keeps the k most likely tokens.
      top_p: keeps the fewest most likely tokens whose probabilities reach p.

    Returns:
      Integers `[B, T + max_new_tokens]`, prompt included.

    Raises:
      ValueError: if an argument is out of range, or the result exceeds the model's `max_len`.
    """
    if prompt.ndim != 2 or not prompt.shape[1]:
        raise ValueError(f"prompt must be [B, T] with at least one token, got shape {prompt.shape}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    graphdef, state = nnx.split(model)
    return _generate(
        graphdef, max_new_tokens, temperature == 0, top_k, top_p, state, prompt, key, temperature
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _generate(graphdef, count, greedy, top_k, top_p, state, prompt, key, temperature):
    model = nnx.merge(graphdef, state)
    cache = model.init_cache(prompt.shape[0], prompt.shape[1] + count)

    def choose(logits, step):
        if greedy:
            return jnp.argmax(logits, -1).astype(prompt.dtype)
        logits = restrict(logits / temperature, top_k, top_p)
        drawn = jax.random.categorical(jax.random.fold_in(key, step), logits)
        return drawn.astype(prompt.dtype)

    def advance(carry, step):
        cache, token = carry
        logits, _, cache = model(token[:, None], cache=cache)
        return (cache, choose(logits[:, -1], step)), token

    logits, _, cache = model(prompt, cache=cache)
    first = choose(logits[:, -1], 0)
    (_, last), tokens = jax.lax.scan(advance, (cache, first), jnp.arange(1, count))
    return jnp.concatenate([prompt, tokens.T, last[:, None]], 1)


def restrict(logits: jax.Array, top_k: int | None = None, top_p: float | None = None) -> jax.Array:
    """Logits `[..., V]` with -inf outside the k most likely, then outside the nucleus of mass p."""
    if top_k is not None and top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        ordered = jnp.sort(logits, -1, descending=True)
        mass = jnp.cumsum(jax.nn.softmax(ordered, -1), -1)
        kept = mass - jax.nn.softmax(ordered, -1) < top_p
        least = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits
