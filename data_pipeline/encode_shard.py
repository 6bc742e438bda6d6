"""Image-text shards read ahead as batches to encode, and the latent shards that are made of them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from data_pipeline.common.errors import DataError
from data_pipeline.common.threads import Ahead, in_order
from data_pipeline.encode_batch import Encoders, Item, batch_statistics, combined_statistics
from data_pipeline.images.aspect_buckets import Sizes, geometry
from data_pipeline.images.decode import IMAGES
from data_pipeline.images.resize import Sides, fitted
from data_pipeline.reuse import Base, BaseShard
from data_pipeline.shard_notes import Places, published
from data_pipeline.shards import codec
from data_pipeline.shards.arrays import described, unusable
from data_pipeline.shards.manifest import Shard
from data_pipeline.shards.reader import read_whole
from data_pipeline.shards.samples import as_sample, collated, picture_in
from data_pipeline.shards.tar_index import IndexEntry, read_index
from data_pipeline.shards.writer import ShardWriter

Rejected = tuple[int, str, str]  # position in the shard, key, reason


@dataclass(frozen=True, slots=True)
class Begun:
    """A shard comes next; captions: those that must be encoded. Who sets `dropped` wants no more parts of it."""

    shard: Shard
    captions: list[str]
    dropped: threading.Event = field(default_factory=threading.Event)


class Part(NamedTuple):
    """Some of a shard's samples, of one size: (N, 3, H, W) in [-1, 1] of those that have a picture; and what can't be
    used."""

    items: list[Item]
    images: Tensor | None
    rejected: list[Rejected]


class Over(NamedTuple):
    """The shard's last part has come."""


class FoundMade(NamedTuple):
    """A shard that is finished already, and its note."""

    shard: Shard
    record: dict[str, Any]


Step = Begun | Part | Over | FoundMade


class ShardReader:
    """Reads shards of the data set at `path`: bytes in one thread, pictures decoded in `threads` more."""

    def __init__(self, path: str, encoders: Encoders, sizes: Sizes, base: Base | None = None, threads: int = 1) -> None:
        self.path, self.encoders, self.sizes, self.base, self.threads = path, encoders, sizes, base, threads
        self.makers = encoders.makers

    def steps(self, shards: Iterable[Shard], record_of: Callable[[Shard], dict[str, Any] | None]) -> Iterator[Step]:
        """Of each shard its note where it has one, else Begun, parts, Over."""

        def read() -> Iterator[tuple[Any, ...]]:
            for shard in shards:
                record = record_of(shard)
                whole = () if record else (read_index(self.path, shard), read_whole(self.path, shard))
                yield shard, record, *whole

        with ThreadPoolExecutor(self.threads) as pool, Ahead(read(), 1) as ahead:
            for shard, record, *whole in ahead:
                if record:
                    yield FoundMade(shard, record)
                else:
                    yield from self._parts(shard, *whole, pool)

    def _parts(self, shard: Shard, entries: list[IndexEntry], data: bytes, pool: ThreadPoolExecutor) -> Iterator[Step]:
        base = self.base.shard(shard.name, [entry.key for entry in entries]) if self.base else None
        items, rejected = [], []
        for position, entry in enumerate(entries):
            try:
                items.append(self._without_picture(position, entry, data, base))
            except DataError as error:
                rejected.append((position, entry.key, str(error)))
        uses_text = [maker for maker in self.makers if "caption" in maker.made_from]
        lacking = [item for item in items if any(item.lacks(maker) for maker in uses_text)]
        begun = Begun(shard, [item.sample["caption"] for item in lacking])
        yield begun
        waiting: dict[Sides, list[Item]] = {}
        only: Sides | None = None  # the size of all, where pictures stay as they are
        for item, sides in in_order(
            pool, lambda each: self._with_picture(each, entries, data), items, 2 * self.threads
        ):
            if begun.dropped.is_set():
                return
            if not isinstance(sides, str):
                only = only or sides
            if isinstance(sides, str) or (not self.sizes.sides and sides != only):
                reason = sides if isinstance(sides, str) else f"{words(sides)} beside {words(only)}: give size="
                rejected.append((item.position, item.sample["key"], reason))
                continue
            batch = waiting.setdefault(sides, [])
            batch.append(item)
            if len(batch) == self.encoders.batch_size:
                yield part_of(waiting.pop(sides), rejected)
                rejected = []
        for sides in sorted(waiting):
            yield part_of(waiting[sides], rejected)
            rejected = []
        if rejected:
            yield part_of([], rejected)
        yield Over()

    def _without_picture(self, position: int, entry: IndexEntry, data: bytes, base: BaseShard | None) -> Item:
        """A sample by all of its members but the picture, and what the base has of it. DataError: can't be used."""
        bytes_of = {name: data[at : at + size] for name, (at, size) in entry.members.items()}
        members = {n: codec.decode(n, content) for n, content in bytes_of.items() if n not in IMAGES}
        sample = as_sample(entry.key, members)
        picture = picture_in(entry)
        if picture is None or not sample["caption"]:
            raise DataError("missing picture or caption")
        digest = hashlib.sha256(bytes_of[picture]).hexdigest()[:16]
        sample["meta"] = {**sample["meta"], "image_sha256": digest}
        item = Item(position, sample)
        if base is not None:
            base.lend(item, self.encoders)
        return item

    def _with_picture(self, item: Item, entries: list[IndexEntry], data: bytes) -> tuple[Item, Sides | str]:
        """The item with its picture (where it must be encoded) and bucket; the size, or why it can't be used."""
        try:
            if any("picture" in maker.made_from and item.lacks(maker) for maker in self.makers):
                self._decode(item, entries[item.position], data)
            sides = tuple(item.sample["meta"]["target_size"])
            for condition in self.encoders.conditions.values():
                if reason := condition.reason_against(item.sample):
                    raise DataError(reason)
        except DataError as error:
            return item, str(error)
        item.bucket = self.sizes.bucket(sides)
        return item, sides

    def _decode(self, item: Item, entry: IndexEntry, data: bytes) -> None:
        name, factor = picture_in(entry), self.encoders.image.factor
        at, size = entry.members[name]
        pixels = codec.decode(name, data[at : at + size])
        before = pixels.shape[:2]
        fit = fitted(pixels, self.sizes.of(before))
        if any(side % factor for side in fit.pixels.shape[:2]):
            raise DataError(f"{words(before)} is no multiple of f={factor}: give size=")
        item.sample["image"] = fit.pixels
        item.sample["meta"] |= geometry(item.sample["meta"], before, fit)


def words(sides: Sides) -> str:
    return f"a picture of {sides[0]}x{sides[1]}"


def part_of(items: list[Item], rejected: list[Rejected]) -> Part:
    """With the pictures put together: here, in the thread that decodes."""
    pictures = [{"key": i.sample["key"], "image": i.sample["image"]} for i in items if "image" in i.sample]
    return Part(items, collated(pictures)["image"] if pictures else None, rejected)


class Build:
    """The latent shards, one a bucket, that an image-text shard becomes."""

    def __init__(self, shard: Shard, encoders: Encoders) -> None:
        self.shard, self.image, self.dtype = shard, encoders.image, encoders.dtype
        self.writers: dict[str, ShardWriter] = {}
        self.statistics: dict[str, list[dict[str, Any]]] = {}
        self.fields: dict[str, dict[str, Any]] = {}
        self.rejected: list[Rejected] = []
        self.copied = 0  # samples whose picture was not encoded, as a base has what it would become
        self.noted: dict[str, Any] | None = None

    def add(self, items: Sequence[Item], stored: dict[str, np.ndarray]) -> list[Rejected]:
        """Put encoded samples of one bucket into its tar, in memory; returns those whose values can't be used."""
        self.copied += sum("image" not in item.sample for item in items)
        codes = len(self.image.codebook) if self.image.stored_as == "indices" else None
        bad = [(items[row].position, items[row].sample["key"], why) for row, why in unusable(stored, codes, self.dtype)]
        self.rejected += bad
        dropped = {position for position, _, _ in bad}
        rows = [row for row, item in enumerate(items) if item.position not in dropped]
        if rows:
            self._write(items, stored, rows)
        return bad

    def _write(self, items: Sequence[Item], stored: dict[str, np.ndarray], rows: list[int]) -> None:
        bucket, latents = items[0].bucket, stored[self.image.stored_as]
        writer = self.writers.setdefault(bucket, ShardWriter())
        for row in rows:
            sample = items[row].sample
            members = {f"{name}.npy": values[row] for name, values in stored.items()}
            writer.add(sample["key"], {**members, "json": {**sample["meta"], "caption": sample["caption"]}})
        kept = latents if len(rows) == len(items) else latents[rows]
        self.statistics.setdefault(bucket, []).append(batch_statistics(self.image, kept))
        self.fields[bucket] = {f"{name}.npy": described(values) for name, values in stored.items()} | {"json": {}}

    def publish(self, places: Places) -> dict[str, Any]:
        """Write its tars, and then the note that the shard is finished, which is returned; another's, if that came
        first."""
        record = published(places, self.shard, self.writers, self._note)
        self.writers = {}  # some hundred MB
        return record

    def _note(self, lines: Mapping[str, Shard]) -> dict[str, Any]:
        sets = {
            bucket: {
                "shard": asdict(line),
                "latents": combined_statistics(self.statistics[bucket]),
                "fields": self.fields[bucket],
            }
            for bucket, line in lines.items()
        }
        aside = [{"key": key, "reason": reason} for _, key, reason in sorted(self.rejected)]
        self.noted = {"listed": self.shard.samples, "aside": aside, "sets": sets}
        return self.noted
