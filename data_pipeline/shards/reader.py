"""Reads or copies a whole shard."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.shards import codec
from data_pipeline.shards.manifest import Shard
from data_pipeline.shards.tar_index import read_index, refuse_other_bytes, refuse_other_digest

PIECE = 16 * 2**20  # bytes of a file in memory at a time while it is copied


def read_whole(root: str | Path, shard: Shard) -> bytes:
    """All bytes of a shard, checked against its manifest."""
    path = storage.join(root, shard.name)
    data = storage.read_bytes(path, 0, shard.bytes)
    refuse_other_bytes(data, path, shard)
    return data


def copy_whole(root: str | Path, shard: Shard, target: BinaryIO) -> None:
    """Write all bytes of a shard, checked against its manifest. A file is copied in pieces; an object is held whole."""
    path = storage.join(root, shard.name)
    if storage.is_s3(path):
        target.write(read_whole(root, shard))
        return
    digest = hashlib.sha256()
    for piece in _pieces(path):
        digest.update(piece)
        target.write(piece)
    refuse_other_digest(digest.hexdigest(), path, shard)


def _pieces(path: str) -> Iterator[bytes]:
    """A file's bytes. RuntimeError (not the target's OSError) if it can't be read: a new start may succeed."""
    try:
        with open(path, "rb") as file:
            while piece := file.read(PIECE):
                yield piece
    except OSError as error:
        raise RuntimeError(f"shard {path} can't be read ({error.strerror})") from error


def read_shard(root: str | Path, shard: Shard, fields: tuple[str, ...] | None = None) -> list[dict[str, Any]]:
    """All samples of a shard, decoded: __key__ and each member (of `fields`; all: None) by extension."""
    entries = read_index(root, shard)
    data = read_whole(root, shard)
    samples = []
    for entry in entries:
        sample: dict[str, Any] = {"__key__": entry.key}
        for name, (offset, length) in entry.members.items():
            if fields is None or name in fields:
                try:
                    sample[name] = codec.decode(name, data[offset : offset + length])
                except DataError as error:
                    raise DataError(f"sample {entry.key} of shard {storage.join(root, shard.name)}: {error}") from error
        samples.append(sample)
    return samples
