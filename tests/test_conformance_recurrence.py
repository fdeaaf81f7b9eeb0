"""What holds for every row of the catalogue that carries a state."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_lab.catalogue import CATALOGUE, Sizes

ROWS = [
    row
    for row in CATALOGUE
    if "return_state" in inspect.signature(row.function).parameters
    if row.arguments and True in row.causal
]
LOOKS_AHEAD = "refined_gated_linear_attention"  # its keys are scaled by the largest of all


def takes(row, name):
    return name in inspect.signature(row.function).parameters


def may_vary(row, name):
    """Whether it is an option of how to compute, and not a setting that says what."""
    return takes(row, name) and name not in row.settings


def example(row, length, causal=True):
    """Float64 arguments, of which the first T of every sequence are a call of T positions."""
    sizes = row.fit(Sizes(B=2, T=length, S=length, H=2, K=2, D=4, V=3))
    arrays = row.example(sizes, jax.random.key(length), jnp.float64)
    return {name: np.asarray(x) for name, x in arrays.items()}


def along_time(row):
    return [name for name, (_, axes) in row.arguments.items() if axes[1:2] in ("T", "S")]


def pieces(row, arrays, *spans):
    names = along_time(row)
    return [{n: x[:, span] if n in names else x for n, x in arrays.items()} for span in spans]


def runner(row, **options):
    """Output and state of the causal call, jitted."""

    @jax.jit
    def run(arrays, state=None):
        start = {} if state is None else {"initial_state": state}
        return row.call(arrays | start, causal=True, return_state=True, **options)

    return run


def weigh(tree):
    leaves = (x.real + x.imag if jnp.iscomplexobj(x) else x for x in jax.tree.leaves(tree))
    waves = (jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) * x for x in leaves)
    return sum(jnp.where(jnp.isfinite(x), x, 0).sum() for x in waves)


def close(got, want, tolerance=1e-8):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.name != LOOKS_AHEAD], ids=lambda row: row.name
)
def test_two_halves_and_single_steps_equal_one_call(row, x64):
    """The state handed over, by calls of four, three and then of single positions."""
    arrays = example(row, 7)
    run = runner(row)
    out, state = run(arrays)
    for spans in (slice(0, 4), slice(4, 7)), [slice(t, t + 1) for t in range(7)]:
        parts, carried = [], None
        for piece in pieces(row, arrays, *spans):
            part, carried = run(piece, carried)
            parts.append(part)
        close((jnp.concatenate(parts, 1), carried), (out, state))


@pytest.mark.parametrize(
    "row",
    [row for row in ROWS if len(row.variants) > 1 and takes(row, "chunk_size")],
    ids=lambda row: row.name,
)
@settings(max_examples=2, deadline=None)
@given(length=st.integers(1, 20), chunk=st.integers(1, 24))
def test_forms_and_chunks_agree_with_gradients(row, length, chunk):
    """Gradients of all arguments and of the first state, with cotangents on the last one too."""
    with jax.enable_x64(True):
        before, arrays = pieces(row, example(row, length + 3), slice(0, 3), slice(3, None))
        start = runner(row)(before)[1]

        def slopes(**options):
            run = runner(row, **options)
            loss = lambda arrays, state: weigh(run(arrays, state))  # noqa: E731
            return run(arrays, start), jax.jit(jax.grad(loss, (0, 1)))(arrays, start)

        definition, *others = row.variants
        want = slopes(**definition)
        for variant in others:
            close(slopes(chunk_size=chunk, **variant), want)


@pytest.mark.parametrize(
    "row",
    [row for row in ROWS if may_vary(row, "block_size") or may_vary(row, "chunk_size")],
    ids=lambda row: row.name,
)
def test_chunks_of_any_size_give_the_same(row, x64):
    name = "chunk_size" if takes(row, "chunk_size") else "block_size"
    arrays = example(row, 11)
    want, *others = (runner(row, **{name: size})(arrays) for size in (16, 4, 1))
    for other in others:
        close(other, want)
