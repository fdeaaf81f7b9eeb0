import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from attn_lab.nn import GatedLinearAttention
from attn_lab.objectives import expand_initial_state


def make(**arguments):
    build = dict(rngs=nnx.Rngs(0), kernel_init=nnx.initializers.normal(0.5))
    return GatedLinearAttention(8, num_heads=2, **build | arguments)


def test_the_first_state_is_the_product_of_its_factors():
    mixer, x = make(learned_initial_state=True), jax.random.normal(jax.random.key(1), (3, 5, 8))
    run = nnx.jit(lambda mixer, x: mixer(x))
    a, b = mixer.start["a"], mixer.start["b"]
    assert (a.shape, b.shape) == ((2, 2, 1), (2, 1, 4)) and jnp.abs(a[...]).max() < 0.1
    a[...], b[...] = 30 * a[...], 30 * b[...]
    cache = mixer.init_cache(3, 5)
    state = expand_initial_state(a[...], b[...], 3)
    np.testing.assert_allclose(cache["state"], state, rtol=1e-6)
    np.testing.assert_allclose(run(mixer, x), mixer(x, cache=cache)[0], rtol=1e-5, atol=1e-5)
    learned = run(mixer, x)
    a[...] = 0 * a[...]
    assert jnp.abs(learned - run(mixer, x)).max() > 1e-2
    plain = make()
    nnx.update(plain, nnx.filter_state(nnx.state(mixer), _rest))
    np.testing.assert_allclose(run(mixer, x), run(plain, x), rtol=1e-6)
    with pytest.raises(ValueError, match="segment_ids need learned_initial_state=False"):
        mixer(x, segment_ids=jnp.zeros((3, 5), int))


def _rest(path, value):
    return "start" not in path


def test_initial_states_can_be_trained_alone():
    """Adam behind a mask of paths moves them and nothing else, and finds another state."""
    mixer, x = make(learned_initial_state=True), jax.random.normal(jax.random.key(1), (4, 6, 8))
    graph, params, rest = nnx.split(mixer, nnx.Param, ...)
    other = nnx.clone(mixer)
    for factor in other.start.values():
        factor[...] = 50 * factor[...]
    wanted = other(x)

    def loss(params):
        return jnp.mean((nnx.merge(graph, params, rest)(x) - wanted) ** 2)

    def labels(params):
        def label(path, _):
            return "tuned" if "start" in jax.tree_util.keystr(path) else "frozen"

        return jax.tree_util.tree_map_with_path(label, params)

    optimizer = optax.partition({"tuned": optax.adam(0.1), "frozen": optax.set_to_zero()}, labels)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    before, state, values = params, optimizer.init(params), []
    for _ in range(30):
        params, state, value = step(params, state)
        values.append(float(value))
    changes = jax.tree.map(lambda x, y: jnp.abs(x - y).max(), params, before)
    moved = {path for path, x in nnx.to_flat_state(changes) if x[...] > 0}
    every = {path for path, _ in nnx.to_flat_state(params)}
    assert moved == {path for path in every if "start" in path} and len(moved) == 2
    assert values[-1] < values[0] / 4
