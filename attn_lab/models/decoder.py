"""A decoder language model of any token mixers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_lab.nn import Build, Mixer, SimpleGLU, dropout, make_mixer

CAPTURES = "attention_weights", "scores", "residual_norms"


class MLP(nnx.Module):
    """`W2 gelu(W1 x)`, or for "swiglu" `W2 (silu(W1 x) * W3 x)`."""

    def __init__(self, width: int, hidden: int, kind: str, *, bias: bool, build: Build):
        self.up = build.linear(width, hidden, bias)
        self.gate = build.linear(width, hidden, bias) if kind == "swiglu" else nnx.data(None)
        self.down = build.output(hidden, width, bias)

    def __call__(self, x):
        up = self.up(x)
        if self.gate is None:
            return self.down(jax.nn.gelu(up, approximate=False))
        return self.down(jax.nn.silu(self.gate(x)) * up)


class Block(nnx.Module):
    """`x += mixer(norm(x)); x += mlp(norm(x))`; the MLP may be the identity, or absent."""

    def __init__(self, mixer: Mixer, mlp, mixer_norm, mlp_norm, rate: float):
        self.mixer, self.mixer_norm = mixer, mixer_norm
        self.mlp, self.mlp_norm = nnx.data(mlp), nnx.data(mlp_norm)
        self.rate = rate

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        y = self.mixer(self.mixer_norm(x), segment_ids=segment_ids, cache=cache, rngs=rngs)
        y, cache = (y, None) if cache is None else y
        x = x + dropout(y, self.rate, rngs)
        if self.mlp_norm is not None:
            y = self.mlp_norm(x)
            y = y if self.mlp is None else self.mlp(y)
            x = x + dropout(y, self.rate, rngs)
        return x, cache


class DecoderLM(nnx.Module):
    """A pre-norm decoder: `logits = head(norm(blocks(embed(tokens) + positions)))`.

    Args:
      vocab_size: V.
      width: of the residual stream.
      num_layers: L.
      mixers: a name in `attn_lab.nn.MIXERS`, or one, or a class, for each layer.
      mixer_args: keywords of the mixers: one mapping, or one for each layer. Mixers that take
        their layer's `depth`, `num_layers` or the training length `context` get them.
      mlp: "gelu", "swiglu", "glu" (without an activation), "identity" (the residual adds the norm
        alone) or None.
      mlp_ratio: hidden width over `width`.
      norm: "layer", "rms" or "simple_rms" (without a weight).
      norm_eps: of the norms.
      bias: whether norms and the MLP have biases.
      positions: "learned" (up to `max_len`) or None; rotary positions are an argument of mixers.
      max_len: the longest sequence of training, and of learned positions.
      tied: whether the head is the embedding's transpose.
      dropout: rate after the embedding.
      residual_dropout: rate before each residual addition.
      remat: whether the backward pass computes each block again instead of keeping its inside.
      scan: whether the blocks, which must then be alike, run as one loop. It is traced and lowered
        as fast as a single block, and a block's backward pass is done before that of the one below
        begins.
      unroll: how many blocks a turn of that loop runs. With all there is no loop in the compiled
        program, which then keeps fewer intermediates.
      block: makes every block, with the interface of `Block`, in place of mixers and MLP: it is
        called as `block(width, ...)` with the keywords of `Build`.
      init_std: of the normal initialiser of all kernels; those that write to the residual stream
        have `init_std / sqrt(2 L)`.
      dtype: of the computation; None is that of the parameters. Logits are float32.
      param_dtype: of the parameters.
      rngs: where parameters draw from.

    Raises:
      ValueError: on an unknown mixer or option, a mixer argument that it does not take, or as many
        mixers as there are not layers.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        num_layers: int,
        mixers: str | Sequence[str | type[Mixer]] = "dot_product_attention",
        mixer_args: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        mlp: str | None = "gelu",
        mlp_ratio: float = 4.0,
        norm: str = "layer",
        norm_eps: float = 1e-5,
        bias: bool = True,
        positions: str | None = "learned",
        max_len: int = 1024,
        tied: bool = True,
        dropout: float = 0.0,
        residual_dropout: float = 0.0,
        remat: bool = False,
        scan: bool = False,
        unroll: int = 1,
        block: Callable[..., nnx.Module] | None = None,
        init_std: float = 0.02,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        for name, given, known in (
            ("mlp", mlp, ("gelu", "swiglu", "glu", "identity", None)),
            ("norm", norm, ("layer", "rms", "simple_rms")),
            ("positions", positions, ("learned", None)),
        ):
            if given not in known:
                raise ValueError(f"{name} must be one of {known}, got {given!r}")
        if unroll < 1 or (unroll > 1 and not scan):
            raise ValueError(f"unroll must be 1, or more of blocks that scan runs, got {unroll}")
        mixers = [mixers] * num_layers if isinstance(mixers, str) else list(mixers)
        one = mixer_args is None or isinstance(mixer_args, Mapping)
        mixer_args = [mixer_args or {}] * num_layers if one else list(mixer_args)
        for name, given in ("mixers", mixers), ("mixer_args", mixer_args):
            if len(given) != num_layers:
                raise ValueError(f"{name} must be one, or {num_layers} of them, got {len(given)}")
        build = Build(
            rngs,
            dtype,
            param_dtype,
            nnx.initializers.normal(init_std),
            nnx.initializers.normal(init_std / math.sqrt(2 * num_layers)),
        )
        self.width, self.dropout, self.tied = width, dropout, tied
        self.max_len = max_len if positions else None
        self.remat, self.scan, self.unroll = remat, scan, unroll
        embedding = nnx.initializers.normal(init_std)
        self.embed = build.param((vocab_size, width), embedding)
        self.position = build.param((max_len, width), embedding) if positions else nnx.data(None)
        self.head = nnx.data(None) if tied else build.linear(width, vocab_size)
        self.dtype = param_dtype if dtype is None else dtype

        def make_norm():
            if norm == "layer":
                return build.layer_norm(width, norm_eps, bias)
            return build.rms_norm(width, norm_eps, weight=norm == "rms")

        def make_mlp():
            hidden = round(width * mlp_ratio)
            if mlp == "glu":
                return SimpleGLU(width, hidden=hidden, bias=bias, **vars(build))
            if mlp in ("gelu", "swiglu"):
                return MLP(width, hidden, mlp, bias=bias, build=build)
            return None

        offered = dict(num_layers=num_layers, context=max_len)
        blocks = [block(width, **vars(build)) for _ in range(num_layers)] if block else []
        for depth, (name, arguments) in enumerate([] if block else zip(mixers, mixer_args)):
            mixer = make_mixer(name, width, arguments, build, depth=depth, **offered)
            norms = make_norm(), make_norm() if mlp else None
            blocks.append(Block(mixer, make_mlp(), *norms, residual_dropout))
        self.blocks = nnx.List(blocks)
        if scan:
            _alike(blocks)
        self.norm = make_norm()

    def __call__(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        cache: Any = None,
        at: jax.Array | None = None,
        capture: Sequence[str] = (),
        rngs: nnx.Rngs | None = None,
    ):
        """Next-token logits.

        Args:
          tokens: integers `[B, T]`.
          segment_ids: integers `[B, T]`: documents of a packed row, which do not see each other.
          cache: from `init_cache`: these tokens continue what it holds.
          at: positions `[B, N]`; only their logits are computed.
          capture: intermediates to return: "attention_weights" and "scores" (`[B, H, T, T]` a
            layer) and "residual_norms" (`[B, T]` before the first block and after each).
          rngs: turns dropout on.

        Returns:
          Logits `[B, T or N, V]` in float32 and a dictionary with what was captured; with `cache`
          also the new cache.

        Raises:
          ValueError: if tokens exceed `max_len`, or something cannot be captured.
        """
        for name in capture:
            if name not in CAPTURES:
                raise ValueError(f"capture must be of {', '.join(CAPTURES)}, got {name!r}")
        length = tokens.shape[1]
        out: dict[str, list[jax.Array]] = {name: [] for name in capture}
        x = self.embed[...][tokens].astype(self.dtype)
        past = 0 if cache is None else cache["index"]
        if self.position is not None:
            if length > self.max_len:
                raise ValueError(f"tokens have length {length}, but max_len is {self.max_len}")
            table = jax.lax.dynamic_slice_in_dim(self.position[...], past, length)
            if segment_ids is not None:
                table = table[_positions_in_segments(segment_ids)]
            x = x + table.astype(self.dtype)
        x = dropout(x, self.dropout, rngs)
        new = []

        def note(x):
            if "residual_norms" in out:
                out["residual_norms"].append(jnp.linalg.norm(x.astype(jnp.float32), axis=-1))

        note(x)
        scanned = self.scan and cache is None and not capture
        if scanned:
            x = _scanned(self.blocks, x, segment_ids, rngs, self.remat, self.unroll)
        for depth, block in enumerate([] if scanned else self.blocks):
            mixer = block.mixer
            for name, read in ("attention_weights", mixer.weights), ("scores", mixer.scores):
                if name in out:
                    out[name].append(read(block.mixer_norm(x), segment_ids=segment_ids))
            state = None if cache is None else cache["layers"][depth]
            if self.remat and cache is None:
                x = _recomputed(block, x, segment_ids, rngs)
            else:
                x, state = block(x, segment_ids=segment_ids, cache=state, rngs=rngs)
            new.append(state)
            note(x)
        if at is not None:
            x = jnp.take_along_axis(x, at[..., None], axis=1)
        x = self.norm(x)
        if self.tied:
            table = self.embed[...].astype(self.dtype)
            logits = jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32)
        else:
            logits = self.head(x).astype(jnp.float32)
        if cache is None:
            return logits, out
        return logits, out, {"index": past + length, "layers": new}

    def init_cache(self, batch: int, length: int, dtype: Any = None):
        """An empty cache for `batch` sequences of at most `length` tokens."""
        if self.max_len is not None and length > self.max_len:
            raise ValueError(f"length {length} exceeds max_len {self.max_len}")
        dtype = self.dtype if dtype is None else dtype
        layers = [block.mixer.init_cache(batch, length, dtype) for block in self.blocks]
        return {"index": jnp.zeros((), jnp.int32), "layers": layers}

    def state_bytes(self, length: int) -> int:
        """Bytes that decoding keeps for one sequence of that length, at 4 bytes a number."""
        return sum(block.mixer.state_bytes(length) for block in self.blocks)


@nnx.remat
def _recomputed(block, x, segment_ids, rngs):
    return block(x, segment_ids=segment_ids, rngs=rngs)[0]


def _alike(blocks) -> tuple[nnx.GraphDef, list[nnx.State]]:
    """What equal blocks have in common, and the parameters of each.

    Raises:
      ValueError: they are not equal, or have variables that are not parameters.
    """
    graphdefs, params, others = zip(*(nnx.split(block, nnx.Param, ...) for block in blocks))
    if len(set(graphdefs)) > 1 or jax.tree.leaves(others):
        raise ValueError(
            "scan needs blocks with the same mixer, arguments and shapes, all of whose variables "
            "are parameters"
        )
    return graphdefs[0], list(params)


def _scanned(blocks, x, segment_ids, rngs, remat, unroll):
    graphdef, params = _alike(blocks)
    keys = None if rngs is None else jax.random.split(rngs(), len(params))

    def body(x, inputs):
        params, key = inputs
        block = nnx.merge(graphdef, params, nnx.State({}))
        rngs = None if key is None else nnx.Rngs(key)
        return block(x, segment_ids=segment_ids, rngs=rngs)[0], None

    # Without a loop the compiler would keep what is to be computed again.
    body = jax.checkpoint(body, prevent_cse=unroll >= len(params)) if remat else body
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *params)
    return jax.lax.scan(body, x, (stacked, keys), unroll=unroll)[0]


def _positions_in_segments(segment_ids: jax.Array) -> jax.Array:
    """How many tokens of its own segment stand before a token, `[B, T]`."""
    index = jnp.arange(segment_ids.shape[1])
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def count_parameters(model: nnx.Module) -> int:
    """The number of trainable numbers."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
