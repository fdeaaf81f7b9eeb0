import dataclasses
import functools

import calls
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_kernels import gpu
from attn_kernels.attention import Mask, ScoreMod, attention, lists, mosaic_gpu, operand
from attn_kernels.attention.blocks import Blocks, using
from attn_kernels.attention.elementwise import PAIRS, PLACE
from attn_kernels.attention.toeplitz import toeplitz

needs_new_jax = pytest.mark.skipif(not gpu.supported(), reason="the kernel needs JAX 0.11.1")


def looked_up(distance, *table):
    entry = table[0]
    for n, value in enumerate(table[1:]):
        entry = jnp.where(distance >= 7 * n - 30, value, entry)
    return entry


def found(function):
    """The shapes of what a function of score, b, h, q, k, a slope and a row can read."""
    shapes = PAIRS, *PLACE, (1, 1, 1, 1), (1, 1, 2, 1)
    dtypes = [jnp.float32, *[jnp.int32] * 4, jnp.float32, jnp.float32]
    args = [jax.ShapeDtypeStruct(*given) for given in zip(shapes, dtypes, strict=True)]
    return toeplitz(jax.make_jaxpr(function)(*args).jaxpr, (3, 4), (1, 2, 5))


@pytest.mark.parametrize(
    "function, count",
    [
        (lambda s, b, h, q, k, x, row: s + looked_up(q - k, x, 2 * x, 3 * x), 1),
        (lambda s, b, h, q, k, x, row: s * jnp.exp(x * (k - q)) + jnp.clip(q - k, 0, 9) / 3, 2),
        (lambda s, b, h, q, k, x, row: s + x * (q.astype(jnp.float32) - k), 1),
        (lambda s, b, h, q, k, x, row: s + (h + 1) * x * abs((5 - k) + q), 1),
        (lambda s, b, h, q, k, x, row: s + x * ((q - k) // 3), 1),
        (lambda s, b, h, q, k, x, row: s * row + jnp.sin(x * (q - k)), 1),
        (lambda s, b, h, q, k, x, row: jnp.where(q - k > 3, s, x * (q - k)), 1),
        (lambda s, b, h, q, k, x, row: x * (q - k), 1),
        (lambda s, b, h, q, k, x, row: jnp.where(q - k > 3, s, 0), 0),
        (lambda s, b, h, q, k, x, row: s + x * jnp.sin(q), 0),
        (lambda s, b, h, q, k, x, row: s + x * (q + k), 0),
        (lambda s, b, h, q, k, x, row: s + x * (q - 2 * k), 0),
        (lambda s, b, h, q, k, x, row: s + x * q * k, 0),
        (lambda s, b, h, q, k, x, row: s + x * (q // 2 - k // 2), 0),
        (lambda s, b, h, q, k, x, row: s + x * (q.astype(jnp.bfloat16) - k), 0),
        (lambda s, b, h, q, k, x, row: (s + x) * x, 0),
    ],
)
def test_functions_of_differences(monkeypatch, function, count):
    monkeypatch.setattr("attn_kernels.attention.toeplitz.WORTH", 0)
    assert len(found(function)) == count


@pytest.mark.parametrize(
    "function, count",
    [
        (lambda s, b, h, q, k, x, row: s + x * (q - k), 0),
        (lambda s, b, h, q, k, x, row: s - x * abs(q - k), 0),
        (lambda s, b, h, q, k, x, row: s + looked_up(q - k, *[x] * 8), 1),
    ],
    ids=["slope", "slopes", "table"],
)
def test_few_steps_are_not_worth_it(function, count):
    assert len(found(function)) == count


def table_of(axes, *shape):
    rng = np.random.default_rng(0)
    draw = (rng.normal(size=shape) for _ in range(12))
    return tuple(operand(jnp.asarray(x, jnp.float32), axes) for x in draw)


def added(score, b, h, q, k, *table):
    return score + looked_up(q - k, *table)


def of_heads(score, b, h, q, k, row, *table):
    distance = q.astype(jnp.float32) - k
    factor = (h + 1) * looked_up(distance, *(jnp.tanh(x) for x in table))
    return score * factor + row * looked_up(-distance, *table)


ROW = operand(jnp.linspace(-1, 1, 130), "q")
CASES = {
    "heads": (added, table_of("h", 2), calls.causal, [(1, 2)]),
    "batch": (added, table_of("bh", 2, 2), calls.causal, [(2, 2)]),
    "numbers": (added, table_of(""), None, [(1, 1)]),
    "two": (of_heads, (ROW, *table_of("b", 2)), None, [(2, 2), (2, 1)]),
}


@pytest.fixture
def taken(monkeypatch):
    """What kernels read, however small the queries are."""

    def roomy(*args):
        return dataclasses.replace(problem(*args), most_bytes=2**30)

    def wrapped(*args, **kwargs):
        arrays.append(tiles(*args, **kwargs))
        return arrays[-1]

    problem, tiles, arrays = mosaic_gpu.Problem, lists.tiles, []
    monkeypatch.setattr(mosaic_gpu, "Problem", roomy)
    monkeypatch.setattr(lists, "tiles", wrapped)
    return arrays


def normal(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.bfloat16)


@needs_new_jax
@pytest.mark.parametrize(
    "name, lengths, dim, blocks",
    [
        ("heads", (130, 201), 64, Blocks(64, 64, 2)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("heads", (300, 300), 128, Blocks(64, 128, 2)),
                ("batch", (130, 201), 128, Blocks(64, 64, 2)),
                ("numbers", (201, 130), 64, Blocks(64, 64, 2, 3)),
                ("two", (130, 201), 64, Blocks(64, 64, 2, 2, 2)),
            ]
        ),
    ],
)
def test_the_kernel_reads_them(taken, name, lengths, dim, blocks):
    """In interpret mode: outputs and derivatives are those of the definition."""
    function, operands, mask, leads = CASES[name]
    batch = 2 if name in ("batch", "two") else 1
    shapes = (
        (batch, length, heads, dim) for length, heads in zip((*lengths, lengths[1]), (2, 1, 1))
    )
    case = {"score_mod": ScoreMod(function, operands), "mask": mask}
    with using(outputs=blocks):
        calls.check("mosaic_gpu", case, [normal(*shape) for shape in shapes], 2**-7)
    assert [x.shape[:2] for x in taken[-1]] == leads
    assert {x.shape[3:] for x in taken[-1]} == {(blocks.held, blocks.columns)}


@needs_new_jax
@pytest.mark.parametrize("changed", [False, True])
def test_what_is_stored_decides(monkeypatch, taken, changed):
    """Tiles of other numbers give other outputs: the kernel computes none of them itself."""
    tiles = lists.tiles
    if changed:
        monkeypatch.setattr(lists, "tiles", lambda *a, **b: [-x for x in tiles(*a, **b)])
    function, table, mask, _ = CASES["heads"]
    arrays = [normal(1, 130, 2, 64)] * 3
    outputs = [
        attention(*arrays, mask=mask, score_mod=ScoreMod(function, x), implementation=name)
        for name, x in (
            ("mosaic_gpu", table),
            ("definition", tuple(-x if changed else x for x in table)),
        )
    ]
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in outputs), atol=0.03)


@needs_new_jax
@pytest.mark.slow
def test_operands_of_a_map(taken):
    """Batches of q, k, v and tables by `jax.vmap`."""

    def attend(name, arrays, table):
        case = {"mask": calls.causal, "score_mod": ScoreMod(added, table)}
        return attention(*arrays, **case, implementation=name)

    tables = tuple(jnp.stack([x, -x]) for x in table_of("h", 2))
    names = "mosaic_gpu", "definition"
    maps = (jax.vmap(functools.partial(attend, name)) for name in names)
    got, want = (function([normal(2, 1, 130, 2, 64)] * 3, tables) for function in maps)
    assert taken
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (got, want)), 0.01, 0.03)


@needs_new_jax
def test_devices_that_share_heads(taken):
    """What differs between devices, and what does not, meets in the tables."""
    axis = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((1,), ("tensor",), axis_types=(axis,))
    spec, lead = jax.P(None, None, "tensor"), jax.P(None, "tensor")

    def attend(q, k, v, table):
        case = {"mask": calls.causal, "score_mod": ScoreMod(added, table)}
        return attention(q, k, v, **case, implementation="mosaic_gpu")

    mapped = jax.shard_map(attend, mesh=mesh, in_specs=(spec, spec, spec, lead), out_specs=spec)
    arrays = [normal(1, 130, 2, 64)] * 3
    assert jax.eval_shape(mapped, *arrays, table_of("h", 2)).shape == arrays[0].shape
    assert taken


@needs_new_jax
@pytest.mark.parametrize(
    "length, function, known, count",
    [
        (1024, added, True, 1),
        (1024, added, False, 0),
        (130, added, True, 0),
        (1024, lambda s, b, h, q, k, *table: s + looked_up((q - k) % 99, *table), True, 0),
    ],
    ids=["table", "mask of a program", "few queries", "all differences"],
)
def test_it_takes_no_more_room_than_queries(monkeypatch, length, function, known, count):
    stored, outputs = [], mosaic_gpu.outputs

    def wrapped(*args):
        stored.extend(args[-1].stored)
        return outputs(*args)

    def attend(q, table, mask):
        score_mod = ScoreMod(function, table)
        mask = calls.causal if known else mask
        return attention(q, q, q, mask=mask, score_mod=score_mod, implementation="mosaic_gpu")

    monkeypatch.setattr(mosaic_gpu, "outputs", wrapped)
    mask = Mask(lambda b, h, q, k, first: k <= q - first, (operand(jnp.int32(0), ""),))
    with using(outputs=Blocks(64, 64, 2)):
        jax.eval_shape(attend, normal(1, length, 2, 128), table_of("h", 2), mask)
    assert len(stored) == count
