"""Reading and checking the files in tests/golden: inputs, outputs and gradients in float64."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import attn_lab.analysis
import attn_lab.models
import attn_lab.ops
import attn_lab.tasks

FOLDER = pathlib.Path(__file__).parent / "golden"


def resolve(path: str):
    package, room, name = path.split(".")
    assert package == "attn_lab"
    return getattr(getattr(attn_lab, room), name)


def read(stem: str):
    """The file's meta data, inputs, outputs, cotangents and gradients; lists put together."""
    with np.load(FOLDER / f"{stem}.npz") as data:
        meta, arrays = (
            json.loads(str(data["meta"])),
            {k: data[k] for k in data.files if k != "meta"},
        )

    def group(prefix):
        found = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        for name in meta.get("lists", ()):
            parts = sorted(k for k in found if k.startswith(f"{name}__"))
            if parts:
                found[name] = [found.pop(k) for k in parts]
        return found

    in_order = [{int(k): v for k, v in group(p).items()} for p in ("out_", "ct_")]
    return meta, group("in_"), *in_order, group("grad_")


def check(stem: str, wide: bool) -> None:
    """Compares the function that a file names with it, in float64 or in float32."""
    meta, arrays, outs, cts, grads = read(stem)
    static = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["static"].items()}
    function = resolve(meta["function"])
    strict = 1e-3 if wide else 1.0
    rtol, atol = meta["rtol"] * strict, meta["atol"] * strict

    def close(got, want, what):
        got, want = np.asarray(got), np.asarray(want)
        assert got.shape == want.shape, what
        size = np.abs(want[np.isfinite(want)]).max(initial=1.0)
        np.testing.assert_allclose(got, want, rtol=rtol, atol=atol * size, err_msg=what)

    arrays = jax.tree.map(jnp.asarray, arrays)
    if meta["function"].endswith("_mask"):
        lengths = [static.pop(n, outs[0].shape[a]) for n, a in (("q_len", -2), ("k_len", -1))]
        close(function(**arrays, **static).dense(*lengths), outs[0], stem)
        return
    moving = {k: v for k, v in arrays.items() if k in grads}
    fixed = {k: v for k, v in arrays.items() if k not in grads}

    def run(moving):
        got, pullback = jax.vjp(
            lambda moving: jax.tree.leaves(function(**moving, **fixed, **static)), moving
        )
        if not grads:
            return got, None
        given = [
            jnp.asarray(cts[n], out.dtype) if n in cts else _zero_cotangent(out)
            for n, out in enumerate(got)
        ]
        return got, pullback(given)[0]

    got, slopes = (jax.jit(run) if grads else run)(moving)
    for n, out in enumerate(got):
        close(out, outs[n], f"{stem}: output {n}")
    for name, want in grads.items():
        for a, b in zip(jax.tree.leaves(slopes[name]), jax.tree.leaves(want), strict=True):
            close(a, b, f"{stem}: gradient of {name}")


def _zero_cotangent(out):
    if jnp.issubdtype(out.dtype, jnp.inexact):
        return jnp.zeros_like(out)
    return np.zeros(out.shape, jax.dtypes.float0)
