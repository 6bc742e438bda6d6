"""Checkpoints that can't be torn, that any number of ranks can load, and that training does not wait for.

<run>/checkpoints/step-00001000/
    part-00000.safetensors    each rank's pieces of the parameters: weights, moments, EMA (fragments.py)
    ema.safetensors           the EMA gathered, by the module's own names: what sampling and export read
    state.json                step, samples seen, and what the run is made of
    manifest.json             bytes and sha256 of each file above
<run>/checkpoints/latest      the name of the newest complete one
<run>/ema_snapshots/step-00001000.safetensors    the power-function averages, where there are any

Training stops for a copy into memory. A thread of each rank writes it under a temporary name and reads it back; rank
0's waits for all parts, and then publishes by one rename.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.storage import sync_folder, write_atomically
from train.checkpoint_files import complete_checkpoints, newest_intact, published, step_of, sync_and_digest
from train.ema import Ema
from train.engine import Engine
from train.fragments import Copies, copied_pieces, fill, gathered
from train.ranks import Ranks, barrier, broadcast_object
from train.tensor_files import save_tensors
from train.train_state import TrainState

log = logging.getLogger(__name__)
RESUME = ("auto", "must", "never")
PATIENCE_S = 1800.0  # for the slowest rank's part


class Checkpoints:
    """All checkpoints of a run. Every method is called by all ranks.

    identity: what may not change between a checkpoint and the run that goes on from it, by name, but for `may_change`.
    keep: how many of the newest; keep_every: besides those, each whose step is a multiple of it.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        identity: dict[str, Any],
        weights_prefix: str,
        keep: int = 2,
        keep_every: int | None = None,
        asynchronous: bool = True,
        may_change: tuple[str, ...] = (),
    ) -> None:
        self.folder, self.ranks, self.identity = folder, ranks, identity
        self.weights_prefix, self.keep, self.keep_every = weights_prefix, keep, keep_every
        self.asynchronous, self.may_change = asynchronous, may_change
        self.at: int | None = None  # the step last saved or resumed from
        self.writing: _Writing | None = None
        self.copies: Copies = {}  # kept: new memory would take training several times as long to fill

    def save(self, engine: Engine, ema: Ema, state: TrainState) -> None:
        """Take the present state as step-<step>; the one before stays until this one is whole."""
        if state.step == self.at:
            return
        self.finish()  # the one before, whose copies this one takes
        tensors = {**engine.tensors(), **ema.tensors()}
        pieces = self._copied(engine, tensors)
        about = {
            "state": state.state_dict(),
            "identity": self.identity,
            "layout": self._layout(engine),
            "engine": engine.scalars(),
            "ema": ema.scalars(),
            "kinds": list(tensors),
            "shapes": engine.shapes,
        }
        name, self.at = f"step-{state.step:08d}", state.step
        self.writing = _Writing(lambda: self._write(name, pieces, about))
        if not self.asynchronous:
            self.finish()

    def finish(self) -> None:
        """Wait for what this rank has to do for the last save. What went wrong with it is raised here."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.join()
            writing.raise_if_failed()

    def raise_if_failed(self) -> None:
        """At once, rather than at the next save."""
        if self.writing is not None:
            self.writing.raise_if_failed()

    def _copied(self, engine: Engine, tensors: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        return copied_pieces(engine.fragments_to_save(), tensors, self.copies if self.asynchronous else {})

    def _write(self, name: str, pieces: dict[str, Tensor], about: dict[str, Any]) -> None:
        writing = self.folder / f"{name}.tmp"
        writing.mkdir(parents=True, exist_ok=True)
        part = writing / _part(self.ranks.rank)
        save_tensors(pieces, part)
        write_atomically(_note(part), json.dumps(sync_and_digest(part)).encode())
        if not self.ranks.is_main:
            return
        parts = [writing / _part(rank) for rank in range(self.ranks.world_size)]
        self._wait_for(parts)
        shapes = {name: shape for name, shape in about["shapes"].items() if name.startswith(self.weights_prefix)}
        weights = gathered("ema", shapes, parts)
        save_tensors({n.removeprefix(self.weights_prefix): w for n, w in weights.items()}, writing / "ema.safetensors")
        write_atomically(writing / "state.json", json.dumps(about, indent=1).encode())
        if kinds := [kind for kind in about["kinds"] if kind.startswith("ema_")]:
            self._keep_snapshot(name, kinds, about["ema"], shapes, parts)
        self._publish(writing, self.folder / name, parts)

    def _keep_snapshot(
        self, name: str, kinds: list[str], scalars: dict[str, int], shapes: dict[str, list[int]], parts: list[Path]
    ) -> None:
        """Of the power-function averages, for good: posthoc_ema.py rebuilds others of them."""
        tensors = {
            f"{kind}/{n.removeprefix(self.weights_prefix)}": weights
            for kind in kinds
            for n, weights in gathered(kind, shapes, parts).items()
        }
        facts = {"kinds": ",".join(kinds), **{key: str(value) for key, value in scalars.items()}}
        path = self.folder.parent / "ema_snapshots" / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_tensors(tensors, path, facts)

    def _wait_for(self, parts: list[Path]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        for rank, part in enumerate(parts):
            while not _note(part).exists():
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{part.parent} lacks the part of rank {rank}: output= must be on a file system that all "
                        "nodes share, and that rank alive."
                    )
                time.sleep(0.01)

    def _publish(self, writing: Path, final: Path, parts: list[Path]) -> None:
        files = {part.name: json.loads(_note(part).read_text()) for part in parts}
        for path in (writing / "ema.safetensors", writing / "state.json"):
            files[path.name] = sync_and_digest(path)
        write_atomically(writing / "manifest.json", json.dumps(files, indent=1).encode())
        for part in parts:
            _note(part).unlink()
        sync_folder(writing)
        os.rename(writing, final)
        write_atomically(self.folder / "latest", final.name.encode())  # syncs the folder, and so the rename
        for old in complete_checkpoints(self.folder)[: -self.keep]:
            if not (self.keep_every and step_of(old) % self.keep_every == 0):
                shutil.rmtree(old)

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
        if found:
            saved = json.loads((Path(found) / "state.json").read_text())
            self._refuse_what_differs(saved)
            self.load(Path(found), saved, engine, ema, state)
        if self.ranks.is_main:
            self._remove_newer(found)
        if self.asynchronous:  # so that the first save finds its memory there
            self._copied(engine, {**engine.tensors(), **ema.tensors()})
        barrier()  # nobody writes before that
        return bool(found)

    def roll_back(self, engine: Engine, ema: Ema, state: TrainState, before: int) -> bool:
        """Load the newest intact one of a step up to `before`, and remove those after it; false if there is none."""
        with contextlib.suppress(UserError):  # of what went bad, whether it could be written does not matter
            self.finish()
        barrier()
        found = broadcast_object(str(newest_intact(self.folder, before) or "") if self.ranks.is_main else None)
        if not found:
            return False
        self.load(Path(found), json.loads((Path(found) / "state.json").read_text()), engine, ema, state)
        if self.ranks.is_main:
            self._remove_newer(found)
        barrier()
        return True

    def load(self, path: Path, saved: dict[str, Any], engine: Engine, ema: Ema, state: TrainState) -> None:
        """Weights, moments, EMA and state, wherever the ranks that saved them had them."""
        if saved["layout"] != self._layout(engine) and self.ranks.is_main:
            log.warning("%s was saved with %s: its parts are dealt anew", path, _spelled(saved["layout"]))
        parts = [path / _part(rank) for rank in range(saved["layout"]["ranks"])]
        own = self.ranks.rank % len(parts)  # the same layout finds all that it needs there
        tensors = {**engine.tensors(), **ema.tensors()}
        fill(engine.fragments(), tensors, [parts[own], *parts[:own], *parts[own + 1 :]])
        engine.after_loading(saved["engine"])
        ema.load_scalars(saved["ema"])
        state.load_state_dict(saved["state"])
        barrier()  # every rank has what it needs
        self.at = state.step

    def _look(self) -> tuple[str, bool]:
        """The newest intact checkpoint ("": none), and whether there is any, be it damaged."""
        return str(newest_intact(self.folder) or ""), bool(published(self.folder))

    def _remove_newer(self, than: str) -> None:
        """Damaged ones and what killed saves left: this run comes to their steps again."""
        name = Path(than).name if than else ""
        if name:
            write_atomically(self.folder / "latest", name.encode())
        for newer in [p for p in self.folder.glob("step-*") if p.name > name]:
            log.warning("removing %s: the run goes on from %s", newer, name or "the start")
            shutil.rmtree(newer)

    def _layout(self, engine: Engine) -> dict[str, Any]:
        return {"ranks": self.ranks.world_size, "zero_stage": engine.config.zero_stage}

    def _refuse_what_differs(self, saved: dict[str, Any]) -> None:
        now, before = _flat(self.identity), _flat(saved["identity"])
        differing = {
            name: f"{name} was {before.get(name)} and is {now.get(name)}"
            for name in sorted(now | before)
            if now.get(name) != before.get(name)
        }
        refused = [what for name, what in differing.items() if name not in self.may_change]
        if refused:
            raise UserError(
                f"can't resume from {self.folder}: {'; '.join(refused)}. Restore that, start in another output=, or "
                f"name what may change: training.may_change=[{','.join(n for n in differing)}]."
            )
        if differing and self.ranks.is_main:
            log.warning("going on although %s (training.may_change)", "; ".join(differing.values()))


class _Writing(threading.Thread):
    """A save on its way. A daemon: a process that fails does not wait for it."""

    def __init__(self, write: Callable[[], None]) -> None:
        super().__init__(daemon=True, name="checkpoint")
        self.write, self.error = write, None
        self.start()

    def run(self) -> None:
        try:
            self.write()
        except BaseException as error:  # raised by raise_if_failed
            self.error = error
        finally:
            del self.write  # and the copies, where they are not kept

    def raise_if_failed(self) -> None:
        if isinstance(self.error, OSError):
            raise UserError(f"the checkpoint can't be written ({self.error}): make room, and start again to go on.")
        if self.error is not None:
            raise self.error


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by dots, so that only the leaves that differ are named."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _spelled(layout: dict[str, Any]) -> str:
    return f"{layout['ranks']} rank(s) and ZeRO stage {layout['zero_stage']}"


def _part(rank: int) -> str:
    return f"part-{rank:05d}.safetensors"


def _note(part: Path) -> Path:
    """Written when the part is, with its digest."""
    return part.with_suffix(".json")
