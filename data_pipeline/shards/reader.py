"""Reads a whole shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.shards import codec
from data_pipeline.shards.manifest import Shard
from data_pipeline.shards.tar_index import read_index, refuse_other_bytes


def read_whole(root: str | Path, shard: Shard) -> bytes:
    """All bytes of a shard, checked against its manifest."""
    path = storage.join(root, shard.name)
    data = storage.read_bytes(path, 0, shard.bytes)
    refuse_other_bytes(data, path, shard)
    return data


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
