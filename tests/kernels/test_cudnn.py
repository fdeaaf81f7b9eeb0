"""What cuDNN is given, with XLA in its place; the kernels themselves need a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_kernels.attention import Mask, ScoreMod, attention, sigmoid, softmax_with_sink
from attn_lab import ops
from attn_lab.ops.masks import as_mask


@pytest.fixture
def given(monkeypatch):
    """The keywords of the calls."""
    calls, whole = [], jax.nn.dot_product_attention

    def fixed(*arrays, **keywords):
        assert keywords.pop("implementation") == "cudnn"
        calls.append(keywords)
        return whole(*arrays, **keywords)

    monkeypatch.setattr(jax.nn, "dot_product_attention", fixed)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    return calls


def arrays(q_len=24, k_len=24, dtype=jnp.bfloat16, dims=(8, 8), heads=(4, 2, 2)):
    shapes = [(q_len, heads[0], dims[0]), (k_len, heads[1], dims[0]), (k_len, heads[2], dims[1])]
    return [
        jax.random.normal(jax.random.key(n), (2, *shape), dtype) for n, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize(
    ("mask", "keywords"),
    [
        (None, dict(is_causal=False, local_window_size=None)),
        (ops.causal_mask(), dict(is_causal=True, local_window_size=None)),
        (ops.sliding_window_mask(5, 0), dict(is_causal=True, local_window_size=(5, 0))),
        (as_mask(ops.sliding_window_mask(5, 3), True), dict(local_window_size=(5, 0))),
        (ops.sliding_window_mask(9, -1) & ops.sliding_window_mask(7, 0), dict(is_causal=True)),
    ],
)
def test_masks_are_those_of_the_definition(mask, keywords, given):
    def loss(implementation, q, k, v):
        out = attention(q, k, v, mask=mask, scale=0.3, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) ** 2), out

    def both(implementation):
        function = functools.partial(loss, implementation)
        return jax.grad(function, argnums=(0, 1, 2), has_aux=True)(*arrays())

    (found, out), (want, exact) = both("cudnn"), both("definition")
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (out, exact)), atol=0.02)
    for a, b in zip(found, want):
        np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (a, b)), atol=0.1, rtol=0.05)
    assert keywords.items() <= given[0].items() and given[0]["scale"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": ops.sliding_window_mask(3, 1)}, "mask is None, or a causal window"),
        ({"mask": ~ops.causal_mask()}, "mask is None, or a causal window"),
        ({"mask": ops.causal_mask() | ops.sliding_window_mask(3, 0)}, "mask is None"),
        ({"mask": Mask(lambda b, h, q, k: q >= k)}, "mask is None"),
        ({"mask": ops.causal_mask(), "k_len": 32}, "as many queries as keys"),
        ({"score_mod": ScoreMod(lambda s, b, h, q, k: s - k)}, "unmodified inner products"),
        ({"normalizer": sigmoid}, "the normalizer is softmax"),
        ({"normalizer": softmax_with_sink(jnp.zeros(4))}, "softmax without a sink"),
        ({"dtype": jnp.float32}, r"bfloat16 or all in float16, got \['float32'\]"),
        ({"dims": (8, 16)}, "same heads and dimensions"),
        ({"heads": (4, 2, 4)}, "same heads and dimensions"),
        ({"scale": jnp.float32(2)}, "scale is a number"),
        ({"return_stats": True}, "return_stats"),
    ],
)
def test_what_it_lacks_is_refused(changes, message, given):
    shape = {n: changes.pop(n) for n in ("k_len", "dtype", "dims", "heads") if n in changes}
    with pytest.raises(NotImplementedError, match=message):
        attention(*arrays(**shape), implementation="cudnn", **changes)
    assert not given


def test_a_gpu_is_needed():
    with pytest.raises(NotImplementedError, match="needs a GPU, this is a cpu"):
        attention(*arrays(), implementation="cudnn")
