from pathlib import Path

import pytest

COLABS = Path(__file__).parents[1] / "colabs"


@pytest.mark.parametrize("path", sorted(COLABS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run_top_to_bottom(path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": COLABS}}
    ).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    assert sum("image/png" in out.get("data", {}) for out in outputs) >= 2
