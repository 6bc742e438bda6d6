"""Checks of a whole data set, a shard at a time: what is on disk against what its manifest says."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from data_pipeline import codec, storage
from data_pipeline.errors import DataError
from data_pipeline.loader import as_sample, fields_of
from data_pipeline.manifest import Manifest, Shard, check_size
from data_pipeline.shard_writer import IndexEntry, parse_index, scan

AGAIN = "make the data set again"


@dataclass(slots=True)
class Findings:
    """What is wrong, each kind once, with how often and where first."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, what: str, where: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
        self.first.setdefault(what, where)

    def __len__(self) -> int:
        return len(self.counts)

    def sentences(self) -> list[str]:
        """One of each kind, the most frequent first."""
        ordered = sorted(self.counts, key=lambda what: -self.counts[what])
        return [f"{self.counts[what]} x {what} (first: {self.first[what]})" for what in ordered]


def check_shard(root: str, manifest: Manifest, shard: Shard, keys: dict[str, str], findings: Findings) -> int:
    """Add what is wrong with a shard; keys, of those before it, grow by its own. Returns its samples."""
    path = storage.join(root, shard.name)
    try:
        check_size(root, shard)
        data = storage.read_bytes(path)
        if hashlib.sha256(data).hexdigest() != shard.sha256:
            findings.add(f"a shard's bytes are not those of its manifest: copy it again, or {AGAIN}", path)
        entries = indexed(root, shard, scan(data, shard.name), findings)
    except (DataError, OSError) as error:
        findings.add(str(error), path)
        return 0
    if len(entries) != shard.samples:
        findings.add(f"a shard holds {len(entries)} samples, its manifest says {shard.samples}: {AGAIN}", path)
    for entry in entries:
        where = f"{entry.key} in {path}"
        if entry.key in keys:
            findings.add(f"a key comes twice: {AGAIN} with other keys", f"{where}, before in {keys[entry.key]}")
        keys[entry.key] = path
        if entry.key.startswith("/") or ".." in PurePosixPath(entry.key).parts:
            findings.add(f"a name leads out of the data set, where tar would write it: {AGAIN}", where)
        for what in faults(manifest, members(data, entry, fields_of(manifest))):
            findings.add(what, where)
    return len(entries)


def indexed(root: str, shard: Shard, found: list[IndexEntry], findings: Findings) -> list[IndexEntry]:
    """The samples that the .idx takes of a tar, which must lie there; without one, all."""
    path = storage.join(root, shard.index_name)
    if not storage.exists(path):
        return found
    entries = parse_index(storage.read_bytes(path), path)
    places = {(entry.key, name, place) for entry in found for name, place in entry.members.items()}
    if any((entry.key, name, place) not in places for entry in entries for name, place in entry.members.items()):
        findings.add("an index names places where the tar has no such member: delete it, the tar is read instead", path)
        return found
    return entries


def members(data: bytes, entry: IndexEntry, fields: tuple[str, ...]) -> dict[str, Any]:
    """Decoded members of a sample; what can't be decoded is its DataError."""
    decoded: dict[str, Any] = {}
    for name, (offset, size) in entry.members.items():
        if name in fields:
            try:
                decoded[name] = codec.decode(name, data[offset : offset + size])
            except DataError as error:
                decoded[name] = error
    return decoded


def faults(manifest: Manifest, found: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a sample's members, in words that are the same for all samples that have it."""
    for name, value in found.items():
        if isinstance(value, DataError):
            yield f"{value}: {AGAIN}"
        elif isinstance(value, np.ndarray) and value.dtype.kind == "f" and not np.isfinite(value).all():
            yield f"{name} is not finite: {AGAIN}, with dtype=float32"
    if manifest.kind == "image-text":
        if not any(name in found for name in codec.IMAGES):
            yield f"no picture: {AGAIN}"
        if not codec.caption_in({name: value for name, value in found.items() if not isinstance(value, DataError)}):
            yield f"no caption: {AGAIN}"
        return
    for name, facts in manifest.fields.items():
        value = found.get(name)
        if value is None:
            yield f"no {name}: {AGAIN}"
        elif isinstance(value, np.ndarray) and "shape" in facts:
            dtype = "float32" if facts["dtype"] == "bfloat16" else facts["dtype"]  # as codec.decode gives it
            if (value.dtype.name, list(value.shape)) != (dtype, list(facts["shape"])):
                yield f"{name} is {value.dtype.name} {list(value.shape)}, not {dtype} {facts['shape']}: {AGAIN}"


def chosen_samples(root: str, manifest: Manifest, count: int) -> Iterator[dict[str, Any]]:
    """Samples at equal distances through the data set, decoded; those that can't be are left out."""
    starts = np.cumsum([0, *(shard.samples for shard in manifest.shards)])
    wanted = np.unique(np.linspace(0, manifest.samples, min(count, manifest.samples), endpoint=False).astype(int))
    for number, shard in enumerate(manifest.shards):
        here = [int(w - starts[number]) for w in wanted if starts[number] <= w < starts[number + 1]]
        if not here:
            continue
        data = storage.read_bytes(storage.join(root, shard.name))
        entries = indexed(root, shard, scan(data, shard.name), Findings())
        for place in here:
            found = members(data, entries[place], fields_of(manifest))
            if not any(isinstance(value, DataError) for value in found.values()):
                yield as_sample(entries[place].key, found)
