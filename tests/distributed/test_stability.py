"""Samples that are not finite, and a loss that shoots up: skipped by all ranks, written down, gone back behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from synthetic import NO_ENCODERS, TINY_LATENTS, TINY_UNET, losses, metric_rows, run, write_latents

pytestmark = pytest.mark.processes

SAMPLES, STREAMS, BATCH = 640, 8, 16
BAD_STEPS = range(20, 23)  # counted from 0
SETTINGS = [
    *TINY_UNET, *NO_ENCODERS, f"training.batch_size={BATCH}", "training.log_every=1", "training.save_every=10",
    "training.keep_checkpoints=9", "+data.shuffle=false", "validate_every=null", "engine=zero2",
]  # fmt: skip


def bad_numbers() -> list[int]:
    """Of the samples that the bad steps take: each stream goes through its own eighth of them, in order."""
    each = BATCH // STREAMS
    return [s * SAMPLES // STREAMS + each * step + i for s in range(STREAMS) for step in BAD_STEPS for i in range(each)]


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("latents")
    write_latents(root / "train", SAMPLES, TINY_LATENTS, spoilt=dict.fromkeys(bad_numbers(), np.nan))
    write_latents(root / "heldout", 8, TINY_LATENTS)
    return root


def notes(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


def test_steps_that_are_not_finite_are_skipped(latents: Path, tmp_path: Path) -> None:
    """By one rank; the next test has two."""
    run("train/train_ldm.py", f"input={latents}", f"output={tmp_path / 'run'}", *SETTINGS, "training.steps=30")
    rows = notes(tmp_path / "run")
    assert [row["step"] for row in rows] == [step + 1 for step in BAD_STEPS]
    assert {key for row in rows for key in row["keys"]} == {f"{number:06d}" for number in bad_numbers()}
    logged = metric_rows(tmp_path / "run")
    assert [row["step"] for row in logged if row["loss"] is None] == [21, 22, 23]
    state = json.loads((tmp_path / "run/checkpoints/step-00000030/state.json").read_text())
    assert (state["state"]["applied_steps"], state["engine"]["adam_step"], state["ema"]["updates"]) == (27, 27, 27)


def test_after_several_in_a_row_it_goes_back_and_past_them(latents: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    more = ["training.steps=30", "training.stability.max_skipped=3", "training.save_every=1"]
    more += ["training.keep_checkpoints=2"]  # nothing is saved while steps are skipped, so step 20 is kept
    done = run("train/train_ldm.py", f"input={latents}", f"output={output}", *SETTINGS, *more, ranks=2)
    assert "rolled back to step 20; the data in between are skipped" in done.stdout
    assert notes(output)[-1]["rolled_back_to"] == 20
    skipped = {key for row in notes(output) for key in row.get("keys", [])}
    assert skipped == {f"{number:06d}" for number in bad_numbers()}  # of both ranks
    assert sorted(losses(output)) == list(range(1, 31))  # each once, none of them of the bad samples
    state = json.loads((output / "checkpoints/step-00000030/state.json").read_text())["state"]
    assert (state["passed_over"], state["rollbacks"], state["applied_steps"]) == (3, 1, 30)
    again = run("train/train_ldm.py", f"input={latents}", f"output={output}", *SETTINGS, *more, "training.steps=33")
    assert "resumed from step 30 of 33" in again.stdout  # with the data where they were


def test_a_run_of_skipped_steps_has_not_finished(latents: Path, tmp_path: Path) -> None:
    more = ["training.steps=8", "optimizer.lr=1e30", "optimizer.schedule.warmup=0"]
    done = run("train/train_ldm.py", f"input={latents}", f"output={tmp_path / 'run'}", *SETTINGS, *more, check=False)
    assert done.returncode == 2
    assert "of 8 steps could not be applied: lower optimizer.lr" in done.stderr


def test_no_way_back_is_said(latents: Path, tmp_path: Path) -> None:
    more = ["training.steps=30", "training.stability.max_skipped=3", "training.stability.max_rollbacks=0"]
    done = run("train/train_ldm.py", f"input={latents}", f"output={tmp_path / 'a'}", *SETTINGS, *more, check=False)
    assert done.returncode == 2
    assert "3 steps in a row, up to step 23, were not finite, after 0 rollbacks: lower optimizer.lr" in done.stderr
    none = [*more[:2], "training.save_every=null"]
    done = run("train/train_ldm.py", f"input={latents}", f"output={tmp_path / 'b'}", *SETTINGS, *none, check=False)
    assert done.returncode == 2
    assert "there is no earlier checkpoint" in done.stderr


def test_a_loss_that_shoots_up_is_gone_back_behind(tmp_path: Path) -> None:
    root = tmp_path / "latents"
    write_latents(root / "train", SAMPLES, TINY_LATENTS, spoilt=dict.fromkeys(bad_numbers(), 1000.0))
    write_latents(root / "heldout", 8, TINY_LATENTS)
    more = ["training.steps=30", "training.stability.spike_factor=10", "training.stability.spike_window=10"]
    done = run("train/train_ldm.py", f"input={root}", f"output={tmp_path / 'run'}", *SETTINGS, *more)
    assert "the loss of step 21 is" in done.stdout
    # The first step back takes the second bad one's data, and so on: three windows of one step each.
    assert [row["rolled_back_to"] for row in notes(tmp_path / "run") if "rolled_back_to" in row] == [20, 20, 20]
    assert sorted(losses(tmp_path / "run")) == list(range(1, 31))
