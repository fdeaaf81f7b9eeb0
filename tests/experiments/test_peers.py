import json
import sys
import types

import jax
import pytest

from attn_lab.catalogue import Sizes, find
from experiments import peers
from experiments.programs import RECURRENCES, program

SIZES = Sizes(B=1, T=64, S=64, H=2, K=2, D=8, V=8)


@pytest.mark.parametrize("kind", RECURRENCES)
def test_a_recurrence_is_given_what_ours_is(kind, monkeypatch):
    row = program(kind, SIZES.T)
    arrays = row.example(SIZES, jax.random.key(0))
    module, name, _ = peers.FUNCTIONS[kind]
    stub = types.ModuleType(module)
    monkeypatch.setitem(sys.modules, f"fla.ops.{module}", stub)
    given = {}
    setattr(stub, name, lambda **arguments: (given.update(arguments), "state"))
    peers.linear(row, arrays)()
    names = {"log_decay": "g"}
    want = {names.get(n, n): x for n, x in arrays.items()}
    if kind == "linear":
        want["normalize"] = False
    assert given.keys() == want.keys() and all(given[n] is x for n, x in want.items())


def test_a_call_has_a_time_limit():
    with pytest.raises(TimeoutError, match=r"more than 0\.05 s"), peers.time_limit(0.05):
        while True:
            pass
    with peers.time_limit(60):
        pass


def test_kernels_are_compiled_in_another_process(monkeypatch):
    ran = []
    monkeypatch.setattr(
        peers.subprocess, "run", lambda *args, **options: ran.append((*args, options))
    )
    peers.compile_apart(find("delta_rule"), SIZES, "bfloat16", True, 30)
    ((command, options),) = ran
    name, sizes, dtype, backward = json.loads(command[-1])
    assert (name, dtype, backward) == ("delta_rule", "bfloat16", True)
    assert Sizes(**sizes).T == peers.SHORT and Sizes(**sizes).D == SIZES.D
    assert options["env"]["JAX_PLATFORMS"] == "cpu" and options["timeout"] == 30


def test_compilation_may_take_too_long(monkeypatch):
    def slow(command, timeout, **_):
        raise peers.subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(peers.subprocess, "run", slow)
    assert peers.compile_apart(find("delta_rule"), SIZES, "bfloat16", True, 30) is None
