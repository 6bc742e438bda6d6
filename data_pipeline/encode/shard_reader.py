"""Reads image-text shards ahead, as batches to encode."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from torch import Tensor

from data_pipeline.common.errors import DataError
from data_pipeline.common.threads import Prefetcher, ordered_map
from data_pipeline.encode.base_dataset import Base, BaseShard
from data_pipeline.encode.batch_encoder import Encoders, Item
from data_pipeline.encode.conditions import Condition
from data_pipeline.encode.latent_shard import DoneMarker, OutputPaths, Rejected, read_done_marker
from data_pipeline.images.aspect_buckets import Sizes, geometry
from data_pipeline.images.formats import IMAGES
from data_pipeline.images.resize import Sides, fitted
from data_pipeline.shards import codec
from data_pipeline.shards.caption_edits import StoredEdits
from data_pipeline.shards.manifest import Shard
from data_pipeline.shards.reader import read_whole
from data_pipeline.shards.samples import as_sample, captions_of, collated, picture_in
from data_pipeline.shards.tar_index import IndexEntry, read_index


class ShardStart(NamedTuple):
    """The start of a shard; captions: those that must be encoded."""

    shard: Shard
    captions: list[str]


class EncodeBatch(NamedTuple):
    """Some samples of a shard, all of one size: images (N, 3, H, W) in [-1, 1] of those that have a picture; and those
    that can't be used."""

    items: list[Item]
    images: Tensor | None
    rejected: list[Rejected]


class ShardEnd(NamedTuple):
    """The end of a shard: all its batches have been sent."""


class AlreadyDone(NamedTuple):
    """A shard that is already finished, and its note."""

    shard: Shard
    record: DoneMarker


Step = ShardStart | EncodeBatch | ShardEnd | AlreadyDone


class ShardReader:
    """Reads shards of the data set at `path`: bytes in one thread, pictures decoded in `threads` more."""

    def __init__(self, path: str, encoders: Encoders, sizes: Sizes, base: Base | None = None, threads: int = 1) -> None:
        self.path, self.encoders, self.sizes, self.base, self.threads = path, encoders, sizes, base, threads
        self.field_encoders = encoders.field_encoders

    def steps(self, shards: Iterable[Shard], paths: OutputPaths, shared: bool = False) -> Iterator[Step]:
        """For each shard: ShardStart, batches and ShardEnd, or AlreadyDone if its note is in `paths`. shared: other
        workers may write notes meanwhile."""

        def read() -> Iterator[tuple[Any, ...]]:
            for shard in shards:
                record = read_done_marker(paths, shard)
                yield shard, record, *(() if record else (read_index(self.path, shard), read_whole(self.path, shard)))

        with ThreadPoolExecutor(self.threads) as pool, Prefetcher(read(), 1) as ahead:
            for shard, record, *whole in ahead:
                if record:
                    yield AlreadyDone(shard, record)
                else:
                    start, batches = self._shard(shard, *whole, pool)
                    yield start
                    for batch in batches:
                        if shared and read_done_marker(paths, shard):
                            break  # encode_steps also sees the note and drops the shard
                        yield batch
                    yield ShardEnd()

    def _shard(
        self, shard: Shard, entries: list[IndexEntry], data: bytes, pool: ThreadPoolExecutor
    ) -> tuple[ShardStart, Iterator[EncodeBatch]]:
        base = self.base.shard(shard.name, [entry.key for entry in entries]) if self.base else None
        items, rejected = [], []
        for position, entry in enumerate(entries):
            try:
                items.append(self._without_picture(position, entry, data, base))
            except DataError as error:
                rejected.append((position, entry.key, str(error)))
        uses_text = [encoder for encoder in self.field_encoders if "caption" in encoder.made_from]
        decoded = ordered_map(pool, lambda each: self._with_picture(each, entries, data), items, 2 * self.threads)
        return ShardStart(shard, captions_to_encode(items, uses_text)), self._batches(decoded, rejected)

    def _batches(self, decoded: Iterable[tuple[Item, Sides | str]], rejected: list[Rejected]) -> Iterator[EncodeBatch]:
        """Batches of pictures of one size, in order; rejected samples, given or found here, go with the next batch."""
        waiting: dict[Sides, list[Item]] = {}
        only: Sides | None = None  # the size of all pictures, where they stay as they are
        for item, sides in decoded:
            if not isinstance(sides, str):
                only = only or sides
            if isinstance(sides, str) or (not self.sizes.sides and sides != only):
                reason = sides if isinstance(sides, str) else f"{words(sides)} beside {words(only)}: set size="
                rejected.append((item.position, item.sample["key"], reason))
                continue
            batch = waiting.setdefault(sides, [])
            batch.append(item)
            if len(batch) == self.encoders.batch_size:
                yield batch_of(waiting.pop(sides), rejected)
                rejected = []
        for sides in sorted(waiting):
            yield batch_of(waiting[sides], rejected)
            rejected = []
        if rejected:
            yield batch_of([], rejected)

    def _without_picture(self, position: int, entry: IndexEntry, data: bytes, base: BaseShard | None) -> Item:
        """A sample with all members but the picture, and what the base has of it. DataError: it can't be used."""
        bytes_of = {name: data[at : at + size] for name, (at, size) in entry.members.items()}
        members = {n: codec.decode(n, content) for n, content in bytes_of.items() if n not in IMAGES}
        sample = as_sample(entry.key, members)
        picture = picture_in(entry)
        if picture is None or not sample["caption"]:
            raise DataError("missing picture or caption")
        digest = hashlib.sha256(bytes_of[picture]).hexdigest()[:16]
        sample["meta"] = {**sample["meta"], "image_sha256": digest}
        sample, captions = edited(sample, self.encoders.edits)
        item = Item(position, sample, captions=captions)
        if base is not None:
            base.copy_fields(item, self.encoders)
        return item

    def _with_picture(self, item: Item, entries: list[IndexEntry], data: bytes) -> tuple[Item, Sides | str]:
        """The item with its picture (if it must be encoded) and bucket; the size, or why it can't be used."""
        try:
            made_of_picture = (encoder for encoder in self.field_encoders if "picture" in encoder.made_from)
            if any(item.lacks(encoder) or any(item.lacking(encoder)) for encoder in made_of_picture):
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
            raise DataError(f"{words(before)} is no multiple of f={factor}: set size=")
        item.sample["image"] = fit.pixels
        item.sample["meta"] |= geometry(item.sample["meta"], before, fit)


def edited(sample: dict[str, Any], edits: StoredEdits) -> tuple[dict[str, Any], dict[str, str]]:
    """The sample with its captions edited for encoding, the first as its caption; and all of them, if there are
    several."""
    captions = edits.applied(captions_of(sample))
    sample = {**sample, "caption": next(iter(captions.values()))}
    if len(captions) < 2:
        return sample, {}
    return {**sample, "meta": {**sample["meta"], "captions": captions}}, captions


def captions_to_encode(items: Iterable[Item], encoders: Sequence[Condition]) -> list[str]:
    """The captions of a shard that must be encoded, in order."""
    found = []
    for item in items:
        others = {text for encoder in encoders for _, text in item.lacking(encoder)}
        if any(item.lacks(encoder) for encoder in encoders):
            found.append(item.sample["caption"])
        found += [text for text in item.texts[1:] if text in others]
    return found


def words(sides: Sides) -> str:
    return f"a picture of {sides[0]}x{sides[1]}"


def batch_of(items: list[Item], rejected: list[Rejected]) -> EncodeBatch:
    """A batch with its pictures stacked; done here because this is the decoding thread."""
    pictures = [{"key": i.sample["key"], "image": i.sample["image"]} for i in items if "image" in i.sample]
    return EncodeBatch(items, collated(pictures)["image"] if pictures else None, rejected)
