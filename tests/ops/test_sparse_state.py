import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab import ops

SWITCHES = "num_write", "num_read", "gate_write", "gate_read", "return_state"
expand = jax.jit(ops.sparse_state_expansion, static_argnames=SWITCHES)
gla = jax.jit(ops.gated_linear_attention, static_argnames=("return_state",))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want, tolerance=1e-9):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def arrays(length=11, heads=2, partitions=3, dim=4, v_dim=3):
    qkv = (normal(n, 2, length, heads, d) for n, d in enumerate((dim, dim, v_dim)))
    log_decay = jax.nn.log_sigmoid(normal(3, 2, length, heads, dim))
    return *qkv, log_decay, normal(4, 2, length, partitions)


def test_a_sparse_key_keeps_the_largest_shares():
    logits = jnp.array([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    shares = jax.nn.softmax(logits)
    close(ops.row_sparse_key(logits, top_k=1) > 0, [[0, 1, 0, 0], [1, 0, 0, 0]])
    close(ops.row_sparse_key(logits, top_k=2)[0], shares[0] * jnp.array([0, 1, 1, 0]), 1e-6)
    close(ops.row_sparse_key(logits, top_k=4), shares, 1e-6)
    assert ops.row_sparse_key(logits.astype(jnp.bfloat16), top_k=2).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="top_k must be between 1 and 4, got 5"):
        ops.row_sparse_key(logits, top_k=5)


@pytest.mark.parametrize("scalar", [False, True])
def test_one_partition_is_gated_linear_attention_and_all_are_so_many(scalar, x64):
    q, k, v, log_decay, logits = arrays()
    log_decay = log_decay[..., 0] if scalar else log_decay
    want, state = gla(q, k, v, log_decay, return_state=True)
    one, got = expand(q, k, v, log_decay, logits[..., :1], return_state=True)
    close(one, want)
    close(got[:, 0], state)
    every = dict(num_write=3, num_read=3, gate_write=False, gate_read=False)
    close(expand(q, k, v, log_decay, logits, **every), 3 * want)


def test_a_state_holds_what_its_own_tokens_write(x64):
    """The tokens of a partition alone, in order, give its state: the sorted form."""
    q, k, v, log_decay, logits = arrays()
    start = normal(5, 2, 3, 2, 4, 3)
    part = dict(initial_state=start, return_state=True)
    _, states = expand(q, k, v, log_decay, logits, **part)
    shares = jax.nn.softmax(logits)
    picked = np.asarray(logits.argmax(-1))
    for b, n in np.ndindex(2, 3):
        own = np.flatnonzero(picked[b] == n)
        want = start[b, n]
        if len(own):
            tokens = (x[b : b + 1, own] for x in (q, shares[..., n][..., None, None] * k, v))
            state = start[b : b + 1, n]
            want = gla(*tokens, log_decay[b : b + 1, own], initial_state=state, return_state=True)[
                1
            ][0]
        close(states[b, n], want)
    never = logits.at[..., 1].set(-50)
    assert (expand(q, k, v, log_decay, never, **part)[1][:, 1] == start[:, 1]).all()


@pytest.mark.parametrize("delta", [False, True])
def test_a_call_in_two_parts_is_one(delta, x64):
    q, k, v, log_decay, logits = arrays()
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    beta = jax.nn.sigmoid(normal(6, 2, 11, 2)) if delta else None
    inputs = [q, k, v, log_decay[..., 0], logits]
    settings = dict(num_write=2, num_read=1, return_state=True)
    want, last = expand(*inputs, **settings, beta=beta)
    outs, state = [], None
    for part in slice(0, 10), slice(10, 11):
        own = None if beta is None else beta[:, part]
        out, state = expand(
            *(x[:, part] for x in inputs), **settings, beta=own, initial_state=state
        )
        outs.append(out)
    close(jnp.concatenate(outs, 1), want)
    close(state, last)


def test_forgetting_everything_leaves_other_states_alone(x64):
    q, k, v, log_decay, logits = arrays(length=3)
    gone = jnp.full_like(log_decay, -jnp.inf)

    def loss(logits, log_decay):
        out, state = expand(q, k, v, log_decay, logits, return_state=True)
        return jnp.sum(out) + jnp.sum(state)

    slopes = jax.jit(jax.grad(loss, (0, 1)))(logits, gone)
    assert jax.tree.all(jax.tree.map(lambda x: jnp.isfinite(x).all(), slopes))
    assert (slopes[0] != 0).any()


def test_errors_name_the_argument():
    q, k, v, log_decay, logits = arrays()
    with pytest.raises(ValueError, match="num_read must be between 1 and 3, got 4"):
        ops.sparse_state_expansion(q, k, v, log_decay, logits, num_read=4)
    with pytest.raises(ValueError, match=r"router_logits must be \[B, T, N\]"):
        ops.sparse_state_expansion(q, k, v, log_decay, logits[:, 1:])
    with pytest.raises(ValueError, match=r"initial_state must be \[B, N, H, D, Dv\]"):
        ops.sparse_state_expansion(
            q, k, v, log_decay, logits, initial_state=jnp.zeros((2, 2, 3, 4, 3))
        )
