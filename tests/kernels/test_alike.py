import calls
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_kernels import gpu
from attn_kernels.attention import ScoreMod, operand
from attn_kernels.attention.alike import alike, answers, comparisons
from attn_kernels.attention.blocks import Blocks, using


def traced(function):
    closed = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct((2, 3), jnp.int32),) * 2)
    return closed.jaxpr, closed.consts, (0, 1)


@pytest.mark.parametrize(
    "function, count",
    [
        (lambda q, k: jnp.where(q - k >= 3, 1, jnp.where(2 * q < k - 1, 2, 0)), 2),
        (lambda q, k: jnp.where(jnp.maximum(q - k, 0).astype(jnp.float32) / 3 > 2.5, 1, 0), 1),
        (lambda q, k: (q - k).astype(jnp.float32) - k > 0, 1),
        (lambda q, k: ((q - k) / 3).astype(jnp.int32) > 2, 1),
        (lambda q, k: ((q - k) / 3).astype(jnp.int32) - k > 2, 0),
        (lambda q, k: jax.lax.div(q - k, 3) > 2, 1),
        (lambda q, k: 4 * jax.lax.div(q - k, 3) - q > 2, 0),
        (lambda q, k: jnp.abs(q - k) > 3, 0),
        (lambda q, k: q * k > 3, 0),
        (lambda q, k: q - jnp.minimum(k, 9) > 3, 0),
        (lambda q, k: 1 / (q - k) > 3, 0),
        (lambda q, k: (q - k == 3) & (jnp.sin(q) > k), 0),
    ],
)
def test_comparisons_with_lines(function, count):
    """Those, and no others: where corners of a tile agree, all of its pairs do."""
    jaxpr, _, positions = traced(function)
    assert len(comparisons(jaxpr, positions)) == count


@pytest.mark.parametrize("asked", [256, 20])
def test_marked_tiles_answer_like_their_pair(monkeypatch, asked):
    monkeypatch.setattr("attn_kernels.attention.alike.ASKED", asked)
    jaxpr, consts, positions = traced(
        lambda q, k: jnp.where(q - k > 20, 2, jnp.where(q - k >= -40, 1, 0))
    )
    lengths, blocks = (640, 900), (32, 16)
    counts = [-(-n // size) for n, size in zip(lengths, blocks)]
    full = np.ones((1, 2, *counts), bool)
    full[:, :, :, 6:9] = False
    marks, pairs = alike(jaxpr, consts, positions, lengths, blocks, full)
    assert len(pairs) == 2 and not marks[:, 6:9].any()
    assert np.mean(marks > 0) > 0.25
    for (i, j), mark in np.ndenumerate(marks):
        q = 260 + 32 * i + np.arange(32)[:, None]
        k = 16 * j + np.arange(16)[None]
        found = [*answers(jaxpr, consts, positions, q, k).values()]
        if mark:
            want = answers(jaxpr, consts, positions, *map(np.int32, pairs[mark - 1])).values()
            for x, y in zip(found, want, strict=True):
                assert (x == y).all()


def bucketed(score, b, h, q_index, k_index, before, near, far, rows, columns):
    distance = q_index - k_index
    entry = jnp.where(distance >= 30, far, jnp.where(distance >= -30, near, before))
    return score * (rows + entry * entry) + columns


@pytest.mark.skipif(not gpu.supported(), reason="the kernel needs JAX 0.11.1")
@pytest.mark.parametrize("masked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tiles_on_either_side_of_the_diagonal(masked):
    """Outputs and derivatives of numbers, rows and columns that a modification reads."""
    rng = np.random.default_rng(0)
    length = 384

    def normal(axes, *shape):
        return operand(jnp.asarray(rng.normal(size=shape), jnp.float32), axes)

    operands = (*(normal("h", calls.HEADS) for _ in range(3)),)
    operands += normal("bq", 1, length), normal("hk", calls.HEADS, length)
    case = {"score_mod": ScoreMod(bucketed, operands)}
    case |= {"mask": calls.causal} if masked else {}
    blocks = Blocks(64, 64, 2, 2)
    with using(outputs=blocks, row_slopes=blocks, column_slopes=blocks):
        arrays = calls.inputs(length, length, jnp.bfloat16, 32, 32)
        calls.check("mosaic_gpu", case, arrays, 2**-7)
