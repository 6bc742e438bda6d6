"""metrics.jsonl over stops, cuts and resumptions."""

import pytest

from data_pipeline.common.errors import DataError
from train.runs.metrics import JsonLines, Reporters, read_metrics


def test_rows_are_there_as_soon_as_they_are_logged(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.log(1, {"loss": 0.1 + 0.2})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.1 + 0.2}]
    lines.image(2, "preview", tmp_path / "samples" / "a.png")
    assert read_metrics(tmp_path / "metrics.jsonl")[1] == {"step": 2, "preview": "a.png"}


def test_rows_past_the_step_resumed_from_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path)
    for step in range(1, 6):
        first.log(step, {"loss": float(step)})
    first.close()
    again = JsonLines(path, from_step=3)
    again.log(4, {"loss": -4.0})
    again.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, -4.0)]


def test_a_last_line_that_was_cut_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path)
    for step in (1, 2):
        first.log(step, {"loss": 12.5})
    first.close()
    whole = path.read_text()
    for keep in range(len(whole) // 2 + 1, len(whole) - 1):
        path.write_text(whole[:keep])
        assert [row["step"] for row in read_metrics(path)] == [1]
    again = JsonLines(path, from_step=1)
    again.log(2, {"loss": 1.0})
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_a_new_run_starts_with_none(tmp_path):
    JsonLines(tmp_path / "metrics.jsonl").close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_several_reporters_are_told_the_same(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    reporters = Reporters(*map(JsonLines, paths))
    reporters.log(1, {"loss": 2.0})
    reporters.image(1, "preview", tmp_path / "p.png")
    reporters.close()
    assert paths[0].read_text() == paths[1].read_text() != ""


@pytest.mark.parametrize("line", ["3", "[]", "null", '"step"', "{}", '{"step": "2"}'])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    """Where a run goes on, and where its rows are looked at."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": 2.0}}\n{line}\n{{"step": 3, "loss": 1.0}}\n')
    for do in (read_metrics, JsonLines):
        with pytest.raises(DataError, match=r"metrics\.jsonl, line 2 is not a row of metrics .*: fix or remove it"):
            do(path)
    assert line in path.read_text()
