import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab import ops
from attn_lab.catalogue import find
from attn_lab.nn import MIXERS, Build, find_mixer, make_mixer
from experiments.configs.recall import RECURRENT

WIDTH = 16
# of the mixers of `experiments.recall`'s preset, those that keep every token
GROWING = {
    "adaptive_filter_attention",
    "hyena",
    "local_linear_attention",
    "mega",
    "megalodon",
    "selective_lookup",
}
CASES = [(name, {}) for name, kind in MIXERS.items() if kind.decodes] + [
    ("dot_product_attention", {"window": 3, "rope_theta": 100.0, "num_kv_heads": 2}),
    ("dot_product_attention", {"qk_norm": "rms", "bias": True, "out_bias": True, "value_dim": 6}),
    ("neighborhood_attention", {"window": 3, "dilation": 2, "rope_theta": 100.0}),
    ("sink_attention", {"kind": "key"}),
    ("sink_attention", {"kind": "key_value"}),
    ("gated_attention", {"position": "G2", "granularity": "headwise"}),
    ("gated_attention", {"position": "G3", "activation": "ns_sigmoid"}),
    ("gated_attention", {"position": "G4", "num_kv_heads": 2}),
    ("gated_attention", {"position": "G5", "mode": "add", "activation": "silu"}),
    ("gated_attention", {"head_specific": False}),
    ("differential_attention", {"num_noise_heads": 2, "num_kv_heads": 2, "depth": 3}),
    ("differential_qkv_attention", {"key_dim": 2, "num_key_heads": 2}),
    ("long_short_attention", {"num_local_heads": 3, "window": 3, "num_kv_heads": 2}),
    ("compressed_convolutional_attention", {"num_kv_heads": 2, "head_dim": 4, "query_kernel": 3}),
    ("lean_attention", {"kind": "efficient"}),
    ("lean_attention", {"kind": "super", "num_heads": 2}),
    ("head_embedding", {"mode": "add", "rope_theta": 100.0, "num_kv_heads": 2}),
    ("linear_attention", {"feature_map": "taylor2", "short_conv": 3, "output_gate": "swish"}),
    ("retention", {"short_conv": 2, "expand_v": 1.0, "gate": None}),
    (
        "gated_linear_attention",
        {"gate": "scalar", "short_conv": 4, "qk_norm": "l2", "activation": "silu"},
    ),
    ("gated_linear_attention", {"learned_initial_state": True}),
    ("sparse_state_expansion", {"base": "gdn", "num_write": 2, "head_dim": 6}),
    ("delta_rule", {"allow_neg_eigval": True, "output_gate": True, "short_conv": None}),
    ("delta_rule", {"beta": False}),
    ("gated_delta_rule", {"num_heads": 2, "head_dim": 4, "expand_v": 1.0}),
    ("lightning_attention", {"depth": 1, "num_layers": 2, "hidden_dim": 8, "act": "elu1"}),
    ("block_diagonal_attention", {"block_size": 3, "num_kv_heads": 2, "rope_theta": 100.0}),
    ("ssd", {"ngroups": 2, "expand": 3, "d_conv": 2}),
    ("linear_log_normal_diag_attention", {"block_size": 3, "learned": True, "num_kv_heads": 2}),
    ("base_conv", {"activation": "silu"}),
    ("base_conv", {"kernel_size": -1}),
    ("h3", {"head_dim": 2, "d_state": 12}),
    ("mega", {"chunk_size": 3, "attention": "laplace", "rel_pos": "rotary", "prenorm": False}),
    ("mixed_chunk_attention", {"group_size": None, "scale_std": 1.0}),
]
DEFAULTS = {
    "gated_associative_memory": {"num_slots": 5},
    "grassmann_mixing": {"reduced_dim": 4, "offsets": (1, 3, 7)},
    "mixed_chunk_attention": {"group_size": 4, "qk_dim": 8, "scale_std": 0.5},
    "h3": {"d_state": 4},
    "hyena": {"filter_order": 8},
    "gated_delta_rule": {"num_heads": 4},
    "linformer_attention": {"proj_len": 4},
    "kv_gated_linear_attention": {"num_tokens": 9, "grid": (2, 3)},
    "mega": {"z_dim": 4, "ema_dim": 2},
    "megalodon": {"z_dim": 8, "ema_dim": 2, "num_groups": 2, "chunk_size": 3},
    "neural_memory_mlp": {"chunk_size": 3},
    "ssd": {"d_state": 6, "headdim": 8},
}
WITHOUT_EFFECT = {("mlp_score_attention", "network", 2, "bias")}  # a constant in a softmax
cases = pytest.mark.parametrize(
    ("name", "arguments"), CASES, ids=[f"{n}-{'-'.join(map(str, a.values()))}" for n, a in CASES]
)


def make(name, arguments, **build):
    build = {"kernel_init": nnx.initializers.normal(0.5)} | build
    arguments = DEFAULTS.get(name, {}) | arguments
    return make_mixer(name, WIDTH, arguments, Build(nnx.Rngs(0), **build), context=9)


@pytest.mark.parametrize("causal", [True, False])
def test_neighborhoods_are_those_of_the_operator(causal):
    arguments = {"window": 3, "dilation": 2, "causal": causal}
    mixer, x = make("neighborhood_attention", arguments), tokens()
    q, k, v, _, _ = mixer._inputs(x, None, None)
    want = ops.neighborhood_attention(q, k, v, kernel=3, dilation=2, causal=causal)
    close(mixer(x), mixer._project(want, x))


def tokens(length=9, batch=2):
    return jax.random.normal(jax.random.key(length), (batch, length, WIDTH))


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


@cases
def test_decoding_equals_one_call(name, arguments):
    """A prefill of four tokens and then one at a time; the cache keeps its shapes and dtypes."""
    mixer, x = make(name, arguments), tokens()
    want = nnx.jit(lambda mixer, x: mixer(x))(mixer, x)
    advance = nnx.jit(lambda mixer, x, cache: mixer(x, cache=cache))
    cache = mixer.init_cache(2, 11)
    first, cache = advance(mixer, x[:, :4], cache)
    parts = [first]
    for t in range(4, 9):
        y, new = advance(mixer, x[:, t : t + 1], cache)
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, cache)
        cache = new
        parts.append(y)
    close(jnp.concatenate(parts, 1), want)


@cases
def test_late_tokens_have_exactly_no_influence_on_early_outputs(name, arguments):
    mixer, x = make(name, arguments), tokens(7, 1)
    slopes = nnx.jit(lambda mixer, x: jax.jacrev(lambda x: mixer(x)[:, :3].sum((0, 2)))(x))(
        mixer, x
    )
    if arguments.get("kernel_size") == -1 or name in ("h3", "hyena"):
        close(slopes[..., 3:, :], jnp.zeros_like(slopes[..., 3:, :]))  # an FFT rounds across time
    else:
        assert (slopes[..., 3:, :] == 0).all()
    assert (slopes[..., :3, :] != 0).any()


@cases
def test_segments_of_a_packed_row_are_apart(name, arguments):
    mixer, x = make(name, arguments), tokens(8)
    ids = jnp.array([[0] * 4 + [1] * 4, [0] * 4 + [2] * 4])
    if not mixer.packs:
        with pytest.raises(ValueError, match="segment_ids need"):
            mixer(x, segment_ids=ids)
        return
    run = nnx.jit(lambda mixer, x, ids: mixer(x, segment_ids=ids))
    packed, alone = run(mixer, x, ids), nnx.jit(lambda mixer, x: mixer(x))
    close(packed[:, :4], alone(mixer, x[:, :4]))
    if name != "retention":  # its rotary angles are relative, so the second segment agrees too
        assert not np.allclose(packed[:, 4:], run(mixer, x, 0 * ids)[:, 4:], atol=1e-3)
    close(packed[:, 4:], alone(mixer, x[:, 4:]))
    with pytest.raises(ValueError, match="exclude each other"):
        mixer(x, segment_ids=ids, cache=mixer.init_cache(2, 9))


@cases
def test_every_parameter_gets_a_finite_gradient(name, arguments):
    mixer, x = make(name, arguments), tokens()
    grads = nnx.jit(nnx.grad(lambda mixer: jnp.sum(jnp.sin(mixer(x)))))(mixer)
    for path, grad in nnx.to_flat_state(grads):
        assert jnp.isfinite(grad[...]).all(), path
        assert (grad[...] != 0).any() or (name, *path) in WITHOUT_EFFECT, path


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_bfloat16_computes_and_float32_is_kept(name):
    arguments = {} if MIXERS[name].decodes else {"causal": False}
    mixer = make(name, arguments, dtype=jnp.bfloat16)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(nnx.state(mixer, nnx.Param)))
    x = tokens().astype(jnp.bfloat16)
    call = nnx.jit(lambda mixer, x: mixer(x))
    y = call(mixer, x)
    assert y.dtype == jnp.bfloat16 and jnp.isfinite(y).all()
    exact = call(make(name, arguments), x.astype(jnp.float32))
    assert jnp.abs(y - exact).max() < 0.1 * jnp.abs(exact).max()
    if not mixer.decodes:
        return
    step, _ = nnx.eval_shape(lambda: mixer(x[:, :1], cache=mixer.init_cache(2, 4, jnp.bfloat16)))
    assert step.dtype == jnp.bfloat16


def test_weights_are_those_of_the_call():
    x = tokens()
    for name in ("dot_product_attention", "sink_attention", "differential_attention"):
        weights = make(name, {}).weights(x)
        assert weights.shape == (2, 4, 9, 9) and (jnp.triu(weights, 1) == 0).all()
    weights = make("dot_product_attention", {"window": 3}).weights(x)
    close(weights.sum(-1), 1)
    assert ((weights > 0).sum(-1) <= 3).all()
    with pytest.raises(ValueError, match="DeltaNet has no attention weights"):
        make("delta_rule", {}).weights(x)


def test_dropout_acts_only_with_keys_and_keeps_the_mean():
    mixer, x = make("dot_product_attention", {"dropout": 0.5}), tokens()
    want = mixer(x)
    close(mixer(x), want)
    many = jax.vmap(lambda key: mixer(x, rngs=nnx.Rngs(dropout=key)))(
        jax.random.split(jax.random.key(0), 2000)
    )
    assert jnp.abs(many[0] - want).max() > 0.1
    assert jnp.abs(many.mean(0) - want).max() < 0.1 * jnp.abs(many - want).max()


def test_state_bytes():
    mixer = make("dot_product_attention", {})
    assert mixer.state_bytes(100) == 4 * 2 * WIDTH * 100
    assert make("dot_product_attention", {"window": 8}).state_bytes(100) == 4 * 2 * WIDTH * 8
    assert make("delta_rule", {"short_conv": None}).state_bytes(100) == 4 * WIDTH * WIDTH // 4
    assert make("base_conv", {}).state_bytes(100) == 4 * 3 * WIDTH
    assert make("base_conv", {"kernel_size": -1}).state_bytes(100) == 4 * 100 * WIDTH


@pytest.mark.parametrize("name", sorted(set(RECURRENT) - GROWING))
def test_recurrent_mixers_decode_in_constant_memory(name):
    mixer = make(name, {})
    short, long = (jax.tree.map(jax.typeof, mixer.init_cache(2, n)) for n in (8, 4096))
    assert short == long
    assert 0 < mixer.state_bytes(8) == mixer.state_bytes(4096)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("atention", {}, "'atention' is unknown; choose one of dot_product_attention"),
        ("dot_product_attention", {"heads": 2}, "takes no heads; it takes"),
        ("dot_product_attention", {"num_heads": 3}, "num_heads=3 must divide the width 16"),
        ("dot_product_attention", {"num_kv_heads": 3}, "3 must divide the number of query heads"),
        ("dot_product_attention", {"window": 0}, "window must be at least 1"),
        ("dot_product_attention", {"qk_norm": "l1"}, "qk_norm must be None or 'rms'"),
        ("sigmoid_attention", {"dropout": 0.1}, "needs plain softmax"),
        ("sink_attention", {"dropout": 0.1}, "needs plain softmax"),
        ("sink_attention", {"kind": "value"}, "kind must be one of"),
        ("gated_attention", {"position": "G6"}, "position must be one of G1"),
        ("gated_attention", {"position": "G5", "granularity": "headwise"}, "headwise"),
        ("differential_attention", {"num_noise_heads": 3}, "num_noise_heads"),
        (
            "differential_attention",
            {"num_heads": 30, "head_dim": 2, "num_kv_heads": 15, "num_noise_heads": 15},
            "noise key heads",
        ),
        ("delta_rule", {"num_heads": 3}, "must divide the key width 16"),
        ("linear_attention", {"feature_map": "cos"}, "feature_map must be one of"),
        ("gated_linear_attention", {"gate": "vector"}, "gate must be 'channel' or 'scalar'"),
        ("base_conv", {"kernel_size": 0}, "kernel_size must be positive"),
    ],
)
def test_errors_name_the_argument(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(name, arguments)


def test_a_full_cache_is_not_silent():
    for name, arguments in ("dot_product_attention", {}), ("base_conv", {"kernel_size": -1}):
        mixer, x = make(name, arguments), tokens()
        with pytest.raises(ValueError, match="length 8 cannot take 9 tokens"):
            mixer(x, cache=mixer.init_cache(2, 8))
        _, cache = mixer(x[:, :8], cache=mixer.init_cache(2, 8))
        assert jnp.isnan(mixer(x[:, 8:], cache=cache)[0]).all()


def test_decoding_needs_causality():
    mixer = make("dot_product_attention", {"causal": False})
    with pytest.raises(ValueError, match="cache needs causal=True"):
        mixer(tokens(), cache=mixer.init_cache(2, 9))


def test_mixers_have_the_names_of_the_catalogue():
    for name in MIXERS:
        assert find(name).name == name and find_mixer(name) is MIXERS[name]


def test_every_mixer_can_be_made_without_computing_and_be_compiled_for():
    for name, kind in MIXERS.items():
        arguments = {} if kind.decodes else {"causal": False}
        mixer = nnx.eval_shape(lambda name=name, arguments=arguments: make(name, arguments))
        assert hash(nnx.graphdef(mixer)), name  # what does not change is an argument of `jax.jit`
