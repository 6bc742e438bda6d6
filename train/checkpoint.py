"""Checkpoints that can't be torn: written under a temporary name by all ranks, checksummed, read back, then renamed.

<run>/checkpoints/step-00001000/
    engine/                   DeepSpeed's partitions: weights, moments
    ema-rank-00000.safetensors  each rank's part of the EMA
    ema.safetensors           the EMA gathered, by the module's own names: what sampling and export read
    state.json                step, samples seen, and what the run is made of
    manifest.json             bytes and sha256 of each file above
<run>/checkpoints/latest      the name of the newest complete one
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from data_pipeline.errors import DataError, UserError
from data_pipeline.storage import sync_folder, write_atomically
from train.ema import Ema
from train.engine import Engine
from train.ranks import Ranks, barrier, broadcast_object
from train.train_state import TrainState

log = logging.getLogger(__name__)
RESUME = ("auto", "must", "never")


class Checkpoints:
    """All checkpoints of a run. Every method is called by all ranks.

    identity: what may not change between a checkpoint and the run that goes on from it, by name.
    """

    def __init__(
        self, folder: Path, ranks: Ranks, identity: dict[str, Any], weights_prefix: str, keep: int = 2
    ) -> None:
        self.folder, self.ranks, self.identity = folder, ranks, identity
        self.weights_prefix, self.keep = weights_prefix, keep
        self.at: int | None = None  # the step last saved or resumed from

    def save(self, engine: Engine, ema: Ema, state: TrainState) -> None:
        """Publish the present state as step-<step>; the one before stays until this one is whole."""
        if state.step == self.at:
            return
        final = self.folder / f"step-{state.step:08d}"
        writing = self.folder / f"{final.name}.tmp"
        if self.ranks.is_main:
            shutil.rmtree(writing, ignore_errors=True)  # what a killed run left
            writing.mkdir(parents=True)
        barrier()
        engine.save(writing)
        save_file(ema.tensors(), writing / _ema_part(self.ranks.rank))
        weights = engine.full_state_dict(ema.shards, prefix=self.weights_prefix)
        if self.ranks.is_main:
            save_file(weights, writing / "ema.safetensors")
            saved = {"state": state.state_dict(), "identity": self.identity, "layout": self._layout(engine)}
            write_atomically(writing / "state.json", json.dumps(saved, indent=1).encode())
        barrier()  # every rank has written its part
        if self.ranks.is_main:
            self._publish(writing, final)
        barrier()
        self.at = state.step

    def _publish(self, writing: Path, final: Path) -> None:
        self._refuse_missing_parts(writing)
        files = {str(p.relative_to(writing)): _sync_and_digest(p) for p in sorted(writing.rglob("*")) if p.is_file()}
        write_atomically(writing / "manifest.json", json.dumps(files, indent=1).encode())
        for inner in (p for p in writing.rglob("*") if p.is_dir()):
            sync_folder(inner)
        os.rename(writing, final)
        write_atomically(self.folder / "latest", final.name.encode())  # syncs the folder, and so the rename
        for old in complete_checkpoints(self.folder)[: -self.keep]:
            shutil.rmtree(old)

    def _refuse_missing_parts(self, writing: Path) -> None:
        missing = [r for r in range(self.ranks.world_size) if not (writing / _ema_part(r)).exists()]
        if missing:
            raise UserError(
                f"{writing} lacks the part of rank {missing[0]}: output= must be on a file system that all nodes share."
            )

    def resume(self, how: str, engine: Engine, ema: Ema, state: TrainState) -> bool:
        """Go on from the newest intact checkpoint, as `how` asks; true if there was one."""
        assert how in RESUME, how
        found, any_there = broadcast_object(self._look() if self.ranks.is_main else None)
        if any_there and not found:
            raise UserError(
                f"every checkpoint in {self.folder} is damaged: remove that folder to start afresh, or copy them again."
            )
        if how == "never" and found:
            raise UserError(f"{found} exists and resume=never: choose another output=, or resume=auto.")
        if how == "must" and not found:
            raise UserError(
                f"resume=must, but {self.folder} has no intact checkpoint: check output=, or use resume=auto."
            )
        if not found:
            return False
        path = Path(found)
        saved = json.loads((path / "state.json").read_text())
        self._refuse_what_differs(saved, engine)
        engine.load(path)
        ema.load_tensors(load_file(path / _ema_part(self.ranks.rank)))
        state.load_state_dict(saved["state"])
        barrier()  # every rank has what it needs
        if self.ranks.is_main:
            self._remove_newer(path)
        self.at = state.step
        return True

    def _look(self) -> tuple[str, bool]:
        """The newest intact checkpoint ("": none), and whether there is any, be it damaged."""
        return str(newest_intact(self.folder) or ""), bool(published(self.folder))

    def _remove_newer(self, than: Path) -> None:
        """Damaged ones and what killed saves left: this run comes to their steps again."""
        write_atomically(self.folder / "latest", than.name.encode())
        for newer in [p for p in self.folder.glob("step-*") if p.name > than.name]:
            log.warning("removing %s: the run goes on from %s", newer, than.name)
            shutil.rmtree(newer)

    def _layout(self, engine: Engine) -> dict[str, Any]:
        config = engine.config
        return {"ranks": self.ranks.world_size, "zero_stage": config.zero_stage, "dtype": config.dtype}

    def _refuse_what_differs(self, saved: dict[str, Any], engine: Engine) -> None:
        now = _flat({**self.identity, **self._layout(engine)})
        before = _flat({**saved["identity"], **saved["layout"]})
        differing = [name for name in sorted(now | before) if now.get(name) != before.get(name)]
        if differing:
            what = "; ".join(f"{name} was {before.get(name)} and is {now.get(name)}" for name in differing)
            raise UserError(f"can't resume from {self.folder}: {what}. Restore that, or start in another output=.")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by dots, so that only the leaves that differ are named."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def published(folder: Path) -> list[Path]:
    """All that was ever renamed to its final name, whatever became of it since; oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.suffix != ".tmp")


def complete_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    return [p for p in published(folder) if (p / "manifest.json").exists()]


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint whose every file is as its manifest says; damaged ones are named in the log."""
    for path in reversed(complete_checkpoints(folder)):
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
    """The gathered EMA of a run at `step`, for sampling: errors say what there is."""
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


def _ema_part(rank: int) -> str:
    return f"ema-rank-{rank:05d}.safetensors"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_and_digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}
