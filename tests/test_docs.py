import re
from pathlib import Path

import pytest

DOCS = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_the_complete_example_runs(path):
    example = path.read_text().split("## A complete example")[1]
    code = re.search(r"```python\n(.*?)```", example, re.DOTALL).group(1)
    exec(compile(code, str(path), "exec"), {})
