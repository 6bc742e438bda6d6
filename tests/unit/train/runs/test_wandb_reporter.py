"""W&B's end of the reporters, with W&B itself replaced: what it is told, what it is not, and that nothing waits."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace

import pytest
import torch
import wandb

from train.distributed.ranks import Ranks
from train.runs import wandb_reporter
from train.runs.metrics import rows_by_step
from train.runs.run_folder import RunFolder
from train.runs.wandb_reporter import WeightsAndBiases


@pytest.fixture
def told(monkeypatch):
    """What W&B's run was told, in order; `told.go` holds it up until set."""
    told = SimpleNamespace(rows=[], go=threading.Event(), finished=[])
    told.go.set()

    def log(values, step):
        assert told.go.wait(30)
        told.rows.append((step, values))

    run = SimpleNamespace(log=log, finish=lambda: told.finished.append(True), resumed=False, step=0)
    told.run = run
    monkeypatch.setattr(wandb_reporter, "_begin_run", lambda about, patience_s: run)
    return told


def test_all_is_told_in_order_and_ended(told, tmp_path):
    reporter = WeightsAndBiases(tmp_path, "abc", {}, "project")
    for step in range(1, 201):
        reporter.log(step, {"loss": float(step)})
    reporter.close()
    assert told.rows == [(step, {"loss": float(step)}) for step in range(1, 201)]
    assert told.finished == [True]


def test_what_it_has_already_is_not_told_again_and_what_it_lacks_is(told, tmp_path):
    """W&B has up to step 2; of step 3 a kill came between; then the run goes on, and back to step 4 once."""
    told.run.resumed, told.run.step = True, 3
    rows = [{"step": step, "loss": float(step)} for step in (1, 2, 3)]
    reporter = WeightsAndBiases(tmp_path, "abc", {}, "project", rows)
    for step in (4, 5):
        reporter.log(step, {"loss": float(step)})
    reporter.log(5, {"heldout_loss": 2.0})  # of the same step: not an older one
    reporter.rewind(4)
    reporter.log(4, {"loss": 1.0})
    reporter.close()
    assert told.rows == [(3, {"loss": 3.0}), (4, {"loss": 4.0}), (5, {"loss": 5.0}), (5, {"heldout_loss": 2.0})]


def test_a_full_queue_drops_counts_and_says_so_once(told, tmp_path, caplog):
    told.go.clear()
    reporter = WeightsAndBiases(tmp_path, "abc", {}, "project", queue_size=10)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 101):
            reporter.log(step, {"loss": 1.0})  # would wait for ever, if it waited
        assert 89 <= reporter.dropped <= 90  # ten in the queue, and perhaps one in the thread's hands
        told.go.set()
        reporter.close()
    assert [record.message for record in caplog.records].count(
        "W&B can't keep up, and values are dropped: train/replay_metrics.py can send them later from metrics.jsonl"
    ) == 1
    assert f"{reporter.dropped} entries were dropped" in caplog.text
    assert len(told.rows) == 100 - reporter.dropped


def test_its_end_is_waited_for_no_longer_than_said(told, tmp_path, caplog, monkeypatch):
    killed = []
    monkeypatch.setattr(wandb_reporter, "_kill_service", lambda: killed.append(True))
    told.go.clear()
    reporter = WeightsAndBiases(tmp_path, "abc", {}, "project", patience_s=0.1)
    reporter.log(1, {"loss": 1.0})
    with caplog.at_level(logging.WARNING):
        reporter.close()
    assert "it did not finish in time" in caplog.text
    assert killed == [True, True]  # the second time, what it kept offline then
    told.go.set()


def test_trouble_with_wandb_is_not_trainings(tmp_path, monkeypatch, caplog):
    def fail(about, patience_s):
        raise wandb.errors.UsageError("no such thing")

    monkeypatch.setattr(wandb_reporter, "_begin_run", fail)
    with caplog.at_level(logging.WARNING):
        reporter = WeightsAndBiases(tmp_path, "abc", {}, "project")
        reporter.log(1, {"loss": 1.0})
        reporter.close()
    assert "logging to W&B has stopped (UsageError: no such thing)" in caplog.text
    assert isinstance(reporter.error, wandb.errors.UsageError)


def test_a_resumed_run_tells_what_it_resumes_from(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run", "train_ldm", {}, Ranks(0, 1, 0, torch.device("cpu")))
    (run.path / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, 6)))
    given = []
    monkeypatch.setattr("train.runs.run_folder.WeightsAndBiases", lambda *arguments: given.append(arguments))
    run.reporters(2, "project")
    assert given == [(run.path, run.run_id, {}, "project", [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}])]


def test_rows_of_a_step_are_one(tmp_path):
    rows = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None, "lr": 0.1}, {"step": 2, "heldout_loss": 3.0}]
    assert list(rows_by_step(rows, tmp_path)) == [{"step": 1, "loss": 1.0}, {"step": 2, "lr": 0.1, "heldout_loss": 3.0}]


def test_a_grid_is_told_where_it_still_lies(tmp_path):
    (tmp_path / "a.png").touch()
    rows = [{"step": 1, "samples": "a.png"}, {"step": 2, "samples": "b.png"}]
    assert list(rows_by_step(rows, tmp_path)) == [{"step": 1, "samples": tmp_path / "a.png"}, rows[1]]
