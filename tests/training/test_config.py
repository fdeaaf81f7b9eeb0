import json
import os
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from attn_lab.training import claim_workdir

CONFIG_FILE = """
from ml_collections import ConfigDict

def get_config(preset="small"):
    if preset not in ("small", "large"):
        raise ValueError(f"preset must be small or large; got {preset!r}")
    model = {"width": 16 if preset == "small" else 64}
    return ConfigDict({"steps": 3, "model": model, "betas": (0.9, 0.99)})
"""
PROGRAM = """
import json
from absl import logging
from attn_lab.training import run_main

def train(config, workdir):
    if config.steps < 0:
        raise ValueError(f"steps must be positive; got {config.steps}")
    logging.info("not shown")
    print(json.dumps([workdir, config.steps, config.model.width, config.betas]))
    if workdir.startswith("made"):
        import pathlib
        pathlib.Path(workdir).mkdir()
        return {"steps": config.steps}

run_main(train, "conf.py", "runs/default")
"""


@pytest.fixture
def program(tmp_path):
    (tmp_path / "conf.py").write_text(CONFIG_FILE)
    (tmp_path / "program.py").write_text(PROGRAM)

    def call(*args):
        return subprocess.run(
            [sys.executable, "program.py", *args],
            cwd=tmp_path,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )

    return call


@pytest.mark.parametrize(
    "args, expected",
    [
        ([], ["runs/default", 3, 16, [0.9, 0.99]]),
        (
            ["--config=conf.py:large", "--config.steps=5", "--config.betas=(0.5,0.6)"],
            ["runs/default", 5, 64, [0.5, 0.6]],
        ),
        (["--workdir=here", "--config.model.width=8"], ["here", 3, 8, [0.9, 0.99]]),
    ],
)
def test_flags_reach_the_experiment(program, args, expected):
    done = program(*args)
    assert json.loads(done.stdout) == expected and not done.stderr


def test_a_finished_run_leaves_its_result(program, tmp_path):
    assert not program("--workdir=made").stderr
    assert json.loads((tmp_path / "made/result.json").read_text()) == {"steps": 3}
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["result.json"]
    assert program("--workdir=made_wrong", "--config.steps=-1").returncode == 1
    assert not (tmp_path / "made_wrong").exists()


@pytest.mark.parametrize(
    "arg, message",
    [
        (
            "--config.model.widht=3",
            'unknown config key in --config.model.widht=3; did you mean "width"?',
        ),
        ("--config.zzz=3", "unknown config key in --config.zzz=3"),
        ("--config.steps=many", "invalid literal for int"),
        ("--config=conf.py:huge", "preset must be small or large; got 'huge'"),
        ("--config=missing.py", "missing.py"),
        ("--nonsense=1", "nonsense"),
        ("stray", "unexpected argument 'stray'"),
        ("--processes=2", "coordinator, processes and process_id go together"),
        ("--config.steps=-1", "steps must be positive; got -1"),
    ],
)
def test_bad_input_ends_with_one_line(program, arg, message):
    done = program(arg)
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_config_survives_its_workdir(tmp_path):
    config = ConfigDict({"a": 1, "b": {"c": (1.5, 2), "d": None, "e": {}}})
    assert claim_workdir(tmp_path / "x/y", config) == tmp_path / "x/y"
    assert json.loads((tmp_path / "x/y/config.json").read_text()) == {
        "a": 1,
        "b": {"c": [1.5, 2], "d": None, "e": {}},
    }
    claim_workdir(tmp_path / "x/y", config)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"a": 2}, r"a \(1 there, 2 asked\)$"),
        ({"b": {"c": 3}}, r"b\.d \(4 there, 'absent' asked\)$"),
        ({"e": 0}, r"e \('absent' there, 0 asked\)$"),
    ],
)
def test_another_config_is_refused(tmp_path, change, named):
    config = {"a": 1, "b": {"c": 3, "d": 4}}
    claim_workdir(tmp_path, config)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ValueError, match=named):
        claim_workdir(tmp_path, config | change)
    assert (tmp_path / "config.json").read_bytes() == before
