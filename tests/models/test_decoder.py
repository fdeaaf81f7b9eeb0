import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab.models import DecoderLM, count_parameters, generate
from attn_lab.models.decoder import Block
from attn_lab.models.generate import restrict


def model(**changes):
    settings = dict(vocab_size=23, width=16, num_layers=2, max_len=24, init_std=0.3)
    return DecoderLM(**settings | changes, rngs=nnx.Rngs(0))


def tokens(length=10):
    return jax.random.randint(jax.random.key(length), (2, length), 0, 23)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixers": ["delta_rule", "dot_product_attention"], "mixer_args": [{}, {"window": 3}]},
        {"mlp": "swiglu", "norm": "rms", "positions": None, "tied": False},
        {"mlp": "identity", "mixers": "base_conv", "bias": False},
        {"mlp": None, "mixer_args": {"rope_theta": 1e4}, "positions": None},
    ],
)
def test_decoding_equals_one_call_and_segments_are_apart(changes):
    lm, ids = model(**changes), tokens()
    want = lm(ids)[0]
    assert want.shape == (2, 10, 23) and want.dtype == jnp.float32
    logits, _, cache = lm(ids[:, :6], cache=lm.init_cache(2, 12))
    last, _, _ = lm(ids[:, 6:], cache=cache)
    close(jnp.concatenate([logits, last], 1), want)
    segments = jnp.array([[0] * 4 + [1] * 6] * 2)
    packed = lm(ids, segment_ids=segments)[0]
    close(packed, jnp.concatenate([lm(ids[:, :4])[0], lm(ids[:, 4:])[0]], 1))


def test_logits_at_positions_are_those_logits():
    lm, ids = model(), tokens()
    at = jnp.array([[0, 5, 9], [2, 2, 7]])
    want = jnp.take_along_axis(lm(ids)[0], at[..., None], 1)
    close(lm(ids, at=at)[0], want)


def test_identity_mlp_adds_the_norm_to_the_stream():
    lm = model(mlp="identity", num_layers=1, positions=None)
    block, x = lm.blocks[0], jax.random.normal(jax.random.key(0), (1, 4, 16))
    middle = x + block.mixer(block.mixer_norm(x))
    close(block(x)[0], middle + block.mlp_norm(middle))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputed_blocks_have_the_same_gradients(dropout):
    tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, 7)

    def gradients(remat):
        arguments = dict(vocab_size=7, width=8, num_layers=2, max_len=8, residual_dropout=dropout)
        model = DecoderLM(**arguments, remat=remat, rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(model)

        def loss(params):
            logits, _ = nnx.merge(graphdef, params)(tokens, rngs=nnx.Rngs(3))
            return (logits**2).sum()

        lowered = jax.jit(jax.grad(loss)).lower(params)
        return lowered.cost_analysis()["flops"], lowered.compile()(params)

    (few, kept), (more, recomputed) = map(gradients, (False, True))
    assert few < more
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), kept, recomputed
    )


@pytest.mark.parametrize("remat, unroll", [(False, 1), (True, 1), (True, 2), (False, 3)])
def test_blocks_as_one_loop_have_the_same_gradients(remat, unroll):
    ids = tokens()

    def gradients(scan):
        arguments = {"mixers": "gated_linear_attention", "num_layers": 3}
        loop = {"scan": True, "unroll": unroll} if scan else {}
        graphdef, params = nnx.split(model(**arguments, **loop, remat=remat))

        def loss(params):
            return (nnx.merge(graphdef, params)(ids)[0] ** 2).mean()

        found = [eqn.params.get("length") for eqn in jax.make_jaxpr(loss)(params).eqns]
        return jax.jit(jax.value_and_grad(loss))(params), 3 in found

    (want, unrolled), (got, looped) = map(gradients, (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, want)
    assert looped and not unrolled


@pytest.mark.parametrize("remat", [False, True])
def test_blocks_without_a_loop_are_traced_once(remat, monkeypatch):
    traced, call = [], Block.__call__
    monkeypatch.setattr(Block, "__call__", lambda *a, **kw: traced.append(a) or call(*a, **kw))

    def numbers(**changes):
        graphdef, params = nnx.split(model(num_layers=3, **changes))

        def loss(params):
            return (nnx.merge(graphdef, params)(tokens())[0] ** 2).mean()

        traced.clear()
        program = jax.jit(jax.grad(loss)).lower(params).compile()
        return len(traced), program.as_text().count("while("), program.cost_analysis()["flops"]

    once, loops, flops = numbers(scan=True, unroll=3, remat=remat)
    assert once == 1 and loops == numbers(remat=remat)[1]
    calls, _, least = numbers()
    assert calls == 3 and flops == pytest.approx(1.7 * least if remat else least, rel=0.01)


def test_dropout_in_a_loop_is_a_function_of_the_key():
    lm = model(scan=True, residual_dropout=0.5)
    first, again, other = (lm(tokens(), rngs=nnx.Rngs(n))[0] for n in (0, 0, 1))
    close(first, again)
    assert not np.allclose(first, other)


def test_blocks_that_differ_cannot_be_one_loop():
    with pytest.raises(ValueError, match="scan needs blocks with the same mixer"):
        model(mixers=["base_conv", "dot_product_attention"], scan=True)
    with pytest.raises(ValueError, match="unroll must be 1, or more of blocks that scan runs, got"):
        model(unroll=2)


def test_parameter_counts():
    """GPT-2's 124M: 12 layers of width 768, tied."""

    def gpt2():
        arguments = {"num_heads": 12, "bias": True, "out_bias": True}
        settings = dict(vocab_size=50257, width=768, num_layers=12, max_len=1024)
        return DecoderLM(**settings, mixer_args=arguments, rngs=nnx.Rngs(0))

    assert count_parameters(nnx.eval_shape(gpt2)) == 124_439_808


def test_initial_scale_of_projections_to_the_stream():
    lm = model(width=64, num_layers=8, init_std=0.02)
    block = lm.blocks[3]
    assert abs(block.mlp.up.kernel[...].std() / 0.02 - 1) < 0.05
    assert abs(block.mlp.down.kernel[...].std() / 0.005 - 1) < 0.05
    assert abs(block.mixer.out.kernel[...].std() / 0.005 - 1) < 0.05


def test_capture():
    lm, ids = model(), tokens()
    logits, out = lm(ids, capture=("attention_weights", "scores", "residual_norms"))
    close(logits, lm(ids)[0])
    assert [w.shape for w in out["attention_weights"]] == [(2, 4, 10, 10)] * 2
    close(out["attention_weights"][1].sum(-1), jnp.ones((2, 4, 10)))
    close(jax.nn.softmax(out["scores"][1]), out["attention_weights"][1])
    assert len(out["residual_norms"]) == 3 and lm(ids)[1] == {}
    with pytest.raises(ValueError, match="capture must be of"):
        lm(ids, capture=("weights",))
    with pytest.raises(ValueError, match="DeltaNet has no attention weights"):
        model(mixers="delta_rule")(ids, capture=("attention_weights",))


def test_dropout_needs_keys_and_bfloat16_keeps_float32_parameters():
    ids = tokens()
    for rates in ({"dropout": 0.5}, {"residual_dropout": 0.5}, {"mixer_args": {"dropout": 0.5}}):
        lm = model(**rates)
        close(lm(ids)[0], model()(ids)[0])
        assert not np.allclose(lm(ids, rngs=nnx.Rngs(dropout=1))[0], lm(ids)[0])
    half = model(dtype=jnp.bfloat16)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(nnx.state(half, nnx.Param)))
    assert half(ids)[0].dtype == jnp.float32
    assert jnp.abs(half(ids)[0] - model()(ids)[0]).max() < 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixers": "softmax"}, "mixer 'softmax' is unknown"),
        ({"mixers": ["delta_rule"]}, "mixers must be one, or 2"),
        ({"mixer_args": [{}] * 3}, "mixer_args must be one, or 2"),
        ({"mixer_args": {"num_heads": 5}}, "num_heads=5 must divide"),
        ({"mlp": "relu"}, "mlp must be one of"),
        ({"norm": "batch"}, "norm must be one of"),
        ({"positions": "sine"}, "positions must be one of"),
    ],
)
def test_errors_name_the_argument(changes, message):
    with pytest.raises(ValueError, match=message):
        model(**changes)


def test_sequences_beyond_max_len_are_refused():
    with pytest.raises(ValueError, match="length 25, but max_len is 24"):
        model()(tokens(25))
    with pytest.raises(ValueError, match="length 25 exceeds max_len 24"):
        model().init_cache(1, 25)


def test_greedy_generation_is_the_argmax_of_full_calls():
    for mixers in ("dot_product_attention", "gated_delta_rule", "retention"):
        arguments = {"num_heads": 2}
        lm, prompt = model(mixers=mixers, mixer_args=arguments), tokens(5)
        got = generate(lm, prompt, max_new_tokens=6, key=jax.random.key(0), temperature=0.0)
        assert got.shape == (2, 11) and (got[:, :5] == prompt).all()
        predicted = lm(got)[0].argmax(-1)
        assert (predicted[:, 4:-1] == got[:, 5:]).all()


def test_restricted_sampling_stays_inside_and_follows_the_distribution():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1]))
    assert jnp.isfinite(restrict(logits, top_k=2)).tolist() == [True, True, False, False]
    assert jnp.isfinite(restrict(logits, top_p=0.7)).tolist() == [True, True, False, False]
    assert jnp.isfinite(restrict(logits, top_p=0.76)).tolist() == [True, True, True, False]
    assert jnp.isfinite(restrict(logits, top_p=0.01)).tolist() == [True, False, False, False]
    assert (restrict(logits, top_k=9, top_p=1.0) == logits).all()
    lm, prompt = model(), jnp.tile(tokens(5)[:1], (2000, 1))
    sample = generate(lm, prompt, max_new_tokens=1, key=jax.random.key(0), temperature=2.0)[:, -1]
    want = jax.nn.softmax(lm(prompt[:1])[0][0, -1] / 2.0)
    got = jnp.bincount(sample, length=23) / 2000
    assert jnp.abs(got - want).max() < 0.04
    few = generate(lm, prompt, max_new_tokens=1, key=jax.random.key(0), top_k=2)[:, -1]
    assert len(set(few.tolist())) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"max_new_tokens": 30}, "exceeds max_len"),
        ({"prompt": jnp.zeros((1, 0), int)}, "prompt must be"),
    ],
)
def test_generate_names_what_is_wrong(changes, message):
    arguments = dict(prompt=tokens(5), max_new_tokens=2, key=jax.random.key(0)) | changes
    with pytest.raises(ValueError, match=message):
        generate(model(), **arguments)
