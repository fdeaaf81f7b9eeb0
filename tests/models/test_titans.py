import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab.models import Titans
from attn_lab.nn import Build, MemoryAsContext, MemoryAsGate, MemoryAsLayer, make_mixer

WIDTH = 8
LAYERS = {
    MemoryAsContext: {"segment_len": 3},
    MemoryAsGate: {"window": 3},
    MemoryAsLayer: {"window": 3},
}
layers = pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)


def make(kind, **arguments):
    build = Build(nnx.Rngs(0), kernel_init=nnx.initializers.normal(0.5))
    memory = {"num_heads": 2, "chunk_size": 2, "depth": 1}
    arguments = LAYERS[kind] | dict(num_heads=2, num_persistent=2, memory_args=memory) | arguments
    return make_mixer(kind, WIDTH, arguments, build)


def tokens(length, batch=2):
    return jax.random.normal(jax.random.key(length), (batch, length, WIDTH))


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


@layers
def test_late_tokens_have_exactly_no_influence_and_every_parameter_some(kind):
    """On an output in the middle of a segment and of a chunk."""
    (graph, state), x = nnx.split(make(kind)), tokens(6, 1)
    run = lambda state, x: nnx.merge(graph, state)(x)[0, 3].sum()  # noqa: E731
    slopes, seen = jax.jit(jax.grad(run, (0, 1)))(state, x)
    assert (seen[0] != 0).any(-1).tolist() == [True] * 4 + [False] * 2
    for path, slope in nnx.to_flat_state(slopes):
        assert jnp.isfinite(slope[...]).all() and (slope[...] != 0).any(), path


@pytest.mark.parametrize(
    ("kind", "persistent"),
    [(MemoryAsContext, 2), (MemoryAsGate, 2), (MemoryAsLayer, 0)],
)
def test_decoding_equals_one_call(kind, persistent):
    mixer, x = make(kind, num_persistent=persistent), tokens(8)
    want = nnx.jit(lambda mixer, x: mixer(x))(mixer, x)
    advance = nnx.jit(lambda mixer, x, cache: mixer(x, cache=cache))
    cache, parts = nnx.jit(lambda mixer: mixer.init_cache(2, 8))(mixer), []
    for start, stop in (0, 4), (4, 5), (5, 6), (6, 7), (7, 8):
        y, new = advance(mixer, x[:, start:stop], cache)
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, cache)
        cache = new
        parts.append(y)
    close(jnp.concatenate(parts, 1), want)


@layers
def test_segments_are_refused(kind):
    with pytest.raises(ValueError, match="segment_ids need"):
        make(kind)(tokens(4), segment_ids=jnp.zeros((2, 4), int))


def test_the_layer_is_windowed_attention_after_the_memory():
    """Without persistent tokens."""
    mixer = make(MemoryAsLayer, num_persistent=0)
    plain = lambda mixer, x: (mixer(x), mixer.attention(mixer.memory(x)))  # noqa: E731
    close(*nnx.jit(plain)(mixer, tokens(7)))


def test_persistent_tokens_stay_visible():
    """With values of their own alone, they reach tokens far beyond the window."""
    mixer, x = make(MemoryAsGate), tokens(7)
    attend = lambda persistent: mixer.attention(  # noqa: E731
        jnp.concatenate([jnp.broadcast_to(persistent, (2, 2, WIDTH)), x], 1)
    )
    slopes = jax.jit(jax.grad(lambda p: attend(p)[0, -1].sum()))(mixer.persistent[...])
    assert (slopes != 0).all()


def test_a_memory_that_answers_nothing_leaves_attention_with_sinks():
    """Its keys and values are 0: a term of 1 under the softmax for every visible position."""
    mixer, x = make(MemoryAsContext, segment_len=5, num_persistent=0), tokens(5)
    mixer.memory.out.kernel[...] = jnp.zeros((WIDTH, WIDTH))
    q, k, v, _ = mixer.attention._heads(x, None, None)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / 2
    mass = jnp.tril(jnp.exp(scores))
    mass /= (mass + jnp.tril(jnp.ones((5, 5)))).sum(-1, keepdims=True)
    want = mixer.attention._project(jnp.einsum("bhts,bshd->bthd", mass, v), x)
    mixer._join = lambda y, m: y
    close(mixer(x), want)


@pytest.mark.parametrize("variant", ["mac", "mag", "mal"])
def test_models_have_the_layers_of_their_variant(variant):
    make = lambda: Titans(  # noqa: E731
        vocab_size=7, width=WIDTH, num_layers=2, variant=variant, rngs=nnx.Rngs(0)
    )
    names = {type(block.mixer).__name__ for block in nnx.eval_shape(make).blocks}
    assert names == {
        {"mac": "MemoryAsContext", "mag": "MemoryAsGate", "mal": "MemoryAsLayer"}[variant]
    }


def test_models_are_causal_in_their_tokens():
    size = dict(vocab_size=7, width=WIDTH, num_layers=1, num_heads=2, segment_len=3)
    model = Titans(**size, memory_args={"depth": 1}, rngs=nnx.Rngs(0))
    run = nnx.jit(lambda model, ids: model(ids)[0])
    ids = jax.random.randint(jax.random.key(0), (1, 7), 0, 7)
    logits, changed = run(model, ids), run(model, ids.at[:, 4:].set((ids[:, 4:] + 1) % 7))
    np.testing.assert_array_equal(logits[:, :4], changed[:, :4])
    assert (logits[:, 4:] != changed[:, 4:]).any(-1).all()


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="variant must be one of mac, mag, mal, got 'mat'"):
        Titans(num_layers=1, variant="mat")
