import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab.training import fit, make_optimizer, read_metrics
from tests.training.tiny import Tiny, loss_fn, make_batch, run


def start(workdir, pause):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.tiny", str(workdir), str(pause)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.02)


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path):
    whole = run(tmp_path / "whole")
    for _ in range(2):
        process = start(tmp_path / "killed", 0.05)
        wait_for(tmp_path / "killed/metrics.jsonl", process)
        time.sleep(random.uniform(0, 2))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    resumed = run(tmp_path / "killed")
    assert resumed.rows == whole.rows == read_metrics(tmp_path / "killed")
    files = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]
    assert equal(nnx.state(resumed.model), nnx.state(whole.model))


def test_sigterm_saves_the_step_it_reached(tmp_path):
    process = start(tmp_path, 0.05)
    wait_for(tmp_path / "checkpoints/8/checksums.json", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    newest = max(int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*"))
    assert 8 <= newest < 60
    steps = []
    run(tmp_path, evals={"valid": lambda step: steps.append(step) or [make_batch(0)]})
    assert min(steps) > newest - 1


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = run(tmp_path)

    def batch(step):
        assert step == 0, "trained again"
        return make_batch(step)

    model = Tiny(nnx.Rngs(0), dropout=0.2, batch_norm=True)
    optimizer = make_optimizer(60, learning_rate=1.0)
    settings = {"steps": 60, "workdir": tmp_path, "config": {"steps": 60}}
    again = fit(model, loss_fn, batch, optimizer, **settings)
    assert again.rows == first.rows and again.step == 60
    assert equal(nnx.state(again.model), nnx.state(first.model))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, caplog):
    whole = run(tmp_path)
    newest = tmp_path / "checkpoints/60"
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    again = run(tmp_path)
    assert "checkpoints/60 is damaged" in caplog.text
    assert again.rows == whole.rows
    assert equal(nnx.state(again.model), nnx.state(whole.model))
    assert (newest / "checksums.json").exists()


def test_a_workdir_of_another_config_is_refused_and_untouched(tmp_path):
    run(tmp_path, config={"steps": 60, "model": {"width": 16, "depth": 2}})
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"model\.width \(16 there, 32 asked\)") as error:
        run(tmp_path, config={"steps": 60, "model": {"width": 32, "depth": 2}})
    assert "depth" not in str(error.value)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_a_model_that_does_not_fit_the_batch_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="accumulate=3"):
        run(tmp_path / "new", accumulate=3)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("bad_step", [1, 11, 24])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, bad_step):
    def batch(step):
        made = make_batch(step, unlabelled=0)
        if step + 1 == bad_step:
            made["x"][0, 0] = np.nan
        return made

    def train():
        model, optimizer = Tiny(nnx.Rngs(0)), make_optimizer(60, learning_rate=1e-2)
        return fit(
            model,
            loss_fn,
            batch,
            optimizer,
            steps=60,
            workdir=tmp_path,
            config={},
            log_every=20,
            checkpoint_every=8,
            progress_seconds=0,
        )

    with pytest.raises(FloatingPointError, match=rf"loss.* at step {bad_step};"):
        train()
    kept = [int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*")]
    assert max(kept, default=0) == (bad_step - 1) // 8 * 8
    with pytest.raises(FloatingPointError, match=rf"loss.* at step {bad_step};"):
        train()


def test_a_metric_of_nothing_stops_nothing():
    def sliced(model, batch, rngs):
        return loss_fn(model, batch, rngs) | {"rare": (jnp.zeros(()), jnp.zeros(()))}

    optimizer = make_optimizer(3, learning_rate=1e-2)
    evals = {"valid": lambda step: [make_batch(0)]}
    model = Tiny(nnx.Rngs(0))
    (row,) = fit(model, sliced, make_batch, optimizer, steps=3, evals=evals).rows
    assert np.isnan(row["train/rare"]) and np.isnan(row["valid/rare"])
    assert np.isfinite(row["valid/loss"])


def test_a_run_stops_early_for_good(tmp_path):
    seen = []

    def stop(row):
        seen.append(row["step"])
        return row["step"] >= 20

    assert run(tmp_path, stop=stop).step == 20
    assert set(seen) == {10, 20}
    assert (tmp_path / "checkpoints/20").exists()
    assert run(tmp_path, stop=stop).step == 20


def test_nothing_is_written_without_a_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(None)
    assert not list(tmp_path.iterdir())
    assert [row["step"] for row in result.rows if "train/loss" in row] == [*range(7, 60, 7), 60]
    assert [row["step"] for row in result.rows if "valid/loss" in row] == [*range(10, 61, 10)]


def test_metrics_hold_nothing_of_the_clock(tmp_path, capsys):
    run(tmp_path, unit=("examples", 8), progress_seconds=1e-6)
    names = {"train/loss", "train/accuracy", "train/grad_norm", "train/param_norm", "train/lr"}
    names |= {"step", "valid/loss", "valid/accuracy"}
    assert set().union(*read_metrics(tmp_path)) == names
    timing = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    assert all(row["examples_per_second"] > 0 and row["seconds"] > 0 for row in timing)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("step 60/60  loss ") and "examples/s" in lines[-1]
    assert lines[-1].endswith("0:00:00 left")


def test_the_model_given_is_left_alone():
    model = Tiny(nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.state(model))
    optimizer = make_optimizer(3, learning_rate=0.1)
    trained = fit(model, loss_fn, make_batch, optimizer, steps=3, progress_seconds=0).model
    assert equal(before, nnx.state(model))
    assert not equal(before, nnx.state(trained))


TWO_PROCESSES = """
import json, sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from tests.training.tiny import run
from attn_lab.training import FSDP, make_mesh
assert jax.process_count() == 2
mesh = make_mesh(data=1, fsdp=2)
result = run(sys.argv[3], mesh=mesh, rules=FSDP, stop=lambda row: row["step"] >= 20)
print(json.dumps(result.rows))
"""


def test_two_processes_train_one_model(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}

    def train():
        commands = [
            [sys.executable, "-c", TWO_PROCESSES, address, str(i), str(tmp_path)] for i in range(2)
        ]
        processes = [
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for command in commands
        ]
        outputs = [process.communicate(timeout=120)[0] for process in processes]
        return [json.loads(output.splitlines()[-1]) for output in outputs]

    first, again = train(), train()
    assert first[0] == first[1] == again[0] == again[1] == read_metrics(tmp_path)
    alone = run(None, stop=lambda row: row["step"] >= 20).rows
    for row, expected in zip(first[0], alone, strict=True):
        assert row == pytest.approx(expected, rel=1e-3)


EIGHT_THEN_FEWER = """
import sys
import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from tests.training.tiny import run
from attn_lab.training import FSDP, make_mesh

rules = (("up/kernel", P("fsdp", "tensor")), ("down/kernel", P("tensor", "fsdp")), *FSDP)

def until(step, *sizes, devices):
    mesh = make_mesh(**dict(zip(("data", "fsdp", "tensor"), sizes)), devices=devices)
    at = lambda row: row["step"] >= step
    return run(sys.argv[1], mesh=mesh, rules=rules, stop=at, config={})

devices = jax.devices()
assert len(devices) == 8
until(10, 1, 4, 2, devices=devices)
until(20, 1, 2, 1, devices=devices[:2])
until(30, 1, 1, 2, devices=devices[2:4])
last = until(40, 1, 1, 1, devices=devices[:1])
assert last.step == 40
alone = run(None, stop=lambda row: row["step"] >= 40).rows
for row, expected in zip(last.rows, alone, strict=True):
    for name in expected:
        np.testing.assert_allclose(row[name], expected[name], rtol=1e-3, err_msg=name)
"""


def test_a_run_goes_on_with_other_numbers_of_devices(tmp_path):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", EIGHT_THEN_FEWER, str(tmp_path)], env=env, check=True)
