import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_kernels.recurrence import step
from attn_lab import ops
from attn_lab.catalogue import Sizes
from experiments import peers
from experiments.programs import ATTENTIONS, AVERAGES, BUCKETS, RECURRENCES, STEPS, program

SIZES = Sizes(B=2, T=128, S=128, H=4, K=4, D=16, V=16)
NAMES = (
    "full",
    "causal",
    "window-40",
    "soft_cap-3",
    "alibi",
    "t5_table",
    "bias",
    "sigmoid",
    "sinks",
    "segments-3",
    "neighborhood-8x16-3x5-4x8",
)


def test_all_programs_are_tested():
    assert {name.split("-")[0] for name in NAMES} == set(ATTENTIONS)


@pytest.mark.parametrize("name", NAMES)
def test_implementations_agree(name):
    row = program(name, SIZES.T)
    arrays = row.example(SIZES, jax.random.key(0))
    want = row.call(arrays, implementation="definition")
    assert want.shape == arrays["v"].shape
    np.testing.assert_allclose(row.call(arrays, implementation="xla"), want, atol=2e-6)


@pytest.mark.parametrize("name", [*RECURRENCES, *AVERAGES])
def test_recurrences_are_those_of_the_engine(name):
    row = program(name, SIZES.T)
    arrays = row.example(SIZES, jax.random.key(0))
    want = row.call(arrays, form="recurrent")
    for variant in row.variants[:2]:
        np.testing.assert_allclose(row.call(arrays, **variant), want, rtol=1e-5, atol=3e-5)
    if name == "retention":
        np.testing.assert_allclose(want, ops.retention(**arrays), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("steps", [1, 19])
def test_steps_are_those_of_the_recurrence(name, steps):
    sizes = dataclasses.replace(SIZES, T=steps, S=steps)
    row = program(name, steps)
    arrays = row.example(sizes, jax.random.key(0))
    state, out = row.call(arrays, implementation="xla")
    gates = {n: arrays[n] for n in ("log_decay", "beta") if n in arrays}
    want, v = arrays["state"], arrays["v"]
    for _ in range(steps):
        v, want = step(want, arrays["q"], arrays["k"], v, **gates)
    np.testing.assert_allclose(state, want, atol=1e-5)
    np.testing.assert_allclose(out, v, atol=1e-5)
    one = program(name, 1)
    assert row.bytes(sizes) == steps * one.bytes(sizes)


def test_states_and_gates_of_heads_are_exact():
    arrays = program("step_gated_delta", 4).example(SIZES, jax.random.key(0), jnp.bfloat16)
    exact = {name for name, x in arrays.items() if x.dtype == jnp.float32}
    assert exact == {"state", "log_decay", "beta"}
    gates = program("gla", 4).example(SIZES, jax.random.key(0), jnp.bfloat16)["log_decay"]
    assert gates.dtype == jnp.bfloat16 and gates.shape[3] == SIZES.D


@pytest.mark.parametrize("name", [n for n in NAMES if n != "sigmoid"])
def test_what_a_peer_is_given_is_the_same(name):
    torch = pytest.importorskip("torch", reason="FlexAttention needs PyTorch")
    row = program(name, SIZES.T)
    arrays = row.example(SIZES, jax.random.key(0))
    tensors = {n: torch.tensor(np.asarray(x)) for n, x in arrays.items()}
    with torch.no_grad():
        found = peers.flex(row, tensors)().numpy()
    np.testing.assert_allclose(found, row.call(arrays), atol=3e-6)


def test_the_buckets_of_the_table_are_those_of_t5():
    row = program("t5_table", 200)
    table = [jnp.full((), float(n)) for n in range(BUCKETS)]
    distance = np.arange(200)
    function = row.settings["parts"](jnp.zeros((BUCKETS, 1)))["score_mod"].function
    found = np.asarray(function(0.0, 0, 0, jnp.asarray(distance), 0, *table))
    near = BUCKETS // 2
    grown = near + np.log(np.maximum(distance, near) / near) / np.log(128 / near) * near
    want = np.where(distance < near, distance, np.minimum(np.floor(grown + 1e-5), BUCKETS - 1))
    np.testing.assert_array_equal(found, want)


def test_parameters_of_heads_are_exact_and_other_arrays_in_the_dtype():
    arrays = program("bias", SIZES.T).example(SIZES, jax.random.key(0), jnp.bfloat16)
    assert arrays["bias"].dtype == arrays["q"].dtype == jnp.bfloat16
    slopes = program("alibi", SIZES.T).example(SIZES, jax.random.key(0), jnp.bfloat16)["slopes"]
    assert slopes.dtype == jnp.float32 and slopes.shape == (4,)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dense", "programs are full, causal.*; got 'dense'"),
        ("window", "program 'window' is window-width, got 'window'"),
        ("window-wide", "program 'window' is window-width, got 'window-wide'"),
        ("causal-3", "program 'causal' is causal, got 'causal-3'"),
        ("neighborhood-4x4-3x3-2x2", r"length must be that of the grid \(4, 4\), got 128"),
    ],
)
def test_unknown_programs(name, message):
    with pytest.raises(ValueError, match=message):
        program(name, 128)
