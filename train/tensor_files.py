"""Writing safetensors files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """All of the file under its name, or nothing; readable as the umask says (the library: by its owner alone)."""
    writing = path.with_name(f"{path.name}.tmp")
    save_file(dict(tensors), writing, None if metadata is None else dict(metadata))
    umask = os.umask(0)
    os.umask(umask)
    writing.chmod(0o666 & ~umask)
    writing.replace(path)
