import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab.training.checkpoint import Checkpoints
from attn_lab.training.step import TrainState


def make_state(step, size=5):
    key = jax.random.key(step)
    params = {"layers": {0: {"kernel": jax.random.normal(key, (size, 3))}}}
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    return TrainState(jnp.int32(step), params, (half, ()), {"key": key})


def same(a, b):
    raw = [
        jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), t)
        for t in (a, b)
    ]
    return jax.tree.all(jax.tree.map(np.array_equal, *raw))


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def test_the_newest_state_comes_back_bit_for_bit_and_older_ones_go(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.restore(make_state(0)) is None
    for step in (3, 5, 9):
        checkpoints.save(make_state(step))
    assert same(Checkpoints(tmp_path).restore(make_state(0)), make_state(9))
    assert checkpoints.newest() == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "9"]


def test_any_damaged_file_is_noticed(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path / "whole")
    for step in (3, 5):
        checkpoints.save(make_state(step))
    files = [p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole/5").rglob("*")]
    files = [p for p in files if (tmp_path / "whole" / p).is_file()]
    assert len(files) > 5
    for i, name in enumerate(files):
        copy = tmp_path / str(i)
        shutil.copytree(tmp_path / "whole", copy)
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        damages = [content, content[: len(content) // 2], None]
        if (damage := damages[i % 3]) is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(damage)
        caplog.clear()
        again = Checkpoints(copy)
        assert same(again.restore(make_state(0)), make_state(3))
        assert f"{i}/5 is damaged" in caplog.text
        again.save(make_state(5))
        assert same(Checkpoints(copy).restore(make_state(0)), make_state(5))


def test_all_damaged(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(3))
    (tmp_path / "3/checksums.json").unlink()
    assert Checkpoints(tmp_path).restore(make_state(0)) is None


def test_other_arrays_are_refused_and_kept(tmp_path):
    Checkpoints(tmp_path).save(make_state(3))
    with pytest.raises(ValueError, match=r"3 has not .*: opt_state/0/layers.*, params/layers/0"):
        Checkpoints(tmp_path).restore(make_state(0, size=6))
    assert same(Checkpoints(tmp_path).restore(make_state(0)), make_state(3))


def test_one_is_not_enough(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 2; got 1"):
        Checkpoints(tmp_path / "new", keep=1)
    assert not (tmp_path / "new").exists()


SAVER = """
import sys
from pathlib import Path
import jax.numpy as jnp
from attn_lab.training.checkpoint import Checkpoints
from attn_lab.training.step import TrainState
checkpoints = Checkpoints(Path(sys.argv[1]))
for step in range(1, 10**6):
    checkpoints.save(TrainState(jnp.int32(step), {"w": jnp.full(100_000, step)}, (), {}))
"""


def test_killed_while_saving(tmp_path):
    rng = np.random.default_rng()
    process = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)])
    while not (tmp_path / "2").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 1))
    process.send_signal(signal.SIGKILL)
    process.wait()
    like = TrainState(jnp.int32(0), {"w": jnp.zeros(100_000, jnp.int32)}, (), {})
    restored = Checkpoints(tmp_path).restore(like)
    assert restored.step >= 1 and (restored.params["w"] == restored.step).all()
    assert all(path.name.isdigit() for path in tmp_path.iterdir())
