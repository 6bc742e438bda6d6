"""The one opener for local paths and s3://; nothing else in the project opens a URL.

Endpoint and region come from AWS_ENDPOINT_URL and AWS_REGION or `store.`, keys from the environment only (bucket.py).
"""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

from data_pipeline.common import s3
from data_pipeline.common.errors import UserError

HOST = platform.node()  # in temporary names: processes of two machines may have the same number


def configure(**settings: str | float | None) -> None:
    """Set endpoint, region, deadline_s, attempts, cache or cache_gb for this process and those that it starts.

    None leaves the environment's. What can't be is a UserError.
    """
    for name, value in settings.items():
        if value is not None:
            os.environ[s3.VARIABLES[name]] = str(value)
    s3.Settings.now()
    if (settings.get("cache") is None) != (settings.get("cache_gb") is None):
        raise UserError("store.cache (a folder) and store.cache_gb (what it may hold) go together: give both.")


def is_s3(path: str | Path) -> bool:
    """Whether `path` lies in a bucket. Any other scheme (pipe: runs a shell) is refused."""
    text = str(path)
    if text.startswith("s3://"):
        return True
    if "://" in text or text.startswith("pipe:"):
        raise UserError(f"{text}: only local paths and s3:// are read; copy the data to one of them.")
    return False


def join(root: str | Path, *parts: str) -> str:
    """Path parts under a root, local or s3."""
    return "/".join([str(root).rstrip("/"), *parts])


def absolute(path: str | Path) -> str:
    """What finds the same place from any folder."""
    return str(path) if is_s3(path) else os.path.abspath(path)


def read_bytes(path: str | Path, start: int = 0, length: int | None = None) -> bytes:
    """`length` bytes from `start` (all: None). Fewer than asked for is an OSError (of a bucket: a DataError):
    nothing is read short in silence."""
    if is_s3(path):
        return s3.read(str(path), start, length)
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read() if length is None else file.read(length)
    if length is not None and len(data) != length:
        raise OSError(f"{path}: {len(data)} of {length} bytes from {start}")
    return data


def read_if_there(path: str | Path) -> bytes | None:
    """All bytes; None if there is no such file."""
    if is_s3(path):
        return s3.read_if_there(str(path))
    try:
        return read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def exists(path: str | Path) -> bool:
    """A local file or folder; an object of a bucket (which has no folders)."""
    return s3.size(str(path)) is not None if is_s3(path) else os.path.exists(path)


def size(path: str | Path) -> int:
    """In bytes."""
    found = size_if_there(path)
    if found is None:
        raise FileNotFoundError(path)
    return found


def size_if_there(path: str | Path) -> int | None:
    """In bytes; None if there is no such file. One request, where exists() and size() are two."""
    if is_s3(path):
        return s3.size(str(path))
    try:
        return os.path.getsize(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def sizes(path: str | Path) -> dict[str, int]:
    """Bytes of each file directly below by its name; none if `path` does not exist. A thousand files a request."""
    if is_s3(path):
        return s3.listed(str(path))[0]
    if not os.path.isdir(path):
        return {}
    return {entry.name: entry.stat().st_size for entry in os.scandir(path) if entry.is_file()}


def subfolders(path: str | Path) -> list[str]:
    """Names of the folders directly below, sorted; none if `path` does not exist."""
    if is_s3(path):
        return sorted(s3.listed(str(path))[1])
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir()) if os.path.isdir(path) else []


def files(path: str | Path, ending: str) -> list[str]:
    """Names of the files directly below that end so, sorted; none if `path` does not exist."""
    if is_s3(path):
        names = list(s3.listed(str(path))[0])
    else:
        names = [entry.name for entry in os.scandir(path) if entry.is_file()] if os.path.isdir(path) else []
    return sorted(name for name in names if name.endswith(ending))


def write_atomically(path: str | Path, data: bytes) -> None:
    """All of it under its name, or nothing: temporary file, fsync, rename. An S3 put is atomic by itself."""
    if is_s3(path):
        s3.write(str(path), data)
        return
    path = Path(path)
    _written_aside(path, data).replace(path)
    sync_folder(path.parent)


def write_first(path: str | Path, data: bytes) -> bool:
    """As write_atomically, unless something has that name already: then False, and that stays. On a disk this is one
    step, as a link is made; in a bucket, or without links, a look and then a write."""
    if is_s3(path):
        if exists(path):
            return False
        s3.write(str(path), data)
        return True
    path = Path(path)
    temporary = _written_aside(path, data)
    try:
        _named(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def _named(temporary: Path, path: Path) -> None:
    """A second name for a file; FileExistsError where something has it."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:  # not every file system has links
        if path.exists():
            raise FileExistsError(path) from error
        temporary.replace(path)


def _written_aside(path: Path, data: bytes) -> Path:
    """All of it under a temporary name beside `path`, on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp.{HOST}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return temporary


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
        s3.remove(str(path))
    else:
        Path(path).unlink(missing_ok=True)
