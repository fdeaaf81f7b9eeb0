import json

from attn_lab.training.metrics import MetricsFile, plot_metrics, read_metrics

ROWS = [{"step": step, "train/loss": 1 / step} for step in (1, 2, 3)]


def test_rows_come_back(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for row in ROWS:
        file.append(row)
    assert file.rows == read_metrics(tmp_path) == read_metrics(file.path) == ROWS


def test_rows_after_the_restored_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"step": 4, "trai')
    assert MetricsFile(path, step=2).rows == read_metrics(path) == ROWS[:2]
    assert [child.name for child in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_memory_only():
    file = MetricsFile(None)
    file.append(ROWS[0])
    assert file.rows == ROWS[:1]


def test_plot(tmp_path):
    path = tmp_path / "loss.png"
    plot_metrics({"one": ROWS, "none": []}, ["train/loss", "valid/loss"], path)
    assert path.read_bytes().startswith(b"\x89PNG")
