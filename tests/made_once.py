"""Read-only data that several tests share, made once for all workers of a pytest run."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """`folder`, filled by `make(folder)`, which the first worker calls while the others wait.

    It is made in its final place, because runs store the paths of their training data. A failed `make` is repeated.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _beside(folder, "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _beside(folder, "listing").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            _beside(folder, "listing").write_text(json.dumps(_listing(folder)))
    return folder


def changed_files(folder: Path) -> list[str]:
    """Names of files that have changed since `folder` was made; other tests may have read them."""
    then, now = json.loads(_beside(folder, "listing").read_text()), _listing(folder)
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))


def _beside(folder: Path, ending: str) -> Path:
    return folder.with_name(f"{folder.name}.{ending}")


def _listing(folder: Path) -> dict[str, list[int]]:
    """Relative path -> size and modification time."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
