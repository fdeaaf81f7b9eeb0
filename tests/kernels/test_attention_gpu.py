import functools
import importlib.util

import calls
import h100
import jax
import jax.numpy as jnp
import pytest
from calls import CASES, HEADS, cases, inputs

from attn_kernels.attention import ScoreMod, attention

NEW = jax.version.__version_info__ >= (0, 11, 1)
needs_new_jax = pytest.mark.skipif(
    not NEW, reason=f"the kernel needs JAX 0.11.1, and so Python 3.12; this is {jax.__version__}"
)
check = functools.partial(calls.check, "mosaic_gpu")


@needs_new_jax
@pytest.mark.parametrize(
    "name", [n if n == "capped_slopes" else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_error_budget(name):
    """In interpret mode, on lengths that fill no tile."""
    q_len, k_len = (192, 192) if name == "segments" else (130, 200)
    check(cases(q_len, k_len)[name], inputs(q_len, k_len, jnp.bfloat16, 48, 32), 2**-7)


@needs_new_jax
@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(1, 1), (131, 7)], ids=str)
def test_error_budget_of_few_positions(lengths):
    check(cases(*lengths)["rows_and_columns"], inputs(*lengths, jnp.bfloat16), 2**-7)


def lgamma(score, b, h, q, k):
    return jax.lax.lgamma(score)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"dtype": jnp.float32}, "q is float32"),
        ({"score_mod": ScoreMod(lgamma)}, "lgamma"),
        ({"dim": 264}, "at most 256"),
    ],
    ids=["float32", "lgamma", "wide"],
)
def test_refusals(change, match):
    sizes = {"dtype": jnp.bfloat16, "dim": 8} | change
    arrays = inputs(3, 5, sizes["dtype"], sizes["dim"])
    call = functools.partial(attention, score_mod=change.get("score_mod"))
    with pytest.raises(NotImplementedError, match=match if NEW else "needs JAX 0.11.1"):
        call(*arrays, implementation="mosaic_gpu")


@needs_new_jax
@pytest.mark.parametrize(
    "name, dim",
    [
        ("capped_slopes", 128),
        *(pytest.param(name, 128, marks=pytest.mark.slow) for name in CASES),
        *(pytest.param("causal", dim, marks=pytest.mark.slow) for dim in (64, 192, 256)),
    ],
)
def test_compiles_for_an_h100(monkeypatch, name, dim):
    for plugin in "jax_cuda13_plugin", "jax_plugins.xla_cuda13":
        if importlib.util.find_spec(plugin.split(".")[0]) is None:
            pytest.skip(f"the wheel of {plugin} is not installed")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    sharding = jax.sharding.SingleDeviceSharding(h100.device())
    case = cases(1024, 1024)[name]
    leaves, treedef = jax.tree.flatten(case)
    floats = [n for n, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]

    def loss(q, k, v, moving, fixed):
        given = [moving.get(n, fixed.get(n)) for n in range(len(leaves))]
        out = attention(q, k, v, **treedef.unflatten(given), implementation="mosaic_gpu")
        return (out.astype(jnp.float32) ** 2).sum()

    def described(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    x = jax.ShapeDtypeStruct((1, 1024, HEADS, dim), jnp.bfloat16, sharding=sharding)
    moving = {n: described(leaves[n]) for n in floats}
    fixed = {n: described(x) for n, x in enumerate(leaves) if n not in floats}
    gradient = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
    gradient.trace(x, x, x, moving, fixed).lower(lowering_platforms=("cuda",)).compile()
