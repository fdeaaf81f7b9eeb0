import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import sweep
from experiments.sweep import Sweep, chain, over, product, run_here, run_name, sample

ROOT = Path(__file__).parents[2]
CONFIG = """
from ml_collections import ConfigDict

def get_config(preset="one"):
    return ConfigDict({"x": 0.0, "y": "a", "model": {"width": 1}, "fails": False, "sleep": 0.0})
"""
# An experiment of milliseconds with the flags of a real one; it says in a file that it ended.
FAKE = """
import json, os, pathlib, sys, time

given = dict(arg[2:].partition("=")[::2] for arg in sys.argv[1:])
folder = pathlib.Path(given["workdir"])
with open(os.environ["RECORD"], "a") as record:
    record.write("start " + folder.name + "\\n")
while "config.sleep" in given and not pathlib.Path(given["config.sleep"]).exists():
    time.sleep(0.02)
if given.get("config.fails") == "True":
    raise SystemExit("error: it was told to fail")
with open(os.environ["RECORD"], "a") as record:
    record.write("end " + folder.name + "\\n")
accuracy = float(given.get("config.x", 0)) + int(given.get("config.model.width", 0))
result = {"accuracy": accuracy, "sample": "some\\ntext"}
(folder / "result.json").write_text(json.dumps(result))
"""
# Recall, which says in a file that it trained to the end.
RECORDED = """
import os
from experiments import recall
from attn_lab.training import run_main

def train(config, workdir):
    result = recall.summarize(recall.train(config, workdir))
    with open(os.environ["RECORD"], "a") as record:
        record.write(f"end {workdir.rsplit('/', 1)[1]}\\n")
    return result

run_main(train, "experiments/configs/recall.py", "runs/recall")
"""
TINY = """
import dataclasses
from experiments.configs.sweep import get_sweep as named

def get_sweep():
    return dataclasses.replace(named("tiny"), experiment="programs.recorded")
"""

keys = st.sampled_from("abcdef")
points = st.dictionaries(keys, st.integers(0, 3), max_size=2)


def lists_of(letters):
    values = st.lists(st.integers(0, 9), unique=True, max_size=4)
    return st.tuples(st.sampled_from(letters), values).map(lambda pair: over(*pair))


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A sweep of the fake experiment by its points; files are in `tmp_path`."""
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs/fake.py").write_text(FAKE)
    (tmp_path / "programs/recorded.py").write_text(RECORDED)
    (tmp_path / "conf.py").write_text(CONFIG)
    (tmp_path / "tiny.py").write_text(TINY)
    paths = [str(tmp_path), str(ROOT), str(ROOT / "kernels")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    yield lambda points, **base: Sweep("programs.fake", str(tmp_path / "conf.py"), points, base)
    kill(*processes_of(tmp_path))


def record(tmp_path, what="end"):
    with contextlib.suppress(FileNotFoundError):
        lines = (tmp_path / "record").read_text().splitlines()
        return Counter(line.split()[1] for line in lines if line.split()[0] == what)
    return Counter()


def drive(*flags, **kwargs):
    command = [sys.executable, "-m", "experiments.sweep", *map(str, flags)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes | kwargs)


def wait_for(condition, process=None, seconds=600):
    end = time.time() + seconds
    while not (found := condition()):
        assert time.time() < end, "nothing happened"
        assert process is None or process.poll() is None, "the driver ended"
        time.sleep(0.02)
    return found


@given(lists_of("ab"), lists_of("cd"), lists_of("ef"))
def test_product_has_every_combination_in_order(a, b, c):
    assert product(a, b, c) == [{**x, **y, **z} for x in a for y in b for z in c]
    assert product(a, product(b, c)) == product(product(a, b), c) == product(a, b, c)
    assert product() == [{}] and product(a, [{}]) == a


@given(lists_of("ab"), lists_of("cd"))
def test_zip_goes_side_by_side(a, b):
    if len(a) == len(b):
        assert sweep.zip(a, b) == [{**x, **y} for x, y in zip(a, b)]
    else:
        with pytest.raises(ValueError, match=rf"one length; got \[{len(a)}, {len(b)}\]"):
            sweep.zip(a, b)


@given(lists_of("a"), lists_of("b"), st.integers(0, 9), st.data())
def test_sample_is_seeded_and_keeps_order(a, b, seed, data):
    points = product(a, b)
    count = data.draw(st.integers(0, len(points)))
    drawn = sample(points, count, seed=seed)
    assert drawn == sample(points, count, seed=seed) == [p for p in points if p in drawn]
    assert len(drawn) == count
    with pytest.raises(ValueError, match=f"count must be 0 to {len(points)}"):
        sample(points, len(points) + 1, seed=seed)


@given(st.lists(points), st.lists(points))
def test_chain_refuses_a_point_twice(a, b):
    names = [run_name(point) for point in a + b]
    if len(set(names)) == len(names):
        assert chain(a, b) == a + b
    else:
        with pytest.raises(ValueError, match="is there twice"):
            chain(a, b)


@pytest.mark.parametrize("combine", [product, sweep.zip])
def test_a_key_given_twice_is_named(combine):
    with pytest.raises(ValueError, match=r"key lr is given twice: 1 and 2"):
        combine([{"lr": 1, "a": 0}], [{"lr": 2}])


def test_names_are_stable_and_safe():
    assert run_name({"b": 1, "a": "x"}) == run_name({"a": "x", "b": 1}) == "a=x,b=1"
    assert run_name({"rates": (1e-3,)}) == "rates=(0.001,)" and run_name({}) == "base"
    odd = [run_name({"a": value}) for value in ("x/y", "x y", "x_y", "x" * 300, "x" * 301)]
    assert len(set(odd)) == 5 and all("/" not in name and len(name) < 130 for name in odd)


def test_a_sweep_runs_skips_and_grows(fake, tmp_path):
    workdir = tmp_path / "runs"
    first = sweep.plan_runs(fake(over("x", [1.0, 2.0]), y="b"), workdir)
    assert run_here(first, workers=2) == {}
    more = product(over("x", [1.0, 2.0, 3.0]))
    assert run_here(sweep.plan_runs(fake(more, y="b"), workdir), workers=2) == {}
    assert record(tmp_path, "start") == record(tmp_path) == {f"x={x}.0": 1 for x in (1, 2, 3)}
    command = (workdir / "x=3.0/command.txt").read_text().split()
    assert command[1:3] == ["-m", "programs.fake"] and "--config.y=b" in command
    (workdir / "x=3.0/result.json").unlink()
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert json.loads((workdir / "x=3.0/result.json").read_text())["accuracy"] == 3
    with pytest.raises(ValueError, match=r"holds another config, which differs in: config.y"):
        sweep.plan_runs(fake(more, y="c"), workdir)


def test_a_failed_run_is_named_and_the_others_go_on(fake, tmp_path):
    both = [{"x": 1.0}, {"fails": True}, {"x": 2.0}]
    runs = sweep.plan_runs(fake(both), tmp_path / "runs")
    assert run_here(runs) == {"fails=True": "status 1: error: it was told to fail"}
    assert set(record(tmp_path)) == {"x=1.0", "x=2.0"}
    assert "told to fail" in (tmp_path / "runs/fails=True/log.txt").read_text()


@pytest.mark.parametrize(
    "point, message",
    [
        ({"modle.width": 3}, 'unknown config key modle.width; did you mean "model"'),
        ({"model.widht": 3}, 'unknown config key model.widht; did you mean "width"'),
        ({"x.y": 3}, "unknown config key x.y"),
        ({"x": "many"}, "config key x cannot be 'many'"),
    ],
)
def test_wrong_points_are_refused_before_anything_starts(fake, tmp_path, point, message):
    with pytest.raises(ValueError, match=message):
        sweep.plan_runs(fake([{"x": 1.0}, point]), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_two_drivers_and_an_orphan_run_no_point_twice(fake, tmp_path):
    gate = tmp_path / "gate"
    spec = tmp_path / "spec.py"
    spec.write_text(
        "from experiments.sweep import Sweep, over\n"
        f"def get_sweep(): return Sweep('programs.fake', {str(tmp_path / 'conf.py')!r}, "
        f"over('x', [1.0, 2.0, 3.0, 4.0]), {{'y': 'b'}})\n"
    )
    program = tmp_path / "programs/fake.py"
    program.write_text(
        FAKE.replace("given = dict(", f"given = {{'config.sleep': {str(gate)!r}}} | dict(")
    )
    flags = [f"--sweep={spec}", f"--workdir={tmp_path / 'runs'}", "--workers=2"]
    first = drive(*flags)
    wait_for(lambda: len(record(tmp_path, "start")) == 2, first, 60)
    first.kill()
    first.wait()
    others = [drive(*flags), drive(*flags)]
    wait_for(lambda: len(record(tmp_path, "start")) == 4, seconds=60)
    time.sleep(0.5)
    gate.touch()
    said = [process.communicate(timeout=60)[0] for process in others]
    assert [process.returncode for process in others] == [0, 0], said
    assert record(tmp_path, "start") == record(tmp_path) == {f"x={n}.0": 1 for n in (1, 2, 3, 4)}


def test_a_driver_told_to_end_ends_its_runs(fake, tmp_path):
    sweep_file = [
        *("--experiment=programs.fake", f"--config={tmp_path / 'conf.py'}"),
        *("--over=y=a,b,c", f"--workdir={tmp_path / 'runs'}", "--workers=2"),
    ]
    program = tmp_path / "programs/fake.py"
    program.write_text(FAKE.replace("given = dict(", "given = {'config.sleep': 'never'} | dict("))
    process = drive(*sweep_file)
    wait_for(lambda: len(record(tmp_path, "start")) == 2, process, 60)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert not processes_of(tmp_path / "runs") and not record(tmp_path)


def test_the_program_reports_and_plots(fake, tmp_path):
    flags = [
        *("--experiment=programs.fake", f"--config={tmp_path / 'conf.py'}", "--set=y=b"),
        *("--over=x=1,2.5", "--over=model.width=(1,2)", f"--workdir={tmp_path / 'runs'}"),
        *("--over=fails=False,True", "--plot=x,model.width", "--metric=accuracy"),
    ]
    process = drive(*flags, "--workers=2")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert "4 of 8 runs failed" in output and "fails=True,model.width=1,x=1: status 1" in output
    assert "| x | model.width | fails | accuracy |" in output
    assert "| 2.5 | 2 | False | 4.5 |" in output and "| 2.5 | 2 | True |  |" in output
    rows = json.loads((tmp_path / "runs/results.json").read_text())
    assert [row["result"] and row["result"]["accuracy"] for row in rows[::2]] == [2, 3, 3.5, 4.5]
    assert len((tmp_path / "runs/results.csv").read_text().splitlines()) == 9
    picture = tmp_path / "runs/x_model.width.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    process = drive(*flags, "--report")
    assert "| 2.5 | 2 |" in process.communicate(timeout=60)[0] and picture.exists()
    assert sum(record(tmp_path, "start").values()) == 8


def test_bad_flags_end_with_one_line(fake, tmp_path):
    config = f"--config={tmp_path / 'conf.py'}"
    bad = {
        "there is no experiment 'recal'": ["--experiment=recal", config],
        "missing.py": ["--experiment=recall", "--config=missing.py"],
        "conf.py has no get_sweep": [f"--sweep={tmp_path / 'conf.py'}"],
        "--over needs KEY=VALUE": ["--experiment=recall", config, "--over=x"],
        "unknown config key z": ["--experiment=recall", config, "--set=z=1"],
        "--sweep=FILE[:NAME], or": ["--experiment=recall"],
    }
    started = [drive(*flags, f"--workdir={tmp_path / 'runs'}") for flags in bad.values()]
    for message, process in zip(bad, started):
        output = process.communicate(timeout=100)[0]
        assert process.returncode == 1 and message in output
        assert output.startswith("error: ") and output.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_plot_names_what_is_not_there(tmp_path):
    rows = [{"run": "a", "point": {"x": 1}, "result": {"accuracy": 0.5}}]
    with pytest.raises(ValueError, match="there are accuracy, x"):
        sweep.plot(rows, ["z"], "accuracy", tmp_path / "plot.png")


def processes_of(folder):
    """The ids of all runs whose workdir is in the folder."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            for part in path.read_bytes().decode(errors="replace").split("\0"):
                if part.startswith(f"--workdir={folder}/"):
                    found[int(path.parent.name)] = Path(part.partition("=")[2])
    return found


def in_the_middle(folder):
    """The id of a run that has a checkpoint and no result."""
    for process, run in processes_of(folder).items():
        if list(run.glob("*/checkpoints/[0-9]*")) and not (run / "result.json").exists():
            return process
    return None


def kill(*processes):
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def check_complete(tmp_path, process):
    output = process.communicate()[0]
    assert process.returncode == 0, output
    rows = json.loads((tmp_path / "runs/results.json").read_text())
    assert len(rows) == 24 and all(0 <= row["result"]["accuracy"] <= 1 for row in rows)
    assert record(tmp_path) == {row["run"]: 1 for row in rows}


@pytest.mark.slow
def test_a_sweep_killed_three_times_loses_nothing_and_repeats_nothing(fake, tmp_path):
    runs = tmp_path / "runs"
    flags = f"--sweep={tmp_path / 'tiny.py'}", f"--workdir={runs}", "--workers=2"
    driver = drive(*flags, stdout=open(tmp_path / "first", "w"))
    wait_for(lambda: record(tmp_path).total() >= 3, driver)
    kill(wait_for(lambda: in_the_middle(runs), driver))
    wait_for(lambda: "failed" in (tmp_path / "first").read_text(), driver)
    wait_for(lambda: record(tmp_path).total() >= 8 and in_the_middle(runs), driver)
    driver.kill()
    driver.wait()
    assert processes_of(runs)
    driver = drive(*flags)
    wait_for(lambda: record(tmp_path).total() >= 15 and in_the_middle(runs), driver)
    kill(driver.pid, *processes_of(runs))
    driver.wait()
    assert record(tmp_path).total() < 24
    check_complete(tmp_path, drive(*flags))


@pytest.mark.slow
def test_a_sweep_on_ray_survives_a_worker_the_driver_and_a_node(fake, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    runs = tmp_path / "runs"
    size = {"object_store_memory": 80_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **size})
    try:
        nodes = [cluster.add_node(num_cpus=1, **size) for _ in range(2)]
        flags = (
            *(f"--sweep={tmp_path / 'tiny.py'}", f"--workdir={runs}"),
            f"--ray_address={cluster.address}",
        )
        driver = drive(*flags, stdout=open(tmp_path / "first", "w"))
        wait_for(lambda: record(tmp_path).total() >= 3, driver)
        kill(parent(wait_for(lambda: in_the_middle(runs), driver)))
        wait_for(lambda: record(tmp_path).total() >= 8 and in_the_middle(runs), driver)
        driver.kill()
        driver.wait()
        driver = drive(*flags, stdout=open(tmp_path / "second", "w"))
        wait_for(lambda: record(tmp_path).total() >= 13 and in_the_middle(runs), driver)
        cluster.remove_node(nodes[0], allow_graceful=False)
        wait_for(lambda: record(tmp_path).total() >= 16, driver)
        cluster.add_node(num_cpus=1, **size)
        driver.wait()
        assert "\nfailed " not in (tmp_path / "second").read_text()
        check_complete(tmp_path, drive(*flags))
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_a_run_takes_every_host_of_a_slice(fake, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    program = tmp_path / "programs/fake.py"
    both = "while open(os.environ['RECORD']).read().count(f'start {folder.name}') < 2: pass\n"
    program.write_text(FAKE.replace("while", f"print(*sys.argv[1:], flush=True)\n{both}while"))
    monkeypatch.setattr(sweep, "_other_hosts", lambda: [{"slice": 1, "TPU": 4}])
    ray.cloudpickle.register_pickle_by_value(sweep)
    size = {"object_store_memory": 80_000_000, "num_cpus": 1}
    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **size})
    try:
        host = {"slice": 1, "TPU": 4}
        cluster.add_node(resources={"TPU-v4-16-head": 1, **host}, **size)
        cluster.add_node(resources=host, **size)
        runs = sweep.plan_runs(fake(over("x", [1.0, 2.0, 3.0])), tmp_path / "runs")
        needs = {"TPU-v4-16-head": 1, "TPU": 4}
        assert sweep.run_on_ray(runs, needs, cluster.address) == {}
        for run in runs:
            logs = [(run.folder / name).read_text() for name in ("log.txt", "log1.txt")]
            assert all("--distributed" in log for log in logs)
        assert record(tmp_path, "start") == {run.name: 2 for run in runs}
    finally:
        ray.shutdown()
        cluster.shutdown()


def parent(process):
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
