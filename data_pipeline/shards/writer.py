"""Writes a WebDataset tar and its index, complete or not at all."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.common import storage
from data_pipeline.shards import codec
from data_pipeline.shards.manifest import Shard
from data_pipeline.shards.tar_index import digest_of, index_digest, scan


class ShardWriter:
    """Collects samples in memory and publishes them as one tar: a shard is a few hundred MB at most.

    The same samples give the same bytes: owner, mode and time are fixed.
    """

    def __init__(self) -> None:
        import webdataset as wds  # it imports torch: one second that --help and a finished output need not wait for

        self.buffer = io.BytesIO()
        self.tar = wds.TarWriter(self.buffer, user="", group="", mode=0o644, mtime=0, encoder=False)
        self.count = 0

    def __del__(self) -> None:
        self.tar.close()  # closes an abandoned shard's tar before its buffer goes: tarfile would complain

    def add(self, key: str, members: Mapping[str, Any]) -> None:
        """Add one sample; members by extension, encoded by codec.encode."""
        encoded = {name: codec.encode(name, value) for name, value in members.items()}
        self.tar.write({"__key__": key, **encoded})
        self.count += 1

    def publish(self, root: str | Path, name: str) -> Shard:
        """Write <root>/<name> and its .idx, each atomically, the tar last."""
        shard, index, data = self.contents(name)
        storage.write_atomically(storage.join(root, shard.index_name), index)
        storage.write_atomically(storage.join(root, name), data)
        return shard

    def contents(self, name: str) -> tuple[Shard, bytes, bytes]:
        """Its line in the manifest, and the bytes of index and tar; nothing can be added after this."""
        self.tar.close()
        data = self.buffer.getvalue()
        lines = [json.dumps([e.key, {k: list(m) for k, m in e.members.items()}]) for e in scan(data, name)]
        index = ("\n".join(lines) + "\n").encode()
        shard = Shard(name, self.count, len(data), digest_of(data), index_digest(index))
        return shard, index, data
