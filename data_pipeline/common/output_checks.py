"""Checks before any work that a program's output can be written: not read-only, permitted, no file in the way."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.common import storage
from data_pipeline.common.errors import UserError

# Where a program writes if output= is null; programs that write nothing in that case are not listed.
DEFAULTS = {
    "index_shards": "{input}",
    "sample_images": "{input}/drawn",
    "evaluate_ldm": "{input}/evaluation",
    "rebuild_ema": "{input}/ema.safetensors",
    "replay_metrics": "{input}",
}
FILES = ("rebuild_ema.output", "export_diffusers.single_file")  # the others name folders
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def refuse_unwritable_outputs(options: Mapping[str, Any], program: str) -> None:
    """UserError for an output that can't be written. Nothing is created."""
    for name, path in outputs(options, program):
        if storage.is_s3(path) or (name == "output" and _is_data_set(path)):
            continue
        if why := reason_against(Path(path), is_file=f"{program}.{name}" in FILES):
            raise UserError(f"{name}={path} can't be written: {why}; choose another path.")


def outputs(options: Mapping[str, Any], program: str) -> Iterator[tuple[str, str]]:
    """(option, path) of each place that the program writes to."""
    default = DEFAULTS[program].format(input=options["input"]) if program in DEFAULTS else None
    training = options.get("training") or {}
    for name, path in (
        ("output", options.get("output") or default),
        ("single_file", options.get("single_file")),
        ("training.checkpoints", training.get("checkpoints")),
    ):
        if path is not None:
            yield name, str(path)


def _is_data_set(path: str) -> bool:
    """Whether it may be finished already, so that nothing needs to be written, as in a read-only archive."""
    return any(storage.exists(storage.join(path, name)) for name in ("manifest.json", "train/manifest.json"))


def reason_against(path: Path, is_file: bool) -> str:
    """Why a folder (or file) can't be written, by a temporary file in its nearest existing folder; "" if it can."""
    folder = path
    try:
        if path.is_dir() if is_file else path.exists() and not path.is_dir():
            return "it is a folder" if is_file else "it is a file"
        folder = path.parent if is_file else path
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            return f"{folder} is a file"
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return "" if error.errno in NO_ROOM else f"{folder}: {error.strerror}"
