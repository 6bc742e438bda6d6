"""The only opener for local paths and s3://; nothing else in the project opens a URL.

Endpoint and region come from AWS_ENDPOINT_URL and AWS_REGION or `store.`, keys from the environment only (s3.py).
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
from pathlib import Path

from data_pipeline.common import s3
from data_pipeline.common.errors import UserError

HOST = platform.node()  # part of temporary names: processes of two machines may have the same number


def configure(**settings: str | float | None) -> None:
    """Set endpoint, region, deadline_s, attempts, cache or cache_gb for this process and those that it starts.

    None keeps the environment's value. An invalid value is a UserError.
    """
    for name, value in settings.items():
        if value is not None:
            os.environ[s3.VARIABLES[name]] = str(value)
    s3.Settings.now()
    if (settings.get("cache") is None) != (settings.get("cache_gb") is None):
        raise UserError("store.cache (a folder) and store.cache_gb (its capacity) must be set together: set both.")
    if cache := os.environ.get(s3.CACHE):
        on_this_node(cache, "store.cache")


def on_this_node(folder: str, option: str) -> Path:
    """A folder with ~ and $VARIABLES resolved from this process' environment, as each node may name its own disk
    differently; call it in the process that uses the folder. UserError for a variable that is not set."""
    for name in re.findall(r"\$\{?(\w+)", folder):
        if not os.environ.get(name):
            raise UserError(f"{option}={folder}: {name} is not set on {HOST}: name a folder that exists on every node.")
    return Path(os.path.expandvars(folder)).expanduser()


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that holds a folder, or would hold it once it is made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def is_s3(path: str | Path) -> bool:
    """Whether `path` lies in a bucket. Any other scheme (pipe: runs a shell) is refused."""
    text = str(path)
    if text.startswith("s3://"):
        return True
    if "://" in text or text.startswith("pipe:"):
        raise UserError(f"{text}: only local paths and s3:// can be read; copy the data to one of these.")
    return False


def join(root: str | Path, *parts: str) -> str:
    """Path parts under a root, local or s3."""
    return "/".join([str(root).rstrip("/"), *parts])


def absolute(path: str | Path) -> str:
    """A path that is valid from any folder."""
    return str(path) if is_s3(path) else os.path.abspath(path)


def read_bytes(path: str | Path, start: int = 0, length: int | None = None) -> bytes:
    """`length` bytes from `start` (all: None). Fewer than asked for is an OSError (in a bucket: a DataError); a short
    read is never silent."""
    if is_s3(path):
        return s3.read(str(path), start, length)
    with open(path, "rb") as file:
        if start:  # a pipe has no places
            file.seek(start)
        data = file.read() if length is None else file.read(length)
    if length is not None and len(data) != length:
        raise OSError(f"{path}: only {len(data)} of {length} bytes could be read from byte {start}")
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
    """Whether there is a local file or folder, or an object of a bucket (which has no folders)."""
    return s3.size(str(path)) is not None if is_s3(path) else os.path.exists(path)


def size(path: str | Path) -> int:
    """Size in bytes."""
    found = size_if_there(path)
    if found is None:
        raise FileNotFoundError(path)
    return found


def size_if_there(path: str | Path) -> int | None:
    """Size in bytes; None if there is no such file. One request, where exists() and size() are two."""
    if is_s3(path):
        return s3.size(str(path))
    try:
        return os.path.getsize(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def sizes(path: str | Path) -> dict[str, int]:
    """Bytes of each file directly below, by name; empty if `path` does not exist. One request per thousand files."""
    if is_s3(path):
        return s3.listed(str(path))[0]
    if not os.path.isdir(path):
        return {}
    return {entry.name: entry.stat().st_size for entry in os.scandir(path) if entry.is_file()}


def subfolders(path: str | Path) -> list[str]:
    """Names of the folders directly below, sorted; empty if `path` does not exist."""
    if is_s3(path):
        return sorted(s3.listed(str(path))[1])
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir()) if os.path.isdir(path) else []


def files(path: str | Path, ending: str) -> list[str]:
    """Names of the files directly below with this ending, sorted; empty if `path` does not exist."""
    if is_s3(path):
        names = list(s3.listed(str(path))[0])
    else:
        names = [entry.name for entry in os.scandir(path) if entry.is_file()] if os.path.isdir(path) else []
    return sorted(name for name in names if name.endswith(ending))


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write all of it under its name, or nothing: temporary file, fsync, rename. An S3 put is atomic by itself."""
    if is_s3(path):
        s3.write(str(path), data)
        return
    path = Path(path)
    _written_aside(path, data).replace(path)
    sync_folder(path.parent)


def write_first(path: str | Path, data: bytes) -> bool:
    """Like write_atomically, unless the name is taken: then returns False and leaves it. On a disk this is one step, as
    a link is made; in a bucket, or without links, a check and then a write."""
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
    """Give a file a second name; FileExistsError if that is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:  # not every file system has links
        if path.exists():
            raise FileExistsError(path) from error
        temporary.replace(path)


def _written_aside(path: Path, data: bytes) -> Path:
    """Write all of it under a temporary name beside `path`, on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp.{HOST}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable, as after a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every network file system supports it
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: str | Path) -> None:
    """Remove the file if it exists."""
    if is_s3(path):
        s3.remove(str(path))
    else:
        Path(path).unlink(missing_ok=True)
