"""Mixers whose maps are joined to others: differences, relations and neighbouring scores."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_lab import ops
from attn_lab.nn.attention import DifferentialAttention, MultiHeadAttention
from attn_lab.nn.layers import Build, Mixer, append, divide, split_heads


class DifferentialIntegralAttention(DifferentialAttention):
    """Differential attention plus the mean attention of each key, with a norm on every head.

    The cache also keeps the sum of what the signal maps have read.

    Args:
      width, arguments: as `DifferentialAttention`, without a window.

    Source: Cang et al., 2025, arXiv 2501.17486.
    """

    def __init__(self, width: int, **arguments: Any):
        if arguments.get("window") is not None:
            raise ValueError("window must be None: the mean is over all queries before")
        super().__init__(width, **arguments)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        total = jnp.zeros((batch, self.num_heads, self.value_dim), jnp.float32)
        return super().init_cache(batch, length, dtype) | {"total": total}

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        q, k, v, mask, new = self._inputs(x, segment_ids, cache)
        if cache is None:
            mask = None if segment_ids is None else mask
            return self._project(self._attend(q, k, v, mask, rngs), x)
        q1, k1, q2, k2, lam = self._parts(q, k)
        signal = ops.dot_product_attention(q1, k1, v, mask=mask)
        difference = ops.differential_attention(q1, k1, q2, k2, v, lam, mask=mask)
        total = cache["total"][:, None] + jnp.cumsum(signal.astype(jnp.float32), 1)
        count = cache["index"] + jnp.arange(1, x.shape[1] + 1)
        mean = total / count[:, None, None]
        heads = (difference + lam * mean).astype(v.dtype)
        return self._project(heads, x), new | {"total": total[:, -1]}

    def _attend(self, q, k, v, mask, rngs):
        causal = self.causal and mask is None
        q1, k1, q2, k2, lam = self._parts(q, k)
        function = ops.differential_integral_attention
        return function(q1, k1, q2, k2, v, lam, causal=causal, mask=mask)

    def _project(self, heads, x):
        return MultiHeadAttention._project(self, self.head_norm(heads), x)

    def _parts(self, q, k):
        q1, q2 = jnp.split(q, [self.num_heads], axis=2)
        k1, k2 = jnp.split(k, [self.num_kv_heads], axis=2)
        vectors = (param[...] for param in self.lambdas)
        return q1, k1, q2, k2, ops.differential_lambda(*vectors, lambda_init=self.lambda_init)


class RelationalAttention(MultiHeadAttention):
    """Attention that retrieves relations of tokens, and symbols that identify the senders.

    A token's symbol is read from a library by attention to learned templates.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout.
      num_relations: R, which divides `num_heads * value_dim`; by default `num_heads`.
      num_symbols: in the library.
      relation_activation: as in `ops.relational_attention`.

    Source: Altabaa and Lafferty, 2024, arXiv 2405.16727.
    """

    drops = False

    def __init__(
        self,
        width: int,
        *,
        num_relations: int | None = None,
        num_symbols: int = 64,
        relation_activation: str = "identity",
        **arguments: Any,
    ):
        super().__init__(width, **arguments)
        build, heads = Build.of(arguments), self.num_heads
        self.num_relations = heads if num_relations is None else num_relations
        total = heads * self.value_dim
        self.relation_dim = divide(total, self.num_relations, "channels of all heads")
        self.relation_activation = relation_activation
        self.relation_query = build.linear(width, total)
        self.relation_key = build.linear(width, total)
        kaiming = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform", -1, -2, (0,))
        self.relation_out = build.param((heads, self.value_dim, self.num_relations), kaiming)
        self.symbol_query = build.linear(width, width)
        normal = nnx.initializers.normal(1.0)
        self.templates = build.param((num_symbols, width), normal)
        self.library = build.param((num_symbols, width), normal)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        shape = batch, length, self.num_relations, self.relation_dim
        return super().init_cache(batch, length, dtype) | {"relation": jnp.zeros(shape, dtype)}

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        q, k, v, mask, new = self._inputs(x, segment_ids, cache)
        receivers = split_heads(self.relation_query(x), self.num_relations)
        senders = split_heads(self.relation_key(x), self.num_relations)
        if cache is not None:
            senders = append(cache["relation"], senders, cache["index"])
            new = new | {"relation": senders}
        heads = ops.relational_attention(
            q,
            k,
            receivers,
            senders,
            self.relation_out[...],
            v,
            relation_activation=self.relation_activation,
            mask=mask,
        )
        y = self._project(heads, x)
        return y if new is None else (y, new)

    def _modulate(self, q, k, v, x):
        templates, library = (
            jnp.broadcast_to(p[...].astype(x.dtype), (x.shape[0], *p.shape))[:, :, None]
            for p in (self.templates, self.library)
        )
        query = self.symbol_query(x)[:, :, None]
        symbols = ops.dot_product_attention(query, templates, library)[:, :, 0]
        return q, k, split_heads(self.value(symbols), self.num_kv_heads)


class DualAttention(Mixer):
    """Heads that retrieve values beside heads that retrieve relations, each group projected.

    Args:
      width: of the input and output.
      num_sensory_heads, num_relational_heads: of the two groups; their sum divides the width.
      num_relations, num_symbols, relation_activation: as in `RelationalAttention`.
      arguments: of both groups, as `MultiHeadAttention`, without dropout.

    Source: Altabaa and Lafferty, 2024, arXiv 2405.16727.
    """

    def __init__(
        self,
        width: int,
        *,
        num_sensory_heads: int = 2,
        num_relational_heads: int = 2,
        num_relations: int | None = None,
        num_symbols: int = 64,
        relation_activation: str = "identity",
        **arguments: Any,
    ):
        dim = divide(width, num_sensory_heads + num_relational_heads)
        sensory = dict(num_heads=num_sensory_heads, head_dim=dim) | arguments
        relational = dict(num_heads=num_relational_heads, head_dim=dim) | arguments
        relational |= dict(num_relations=num_relations, num_symbols=num_symbols)
        self.sensory = MultiHeadAttention(width, **sensory)
        self.relational = RelationalAttention(
            width, relation_activation=relation_activation, **relational
        )
        build = Build.of(arguments)
        for group in self.sensory, self.relational:
            size = group.num_heads * dim
            group.out = build.output(group.num_heads * group.value_dim, size)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        groups = {"sensory": self.sensory, "relational": self.relational}
        return {name: group.init_cache(batch, length, dtype) for name, group in groups.items()}

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        if cache is None:
            groups = self.sensory, self.relational
            return jnp.concatenate([group(x, segment_ids=segment_ids) for group in groups], -1)
        part = dict(segment_ids=segment_ids)
        values, sensory = self.sensory(x, cache=cache["sensory"], **part)
        relations, relational = self.relational(x, cache=cache["relational"], **part)
        y = jnp.concatenate([values, relations], -1)
        return y, {"sensory": sensory, "relational": relational}

    def weights(self, x, *, segment_ids=None):
        groups = self.sensory, self.relational
        return jnp.concatenate([group.weights(x, segment_ids=segment_ids) for group in groups], 1)


class MultiTokenAttention(MultiHeadAttention):
    """Multi-head attention with convolved scores and mixed heads, each normalised and gated.

    The cache also keeps the queries that later rows read.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout.
      query_kernel, key_kernel: size of the convolution of scores; the latter is odd.
      head_kernel: how many heads mix their weights, by default all.
      group_norm: whether every head is normalised.
      gate: "scalar" gates every head by a number from itself; None does not.

    Source: Golovneva et al., 2025, arXiv 2504.00927.
    """

    drops = False

    def __init__(
        self,
        width: int,
        *,
        query_kernel: int = 6,
        key_kernel: int = 11,
        head_kernel: int | None = None,
        group_norm: bool = True,
        gate: str | None = "scalar",
        **arguments: Any,
    ):
        super().__init__(width, **arguments)
        if query_kernel < 1 or key_kernel < 1 or key_kernel % 2 == 0:
            raise ValueError(
                f"query_kernel={query_kernel} and key_kernel={key_kernel} must be positive, "
                "the second odd"
            )
        if gate not in (None, "scalar"):
            raise ValueError(f"gate must be None or 'scalar', got {gate!r}")
        build, heads = Build.of(arguments), self.num_heads
        mixed = heads if head_kernel is None else head_kernel
        groups = divide(heads, mixed, "number of heads; head_kernel:")
        self.before = query_kernel - 1

        def present(key, shape, dtype):
            return jnp.zeros(shape, dtype).at[:, -1, shape[2] // 2].set(1)

        def identity(key, shape, dtype):
            return jnp.broadcast_to(jnp.eye(shape[1], dtype=dtype), shape)

        self.kernel = build.param((heads, query_kernel, key_kernel), present)
        self.head_mix = build.param((groups, mixed, mixed), identity)
        self.head_norm = build.rms_norm(self.value_dim) if group_norm else nnx.data(None)
        self.gate = build.linear(self.value_dim, 1) if gate else nnx.data(None)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        shape = batch, self.before, self.num_heads, self.head_dim
        return super().init_cache(batch, length, dtype) | {"query": jnp.zeros(shape, dtype)}

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        q, k, v, mask, new = self._inputs(x, segment_ids, cache)
        if cache is None:
            return self._project(self._attend(q, k, v, mask, rngs), x)
        q = jnp.concatenate([cache["query"].astype(q.dtype), q], 1)
        heads = self._attend(q, k, v, mask, rngs)[:, self.before :]
        last = q[:, x.shape[1] :].astype(cache["query"].dtype)
        return self._project(heads, x), new | {"query": last}

    def _attend(self, q, k, v, mask, rngs):
        kernel, mix = self.kernel[...], self.head_mix[...]
        function = ops.multi_token_attention
        return function(q, k, v, kernel, head_mix_post=mix, causal=False, mask=mask)

    def _scores(self, q, k, mask):
        raise ValueError("MultiTokenAttention has no scores to capture")

    def _project(self, heads, x):
        if self.head_norm is not None:
            heads = self.head_norm(heads)
        if self.gate is not None:
            heads = heads * jax.nn.sigmoid(self.gate(heads))
        return super()._project(heads, x)
