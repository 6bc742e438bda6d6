"""Writing safetensors files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """All of the file under its name, or nothing; readable as the umask says (the library: by its owner alone).

    A disk that is full is an OSError.
    """
    writing = path.with_name(f"{path.name}.tmp")
    try:
        save_file(dict(tensors), writing, None if metadata is None else dict(metadata))
    except SafetensorError as error:  # which hides an OSError in a sentence
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise
    umask = os.umask(0)
    os.umask(umask)
    writing.chmod(0o666 & ~umask)
    writing.replace(path)
