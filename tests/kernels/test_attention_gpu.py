import functools

import calls
import h100
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import CASES, HEADS, cases, inputs

from attn_kernels import gpu
from attn_kernels.attention import ScoreMod, attention, clipped_softmax, mosaic_gpu, operand
from attn_kernels.attention.blocks import Blocks, table, using
from attn_kernels.attention.definition import attend
from attn_lab.catalogue import CATALOGUE, Sizes

NEW = jax.version.__version_info__ >= (0, 11, 1)
needs_new_jax = pytest.mark.skipif(
    not NEW, reason=f"the kernel needs JAX 0.11.1, and so Python 3.12; this is {jax.__version__}"
)
TUNED = table()
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


@needs_new_jax
@pytest.mark.slow
@pytest.mark.parametrize(
    "blocks", [Blocks(64, 64, 3, 3), Blocks(64, 128, 1, 2), Blocks(64, 64, 2, 2, 3)], ids=str
)
def test_blocks_change_nothing(blocks):
    with using(outputs=blocks, row_slopes=blocks, column_slopes=blocks):
        check(cases(200, 261)["capped_slopes"], inputs(200, 261, jnp.bfloat16, 64, 64), 2**-7)


@needs_new_jax
@pytest.mark.slow
@pytest.mark.parametrize("dims", [(192, 128), (64, 256)], ids=str)
def test_wide_heads(dims):
    check(cases(70, 130)["rows_and_columns"], inputs(70, 130, jnp.float16, *dims), 2**-7)


NOT_SERVED = {
    "topk_attention": "_Largest",
    "straight_through_hard_attention": "best_key",
    "compositional_attention": "inner products",
    "mlp_score_attention": "inner products",
    "neighborhood_attention_relative_bias": "inner products",
    "local_linear_attention": "forward mode",
    "rectified_linear_attention": "float32",
    "relational_attention": "float32",
    "linear_log_normal_diag_attention": "float32",
    "complex_attention": "float32",
    "linformer_attention": "float32",
}


@needs_new_jax
@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    [row for row in CATALOGUE if {"implementation": "xla"} in map(dict, row.variants)],
    ids=lambda row: row.name,
)
def test_mechanisms_of_the_catalogue(row):
    """Output and gradients of every one within the budget, or a reason."""
    check = functools.partial(
        calls.check_mechanism, "mosaic_gpu", row, Sizes(B=1, T=70, S=131), jnp.bfloat16, 2**-7
    )
    if row.name not in NOT_SERVED:
        return check()
    with pytest.raises(NotImplementedError, match=NOT_SERVED[row.name]):
        check()


@pytest.mark.skipif(not gpu.available(), reason="there is no Hopper GPU")
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", ["causal", "capped_slopes", "sigmoid"])
def test_programs_that_fill_a_gpu(name, dim):
    """Races would show: outputs and derivatives are right, and the same whenever they are run."""
    arrays = inputs(2048, 2048, jnp.bfloat16, dim, dim)
    many = [jnp.concatenate([x, x[:, ::-1], x / 2, x] * 16) for x in arrays]
    case = cases(2048, 2048)[name]
    run = jax.jit(lambda *arrays: calls.everything(arrays, case, "mosaic_gpu"))
    jax.tree.map(np.testing.assert_array_equal, run(*many), run(*many))
    check(case, arrays, 2**-7)


@needs_new_jax
def test_none_takes_the_kernel_for_what_it_serves(monkeypatch):
    served = []
    monkeypatch.setattr(gpu, "available", lambda: True)
    monkeypatch.setattr(mosaic_gpu, "attend", lambda tile: served.append(tile) or attend(tile))
    for dtype in jnp.bfloat16, jnp.float32:
        attention(*inputs(3, 5, dtype))
    assert [tile.q.dtype for tile in served] == [jnp.bfloat16]


@pytest.mark.skipif(gpu.available(), reason="there is a Hopper GPU")
def test_none_takes_no_kernel_without_a_hopper_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not gpu.available()


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


def compile_gradient(monkeypatch, case, shapes):
    """For an H100, of q, k, v and all operands."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    sharding = jax.sharding.SingleDeviceSharding(h100.device())
    leaves, treedef = jax.tree.flatten(case)
    floats = [n for n, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]

    def loss(q, k, v, moving, fixed):
        given = [moving.get(n, fixed.get(n)) for n in range(len(leaves))]
        out = attention(q, k, v, **treedef.unflatten(given), implementation="mosaic_gpu")
        return (out.astype(jnp.float32) ** 2).sum()

    def described(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    moving = {n: described(leaves[n]) for n in floats}
    fixed = {n: described(x) for n, x in enumerate(leaves) if n not in floats}
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    gradient = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
    gradient.trace(*arrays, moving, fixed).lower(lowering_platforms=("cuda",)).compile()


@needs_new_jax
@pytest.mark.parametrize(
    "name, dims",
    [
        ("capped_slopes", (128, 128)),
        *(pytest.param(name, (128, 128), marks=pytest.mark.slow) for name in CASES),
        pytest.param("clipped", (64, 64), marks=pytest.mark.slow),
        *(
            pytest.param("causal", dims, marks=pytest.mark.slow)
            for dims in ((64, 64), (192, 128), (256, 256), (48, 200))
        ),
    ],
)
def test_compiles_for_an_h100(monkeypatch, name, dims):
    q_len, k_len = (1021, 1021) if name == "segments" else (1021, 1347)
    dim, width = dims
    shapes = (1, q_len, HEADS, dim), (1, k_len, HEADS, dim), (1, k_len, HEADS, width)
    clipped = {"clipped": {"mask": calls.causal, "normalizer": clipped_softmax(-0.1, 1.1)}}
    compile_gradient(monkeypatch, (cases(q_len, k_len) | clipped)[name], shapes)


@needs_new_jax
@pytest.mark.slow
@pytest.mark.parametrize(
    "device, dim, kind", sorted({(row["device"], row["dim"], row["kind"]) for row in TUNED})
)
def test_blocks_of_the_table_compile_for_an_h100(monkeypatch, device, dim, kind):
    """Those of all three kernels, which a gradient takes together."""
    wanted = dict(device=device, dim=dim, kind=kind)
    rows = [row for row in TUNED if wanted.items() <= row.items()]
    case = {"plain": "causal", "modified": "capped_slopes", "weights": "sigmoid"}[kind]
    with using(**{row["kernel"]: Blocks(*row["blocks"]) for row in rows}):
        compile_gradient(monkeypatch, cases(512, 512)[case], [(1, 512, HEADS, dim)] * 3)


@needs_new_jax
@pytest.mark.slow
def test_programs_of_many_blocks_of_rows_compile_for_an_h100(monkeypatch):
    blocks = Blocks(64, 64, 2, 2, 132)
    with using(outputs=blocks, row_slopes=blocks, column_slopes=blocks):
        compile_gradient(monkeypatch, cases(1021, 1347)["causal"], [(1, 1021, HEADS, 128)] * 3)


@needs_new_jax
@pytest.mark.slow
def test_all_primitives_compile_for_an_h100(monkeypatch):
    """What the kernel is said to have, and what others are rewritten in."""

    def everything(s, b, h, q, k):
        positive = 1 + jnp.abs(s)
        found = [
            jnp.clip(s, -1, 1) + jnp.clip(q - k, -3, 3),
            jnp.cos(s) / (1 + q) - jnp.sin(s) * jnp.sign(q - k),
            jnp.exp(-positive) + jnp.exp2(-positive) + jnp.log(positive),
            jnp.maximum(s, q) * jnp.minimum(s, k) * jnp.round(s) * jax.lax.round(s),
            jax.lax.rsqrt(positive) * jnp.sqrt(positive) * jnp.tanh(s),
            jax.lax.erf(s) + jnp.square(s) + positive**1.5 + positive**-2 + jnp.expm1(-positive),
            jnp.log1p(positive) + jax.nn.sigmoid(s) + jax.nn.softplus(s) + jax.nn.silu(s),
            jnp.floor(s) + jnp.ceil(s) + jax.lax.rem(s, positive) + jnp.sinh(s / positive),
            s.astype(jnp.bfloat16).astype(jnp.float32) + s.astype(jnp.int32),
            jnp.where(((q & 3) == (k | 1)) ^ ((q << 1) > (k >> 1)), s, q // 3 % 5),
            jnp.where(~(q != k) | ~(~q >= (k ^ h)), s, jax.lax.shift_right_logical(q, 1) <= b),
        ]
        return sum(found)

    shape = (1, 128, HEADS, 64)
    few = Blocks(64, 64, 2)  # numbers for a thread: compilation takes as long as there are
    with using(outputs=few, row_slopes=few, column_slopes=few):
        compile_gradient(monkeypatch, {"score_mod": ScoreMod(everything)}, [shape] * 3)


@needs_new_jax
@pytest.mark.slow
def test_tables_by_distance_compile_for_an_h100(monkeypatch):
    """The kernel of outputs reads tiles of them, those of derivatives compute what they need."""

    def looked_up(score, b, h, q, k, *table):
        entry = table[0]
        for n, value in enumerate(table[1:]):
            entry = jnp.where(q - k >= 4 * n, value, entry)
        return score + entry

    @functools.wraps(mosaic_gpu.outputs)
    def wrapped(*args):
        stored.extend(args[-1].stored)
        return outputs(*args)

    stored, outputs = [], mosaic_gpu.outputs
    monkeypatch.setattr(mosaic_gpu, "outputs", wrapped)
    table = tuple(operand(jnp.full(HEADS, n / 8), "h") for n in range(8))
    case = {"mask": calls.causal, "score_mod": ScoreMod(looked_up, table)}
    compile_gradient(monkeypatch, case, [(1, 1024, HEADS, 128)] * 3)
    assert len(stored) == 1
