"""Writes a checkpoint: each rank in a thread of its own; rank 0's thread publishes it (checkpoints.py)."""

from __future__ import annotations

import errno
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.common import storage
from data_pipeline.common.errors import UserError
from train.checkpointing.files import CheckpointPaths, FileInfo, complete_checkpoints, part_name, step_of
from train.checkpointing.part_files import gathered
from train.checkpointing.safetensors_io import save_tensors, verified_file_info
from train.checkpointing.stores import OWNER, Store
from train.distributed.collectives import broadcast_object
from train.distributed.ranks import Ranks

PATIENCE_S = 1800.0  # how long to wait for the slowest rank's part
LONGEST_PAUSE = 5.0
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)  # errors that only the user can fix


class Writer:
    """Writes steps to a store, and keeps the newest `keep` and each whose step is a multiple of `keep_every`.

    folder: the run's own, which launch scripts read. A store elsewhere has an owner file, as no lock protects it.
    """

    def __init__(
        self,
        store: Store,
        paths: CheckpointPaths,
        folder: Path,
        ranks: Ranks,
        weights_prefix: str,
        keep: int,
        keep_every: int | None,
    ) -> None:
        self.store, self.paths, self.folder, self.ranks = store, paths, folder, ranks
        self.weights_prefix, self.keep, self.keep_every = weights_prefix, keep, keep_every
        self.elsewhere = store.root != str(folder)
        self.attempt = str(broadcast_object(secrets.token_hex(4)))  # shared by all ranks of this start
        self.saves = 0

    def new_save_id(self) -> str:
        """Marks the notes of one save, so that they differ from those of a killed save of the same step."""
        self.saves += 1
        return f"{self.attempt}-{self.saves}"

    def write(self, name: str, mark: str, pieces: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Write this rank's part; rank 0 also completes and publishes the checkpoint."""
        with self.store.workplace(name) as workplace:
            facts = self._add(name, workplace / part_name(self.ranks.rank), pieces)
            note = json.dumps({"save": mark, **facts}).encode()
            self.store.note(note, name, _note(part_name(self.ranks.rank)))
            if self.ranks.is_main:
                self._complete(name, mark, workplace, about)

    def _add(self, name: str, path: Path, tensors: dict[str, Tensor]) -> FileInfo:
        save_tensors(tensors, path)
        return self.store.add(name, path, tensors)

    def _complete(self, name: str, mark: str, workplace: Path, about: dict[str, Any]) -> None:
        """Rank 0 waits for all parts, adds its own files, and publishes."""
        names = [part_name(rank) for rank in range(self.ranks.world_size)]
        files = self._wait_for(name, mark, names)
        averages = [kind for kind in about["kinds"] if kind == "ema" or kind.startswith("ema_")]
        parts = self.store.parts(name, workplace, names, averages)
        shapes = {n: shape for n, shape in about["shapes"].items() if n.startswith(self.weights_prefix)}
        weights = {n.removeprefix(self.weights_prefix): w for n, w in gathered("ema", shapes, parts).items()}
        files["ema.safetensors"] = self._add(name, workplace / "ema.safetensors", weights)
        files["state.json"] = self._add_text(name, "state.json", json.dumps(about, indent=1).encode())
        if kinds := [kind for kind in averages if kind != "ema"]:
            self._keep_snapshot(name, kinds, about["ema"], shapes, workplace, parts)
        self._publish(name, files)

    def _add_text(self, name: str, file: str, data: bytes) -> FileInfo:
        self.store.write(data, self.store.unpublished(name), file)
        if self.store.read(self.store.unpublished(name), file) != data:
            raise OSError(f"{self.store.at(name, file)} differs after reading it back")
        return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def _keep_snapshot(
        self,
        name: str,
        kinds: list[str],
        scalars: dict[str, int],
        shapes: dict[str, list[int]],
        workplace: Path,
        parts: list[Path],
    ) -> None:
        """Save the power-function averages permanently: posthoc_ema.py rebuilds others from them."""
        tensors = {
            f"{kind}/{n.removeprefix(self.weights_prefix)}": weights
            for kind in kinds
            for n, weights in gathered(kind, shapes, parts).items()
        }
        facts = {"kinds": ",".join(kinds), **{key: str(value) for key, value in scalars.items()}}
        save_tensors(tensors, workplace / "snapshot", facts)
        about = verified_file_info(workplace / "snapshot", tensors)
        self.store.send(workplace / "snapshot", storage.join(self.paths.snapshots, f"{name}.safetensors"))
        storage.write_atomically(storage.join(self.paths.snapshots, f"{name}.json"), json.dumps(about).encode())

    def _wait_for(self, name: str, mark: str, parts: list[str]) -> dict[str, FileInfo]:
        """Facts from each rank's note, by the name of its part."""
        deadline, found = time.monotonic() + PATIENCE_S, {}
        for rank, part in enumerate(parts):
            pause = self.store.pause
            while (facts := self._noted(name, mark, part)) is None:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{self.store.at(self.store.unpublished(name))} has no part from rank {rank}: "
                        f"{self.store.lacks_part}."
                    )
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE) if self.store.fetches else pause
            found[part] = facts
        return found

    def _noted(self, name: str, mark: str, part: str) -> FileInfo | None:
        facts = json.loads(self.store.read(self.store.unpublished(name), _note(part)) or b"{}")
        return facts if facts.pop("save", None) == mark else None

    def _publish(self, name: str, files: dict[str, FileInfo]) -> None:
        for rank in range(self.ranks.world_size):
            storage.remove(self.store.at(self.store.unpublished(name), _note(part_name(rank))))
        self.refuse_if_claimed()
        self.store.publish(name, json.dumps(files, indent=1).encode())
        self.update_latest(name)
        for old in complete_checkpoints(self.store.root)[: -self.keep]:
            if not (self.keep_every and step_of(old) % self.keep_every == 0):
                self.store.remove(old)

    def update_latest(self, name: str) -> None:
        """Write `latest`, in the run's folder too: there, launch scripts check for progress."""
        self.store.write(name.encode(), "latest")
        if self.elsewhere:
            storage.write_atomically(self.folder / "latest", name.encode())

    def claim_store(self, run_id: str) -> None:
        """Own the store: from now on no other process publishes here, not even one that was given up but still runs."""
        if self.elsewhere:
            self.store.write(f"{run_id} {self.attempt}\n".encode(), OWNER)

    def refuse_if_claimed(self) -> None:
        """UserError if another process has become the owner of these checkpoints."""
        if self.elsewhere and (self.store.read(OWNER) or b"").split()[-1:] != [self.attempt.encode()]:
            raise UserError(
                f"{self.store.root} now belongs to another process: make sure that only one process saves checkpoints "
                "there."
            )


class SaveThread(threading.Thread):
    """A save in progress. A daemon thread: a failing process does not wait for it."""

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
            del self.write  # frees the copies, unless they are reused

    def raise_if_failed(self) -> None:
        """UserError for what only the user can fix; other errors are raised unchanged, as a new start may succeed."""
        if isinstance(self.error, OSError) and self.error.errno in UNWRITABLE:
            raise UserError(
                f"the checkpoint can't be written ({self.error}): free disk space or fix the permissions, and start "
                "again to continue."
            )
        if self.error is not None:
            raise self.error


def _note(part: str) -> str:
    """The note of a part: written after the part, with its digest."""
    return part.replace(".safetensors", ".json")
