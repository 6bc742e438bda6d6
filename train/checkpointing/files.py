"""The files of checkpoints, in folders and in buckets: where they are, and which checkpoints are complete."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.common.saved_objects import read_config, refuse_wrong_kinds

FileInfo = dict[str, Any]  # about a file, as in its manifest: bytes, sha256
MANIFEST = "manifest.json"
STEP = re.compile(r"step-\d{8,}((\.removed)?\.tmp)?")  # other names belong to the user
CHUNK = 2**27  # bytes of an object that are held in memory at once
IN_STATE = {  # what a resume reads from state.json
    "state": {"step", "applied_steps", "samples_seen", "run_id", "passed_over", "rollbacks"},
    "identity": set(), "layout": {"ranks", "zero_stage"}, "engine": set(), "ema": set(), "shapes": set(),
}  # fmt: skip


class CheckpointPaths(NamedTuple):
    """Where a run keeps its checkpoints and its snapshots of power-function averages; local or s3."""

    checkpoints: str
    snapshots: str

    @classmethod
    def of(cls, run: Path, elsewhere: str | None) -> CheckpointPaths:
        """elsewhere: the run's training.checkpoints; None: in the run's folder."""
        if not elsewhere:
            return cls(str(run / "checkpoints"), str(run / "ema_snapshots"))
        return cls(elsewhere, storage.join(elsewhere, "ema_snapshots"))

    @classmethod
    def of_run(cls, run: Path) -> CheckpointPaths:
        """As given by the run's configuration, if it has one."""
        config = run / "config.yaml"
        training = (read_config(config).get("training") or {}) if config.exists() else {}
        refuse_wrong_kinds({"checkpoints": None, **training}, {"checkpoints": str | None}, f"{config}: training")
        return cls.of(run, training.get("checkpoints"))


def steps_in(root: str | Path) -> list[str]:
    """Names of all step folders there, complete or left over from a save or a removal; oldest first."""
    return [name for name in storage.subfolders(root) if STEP.fullmatch(name)]


def complete_checkpoints(root: str | Path) -> list[str]:
    """Names of the published checkpoints, oldest first."""
    names = [name for name in steps_in(root) if not name.endswith(".tmp")]
    return [name for name in names if storage.exists(storage.join(root, name, MANIFEST))]


def step_of(name: str) -> int:
    return int(name.removeprefix("step-"))


def part_name(rank: int) -> str:
    return f"part-{rank:05d}.safetensors"


class Found(NamedTuple):
    """A checkpoint whose files have the right sizes: its name, manifest and state.json."""

    name: str
    files: dict[str, FileInfo]
    saved: dict[str, Any]


def inspect_checkpoint(root: str, name: str) -> tuple[Found | None, list[str]]:
    """A published checkpoint, judged by file sizes and its small files; or which of its files are damaged."""
    at = storage.join(root, name)
    manifest, text = (storage.read_if_there(storage.join(at, file)) for file in (MANIFEST, "state.json"))
    try:
        files = json.loads(manifest or b"")
        whole = {(type(facts["bytes"]), type(facts["sha256"])) for facts in files.values()} == {(int, str)}
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole or "state.json" not in files:
        return None, [MANIFEST]
    sizes = storage.sizes(at)
    damaged = [file for file, facts in files.items() if sizes.get(file) != facts["bytes"]]
    if not damaged and hashlib.sha256(text or b"").hexdigest() != files["state.json"]["sha256"]:
        damaged = ["state.json"]
    saved = None if damaged else _state_in(text or b"")
    if saved is None:
        return None, damaged or ["state.json"]
    parts = map(part_name, range(saved["layout"]["ranks"]))
    return (Found(name, files, saved), []) if files.keys() >= set(parts) else (None, [MANIFEST])


def _state_in(text: bytes) -> dict[str, Any] | None:
    """The contents of a state.json; None if something is missing."""
    try:
        saved = json.loads(text)
        whole = all(saved[part].keys() >= names for part, names in IN_STATE.items())
        return saved if whole and isinstance(saved["layout"]["ranks"], int) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def newest_whole(root: str) -> Found | None:
    """The checkpoint that a run would resume from, as far as `inspect_checkpoint` can tell."""
    looks = (inspect_checkpoint(root, name)[0] for name in reversed(complete_checkpoints(root)))
    return next((found for found in looks if found), None)


def file_digest(path: Path) -> str:
    """sha256 of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_as_written(path: Path, facts: FileInfo) -> bool:
    """Whether a local file has the size and digest of its facts."""
    return path.exists() and path.stat().st_size == facts["bytes"] and file_digest(path) == facts["sha256"]


def chunks(path: str, start: int, length: int) -> Iterator[bytes]:
    """`length` bytes from `start`, in pieces that fit in memory."""
    for at in range(start, start + length, CHUNK):
        yield storage.read_bytes(path, at, min(CHUNK, start + length - at))


def download(source: str, target: Path, facts: FileInfo) -> bool:
    """Download an object of a bucket to a local file, checking its digest. If its bytes differ: false, and no file.

    OSError if it can't be written to the disk.
    """
    digest = hashlib.sha256()
    try:
        with target.open("wb") as file:
            for chunk in chunks(source, 0, facts["bytes"]):
                digest.update(chunk)
                file.write(chunk)
    except DataError:  # the object is too short
        target.unlink()
        return False
    if facts["sha256"] not in (None, digest.hexdigest()):
        target.unlink()
        return False
    return True


@contextlib.contextmanager
def local_copy(path: str, facts: FileInfo | None) -> Iterator[Path | None]:
    """A local or s3 file as a local one within the context; None if it does not match its facts (if given)."""
    if not storage.is_s3(path):
        yield Path(path) if facts is None or is_as_written(Path(path), facts) else None
        return
    with tempfile.TemporaryDirectory(prefix="fetched-") as folder:
        target = Path(folder) / path.rpartition("/")[2]
        yield target if download(path, target, facts or {"bytes": storage.size(path), "sha256": None}) else None
