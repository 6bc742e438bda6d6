"""Where checkpoints are stored: in a folder, or in a bucket. Everything that differs between the two is here.

In a folder, a checkpoint is written under a temporary name and published by one rename. Buckets have no rename: files
get their final names, and the manifest, written last, publishes them; a step without one was left by a killed save.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from data_pipeline.common import storage
from data_pipeline.common.errors import UserError
from train.checkpointing.files import MANIFEST, FileInfo, complete_checkpoints, download, is_as_written, steps_in
from train.checkpointing.safetensors_io import copy_some, verified_file_info

log = logging.getLogger(__name__)
OWNER = "owner"  # file in a place outside the run's folder: the run's id, and which start of the run writes here


class Store:
    """Steps (step-00001000) of files. A step being written does not count as a checkpoint until `publish`.

    fetches: whether files must be downloaded to this node before reading. pause: seconds between checks for another
    rank's part.
    """

    fetches: bool
    pause: float
    scratch: Path | None = None  # this node's folder for files that are not yet, or no longer, in the store
    lacks_part: str  # why a part may be missing, for the error message

    def __init__(self, root: str) -> None:
        self.root = root

    def at(self, *parts: str) -> str:
        return storage.join(self.root, *parts)

    def read(self, *parts: str) -> bytes | None:
        """The contents of a small file; None if it does not exist."""
        return storage.read_if_there(self.at(*parts))

    def write(self, data: bytes, *parts: str) -> None:
        """Write a small file atomically."""
        storage.write_atomically(self.at(*parts), data)

    def note(self, data: bytes, step: str, name: str) -> None:
        """Write a small file that rank 0 waits for to an unpublished step; after it, the step must not be changed."""
        self.write(data, self.unpublished(step), name)

    def steps(self) -> list[str]:
        """All steps here, published or left over; oldest first."""
        return steps_in(self.root)

    def published(self) -> list[str]:
        """All steps ever published, even if damaged since; oldest first."""
        raise NotImplementedError

    def unpublished(self, step: str) -> str:
        """The name of a step before it is published."""
        raise NotImplementedError

    def workplace(self, step: str) -> contextlib.AbstractContextManager[Path]:
        """A folder where this rank writes files of the step."""
        raise NotImplementedError

    def add(self, step: str, path: Path, tensors: Mapping[str, Tensor]) -> FileInfo:
        """Add a file of the workplace to the step; OSError if it does not hold `tensors`."""
        raise NotImplementedError

    def send(self, path: Path, target: str) -> None:
        """Move a file of the workplace to another path in the same kind of storage."""
        raise NotImplementedError

    def parts(self, step: str, workplace: Path, names: list[str], kinds: list[str]) -> list[Path]:
        """All ranks' part files of an unpublished step, in the workplace, with at least the pieces of these kinds."""
        raise NotImplementedError

    def publish(self, step: str, manifest: bytes) -> None:
        """Publish the step with a manifest of all its files; from then on it is a checkpoint."""
        raise NotImplementedError

    def remove(self, step: str) -> None:
        """Remove any of `steps`; if killed halfway, it is no longer among `published`."""
        raise NotImplementedError

    def set_aside(self, step: str) -> str:
        """Take a damaged step out of `published`; returns what was done with it, for a message."""
        raise NotImplementedError

    def local(self, step: str, name: str) -> Path:
        """Where a file of a published step can be read after `check`."""
        raise NotImplementedError

    def check(self, step: str, name: str, facts: FileInfo) -> bool:
        """Whether a file of a published step is intact; downloads it if needed."""
        raise NotImplementedError

    def forget(self, step: str) -> None:
        """Remove what `check` downloaded."""

    def tidy(self) -> None:
        """Remove what a killed process left on this node. Must be called before any rank of this run begins."""


class FolderStore(Store):
    """A folder on a file system that all nodes share."""

    fetches, pause = False, 0.01
    lacks_part = "check that this rank is still running and that output= is on a file system that all nodes share"

    def published(self) -> list[str]:
        return [name for name in self.steps() if not name.endswith(".tmp")]

    def unpublished(self, step: str) -> str:
        return f"{step}.tmp"

    @contextlib.contextmanager
    def workplace(self, step: str) -> Iterator[Path]:
        folder = Path(self.at(self.unpublished(step)))
        folder.mkdir(parents=True, exist_ok=True)
        yield folder

    def note(self, data: bytes, step: str, name: str) -> None:
        note = Path(self.at(self.unpublished(step), name))
        note.with_suffix(".tmp").write_bytes(data)
        note.with_suffix(".tmp").replace(note)  # no sync after it: the folder may already have its final name

    def add(self, step: str, path: Path, tensors: Mapping[str, Tensor]) -> FileInfo:
        _sync(path)
        return verified_file_info(path, tensors)

    def send(self, path: Path, target: str) -> None:
        _sync(path)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
        storage.sync_folder(Path(target).parent)

    def parts(self, step: str, workplace: Path, names: list[str], kinds: list[str]) -> list[Path]:
        return [workplace / name for name in names]

    def publish(self, step: str, manifest: bytes) -> None:
        writing = self.unpublished(step)
        self.write(manifest, writing, MANIFEST)
        storage.sync_folder(Path(self.at(writing)))
        os.rename(self.at(writing), self.at(step))
        storage.sync_folder(Path(self.root))

    def remove(self, step: str) -> None:
        doomed = step
        if not step.endswith(".tmp"):
            doomed = f"{step}.removed.tmp"
            shutil.rmtree(self.at(doomed), ignore_errors=True)
            os.rename(self.at(step), self.at(doomed))
        try:
            shutil.rmtree(self.at(doomed))
        except OSError as error:  # e.g. another node on a network file system reads it; the next start tries
            log.warning("%s can't be removed now (%s); the next start of the run tries again", self.at(doomed), error)

    def set_aside(self, step: str) -> str:
        aside = f"damaged-{step}"
        shutil.rmtree(self.at(aside), ignore_errors=True)
        os.rename(self.at(step), self.at(aside))
        return f"is damaged and was renamed to {aside}: inspect or remove it"

    def local(self, step: str, name: str) -> Path:
        return Path(self.at(step, name))

    def check(self, step: str, name: str, facts: FileInfo) -> bool:
        return is_as_written(self.local(step, name), facts)


class BucketStore(Store):
    """A prefix in a bucket. Each rank writes to the node's scratch folder, and uploads from there: it holds at most one
    part per rank, or the files that the node's ranks resume from."""

    fetches, pause = True, 0.2
    lacks_part = "this rank has ended, or its upload takes too long; start the run again to continue"

    def __init__(self, root: str, scratch: Path, rank: int) -> None:
        super().__init__(root)
        self.scratch, self.own = scratch, scratch / f"rank-{rank:05d}"

    def published(self) -> list[str]:
        return complete_checkpoints(self.root)

    def unpublished(self, step: str) -> str:
        return step

    @contextlib.contextmanager
    def workplace(self, step: str) -> Iterator[Path]:
        _make(self.own)
        try:
            yield self.own
        finally:
            shutil.rmtree(self.own, ignore_errors=True)
            self._leave_scratch()

    def add(self, step: str, path: Path, tensors: Mapping[str, Tensor]) -> FileInfo:
        facts = verified_file_info(path, tensors)
        self.send(path, self.at(step, path.name))
        return facts

    def send(self, path: Path, target: str) -> None:
        with path.open("rb") as file:  # memory-mapped: even a large file needs no memory
            storage.write_atomically(target, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def parts(self, step: str, workplace: Path, names: list[str], kinds: list[str]) -> list[Path]:
        for name in names:
            if not (workplace / name).exists():  # of another rank
                copy_some(self.at(step, name), workplace / name, lambda key: key.partition("/")[0] in kinds)
        return [workplace / name for name in names]

    def publish(self, step: str, manifest: bytes) -> None:
        self.write(manifest, step, MANIFEST)

    def remove(self, step: str) -> None:
        names = sorted(storage.sizes(self.at(step)), key=lambda name: name != MANIFEST)  # manifest first
        for name in names:
            storage.remove(self.at(step, name))

    def set_aside(self, step: str) -> str:
        self.remove(step)
        return "is damaged and was removed"

    def local(self, step: str, name: str) -> Path:
        return self.scratch / "fetched" / step / name

    def check(self, step: str, name: str, facts: FileInfo) -> bool:
        """One rank of the node downloads the file; others that need it wait."""
        path = self.local(step, name)
        try:
            _make(path.parent)
            with path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if path.exists():
                    return True
                arriving = path.with_suffix(".arriving")
                if not download(self.at(step, name), arriving, facts):
                    return False
                arriving.replace(path)
                return True
        except OSError as error:
            raise UserError(
                f"{path.parent} can't store {name} of {self.at(step)} ({error.strerror}): free disk space there, or "
                "use another training.scratch."
            ) from error

    def forget(self, step: str) -> None:
        shutil.rmtree(self.scratch / "fetched" / step, ignore_errors=True)
        self._leave_scratch()

    def tidy(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _leave_scratch(self) -> None:
        for folder in (self.scratch / "fetched", self.scratch):
            with contextlib.suppress(OSError):  # other ranks still use it
                folder.rmdir()


def refuse_other_owner(root: str, run_id: str | None, allow_mismatch: Sequence[str]) -> None:
    """UserError if another run owns this place outside the run's folder. run_id: None for a new run."""
    owner = (storage.read_if_there(storage.join(root, OWNER)) or b"").decode().partition(" ")[0]
    if owner and owner != run_id and "run_id" not in allow_mismatch:
        raise UserError(
            f"training.checkpoints={root} belongs to run {owner}, but this is {run_id or 'a new run'}: use another "
            "place or that run's output=; or, if that run has ended, continue from its checkpoints with "
            "training.allow_mismatch=[run_id]."
        )


def store_of(root: str, scratch: str | None = None, rank: int = 0) -> Store:
    """The store at `root`. scratch: a folder on each node's own disk, with $VARIABLES, for files in buckets (None: the
    temp folder)."""
    if not storage.is_s3(root):
        return FolderStore(root)
    mark = hashlib.sha256(root.encode()).hexdigest()[:12]
    place = storage.on_this_node(scratch, "training.scratch") if scratch else Path(tempfile.gettempdir())
    folder = place / f"checkpoints-{mark}-{os.getuid()}-{storage.HOST}"
    return BucketStore(root.rstrip("/"), folder, rank)


def _make(folder: Path) -> None:
    while True:
        with contextlib.suppress(FileNotFoundError):  # another rank has just removed the scratch folder
            return folder.mkdir(parents=True, exist_ok=True)


def _sync(path: Path) -> None:
    """Flush to disk and drop from the page cache: the next read comes from the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
