import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmark import cases, example, lowered
from experiments.compiling import compile_all
from experiments.configs.benchmark import get_config


def power(n):
    if n < 0:
        raise NotImplementedError(f"no power {n}\nof anything")
    print(n, os.getpid(), os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE"))
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    return jax.jit(lambda x: (x**n, {"sum": x.sum()}), donate_argnums=0).lower(x)


@pytest.mark.parametrize("processes", [1, 2])
def test_programs_are_in_the_order_of_items_and_failures_in_their_place(processes, capfd):
    first, failed, second = compile_all(power, (2, -1, 3), processes)
    said = sorted(line.split() for line in capfd.readouterr().out.splitlines())
    apart = [(pid != str(os.getpid()), mine) for _, pid, mine in said]
    assert apart == [(True, "false") if processes > 1 else (False, "None")] * 2
    assert failed == {"error": "refused", "reason": "no power -1"}
    for n, ready in (2, first), (3, second):
        assert ready.total >= 64 * 64 * 4 and ready.temporary >= 0
        x = jnp.full((64, 64), 2.0)
        raised, others = ready.program(x)
        assert x.is_deleted() and raised[0, 0] == 2**n and others["sum"] == 2 * 64 * 64


def test_cases_of_benchmarks_are_compiled_by_others():
    """Programs have functions without names, mechanisms too."""
    config = get_config()
    groups = ({"mechanisms": "soft_cap-30,segments-2,simple_gla,step_gla", "length": 16},)
    config.update(groups=groups, implementations="xla", head_dim=8, passes=("forward",))
    todo = cases(config)
    config.update(groups=(), mechanisms="differential_attention", lengths=(8,))
    todo += cases(config)
    for case, ready in zip(todo, compile_all(lower_causal, todo, 2), strict=True):
        arrays = example(config, case)
        want = lowered(config, case).compile()(arrays)
        jax.tree.map(np.testing.assert_array_equal, ready.program(arrays), want)


def lower_causal(case):
    return lowered(get_config(), case)
