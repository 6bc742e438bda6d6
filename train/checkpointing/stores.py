"""Where checkpoints lie: in a folder, or in a bucket. All in which the two differ is here.

In a folder a checkpoint is written under a temporary name and published by one rename. A bucket knows no rename: there
all lies under its final name, and the manifest, put last, publishes; what has none was left by a killed save.
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
from train.checkpointing.files import MANIFEST, Facts, complete_checkpoints, fetched, is_as_written, steps_in
from train.checkpointing.safetensors_io import copy_some, facts_read_back

log = logging.getLogger(__name__)
OWNER = "owner"  # of a place outside the run's folder: the run's id, and which start of it writes here


class Store:
    """Steps (step-00001000) of files. What is being written is seen by nobody as a checkpoint until `publish`.

    fetches: whether what is read must be brought to this node first. pause: seconds between looks for another rank's
    part.
    """

    fetches: bool
    pause: float
    lacks_part: str  # what may be the matter

    def __init__(self, root: str) -> None:
        self.root = root

    def at(self, *parts: str) -> str:
        return storage.join(self.root, *parts)

    def read(self, *parts: str) -> bytes | None:
        """A small file; None if it is not there."""
        return storage.read_if_there(self.at(*parts))

    def write(self, data: bytes, *parts: str) -> None:
        """A small file, all or nothing."""
        storage.write_atomically(self.at(*parts), data)

    def note(self, data: bytes, step: str, name: str) -> None:
        """A small file of a step that is written, at which rank 0 goes on: nothing may be done to the step after it."""
        self.write(data, self.unpublished(step), name)

    def steps(self) -> list[str]:
        """All that lies here, published or left over; oldest first."""
        return steps_in(self.root)

    def published(self) -> list[str]:
        """All that was ever published, whatever became of it since; oldest first."""
        raise NotImplementedError

    def unpublished(self, step: str) -> str:
        """The name of a step while it is written."""
        raise NotImplementedError

    def workplace(self, step: str) -> contextlib.AbstractContextManager[Path]:
        """A folder in which this rank writes files of the step."""
        raise NotImplementedError

    def add(self, step: str, path: Path, tensors: Mapping[str, Tensor]) -> Facts:
        """A file of the workplace becomes one of the step's; OSError if it does not hold `tensors`."""
        raise NotImplementedError

    def send(self, path: Path, target: str) -> None:
        """A file of the workplace to any other place of this kind."""
        raise NotImplementedError

    def parts(self, step: str, workplace: Path, names: list[str], kinds: list[str]) -> list[Path]:
        """Every rank's part of the step that is written, to read pieces of these kinds from."""
        raise NotImplementedError

    def publish(self, step: str, manifest: bytes) -> None:
        """Of all files of the step; from then on it is a checkpoint."""
        raise NotImplementedError

    def remove(self, step: str) -> None:
        """Any of `steps`; killed on the way it is no longer among `published`."""
        raise NotImplementedError

    def set_aside(self, step: str) -> str:
        """A damaged one of `published`, which is then no longer; what became of it, in words."""
        raise NotImplementedError

    def local(self, step: str, name: str) -> Path:
        """Where a file of a published step can be read once `check` has seen it."""
        raise NotImplementedError

    def check(self, step: str, name: str, facts: Facts) -> bool:
        """Whether a file of a published step is what was written."""
        raise NotImplementedError

    def forget(self, step: str) -> None:
        """What `check` brought here is needed no longer."""

    def tidy(self) -> None:
        """Remove what a killed process left on this node. Before any rank of this run begins."""


class OnDisk(Store):
    """A folder on a file system that all nodes share."""

    fetches, pause = False, 0.01
    lacks_part = "output= must be on a file system that all nodes share, and that rank alive"

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
        note.with_suffix(".tmp").replace(note)  # and no sync: the folder may have its final name already

    def add(self, step: str, path: Path, tensors: Mapping[str, Tensor]) -> Facts:
        _sync(path)
        return facts_read_back(path, tensors)

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
        except OSError as error:  # as where another node of a network file system reads it still; the next start tries
            log.warning("%s can't be removed yet (%s)", self.at(doomed), error)

    def set_aside(self, step: str) -> str:
        aside = f"damaged-{step}"
        shutil.rmtree(self.at(aside), ignore_errors=True)
        os.rename(self.at(step), self.at(aside))
        return f"is now {aside}, to look into or to remove"

    def local(self, step: str, name: str) -> Path:
        return Path(self.at(step, name))

    def check(self, step: str, name: str, facts: Facts) -> bool:
        return is_as_written(self.local(step, name), facts)


class InBucket(Store):
    """Under a prefix. Each rank writes to the node's scratch folder, and uploads from there: at most one part of each
    rank, or what the ranks of a node resume from, lies there at a time."""

    fetches, pause = True, 0.2
    lacks_part = "that rank is gone, or its upload takes too long"

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

    def add(self, step: str, path: Path, tensors: Mapping[str, Tensor]) -> Facts:
        facts = facts_read_back(path, tensors)
        self.send(path, self.at(step, path.name))
        return facts

    def send(self, path: Path, target: str) -> None:
        with path.open("rb") as file:  # mapped: its size costs no memory
            storage.write_atomically(target, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def parts(self, step: str, workplace: Path, names: list[str], kinds: list[str]) -> list[Path]:
        for name in names:
            if not (workplace / name).exists():  # another rank's
                copy_some(self.at(step, name), workplace / name, lambda key: key.partition("/")[0] in kinds)
        return [workplace / name for name in names]

    def publish(self, step: str, manifest: bytes) -> None:
        self.write(manifest, step, MANIFEST)

    def remove(self, step: str) -> None:
        names = sorted(storage.sizes(self.at(step)), key=lambda name: name != MANIFEST)  # it first
        for name in names:
            storage.remove(self.at(step, name))

    def set_aside(self, step: str) -> str:
        self.remove(step)
        return "is removed"

    def local(self, step: str, name: str) -> Path:
        return self.scratch / "fetched" / step / name

    def check(self, step: str, name: str, facts: Facts) -> bool:
        """Fetched by one rank of the node, while the others that need it wait."""
        path = self.local(step, name)
        try:
            _make(path.parent)
            with path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if path.exists():
                    return True
                arriving = path.with_suffix(".arriving")
                if not fetched(self.at(step, name), arriving, facts):
                    return False
                arriving.replace(path)
                return True
        except OSError as error:
            raise UserError(
                f"{path.parent} can't take {name} of {self.at(step)} ({error.strerror}): make room there, or give "
                "another training.scratch."
            ) from error

    def forget(self, step: str) -> None:
        shutil.rmtree(self.scratch / "fetched" / step, ignore_errors=True)
        self._leave_scratch()

    def tidy(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _leave_scratch(self) -> None:
        for folder in (self.scratch / "fetched", self.scratch):
            with contextlib.suppress(OSError):  # others use it
                folder.rmdir()


def refuse_other_owner(root: str, run_id: str | None, may_change: Sequence[str]) -> None:
    """Of a place outside the run's folder; run_id: None of a run that is to begin."""
    owner = (storage.read_if_there(storage.join(root, OWNER)) or b"").decode().partition(" ")[0]
    if owner and owner != run_id and "run_id" not in may_change:
        raise UserError(
            f"training.checkpoints={root} belongs to run {owner}, and this is {run_id or 'a new one'}: give another "
            "place or that run's output=; or, if that run is over, go on from its checkpoints by "
            "training.may_change=[run_id]."
        )


def store_of(root: str, scratch: str | None = None, rank: int = 0) -> Store:
    """scratch: a folder on each node's own disk, for what lies in buckets (None: where temporary files go)."""
    if not storage.is_s3(root):
        return OnDisk(root)
    mark = hashlib.sha256(root.encode()).hexdigest()[:12]
    folder = Path(scratch or tempfile.gettempdir()) / f"checkpoints-{mark}-{os.getuid()}-{storage.HOST}"
    return InBucket(root.rstrip("/"), folder, rank)


def _make(folder: Path) -> None:
    while True:
        with contextlib.suppress(FileNotFoundError):  # another rank has just left the scratch, and removed it
            return folder.mkdir(parents=True, exist_ok=True)


def _sync(path: Path) -> None:
    """To the disk, and out of memory: what is read next is what the disk holds."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
