"""Temporary files that a killed process left behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

from data_pipeline.common import storage

ABANDONED_AFTER = 3600.0  # seconds after which another machine's temporary file counts as left by a dead worker


def sweep(folder: str) -> int:
    """Delete temporary files that killed workers left in a local folder; returns how many.

    Only files of ended processes of this machine, and files of other machines that are an hour old.
    """
    if storage.is_s3(folder) or not os.path.isdir(folder):
        return 0  # an interrupted S3 put leaves nothing behind
    left = [path for path in Path(folder).iterdir() if ".tmp." in path.name and abandoned(path)]
    for path in left:
        path.unlink(missing_ok=True)
    return len(left)


def abandoned(path: Path) -> bool:
    """Whether nobody will finish a temporary file."""
    host, _, number = path.name.partition(".tmp.")[2].rpartition(".")
    if host == storage.HOST and number.isdecimal():
        return not alive(int(number))
    try:
        return time.time() - path.stat().st_mtime > ABANDONED_AFTER
    except FileNotFoundError:  # another worker deleted it first
        return False


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
