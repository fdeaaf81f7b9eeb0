"""What holds for the project as a whole: imports, packaging, README."""

import ast
import configparser
import json
import subprocess
import sys
from pathlib import Path

import pytest

from attn_lab.catalogue import with_table

ROOT = Path(__file__).parents[1]
HEAVY = {"orbax", "tensorflow_datasets", "matplotlib", "PIL", "tensorflow"}
# A room may import those in its row and itself.
MAY_IMPORT = {
    "attn_kernels": set(),
    "attn_lab.ops": {"attn_kernels"},
    "attn_lab.nn": {"attn_kernels", "attn_lab.ops"},
    "attn_lab.models": {"attn_lab.ops", "attn_lab.nn"},
    "attn_lab.tasks": set(),
    "attn_lab.data": set(),
    "attn_lab.training": {"attn_kernels.parallel", "attn_lab.data.order"},
    "attn_lab.distributed": {"attn_kernels", "attn_lab.ops"},
    "attn_lab.catalogue": {"attn_lab.ops"},
    "attn_lab.analysis": {"attn_kernels", "attn_lab.ops"},
    "attn_lab.objectives": set(),
}
FOLDERS = {"attn_kernels": ROOT / "kernels" / "attn_kernels"}


def python(script: str) -> str:
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return run.stdout


def test_imports_are_light():
    """Importing every room and building a train step loads none of the heavy libraries."""
    loaded = json.loads(
        python(
            "import json, sys\n"
            "import attn_lab.analysis, attn_lab.catalogue, attn_lab.data, attn_lab.models\n"
            "import attn_lab.nn, attn_lab.objectives, attn_lab.ops, attn_lab.tasks\n"
            "import attn_lab.training\n"
            "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
        )
    )
    assert not HEAVY & set(loaded)


def test_import_takes_little_beyond_jax():
    script = "import time, jax\nstart = time.perf_counter()\nimport attn_lab\n"
    seconds = [float(python(script + "print(time.perf_counter() - start)")) for _ in range(3)]
    assert min(seconds) < 1.5


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_imports_point_one_way(room):
    folder = FOLDERS.get(room, ROOT / room.replace(".", "/"))
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    assert files
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                if name.split(".")[0] in ("attn_lab", "attn_kernels", "experiments"):
                    allowed = {room} | MAY_IMPORT[room]
                    assert any(f"{name}.".startswith(f"{a}.") for a in allowed), (path, name)


def test_every_package_is_installed():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    listed = set(parser["options"]["packages"].split())
    for top, folder in ("attn_lab", ROOT / "attn_lab"), ("attn_kernels", FOLDERS["attn_kernels"]):
        found = {
            ".".join((top, *path.parent.relative_to(folder).parts))
            for path in folder.rglob("__init__.py")
        }
        assert found == {name for name in listed if name.split(".")[0] == top}


def test_the_table_in_the_readme_is_fresh():
    readme = (ROOT / "README.md").read_text()
    assert with_table(readme) == readme, "run: python -m attn_lab.catalogue README.md"
