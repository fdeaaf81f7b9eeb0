"""Compact vision transformers: ViT-Lite, CVT and CCT."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_lab import ops
from attn_lab.models.decoder import MLP
from attn_lab.nn import Build, Mixer, dropout, make_mixer

# layers: (heads, width, MLP ratio)
SIZES = {2: (2, 128, 1), 4: (2, 128, 1), 6: (4, 256, 2), 7: (4, 256, 2), 14: (6, 384, 3)}
KINDS = "vit_lite", "cvt", "cct"
HIDDEN = 64


class ConvTokenizer(nnx.Module):
    """`ops.conv_tokenizer` with its kernels: convolutions of size `kernel`, ReLU and pooling.

    Args:
      channels: of the image.
      width: of a token.
      kernel: size of the convolutions, whose stride is `max(1, kernel // 2 - 1)`.
      layers: how many; all but the last have 64 outputs.
      build: how to make the parameters.
    """

    def __init__(self, channels: int, width: int, *, kernel: int, layers: int, build: Build):
        sizes = [channels, *[HIDDEN] * (layers - 1), width]
        init = nnx.initializers.he_normal()
        shapes = [(kernel, kernel, a, b) for a, b in itertools.pairwise(sizes)]
        self.kernels = nnx.List([build.param(shape, init) for shape in shapes])
        self.stride, self.padding = max(1, kernel // 2 - 1), max(1, kernel // 2)

    def __call__(self, x):
        kernels = [kernel[...] for kernel in self.kernels]
        return ops.conv_tokenizer(x, kernels, stride=self.stride, padding=self.padding)


class PatchTokenizer(nnx.Module):
    """Square patches, each a linear map with a bias."""

    def __init__(self, channels: int, width: int, *, size: int, build: Build):
        self.size = size
        self.kernel = build.param((size * size * channels, width), nnx.initializers.he_normal())
        self.bias = build.param((width,), nnx.initializers.zeros)

    def __call__(self, x):
        batch, y, z, channels = x.shape
        n = self.size
        if y % n or z % n:
            raise ValueError(f"image size {y} x {z} must be a multiple of the patch size {n}")
        patches = x.reshape(batch, y // n, n, z // n, n, channels).swapaxes(2, 3)
        flat = patches.reshape(batch, -1, n * n * channels)
        return flat @ self.kernel[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


class SequencePool(nnx.Module):
    """`ops.sequence_pool` with its parameters."""

    def __init__(self, width: int, *, build: Build):
        self.kernel = build.param((width, 1), nnx.initializers.truncated_normal(0.02))
        self.bias = build.param((1,), nnx.initializers.zeros)

    def __call__(self, x):
        return ops.sequence_pool(x, self.kernel[...], self.bias[...])


class EncoderBlock(nnx.Module):
    """`x += mixer(norm(x)); x = norm_1(x); x += mlp(x)`: the second norm replaces the stream."""

    def __init__(self, mixer: Mixer, mlp: MLP, norms: Sequence[nnx.LayerNorm], rate: float):
        self.mixer, self.mlp, self.rate = mixer, mlp, rate
        self.norm, self.stream_norm = norms

    def __call__(self, x, rngs=None):
        x = x + drop_path(self.mixer(self.norm(x), rngs=rngs), self.rate, rngs)
        x = self.stream_norm(x)
        return x + drop_path(self.mlp(x), self.rate, rngs)


class CompactTransformer(nnx.Module):
    """A small vision transformer for small data; `CCT`, `CVT`, `ViTLite` are the published ones.

    Args:
      kind: "cct" (convolutional tokens, pooled), "cvt" (patches, pooled) or "vit_lite" (patches and
        a class token).
      layers: 2, 4, 6, 7 or 14, which sets heads, width and MLP ratio.
      kernel: size of the convolutions, or of a patch.
      convs: convolutions of the tokenizer (CCT).
      num_classes: of the head.
      image_size, channels: of the images.
      mixer, mixer_args: a name in `attn_lab.nn.MIXERS` that takes `causal`, and its keywords.
      positions: "learned" or "sine".
      dropout, attention_dropout: rates; the second only where the mixer takes it.
      stochastic_depth: rate of the last layer; it grows linearly from 0.
      dtype: of the computation; None is that of the parameters. Logits are float32.
      param_dtype: of the parameters.
      rngs: where parameters draw from.

    Raises:
      ValueError: on an unknown kind, size, mixer or option.

    Source: Hassani et al., Escaping the Big Data Paradigm, 2021, arXiv 2104.05704.
    """

    def __init__(
        self,
        *,
        kind: str,
        layers: int,
        kernel: int,
        convs: int = 1,
        num_classes: int = 10,
        image_size: int = 32,
        channels: int = 3,
        mixer: str = "dot_product_attention",
        mixer_args: Mapping[str, Any] | None = None,
        positions: str = "learned",
        dropout: float = 0.0,
        attention_dropout: float = 0.1,
        stochastic_depth: float = 0.1,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        for name, given, known in (
            ("kind", kind, KINDS),
            ("layers", layers, tuple(SIZES)),
            ("positions", positions, ("learned", "sine")),
        ):
            if given not in known:
                raise ValueError(f"{name} must be one of {known}, got {given!r}")
        heads, width, ratio = SIZES[layers]
        build = Build(rngs, dtype, param_dtype, nnx.initializers.truncated_normal(0.02))
        self.dtype, self.dropout = param_dtype if dtype is None else dtype, dropout
        if kind == "cct":
            self.tokenizer = ConvTokenizer(
                channels, width, kernel=kernel, layers=convs, build=build
            )
        else:
            self.tokenizer = PatchTokenizer(channels, width, size=kernel, build=build)
        image = jax.ShapeDtypeStruct((1, image_size, image_size, channels), jnp.float32)
        count = nnx.eval_shape(lambda m, x: m(x), self.tokenizer, image).shape[1]
        class_token = kind == "vit_lite"
        count += class_token
        self.class_token = (
            build.param((1, 1, width), nnx.initializers.zeros) if class_token else nnx.data(None)
        )
        table = nnx.initializers.truncated_normal(0.2)
        learned = positions == "learned"
        self.position = build.param((1, count, width), table) if learned else nnx.data(None)
        arguments = {"num_heads": heads, "causal": False}
        if mixer == "dot_product_attention":
            arguments |= {"dropout": attention_dropout, "out_bias": True}
        arguments |= mixer_args or {}
        rates = np.linspace(0, stochastic_depth, layers)
        self.blocks = nnx.List(
            [
                EncoderBlock(
                    make_mixer(mixer, width, arguments, build, depth=depth, context=count),
                    MLP(width, width * ratio, "gelu", bias=True, build=build),
                    [build.layer_norm(width), build.layer_norm(width)],
                    float(rate),
                )
                for depth, rate in enumerate(rates)
            ]
        )
        self.norm = build.layer_norm(width)
        self.pool = nnx.data(None) if class_token else SequencePool(width, build=build)
        self.head = build.linear(width, num_classes, True)

    def __call__(
        self, images: jax.Array, *, capture: Sequence[str] = (), rngs: nnx.Rngs | None = None
    ):
        """Class logits `[B, num_classes]` in float32 of images `[B, Y, X, C]`, normalised.

        `capture` may hold "attention_weights" (`[B, H, N, N]` a layer); `rngs` turns dropout and
        stochastic depth on. Returns the logits and a dictionary with what was captured.
        """
        unknown = sorted(set(capture) - {"attention_weights"})
        if unknown:
            raise ValueError(f"capture must be of attention_weights, got {unknown}")
        out: dict[str, list[jax.Array]] = {name: [] for name in capture}
        x = self.tokenizer(images.astype(self.dtype))
        if self.class_token is not None:
            token = jnp.broadcast_to(self.class_token[...], (x.shape[0], 1, x.shape[2]))
            x = jnp.concatenate([token.astype(x.dtype), x], 1)
        if self.position is None:
            x = x + sine_positions(x.shape[1], x.shape[2]).astype(x.dtype)
        elif self.position.shape[1] != x.shape[1]:
            raise ValueError(
                f"images of shape {images.shape} give {x.shape[1]} tokens, the model has positions "
                f"for {self.position.shape[1]}"
            )
        else:
            x = x + self.position[...].astype(x.dtype)
        x = dropout(x, self.dropout, rngs)
        for block in self.blocks:
            if out:
                out["attention_weights"].append(block.mixer.weights(block.norm(x)))
            x = block(x, rngs)
        x = self.norm(x)
        x = x[:, 0] if self.pool is None else self.pool(x)
        return self.head(x).astype(jnp.float32), out


def CCT(name: str, **arguments: Any) -> CompactTransformer:
    """CCT-L/PxK, for example "7/3x1": L layers and K convolutions of size P."""
    layers, kernel, convs = _numbers(name, "L/PxK")
    return CompactTransformer(kind="cct", layers=layers, kernel=kernel, convs=convs, **arguments)


def CVT(name: str, **arguments: Any) -> CompactTransformer:
    """CVT-L/P, for example "7/4": L layers on patches of size P, pooled."""
    layers, kernel = _numbers(name, "L/P")
    return CompactTransformer(kind="cvt", layers=layers, kernel=kernel, **arguments)


def ViTLite(name: str, **arguments: Any) -> CompactTransformer:
    """ViT-Lite-L/P, for example "7/4": L layers on patches of size P and a class token."""
    layers, kernel = _numbers(name, "L/P")
    return CompactTransformer(kind="vit_lite", layers=layers, kernel=kernel, **arguments)


def _numbers(name: str, form: str) -> list[int]:
    parts = name.replace("x", "/").split("/")
    if len(parts) != form.count("/") + form.count("x") + 1 or not all(p.isdigit() for p in parts):
        raise ValueError(f"name must have the form {form}, got {name!r}")
    return [int(p) for p in parts]


def sine_positions(length: int, width: int) -> jax.Array:
    """Fixed positions `[1, length, width]`: sines on even and cosines on odd channels."""
    channel = np.arange(width)
    angle = np.arange(length)[:, None] / 10000 ** (2 * (channel // 2) / width)
    return jnp.asarray(np.where(channel % 2, np.cos(angle), np.sin(angle)))[None]


def drop_path(x: jax.Array, rate: float, rngs: nnx.Rngs | None) -> jax.Array:
    """Drops whole examples of a branch with probability `rate`; None keeps all."""
    if rngs is None or not rate:
        return x
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    keep = jax.random.bernoulli(rngs.dropout(), 1 - rate, shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
