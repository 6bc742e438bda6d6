"""Reads samples of data sets by place: threads open and check shards, arrays are copied once, the rest is decoded."""

from __future__ import annotations

import mmap
import os
import resource
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.images.formats import IMAGES
from data_pipeline.loading.array_batch import ArrayLayout, not_finite, stacked
from data_pipeline.loading.caption_draw import CaptionOptions
from data_pipeline.loading.epoch_plan import Place
from data_pipeline.loading.shard_cache import RemoteShard, fits_cache, open_shard
from data_pipeline.shards import codec
from data_pipeline.shards.arrays import differing
from data_pipeline.shards.caption_members import line_of, member_of
from data_pipeline.shards.data_sets import DataSets, Numbered
from data_pipeline.shards.json_fields import FROM_JSON
from data_pipeline.shards.samples import as_sample, captions_of, collated, fields_of, size_of, without_other_pictures
from data_pipeline.shards.tar_index import IndexEntry, read_index, refuse_other_bytes

OPENERS = 4  # threads that open shards: one thread takes 0.5 s a GB for a digest


class OpenShard(NamedTuple):
    """A shard's bytes, mapped or fetched on demand, and its index."""

    data: np.ndarray | RemoteShard
    entries: list[IndexEntry]


class SampleReader:
    """Reads samples of data sets by place. Background threads open shards; decoded pictures are kept up to `cache_mb`,
    enough for small sets. verify: each shard's digest is checked once, before any of its samples is returned. The dtype
    and shape of each array are checked on every read. finite: whether to refuse values that are not finite.
    json_fields: names in FROM_JSON that also become arrays. captions: which of several captions a batch takes."""

    def __init__(
        self,
        data: DataSets,
        cache_mb: float,
        verify: bool = True,
        finite: bool = True,
        json_fields: Sequence[str] = (),
        captions: CaptionOptions = CaptionOptions(),  # noqa: B008  (frozen)
    ) -> None:
        _allow_many_open_files()
        self.numbered, self.kind, self.verify, self.finite = Numbered(data), data.kind, verify, finite
        self.captions, self.json_fields = captions, {name: FROM_JSON[name] for name in json_fields}
        self.fields = fields_of(data.sets[0].manifest)  # all sets have the same (data_sets.py)
        self.arrays = [name for name in self.fields if name.endswith(".npy")]
        self.only_arrays = all(name in ("json", "txt") or name in self.arrays for name in self.fields)
        self.layouts: dict[tuple[int, str], ArrayLayout | None] = {}  # for each set: buckets differ in shape
        self.openers = ThreadPoolExecutor(min(OPENERS, os.cpu_count() or 1), "open shard")
        self.opening: dict[int, Future[OpenShard]] = {}
        self.shards: dict[int, OpenShard] = {}
        self.checked: set[int] = set()
        self.cache: dict[Place, dict[str, Any]] = {}
        self.room = cache_mb * 2**20
        self.pieces: Callable[[int], list[tuple[int, int]]] = lambda shard: []  # a shard's samples that will be needed

    def batch(
        self, places: Sequence[Place], pinned: bool = False, draws: Sequence[int] | None = None
    ) -> tuple[list[str], list[str], dict[str, Tensor]]:
        """Keys, captions and tensors by name. Arrays keep their stored dtype and are copied once, if all arrays of a
        field share one layout; otherwise they are decoded one by one, like pictures, to float32 or int64. draws: the
        number that selects each sample's caption (draws_of); None: the first caption."""
        tensors, draws = None, draws or [None] * len(places)
        if self.only_arrays:
            found = [(shard := self.shard(number), shard.entries[sample]) for number, sample in places]
            texts = [self._texts(place, *each) for place, each in zip(places, found, strict=True)]
            chosen = [self.captions.chosen(captions_of(text), draw) for text, draw in zip(texts, draws, strict=True)]
            names = [caption.name for caption in chosen]
            tensors = self._stacked([(shard.data, entry) for shard, entry in found], places, names, pinned)
        if tensors is None:
            samples = [self.read(*each) for each in zip(places, draws, strict=True)]
            tensors = {name: pin(value, pinned) for name, value in collated(samples).items()}
            return [sample["key"] for sample in samples], [sample["caption"] for sample in samples], tensors
        if self.json_fields:
            rows = [self._in_json(place, each["meta"]) for place, each in zip(places, texts, strict=True)]
            tensors |= {name: pin(value, pinned) for name, value in collated(rows).items()}
        return [entry.key for _, entry in found], [caption.text for caption in chosen], tensors

    def _stacked(
        self, found: Sequence[tuple[Any, IndexEntry]], places: Sequence[Place], captions: Sequence[str], pinned: bool
    ) -> dict[str, Tensor] | None:
        """captions: for each sample the name of its caption; "" for the first."""
        tensors, (which, _, _) = {}, self.numbered[places[0].shard]
        for member in self.arrays:
            members = [self._of_caption(place, member, name) for place, name in zip(places, captions, strict=True)]
            if (which, member) not in self.layouts:
                data, entry = found[0]
                if member not in entry.members:
                    return None
                self.read(places[0])  # names the array that can't be decoded
                offset, size = entry.members[member]
                self.layouts[which, member] = ArrayLayout.of(bytes(data[offset : offset + size]))
            layout = self.layouts[which, member]
            values = None if layout is None else stacked(members, layout, found, pinned)
            if values is None:
                return None
            if self.finite and (row := not_finite(values)) is not None:
                raise self._naming(places[row], f"{members[row]} is not finite")
            tensors[member.removesuffix(".npy")] = values
        return tensors

    def _fields(self, place: Place) -> Mapping[str, Any]:
        """The fields of a place's data set, as listed in its manifest."""
        return self.numbered[place.shard][1].manifest.fields

    def _texts(self, place: Place, shard: OpenShard, entry: IndexEntry) -> dict[str, Any]:
        """A sample without its arrays."""
        text = {name: entry.members[name] for name in ("txt", "json") if name in entry.members and name in self.fields}
        return as_sample(entry.key, self._decoded(place, shard, text))

    def _in_json(self, place: Place, meta: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The fields in a sample's json, which is decoded anyway for the caption."""
        try:
            return {name: taken(meta) for name, taken in self.json_fields.items()}
        except DataError as error:
            raise self._naming(place, str(error)) from error

    def _of_caption(self, place: Place, member: str, caption: str) -> str:
        """The member that holds a field of a caption; caption: its name, "" for the first."""
        own = caption and self._fields(place)[member].get("captions")
        return f"{member_of(member.removesuffix('.npy'), caption)}.npy" if own else member

    def read(self, place: Place, draw: int | None = None) -> dict[str, Any]:
        """{"key", "caption", "meta", and arrays by name: image, or moments, text and other stored fields}. draw: this
        sample's number among the draws of `batch`."""
        sample = self._whole(place)
        caption = self.captions.chosen(captions_of(sample), draw)
        others = {own: name for name in self.arrays if (own := self._of_caption(place, name, caption.name)) != name}
        if others:
            shard = self.shard(place.shard)
            entry = shard.entries[place.sample]
            if lacking := others.keys() - entry.members.keys():
                raise self._naming(place, f"it lacks {', '.join(sorted(lacking))}")
            found = self._decoded(place, shard, {own: entry.members[own] for own in others})
            sample = sample | {others[own].removesuffix(".npy"): value for own, value in found.items()}
        return sample if sample["caption"] == caption.text else {**sample, "caption": caption.text}

    def _whole(self, place: Place) -> dict[str, Any]:
        """A sample with its first caption, decoded or from the cache."""
        if place in self.cache:
            return self.cache[place]
        shard = self.shard(place.shard)
        entry = without_other_pictures(shard.entries[place.sample])
        wanted = {name: member for name, member in entry.members.items() if name in self.fields}
        if lacking := self._lacking(wanted):
            raise self._naming(place, f"it lacks {lacking}")
        members = self._decoded(place, shard, wanted)
        sample = as_sample(entry.key, members, size_of(self.numbered[place.shard][1].manifest))
        sample |= self._in_json(place, sample["meta"])
        cost = sum(value.nbytes for value in sample.values() if isinstance(value, np.ndarray))
        if cost <= self.room and not self.only_arrays:
            self.cache[place] = sample
            self.room -= cost
        return sample

    def _decoded(self, place: Place, shard: OpenShard, members: Mapping[str, Any]) -> dict[str, Any]:
        fields = self._fields(place)
        try:
            return {
                name: decoded(
                    name, bytes(shard.data[offset : offset + size]), fields.get(line_of(name, fields), {}), self.finite
                )
                for name, (offset, size) in members.items()
            }
        except DataError as error:
            raise self._naming(place, str(error)) from error

    def _lacking(self, members: Mapping[str, Any]) -> str:
        """A required member that a sample does not have."""
        if self.kind == "image-text":
            return "" if any(name in IMAGES for name in members) else "a picture"
        return ", ".join(name for name in self.arrays if name not in members)

    def _naming(self, place: Place, reason: str) -> DataError:
        _, of, shard = self.numbered[place.shard]
        path = storage.join(of.root, shard.name)
        return DataError(f"sample {self.shard(place.shard).entries[place.sample].key} of shard {path}: {reason}")

    def prefetch(self, numbers: set[int]) -> None:
        """Begin to open these shards; errors are raised when one of their samples is read."""
        for number in sorted(numbers - self.shards.keys() - self.opening.keys()):
            self.opening[number] = self.openers.submit(self._open, number)

    def shard(self, number: int) -> OpenShard:
        """An open shard; waits for it if necessary."""
        if number not in self.shards:
            self.prefetch({number})
            self.shards[number] = self.opening.pop(number).result()
        return self.shards[number]

    def _open(self, number: int) -> OpenShard:
        data, entries = self._shard(number)
        return OpenShard(data if isinstance(data, RemoteShard) else np.frombuffer(data, np.uint8), entries)

    def _shard(self, number: int) -> tuple[Any, list[IndexEntry]]:
        """A shard's bytes, from the cache, from disk or from the bucket, and its index."""
        _, of, shard = self.numbered[number]
        entries = read_index(of.root, shard)
        path = storage.join(of.root, shard.name)
        if storage.is_s3(path) or fits_cache(shard):
            data = open_shard(of.root, shard, entries, lambda: self.pieces(number))
        else:
            with open(path, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            data.madvise(mmap.MADV_WILLNEED)
            if self.verify and number not in self.checked:  # 0.1 s for 180 MB, which also reads them ahead
                refuse_other_bytes(data, path, shard)
                self.checked.add(number)
        return data, entries

    def keep_only(self, numbers: set[int]) -> None:
        """Drop the shards that no stream needs any more."""
        for number in self.shards.keys() - numbers:
            del self.shards[number]
        for number in self.opening.keys() - numbers:
            self.opening.pop(number).cancel()

    def close(self) -> None:
        """End the threads."""
        self.openers.shutdown(wait=False, cancel_futures=True)


def _allow_many_open_files() -> None:
    """A mapped shard keeps its file open, and many streams map more than the 1024 files that most shells allow."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def decoded(name: str, data: bytes, field: Mapping[str, Any], finite: bool = True) -> Any:
    """A member's value. DataError if it can't be decoded, and for an array that does not match `field`, its line in the
    manifest, or is not `finite`."""
    value = codec.decode(name, data, strict=False)  # a data set that was accepted when it was made stays usable
    if name.endswith(".npy"):
        for reason in differing(name, codec.array_header(data), field):
            raise DataError(reason)
        if finite and value.dtype.kind == "f" and not np.isfinite(value).all():
            raise DataError(f"{name} is not finite")
    return value


def pin(value: Tensor, pinned: bool) -> Tensor:
    """With CUDA: page-locked memory, from which a GPU can copy while the CPU goes on."""
    return value.pin_memory() if pinned else value
