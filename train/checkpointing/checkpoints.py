"""Checkpoints: published atomically, written while training goes on, loadable with any number of ranks.

<run>/checkpoints/step-00001000/
    part-00000.safetensors    each rank's pieces of the parameters: weights, moments, EMA (part_files.py)
    ema.safetensors           the full EMA weights, by the module's own names, for sampling and export
    state.json                step, samples seen, and the run's identity
    manifest.json             bytes and sha256 of each file above
<run>/checkpoints/latest      the name of the newest complete one
<run>/ema_snapshots/step-00001000.safetensors    the power-function averages, if there are any

Training pauses only for a copy to memory. A thread on each rank writes it, reads it back and leaves a note; rank 0's
thread waits for all notes and then publishes (stores.py: by a rename, or in a bucket by writing the manifest).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, UserError
from data_pipeline.common.saved_names import named
from train.checkpointing.compatibility import describe_layout, refuse_other_shapes, refuse_what_differs
from train.checkpointing.files import STEP, CheckpointPaths, Found, inspect_checkpoint, part_name, step_of
from train.checkpointing.part_files import Copies, copied_pieces, files_needed, fill
from train.checkpointing.safetensors_io import Header
from train.checkpointing.scratch_room import refuse_little_room
from train.checkpointing.stores import store_of
from train.checkpointing.writer import SaveThread, Writer
from train.distributed.collectives import barrier, broadcast_object, gathered_objects
from train.distributed.ranks import Ranks
from train.engine.deepspeed_engine import Engine
from train.engine.ema import Ema
from train.engine.train_state import TrainState

log = logging.getLogger(__name__)
RESUME = ("auto", "must", "never")


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """How checkpoints are written and kept.

    keep: how many of the newest to keep; keep_every: also keep each whose step is a multiple of it.
    allow_mismatch: names of what may differ between a checkpoint and the run that resumes from it.
    scratch: a folder on each node, for uploads to and downloads from a bucket.
    """

    keep: int = 2
    keep_every: int | None = None
    asynchronous: bool = True
    allow_mismatch: tuple[str, ...] = ()
    scratch: str | None = None


class Checkpoints:
    """All checkpoints of a run. All ranks must call every method.

    identity: by name, what must be the same in a checkpoint and the run that resumes from it, except `allow_mismatch`.
    folder: the run's own; paths: where checkpoints are kept, if not there (training.checkpoints).
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        identity: dict[str, Any],
        weights_prefix: str,
        config: CheckpointConfig = CheckpointConfig(),  # noqa: B008
        paths: CheckpointPaths | None = None,
    ) -> None:
        self.ranks, self.identity, self.config = ranks, named(identity), config
        self.paths = paths or CheckpointPaths.of(folder.parent, None)
        self.store = store_of(self.paths.checkpoints, config.scratch, ranks.rank)
        self.writer = Writer(self.store, self.paths, folder, ranks, weights_prefix, config.keep, config.keep_every)
        self.at: int | None = None  # the step last saved or resumed from
        self.save_thread: SaveThread | None = None
        self.copies: Copies = {}  # reused: filling newly allocated memory takes several times as long

    def save(self, engine: Engine, ema: Ema, state: TrainState) -> None:
        """Save the present state as step-<step>; the previous checkpoint stays until this one is complete."""
        if state.step == self.at:
            return
        self.finish()  # the previous save, whose copies this one overwrites
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
        name, mark, self.at = f"step-{state.step:08d}", self.writer.new_save_id(), state.step
        self.save_thread = SaveThread(lambda: self.writer.write(name, mark, pieces, about))
        if not self.config.asynchronous:
            self.finish()

    def finish(self) -> None:
        """Wait until this rank's part of the last save is done; raises the error if it failed."""
        if self.save_thread is not None:
            save_thread, self.save_thread = self.save_thread, None
            save_thread.join()
            save_thread.raise_if_failed()

    def raise_if_failed(self) -> None:
        """Raise the error of a failed save now, rather than at the next save."""
        if self.save_thread is not None:
            self.save_thread.raise_if_failed()

    def _copied(self, engine: Engine, tensors: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        return copied_pieces(engine.fragments_to_save(), tensors, self.copies if self.config.asynchronous else {})

    def _bytes_to_save(self, engine: Engine, ema: Ema) -> int:
        """Bytes that this rank needs in its scratch folder during a save."""
        fragments, tensors = engine.fragments_to_save(), {**engine.tensors(), **ema.tensors()}
        part = sum(fragment.of(shards).nbytes for shards in tensors.values() for fragment in fragments)
        if not self.ranks.is_main:
            return part
        # Rank 0 also gathers the averages: the pieces of all ranks, and the files assembled from them.
        averages = sum(kind.startswith("ema") for kind in tensors)
        return part + 2 * averages * 4 * sum(math.prod(shape) for shape in engine.shapes.values())

    def resume(
        self, how: str, engine: Engine, ema: Ema, state: TrainState, before_anew: Callable[[], None] = lambda: None
    ) -> bool:
        """Resume from the newest intact checkpoint, as `how` asks; true if there was one.

        before_anew: called if there is none, before anything is removed; an error that it raises ends the resume.
        """
        assert how in RESUME, how
        self.store.tidy()
        barrier()  # so that no rank of this node fetches before the tidying
        if self.store.scratch is not None:
            refuse_little_room(self.store.scratch, self._bytes_to_save(engine, ema))
        any_there, resumed, run_id = self._names(), None, state.run_id
        for found in self._whole_by_size(any_there):
            if how == "never":
                raise UserError(
                    f"{self.store.at(found.name)} exists and training.resume=never: choose another output=, or "
                    "training.resume=auto."
                )
            self._compare(found.saved["identity"])
            if self.load(found, engine, ema, state):
                resumed = found.name
                break
        if not resumed:
            self._refuse_none(how, bool(any_there))
            before_anew()
        state.run_id = run_id  # the checkpoint may be another run's; from now on it is this run's
        if self.ranks.is_main:
            self.writer.claim_store(run_id)
            self._set_aside([name for name in any_there if name > (resumed or "")])
            self._remove_newer(resumed or "")
        if self.config.asynchronous:  # allocates the memory of the first save
            self._copied(engine, {**engine.tensors(), **ema.tensors()})
        barrier()  # no rank writes before this
        if resumed:
            self._recall_rollbacks(state)
        return bool(resumed)

    def _refuse_none(self, how: str, any_there: bool) -> None:
        """UserError if an intact checkpoint is required but missing, or if all are damaged."""
        where = self.store.root
        if any_there:
            raise UserError(
                f"every checkpoint in {where} is damaged: copy them there again, or remove that folder to start "
                "from the beginning."
            )
        if how == "must":
            raise UserError(
                f"training.resume=must, but {where} has no intact checkpoint: check output=, or use "
                "training.resume=auto."
            )

    def roll_back(self, engine: Engine, ema: Ema, state: TrainState, before: int) -> bool:
        """Load the newest intact checkpoint of a step up to `before`, remove later ones, and skip the data between its
        step and the present one; false if there is no such checkpoint."""
        with contextlib.suppress(UserError):  # the state went bad: a failed save of it does not matter
            self.finish()
        barrier()
        if self.ranks.is_main:
            self.writer.refuse_if_claimed()
        gone_bad, passed_over, rollbacks, names = state.step, state.passed_over, state.rollbacks, self._names(before)
        for found in self._whole_by_size(names):
            if self.load(found, engine, ema, state):
                state.passed_over, state.rollbacks = passed_over + gone_bad - state.step, rollbacks + 1
                if self.ranks.is_main:
                    self._note_rollback(state)
                    self._set_aside([name for name in names if name > found.name])
                    self._remove_newer(found.name)
                barrier()
                return True
        return False

    def _note_rollback(self, state: TrainState) -> None:
        """Record the rollback: if a kill before the next save lost it, the run could roll back endlessly."""
        note = {"step": state.step, "passed_over": state.passed_over, "rollbacks": state.rollbacks}
        self.store.write(json.dumps(note).encode(), "rollback.json")

    def _recall_rollbacks(self, state: TrainState) -> None:
        found = broadcast_object(self.store.read("rollback.json") if self.ranks.is_main else None)
        note = json.loads(found) if found else {"rollbacks": 0}
        if note["rollbacks"] > state.rollbacks:
            state.rollbacks = note["rollbacks"]
            if note["step"] == state.step:
                state.passed_over = note["passed_over"]

    def _names(self, up_to: float = math.inf) -> list[str]:
        """All checkpoints ever published up to that step, newest first, as rank 0 sees them."""
        names = broadcast_object(self.store.published() if self.ranks.is_main else None)
        return [name for name in reversed(names) if step_of(name) <= up_to]

    def _whole_by_size(self, names: list[str]) -> Iterator[Found]:
        """Those of `names` that `inspect_checkpoint` finds complete, the same on all ranks, which must loop alike."""
        for name in names:
            found, damaged = broadcast_object(inspect_checkpoint(self.store.root, name) if self.ranks.is_main else None)
            if damaged:
                self._say_damaged(name, damaged)
            else:
                yield found

    def _say_damaged(self, name: str, files: list[str]) -> None:
        if self.ranks.is_main:
            where = self.store.at(name)
            log.warning("checkpoint %s is damaged (%s); trying the one before", where, ", ".join(files))

    def load(self, found: Found, engine: Engine, ema: Ema, state: TrainState) -> bool:
        """Load weights, moments, EMA and state, however the ranks that saved them had partitioned them.

        All ranks check their share of the files before anything is loaded; false if any file is damaged.
        """
        refuse_other_shapes(found.saved["shapes"], engine.shapes, self.store.root)
        tensors = {**engine.tensors(), **ema.tensors()}
        parts = [part_name(rank) for rank in range(found.saved["layout"]["ranks"])]
        own = self.ranks.rank % len(parts)  # with the same layout, this part has all that the rank needs
        parts = [parts[own], *parts[:own], *parts[own + 1 :]]
        to_check = list(found.files)[self.ranks.rank :: self.ranks.world_size]
        if self.store.fetches:
            to_check = parts = files_needed(engine.fragments(), tensors, parts, lambda part: self._pieces(found, part))
        damaged = [file for file in to_check if not self.store.check(found.name, file, found.files[file])]
        damaged = sorted({file for of_rank in gathered_objects(damaged) for file in of_rank})
        if damaged:
            self.store.forget(found.name)
            self._say_damaged(found.name, damaged)
            return False
        if found.saved["layout"] != self._layout(engine) and self.ranks.is_main:
            layout = describe_layout(found.saved["layout"])
            log.warning("%s was saved with %s: it is resharded for this run", self.store.at(found.name), layout)
        fill(engine.fragments(), tensors, [self.store.local(found.name, part) for part in parts])
        engine.after_loading(found.saved["engine"])
        ema.load_scalars(found.saved["ema"])
        state.load_state_dict(found.saved["state"])
        barrier()  # every rank has read what it needs
        self.store.forget(found.name)
        self.at = state.step
        return True

    def _pieces(self, found: Found, part: str) -> dict[str, int] | None:
        try:
            return {name: length for name, (length, *_) in Header.of(self.store.at(found.name, part)).tensors.items()}
        except DataError:
            return None

    def _set_aside(self, damaged: list[str]) -> None:
        """Set damaged checkpoints aside: this run will reach their steps again."""
        for step in damaged:
            log.warning("%s %s", self.store.at(step), self.store.set_aside(step))

    def _remove_newer(self, than: str) -> None:
        """Remove later checkpoints, and what a kill left half written or half removed."""
        if than:
            self.writer.update_latest(than)
        published = self.store.published()
        for step in self.store.steps():
            if step > than or step not in published:
                log.warning("removing %s: the run continues from %s", self.store.at(step), than or "the beginning")
                self.store.remove(step)
        for file in storage.sizes(self.paths.snapshots):
            if STEP.fullmatch(file.partition(".")[0]) and file.partition(".")[0] > than:
                storage.remove(storage.join(self.paths.snapshots, file))

    def _compare(self, identity: dict[str, Any]) -> None:
        changed = refuse_what_differs(self.identity, identity, self.config.allow_mismatch, self.store.root)
        if changed and self.ranks.is_main:
            log.warning("resuming although %s (training.allow_mismatch permits it)", "; ".join(changed))

    def _layout(self, engine: Engine) -> dict[str, Any]:
        return {"ranks": self.ranks.world_size, "zero_stage": engine.config.zero_stage}
