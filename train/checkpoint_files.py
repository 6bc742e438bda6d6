"""The files of checkpoints: which are whole, which are damaged, and the weights to sample from."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError, UserError

log = logging.getLogger(__name__)


def published(folder: Path) -> list[Path]:
    """All that was ever renamed to its final name, whatever became of it since; oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.suffix != ".tmp")


def complete_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    return [p for p in published(folder) if (p / "manifest.json").exists()]


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def newest_intact(folder: Path, up_to: float = math.inf) -> Path | None:
    """The newest checkpoint (of a step up to `up_to`) whose every file is as its manifest says; damaged ones are named
    in the log."""
    for path in reversed([path for path in complete_checkpoints(folder) if step_of(path) <= up_to]):
        damage = damaged_files(path)
        if not damage:
            return path
        log.warning("checkpoint %s is damaged (%s); trying the one before", path, ", ".join(damage))
    return None


def damaged_files(path: Path, only: Sequence[str] | None = None) -> list[str]:
    """Files of a checkpoint (`only` these) that are missing or not what was written."""
    try:
        expected = json.loads((path / "manifest.json").read_text())
    except ValueError:
        return ["manifest.json"]
    names = expected if only is None else only
    return [name for name in names if not _is_as_written(path / name, expected[name])]


def _is_as_written(path: Path, facts: dict[str, Any]) -> bool:
    return path.exists() and path.stat().st_size == facts["bytes"] and _digest(path) == facts["sha256"]


def ema_weights_path(run: Path, step: str | int = "latest") -> Path:
    """The gathered EMA of a run at `step`, for sampling: errors say what there is. Or a file of rebuild_ema.py."""
    if str(step).endswith(".safetensors"):
        if not Path(step).exists():
            raise UserError(f"step={step} is not there: make it with train/rebuild_ema.py.")
        return Path(step)
    folder = Path(run) / "checkpoints"
    there = complete_checkpoints(folder)
    if not there:
        raise UserError(f"{run} holds no checkpoint: give the output= of a train_ldm.py run that has saved one.")
    if step == "latest":
        chosen = there[-1]
    else:
        chosen = folder / f"step-{step:0>8}"
        if chosen not in there:
            steps = ", ".join(str(int(p.name.removeprefix("step-"))) for p in there)
            raise UserError(f"{run} has no checkpoint of step {step}: there are {steps}.")
    damage = damaged_files(chosen, ("ema.safetensors",))
    if damage:
        raise DataError(f"{chosen / damage[0]} is damaged: take another step= of this run, or train it again.")
    return chosen / "ema.safetensors"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_and_digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}
