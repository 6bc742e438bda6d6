"""The loop's order, what a kill costs, and its clock: with a stand-in for the engine, and no network."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from data_pipeline.loading.batch import DataCursor
from train.distributed.ranks import Ranks
from train.engine.deepspeed_engine import StepResult
from train.engine.train_state import TrainState
from train.loop.context import TrainedModel, TrainingContext
from train.loop.heartbeat import NoWatchdog
from train.loop.meter import Meter
from train.loop.stability_monitor import StabilityConfig, StabilityMonitor, TrainingDiverged
from train.loop.trainer import Action, Cadence, Trainer
from train.runs.metrics import JsonLines, read_metrics

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


class Steps:
    """An engine whose loss is the step's number, and whose steps `skipped` are not applied."""

    ranks, batch_size = ALONE, 8

    def __init__(self, skipped=()):
        self.skipped = skipped

    def train_step(self, batches, applied_steps, total_steps):
        step = next(batches)
        return StepResult(
            {"loss": torch.tensor(float(step))},
            DataCursor(step),
            (f"sample of step {step}",),
            0.1,
            step not in self.skipped,
        )

    def master_shards(self):
        return []

    def flops(self, batch):
        return 0

    def gradient_norm(self):
        return float("nan")


class Killed(Exception):
    pass


class Saves:
    """Checkpoints that remember their steps; the one of step `dies_at` is where the run is killed."""

    def __init__(self, dies_at=None):
        self.steps, self.dies_at = [], dies_at

    def save(self, engine, ema, state):
        if state.step == self.dies_at:
            raise Killed
        self.steps.append(state.step)

    def raise_if_failed(self):
        pass

    def finish(self):
        pass


@pytest.fixture
def make_trainer(tmp_path):
    """make_trainer(...): ten steps from `start` on, logged to metrics.jsonl."""

    def make(start=0, total=10, save_every=4, actions=(), saves=None, skipped=(), log_every=2):
        reporter = JsonLines(tmp_path / "metrics.jsonl", start)
        ema = SimpleNamespace(update=lambda shards: None)
        state, cadence = TrainState(total, step=start), Cadence(log_every, save_every)
        listed = [
            Action(every, lambda state, name=name: reporter.log(state.step, {name: 1.0})) for every, name in actions
        ]
        saves = saves or Saves()
        batches = range(start + 1, total + 1)
        monitor = StabilityMonitor(StabilityConfig(), ALONE, tmp_path / "skipped.jsonl", good_step=start)
        never = SimpleNamespace(agreed=lambda step, device: False, begun=lambda: None)
        model, engine = TrainedModel("test", None, ""), Steps(skipped)
        context = TrainingContext(model, engine, ema, state, saves, reporter, NoWatchdog(), never)
        return Trainer(context, batches, monitor, cadence, listed), saves

    return make


def test_it_saves_at_the_last_step_always(make_trainer):
    for save_every, expected in ((None, [10]), (4, [4, 8, 10]), (5, [5, 10])):
        loop, saves = make_trainer(save_every=save_every)
        loop.fit()
        assert saves.steps == expected


@pytest.mark.parametrize("dies_at", [4, 8])
def test_rows_come_exactly_once_wherever_it_is_killed(make_trainer, tmp_path, dies_at):
    actions = [(4, "heldout"), (5, "preview")]
    loop, saves = make_trainer(actions=actions, saves=Saves(dies_at))
    with pytest.raises(Killed):
        loop.fit()
    make_trainer(start=max(saves.steps, default=0), actions=actions)[0].fit()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 8, 10]
    assert [row["step"] for row in rows if "heldout" in row] == [4, 8, 10]
    assert [row["step"] for row in rows if "preview" in row] == [5, 10]


def test_actions_come_before_the_save(make_trainer, tmp_path):
    """Else a kill in between would leave a checkpoint whose rows nobody writes any more."""
    loop, _ = make_trainer(actions=[(4, "heldout")], saves=Saves(dies_at=4))
    with pytest.raises(Killed):
        loop.fit()
    assert read_metrics(tmp_path / "metrics.jsonl")[-1] == {"step": 4, "heldout": 1.0}


def test_only_a_number_is_a_spike(tmp_path):
    """NaN is the loss of a log line all of whose steps were skipped."""
    monitor = StabilityMonitor(StabilityConfig(spike_factor=3.0, spike_window=2), ALONE, tmp_path / "skipped.jsonl")
    for step, loss in enumerate([1.0, 1.1, float("nan"), 2.9], 1):
        monitor.after_log(step, loss)
    with pytest.raises(TrainingDiverged, match="the loss of step 5 is"):
        monitor.after_log(5, 9.0)


def test_no_bare_nan_is_written(make_trainer, tmp_path):
    make_trainer()[0].fit()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [row["gradient_norm"] for row in rows] == [None] * 5


def test_100_skipped_steps_in_a_row_end_it(make_trainer):
    loop, _ = make_trainer(total=250, skipped=[*range(1, 100), *range(101, 201)], save_every=None)
    with pytest.raises(TrainingDiverged, match="gradients of 100 steps in a row, up to step 200, were not") as bad:
        loop.fit()
    state = loop.context.state
    assert (state.step, state.applied_steps, bad.value.good_step) == (200, 1, 100)
    noted = [json.loads(line) for line in loop.monitor.skipped_log.read_text().splitlines()]
    assert [row["step"] for row in noted] == [*range(1, 100), *range(101, 201)]
    assert noted[0]["keys"] == ["sample of step 1"]


def test_the_rate_leaves_out_actions_and_saves(make_trainer, monkeypatch):
    """Each batch takes 1 s, an action 100 s, another 1000 s, a save 10000 s: 8 samples a second all the same."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def passing(seconds):
        def action(*ignored):
            now[0] += seconds

        return action

    loop, saves = make_trainer(log_every=1000)
    meter = Meter(8)
    loop.meter, loop.actions = meter, [Action(1, passing(100.0)), Action(2, passing(1000.0))]
    saves.save = passing(10000.0)
    loop.batches = (passing(1.0)() or step for step in range(1, 11))
    rows = []
    reporter = SimpleNamespace(log=lambda step, row: rows.append(row), close=lambda: None)
    loop.context = replace(loop.context, reporter=reporter)
    loop.fit()
    assert rows[0]["samples_per_s"] == pytest.approx(8.0)
    assert rows[0]["data_wait"] == pytest.approx(1.0)


def test_each_buckets_flops_are_counted_once_and_logged_with_its_steps():
    counted = []

    class Engine:
        def flops(self, batch):
            counted.append(batch.bucket)
            return {"a": 1, "b": 1000}[batch.bucket]

    meter = Meter(8)
    buckets = ["a", "b", "b", "a", "b", "a", "b"]
    batches = meter.counted((SimpleNamespace(bucket=name) for name in buckets), Engine())
    sums = []
    for batch in batches:
        meter.add(StepResult({"loss": torch.tensor(1.0)}, DataCursor(1), (), 0.1, True, batch.bucket))
        sums.append(meter.since.flops)
    assert counted == ["a", "b"]
    assert sums == [1, 1001, 2001, 2002, 3002, 3003, 4003]
