"""The one opener for local paths and s3:// (fsspec, s3fs); nothing else in the project opens a URL.

The S3 endpoint comes from AWS_ENDPOINT_URL, keys from the environment only.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from pathlib import Path
from typing import IO, Any

from data_pipeline.errors import UserError

HOST = platform.node()  # in temporary names: processes of two machines may have the same number


def is_s3(path: str | Path) -> bool:
    """Whether `path` lies in a bucket. Any other scheme (pipe: runs a shell) is refused."""
    text = str(path)
    if text.startswith("s3://"):
        return True
    if "://" in text or text.startswith("pipe:"):
        raise UserError(f"{text}: only local paths and s3:// are read; copy the data to one of them.")
    return False


@functools.cache
def _s3() -> Any:
    """Made in the process that uses it: s3fs does not survive a fork."""
    import s3fs

    return s3fs.S3FileSystem(endpoint_url=os.environ.get("AWS_ENDPOINT_URL"))


def join(root: str | Path, *parts: str) -> str:
    """Path parts under a root, local or s3."""
    return "/".join([str(root).rstrip("/"), *parts])


def absolute(path: str | Path) -> str:
    """What finds the same place from any folder."""
    return str(path) if is_s3(path) else os.path.abspath(path)


def open_read(path: str | Path) -> IO[bytes]:
    """A binary file to read and seek in."""
    return _s3().open(str(path), "rb") if is_s3(path) else open(path, "rb")


def read_bytes(path: str | Path, start: int = 0, length: int | None = None) -> bytes:
    """`length` bytes from `start` (all: None). Fewer than asked for is an OSError: nothing is read short in silence."""
    with open_read(path) as file:
        file.seek(start)
        data = file.read() if length is None else file.read(length)
    if length is not None and len(data) != length:
        raise OSError(f"{path}: {len(data)} of {length} bytes from {start}")
    return data


def exists(path: str | Path) -> bool:
    return _s3().exists(str(path)) if is_s3(path) else os.path.exists(path)


def size(path: str | Path) -> int:
    """In bytes."""
    return _s3().size(str(path)) if is_s3(path) else os.path.getsize(path)


def subfolders(path: str | Path) -> list[str]:
    """Names of the folders directly below, sorted; none if `path` does not exist."""
    if is_s3(path):
        listed = _s3().ls(str(path), detail=True) if exists(path) else []
        return sorted(entry["name"].rsplit("/", 1)[-1] for entry in listed if entry["type"] == "directory")
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir()) if os.path.isdir(path) else []


def files(path: str | Path, ending: str) -> list[str]:
    """Names of the files directly below that end so, sorted; none if `path` does not exist."""
    if is_s3(path):
        listed = _s3().ls(str(path), detail=True) if exists(path) else []
        names = [entry["name"].rsplit("/", 1)[-1] for entry in listed if entry["type"] == "file"]
    else:
        names = [entry.name for entry in os.scandir(path) if entry.is_file()] if os.path.isdir(path) else []
    return sorted(name for name in names if name.endswith(ending))


def write_atomically(path: str | Path, data: bytes) -> None:
    """All of it under its name, or nothing: temporary file, fsync, rename. An S3 put is atomic by itself."""
    if is_s3(path):
        _s3().pipe_file(str(path), data)
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp.{HOST}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in it durable, as after a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every network file system can
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: str | Path) -> None:
    """If it is there."""
    if is_s3(path):
        if exists(path):
            _s3().rm_file(str(path))
    else:
        Path(path).unlink(missing_ok=True)
