"""Both engines over eight devices, against one. Programs of eight devices run by themselves."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attn_kernels.attention import (
    ScoreMod,
    Sinkhorn,
    TopK,
    attention,
    entmax,
    operand,
    sigmoid,
    softmax_with_sink,
)
from attn_kernels.attention.ring import reach
from attn_kernels.layout import ORDERS, Layout
from attn_kernels.parallel import sequence_parallel
from attn_kernels.recurrence import diagonal_recurrence, linear_attention
from attn_lab import ops

B, T, H, K, D = 2, 32, 4, 2, 8
SEGMENTS = jnp.array([[0] * 7 + [1] * 20 + [2] * 5, [0] * 16 + [1] * 16])
PADDED = SEGMENTS.at[0, 27:].set(-1)
RING, ZIGZAG, STRIPED = ({"mode": "ring", "order": order} for order in ORDERS)
GATHER, EXCHANGE = {"mode": "allgather", "order": "zigzag"}, {"mode": "all_to_all"}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def attend(masks, make=lambda **operands: {}, stats=True):
    def run(q, k, v, **operands):
        return attention(q, k, v, mask=masks, return_stats=stats, **make(**operands))

    return run


def distance(score, b, h, i, j, slope):
    return score - slope * abs(i - j) + 0.1 * h


def shifted(score, b, h, i, j, dense, of_key, of_query):
    return score * of_query + dense + of_key


def gated(**keywords):
    return functools.partial(linear_attention, return_state=True, **keywords)


QKV = {"q": normal(0, B, T, H, D), "k": normal(1, B, T, K, D), "v": normal(2, B, T, K, D)}
UNIT = QKV | {"k": QKV["k"] / jnp.linalg.norm(QKV["k"], axis=-1, keepdims=True)}
GATE = jax.nn.log_sigmoid(2 + normal(3, B, T, H, D))
CHANNELS = {"x": normal(6, B, T, 6), "read": normal(7, 6, 3)}
OF_EVERY_AXIS = {
    "dense": normal(4, H, T, T),
    "of_key": normal(5, B, T),
    "of_query": normal(6, B, H, T),
}

ATTENTION = {
    "causal": (attend(ops.causal_mask()), QKV),
    "window": (attend(ops.sliding_window_mask(4, 0)), QKV),
    "neighborhood": (attend(ops.neighborhood_mask(T, 5, 1, 1, False)), QKV),
    "segments": (attend(ops.causal_mask() & ops.segment_mask(SEGMENTS)), QKV),
    "alibi": (
        attend(
            ops.causal_mask(),
            lambda slope: {"score_mod": ScoreMod(distance, (operand(slope, "h"),))},
        ),
        QKV | {"slope": normal(3, H)},
    ),
    "operands": (
        attend(
            None,
            lambda dense, of_key, of_query: {
                "score_mod": ScoreMod(
                    shifted,
                    (operand(dense, "hqk"), operand(of_key, "bk"), operand(of_query, "bhq")),
                )
            },
        ),
        QKV | OF_EVERY_AXIS,
    ),
    "sigmoid": (attend(ops.causal_mask(), lambda: {"normalizer": sigmoid}, stats=False), QKV),
    "sink": (
        attend(ops.causal_mask(), lambda sink: {"normalizer": softmax_with_sink(sink)}),
        QKV | {"sink": normal(3, H)},
    ),
    "entmax": (attend(ops.causal_mask(), lambda: {"normalizer": entmax(1.5)}, stats=False), QKV),
    "top_k": (attend(ops.causal_mask(), lambda: {"normalizer": TopK(3)}, stats=False), QKV),
    "sinkhorn": (attend(None, lambda: {"normalizer": Sinkhorn()}, stats=False), QKV),
}
RECURRENCE = {
    "gated": (
        gated(),
        UNIT | {"log_decay": GATE, "initial_state": normal(8, B, H, D, D)},
    ),
    "gated_segments": (gated(segment_ids=PADDED), UNIT | {"log_decay": GATE}),
    "delta": (
        gated(segment_ids=PADDED),
        UNIT
        | {
            "log_decay": GATE[..., 0].at[0, 9].set(-jnp.inf),
            "beta": jax.nn.sigmoid(normal(4, B, T, H)),
            "initial_state": normal(8, B, H, D, D),
        },
    ),
    "delta_channel": (
        gated(chunk_size=4),
        UNIT | {"log_decay": GATE, "beta": jax.nn.sigmoid(normal(4, B, T, H))},
    ),
    "diagonal": (
        functools.partial(diagonal_recurrence, return_state=True),
        CHANNELS | {"log_decay": -jnp.exp(normal(8, 6, 3)), "initial_state": normal(9, B, 6, 3)},
    ),
    "diagonal_in_time": (
        functools.partial(diagonal_recurrence, return_state=True, chunk_size=3),
        CHANNELS | {"log_decay": -jnp.exp(normal(8, B, T, 6, 3))},
    ),
}
CASES = ATTENTION | RECURRENCE
FEW = (
    ("window", RING),
    ("operands", ZIGZAG),
    ("sink", STRIPED),
    ("neighborhood", GATHER),
    ("alibi", EXCHANGE),
    ("gated_segments", RING),
    ("delta", RING),
    ("diagonal_in_time", RING),
)
ALL = [(name, choice) for name in ATTENTION for choice in (RING, ZIGZAG, STRIPED, GATHER, EXCHANGE)]
ALL += [(name, RING) for name in RECURRENCE]


def eight(axes=("data", "seq"), sizes=(2, 4)):
    return jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * len(axes))


def results(function, arrays, choice=None):
    """Outputs and gradients, of one device or over the sequence axis of eight."""

    def loss(arrays):
        out = function(**arrays)
        return sum(jnp.sin(x).mean() for x in jax.tree.leaves(out)), out

    def run(arrays):
        slopes = jax.grad(loss, has_aux=True)
        if choice is None:
            return slopes(arrays)
        with sequence_parallel(eight(), **choice):
            return slopes(arrays)

    return jax.jit(run)(arrays)


def check(cases):
    jax.config.update("jax_default_matmul_precision", "highest")
    known = {}
    for name, choice in cases:
        function, arrays = CASES[name]
        if name not in known:
            known[name] = results(function, arrays)
        got = results(function, arrays, choice)

        def close(a, b, case=f"{name} {choice}"):
            size = np.abs(b).max(initial=1e-3)
            np.testing.assert_allclose(a / size, b / size, rtol=0, atol=3e-6, err_msg=case)

        jax.tree.map(close, got, known[name])


def check_few():
    check(FEW)


def check_all():
    check(ALL)


def check_traffic():
    """A window hears from one neighbour; keys are never gathered, and memory is a device's own."""
    mesh, length = eight(("data", "seq"), (1, 8)), 1 << 12
    spec = NamedSharding(mesh, P("data", "seq"))

    def compiled(window, length):
        def loss(q, k, v):
            with sequence_parallel(mesh):
                return attention(q, k, v, mask=ops.sliding_window_mask(window, 0)).sum()

        shape = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32, sharding=spec)
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()

    near, far = (compiled(window, length) for window in (100, -1))
    text = near.as_text()
    assert "collective-permute" in text and "all-gather" not in text and "while" in text
    assert "all-gather" not in far.as_text()
    longer = compiled(-1, 2 * length).memory_analysis().temp_size_in_bytes
    assert longer < 2.5 * far.memory_analysis().temp_size_in_bytes


def on_eight_devices(check):
    """Runs a function of this file in a program of its own."""
    code = "import jax; jax.config.update('jax_num_cpu_devices', 8); import test_parallel"
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", f"{code}; test_parallel.{check.__name__}()"]
    subprocess.run(command, check=True, env=env)


@pytest.mark.parametrize(
    "check", [check_few, check_traffic, pytest.param(check_all, marks=pytest.mark.slow)]
)
def test_eight_devices_compute_what_one_does(check):
    on_eight_devices(check)


@pytest.mark.parametrize("order", ORDERS)
def test_layouts_ascend_and_share_all_positions(order):
    layout = Layout(order, 4, 6)
    shards = layout.permutation().reshape(4, 6)
    assert (np.diff(shards) > 0).all()
    assert sorted(shards.ravel()) == list(range(24))
    traced = jax.jit(lambda r: layout.positions(r, jnp.arange(6)))
    for r in range(4):
        np.testing.assert_array_equal(traced(r), shards[r])


def test_zigzag_and_striped_orders_are_those_of_their_papers():
    zigzag, striped = (Layout(order, 2, 4).permutation() for order in ("zigzag", "striped"))
    assert zigzag.tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert striped.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.mark.parametrize(
    ("mask", "steps"),
    [
        (None, (7, 0)),
        (ops.causal_mask(), (7, 0)),
        (ops.sliding_window_mask(2, 0), (1, 0)),
        (ops.sliding_window_mask(9, 0), (3, 0)),
        (ops.sliding_window_mask(4, 4), (1, 1)),
        (ops.segment_mask(jnp.zeros((1, 32), int)), (7, 0)),
    ],
)
def test_keys_travel_no_further_than_the_mask_reaches(mask, steps):
    assert reach(mask, Layout("contiguous", 8, 4)) == steps


def test_unknown_choices_are_refused():
    mesh = jax.make_mesh((1,), ("seq",), axis_types=(AxisType.Auto,))
    for wrong in ({"mode": "rings"}, {"axis": "time"}, {"order": "zig"}):
        with pytest.raises(ValueError, match="must be one of"), sequence_parallel(mesh, **wrong):
            pass
    with sequence_parallel(mesh):
        out = attention(*QKV.values())
    np.testing.assert_array_equal(out, attention(*QKV.values()))
