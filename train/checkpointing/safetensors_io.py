"""Writes safetensors files, and reads parts of those in a bucket."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from train.checkpointing.files import FileInfo, chunks, file_digest

LONGEST_HEADER = 10**8  # bytes, the library's limit


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the file atomically, with the umask's permissions (the library: only the owner can read it).

    OSError if the disk is full.
    """
    writing = path.with_name(f"{path.name}.tmp")
    try:
        save_file(dict(tensors), writing, None if metadata is None else dict(metadata))
    except SafetensorError as error:  # the library has an OSError only in its message
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise
    umask = os.umask(0)
    os.umask(umask)
    writing.chmod(0o666 & ~umask)
    writing.replace(path)


def verified_file_info(path: Path, tensors: Mapping[str, Tensor]) -> FileInfo:
    """Facts of a file just written, by reading it back; OSError if it is not bit for bit what was written."""
    facts = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    with safe_open(path, "pt") as file:
        for name, tensor in tensors.items():
            if not torch.equal(_bits(file.get_tensor(name)), _bits(tensor)):
                raise OSError(f"{path}: tensor {name} differs after reading it back")
    return facts


def _bits(tensor: Tensor) -> Tensor:
    """As bytes, so that NaN equals itself."""
    return tensor.contiguous().view(-1).view(torch.uint8)


class Header(NamedTuple):
    """Header of a safetensors file: where the data begin; by tensor, its length and (begin, end) in the file."""

    begin: int
    tensors: dict[str, tuple[int, int, int]]
    metadata: dict[str, str]

    @classmethod
    def of(cls, path: str) -> Header:
        """The header of a local or s3 file, in two reads; DataError if it has none."""
        try:
            size = int.from_bytes(storage.read_bytes(path, 0, 8), "little")
            about = json.loads(storage.read_bytes(path, 8, size) if size <= LONGEST_HEADER else b"")
            metadata = about.pop("__metadata__", {})
            places = {
                name: (facts["shape"][0] if facts["shape"] else 1, *(8 + size + at for at in facts["data_offsets"]))
                for name, facts in about.items()
            }
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not a safetensors file, or is damaged: copy it again.") from error
        except OSError as error:
            if error.errno:
                raise
            raise DataError(f"{path} is truncated: copy it again.") from error
        return cls(8 + size, places, metadata)


def copy_some(source: str, target: Path, wanted: Callable[[str], bool]) -> None:
    """Copy a file from a bucket, downloading only the `wanted` tensors; the others are zeros, without disk space."""
    header = Header.of(source)
    places = sorted((begin, end) for name, (_, begin, end) in header.tensors.items() if wanted(name))
    with target.open("wb") as file:
        file.truncate(max((end for _, _, end in header.tensors.values()), default=header.begin))
        for begin, end in _joined([(0, header.begin), *places]):
            file.seek(begin)
            file.writelines(chunks(source, begin, end - begin))


def _joined(places: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Adjacent ranges merged."""
    begin, end = places[0]
    for next_begin, next_end in places[1:]:
        if next_begin != end:
            yield begin, end
            begin = next_begin
        end = next_end
    yield begin, end
