"""Steps given as shares of the run: resolved once, against the steps that the run began with."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from synthetic import NO_ENCODERS, TINY_UNET, metric_rows, run

pytestmark = pytest.mark.processes


def test_a_longer_run_does_not_warm_up_again(tiny_latents: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    few = ["training.log_every=1", "training.batch_size=8", "validate_every=null", "optimizer.lr=1"]
    options = [f"input={tiny_latents}", f"output={output}", *TINY_UNET, *NO_ENCODERS, *few]
    options.append("optimizer.schedule.kind=constant")
    share = "optimizer.schedule.warmup=0.5"
    said = run("train/train_ldm.py", *options, share, "training.steps=4").stdout
    assert "optimizer.schedule.warmup: 2, 0.5 of 4 steps" in said
    for steps in (6, 12):  # the second resumes from a checkpoint of 6 steps of a run that began with 4
        run("train/train_ldm.py", *options, share, f"training.steps={steps}")
    assert [row["lr"] for row in metric_rows(output) if "lr" in row] == [0.5] + [1.0] * 11
    assert yaml.safe_load((output / "config.yaml").read_text())["optimizer"]["schedule"]["warmup"] == 2
    done = run("train/train_ldm.py", *options, "optimizer.schedule.warmup=12", "training.steps=12")
    (line,) = [line for line in done.stderr.splitlines() if "outlasts" in line]
    assert "optimizer.schedule.warmup=12 outlasts the run of 12 steps: the learning rate never reaches" in line
    wrong = run("train/train_ldm.py", *options, "optimizer.schedule.warmup=1.5", check=False)
    assert "optimizer.schedule.warmup=1.5 is not valid: use a whole number of steps, or a share" in wrong.stderr
