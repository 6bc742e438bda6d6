"""A latent shard: where it goes, how it is put together, and how it is published.

Its tars are written first, then the note that it is finished, which describes them.

Workers with the same results write the same bytes, so it does not matter which of them makes a shard. Between a GPU
and a CPU the last bits differ: so the first tar under a name stays, its worker's note follows, and the other workers
accept both.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.encode.batch_encoder import Encoders, Item, Others, batch_statistics, combined_statistics
from data_pipeline.shards.arrays import described, unusable
from data_pipeline.shards.caption_members import counted, names_in
from data_pipeline.shards.json_fields import size_sums
from data_pipeline.shards.manifest import Shard
from data_pipeline.shards.tar_index import digest_of
from data_pipeline.shards.truncation import CutCaptions, cut_captions
from data_pipeline.shards.writer import ShardWriter

MARKER_WAIT_S = 10.0  # seconds that another worker, if alive, has to write its note after its tar
DoneMarker = dict[str, Any]
Rejected = tuple[int, str, str]  # position in the shard, key, reason


class OutputPaths(NamedTuple):
    """Where a split's data sets go: <output>/<split>, with buckets <output>/<bucket>/<split>."""

    output: str
    split: str = ""
    bucketed: bool = False

    def root(self, bucket: str = "") -> str:
        return storage.join(self.output, *(part for part in (bucket, self.split) if part))

    @property
    def markers_root(self) -> str:
        """The folder of the notes on finished shards."""
        return self.root("work") if self.bucketed else self.root()

    def done_marker(self, shard: Shard) -> str:
        return storage.join(self.markers_root, shard.name + ".done.json")

    @property
    def final_file(self) -> str:
        """The file that is written last, when everything else is."""
        return storage.join(self.markers_root, "buckets.json" if self.bucketed else "manifest.json")


def read_done_marker(paths: OutputPaths, shard: Shard) -> DoneMarker | None:
    """The note on a finished shard, if its tars are still there as they were written."""
    done_marker = storage.read_if_there(paths.done_marker(shard))
    if done_marker is None:
        return None
    record = json.loads(done_marker)
    for bucket, part in record.get("sets", {}).items():
        tar = storage.join(paths.root(bucket), part["shard"]["name"])
        if storage.size_if_there(tar) != part["shard"]["bytes"]:
            return None
    return record if "sets" in record else None  # a note of an earlier version: its shard is made again


def publish_shard(root: str, line: Shard, index: bytes, data: bytes, overwrite: bool = False) -> bool:
    """Write a tar after its index; False if its name is taken by another tar of the same length with other bytes."""
    path = storage.join(root, line.name)
    size = storage.size_if_there(path)
    if size == line.bytes and not overwrite and not is_there(root, line):
        return False
    storage.write_atomically(storage.join(root, line.index_name), index)
    if overwrite or size not in (None, line.bytes):
        storage.write_atomically(path, data)
        return True
    return storage.write_first(path, data) or is_there(root, line)


def is_there(root: str, line: Shard) -> bool:
    """Whether a tar's bytes match its line in the manifest."""
    return digest_of(storage.read_bytes(storage.join(root, line.name))) == line.sha256


def wait_for_done_marker(paths: OutputPaths, shard: Shard) -> DoneMarker | None:
    """The note of the worker whose tar is already there, which follows within moments; None if it does not."""
    end = time.monotonic() + MARKER_WAIT_S
    while time.monotonic() < end:
        if record := read_done_marker(paths, shard):
            return record
        time.sleep(0.1)
    return None


def verify_done_markers(
    paths: OutputPaths, shards: Sequence[Shard], records: Mapping[str, DoneMarker]
) -> dict[str, DoneMarker]:
    """The present notes of shards that this worker made; a note by another worker is checked against the tars.
    DataError if they disagree: a bucket can't tell who wrote first."""
    now = {}
    for shard in shards:
        record = now[shard.name] = read_done_marker(paths, shard) or records[shard.name]
        if record["sets"] == records[shard.name]["sets"]:
            continue
        for bucket, part in record["sets"].items():
            if not is_there(paths.root(bucket), Shard(**part["shard"])):
                raise DataError(
                    f"shard {storage.join(paths.root(bucket), shard.name)} was made by two workers with different "
                    f"results, and its tar and its done marker are not from the same worker: delete "
                    f"{paths.done_marker(shard)} and start precompute again."
                )
    return now


class LatentShardBuilder:
    """The latent shards, one per bucket, that an image-text shard becomes."""

    def __init__(self, shard: Shard, encoders: Encoders) -> None:
        self.shard, self.image, self.dtype = shard, encoders.image, encoders.dtype
        self.writers: dict[str, ShardWriter] = {}
        self.statistics: dict[str, list[dict[str, Any]]] = {}
        self.metas: dict[str, list[dict[str, Any]]] = {}
        self.fields: dict[str, dict[str, Any]] = {}
        self.captions: dict[str, Counter[str]] = {}
        self.cut = {name: CutCaptions(counter) for name, counter in encoders.token_counters.items()}
        self.rejected: list[Rejected] = []
        self.copied = 0  # samples whose picture was not encoded, because the base has the result
        self.done_marker: DoneMarker | None = None

    def add(
        self,
        items: Sequence[Item],
        stored: dict[str, np.ndarray],
        rejected: Sequence[Rejected] = (),
        others: Others | None = None,
    ) -> list[Rejected]:
        """Add encoded samples of one bucket to its tar in memory, and record those that could not be encoded; returns
        the encoded ones with unusable values. others: fields of further captions."""
        self.rejected += rejected
        if not items:
            return []
        self.copied += sum("image" not in item.sample for item in items)
        others = others or {}
        codes = len(self.image.codebook) if self.image.stored_as == "indices" else None
        reasons = dict(unusable(stored, codes, self.dtype)) | unusable_others(others, self.dtype)
        bad = [(items[row].position, items[row].sample["key"], why) for row, why in sorted(reasons.items())]
        self.rejected += bad
        dropped = {position for position, _, _ in bad}
        rows = [row for row, item in enumerate(items) if item.position not in dropped]
        if rows:
            self._write(items, stored, others, rows)
        return bad

    def _write(self, items: Sequence[Item], stored: dict[str, np.ndarray], others: Others, rows: list[int]) -> None:
        bucket, latents = items[0].bucket, stored[self.image.stored_as]
        writer = self.writers.setdefault(bucket, ShardWriter())
        kept = latents if len(rows) == len(items) else latents[rows]
        self.statistics.setdefault(bucket, []).append(batch_statistics(self.image, kept))
        self.fields[bucket] = {f"{name}.npy": described(values) for name, values in stored.items()} | {"json": {}}
        for row in rows:  # after everything that may fail: publish counts them
            sample = items[row].sample
            members = {f"{name}.npy": values[row] for name, values in stored.items()}
            members |= {f"{name}.npy": values[row] for name, values in others.items() if row in values}
            writer.add(sample["key"], {**members, "json": {**sample["meta"], "caption": sample["caption"]}})
            self.captions.setdefault(bucket, Counter()).update(names_in(items[row].captions))
            for cut in self.cut.values():
                cut.add(sample["key"], items[row].texts)
            self.metas.setdefault(bucket, []).append(sample["meta"])

    def publish(self, paths: OutputPaths) -> DoneMarker:
        """Write each bucket's tar and then the note that the shard is finished, unless another worker came first.
        Returns the note that counts."""
        record = self._existing_done_marker(paths) or self._written(paths)
        self.writers = {}  # frees some hundred MB
        return record

    def _existing_done_marker(self, paths: OutputPaths) -> DoneMarker | None:
        if not storage.exists(paths.done_marker(self.shard)):
            return None
        if record := read_done_marker(paths, self.shard):
            return record
        storage.remove(paths.done_marker(self.shard))  # its tar is cut or missing
        return None

    def _written(self, paths: OutputPaths) -> DoneMarker:
        put = sum(writer.count for writer in self.writers.values()) + len(self.rejected)
        assert put == self.shard.samples, f"{put} of {self.shard.samples} samples of {self.shard.name} were added"
        lines = {}
        for bucket, writer in sorted(self.writers.items()):
            lines[bucket], index, data = writer.contents(self.shard.name)
            if not publish_shard(paths.root(bucket), lines[bucket], index, data):
                if record := wait_for_done_marker(paths, self.shard):
                    return record
                publish_shard(paths.root(bucket), lines[bucket], index, data, overwrite=True)  # that worker is dead
        self.done_marker = self._done_marker(lines)
        if storage.write_first(paths.done_marker(self.shard), json.dumps(self.done_marker).encode()):
            return self.done_marker
        return read_done_marker(paths, self.shard) or self.done_marker

    def _done_marker(self, lines: Mapping[str, Shard]) -> DoneMarker:
        sets = {
            bucket: {
                "shard": asdict(line),
                "latents": combined_statistics(self.statistics[bucket]),
                "fields": self.fields[bucket],
                "size_sums": size_sums(self.metas[bucket]),
                **({"captions": several} if (several := counted(self.captions[bucket])) else {}),
            }
            for bucket, line in lines.items()
        }
        aside = [{"key": key, "reason": reason} for _, key, reason in sorted(self.rejected)]
        cut = {cut_captions(name): each.found for name, each in self.cut.items() if each.found}
        return {"listed": self.shard.samples, "aside": aside, "sets": sets, **cut}


def unusable_others(others: Others, dtype: str) -> dict[int, str]:
    """Row -> reason, for samples with a further caption whose values can't be trained on."""
    found: dict[int, str] = {}
    for name, by_row in others.items():
        rows = list(by_row)
        reasons = unusable({name: np.stack([by_row[row] for row in rows])}, None, dtype)
        found |= {rows[i]: reason for i, reason in reasons}
    return found
