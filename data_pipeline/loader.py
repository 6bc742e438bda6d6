"""From a data set to batches that follow the epoch plan, at any number of ranks and workers."""

from __future__ import annotations

import itertools
import mmap
import os
import resource
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline import codec, storage
from data_pipeline.background import Ahead
from data_pipeline.epoch_plan import EpochPlan, Place
from data_pipeline.errors import DataError, UserError
from data_pipeline.image_transforms import square_of
from data_pipeline.manifest import Manifest
from data_pipeline.samples import Batch, DataCursor, collated, widened
from data_pipeline.shard_writer import IndexEntry, read_index, read_shard, read_whole, refuse_other_bytes
from data_pipeline.stored_arrays import Layout, stacked
from data_pipeline.worker_pool import Workers

PICTURES = (*codec.IMAGES, "txt", "json")
OPENERS = 4  # threads that open shards: a digest takes one thread 0.5 s a GB


WINDOWS_HELD = 3  # piles of a stream's shards that stay open: two that it is in, and the next


class OpenShard(NamedTuple):
    """A shard's bytes, uint8, and what lies where in them."""

    data: np.ndarray
    entries: list[IndexEntry]


class SampleReader:
    """Samples of a data set by place. Threads beside open shards; pictures stay decoded up to `cache_mb`, which small
    sets fit into. verify: each shard's digest is compared once, before any of its samples is handed out."""

    def __init__(self, root: str, manifest: Manifest, cache_mb: float, verify: bool = True) -> None:
        _allow_many_open_files()
        self.root, self.manifest, self.verify = root, manifest, verify
        self.fields = fields_of(manifest)
        self.arrays = [name for name in self.fields if name.endswith(".npy")]
        self.only_arrays = all(name in ("json", "txt") or name in self.arrays for name in self.fields)
        self.layouts: dict[str, Layout | None] = {}
        self.openers = ThreadPoolExecutor(min(OPENERS, os.cpu_count() or 1), "open shard")
        self.opening: dict[int, Future[OpenShard]] = {}
        self.shards: dict[int, OpenShard] = {}
        self.checked: set[int] = set()
        self.cache: dict[Place, dict[str, Any]] = {}
        self.room = cache_mb * 2**20

    def batch(self, places: Sequence[Place], pinned: bool = False) -> tuple[list[str], list[str], dict[str, Tensor]]:
        """Keys, captions and tensors by name. Arrays come in the dtype they are stored in, copied once, where all of a
        field are written alike; else, as pictures do, decoded one by one, in float32 or int64."""
        tensors = None
        if self.only_arrays:
            found = [(shard := self.shard(number), shard.entries[sample]) for number, sample in places]
            tensors = self._stacked([(shard.data, entry) for shard, entry in found], places, pinned)
        if tensors is None:
            samples = [self.read(place) for place in places]
            tensors = {name: pin(value, pinned) for name, value in collated(samples).items()}
            return [sample["key"] for sample in samples], [sample["caption"] for sample in samples], tensors
        captions = [self._caption(place, shard, entry) for place, (shard, entry) in zip(places, found, strict=True)]
        return [entry.key for _, entry in found], captions, tensors

    def _stacked(
        self, found: Sequence[tuple[np.ndarray, IndexEntry]], places: Sequence[Place], pinned: bool
    ) -> dict[str, Tensor] | None:
        tensors = {}
        for member in self.arrays:
            if member not in self.layouts:
                data, entry = found[0]
                if member not in entry.members:
                    return None
                self.read(places[0])  # what can't be decoded is named
                offset, size = entry.members[member]
                self.layouts[member] = Layout.of(data[offset : offset + size].tobytes())
            layout = self.layouts[member]
            values = None if layout is None else stacked(member, layout, found, pinned)
            if values is None:
                return None
            tensors[member.removesuffix(".npy")] = values
        return tensors

    def _caption(self, place: Place, shard: OpenShard, entry: IndexEntry) -> str:
        text = {name: entry.members[name] for name in ("txt", "json") if name in entry.members and name in self.fields}
        return codec.caption_in(self._decoded(place, shard, entry, text))

    def read(self, place: Place) -> dict[str, Any]:
        """{"key", "caption", "meta", and arrays by name: image, or moments, text and what else is stored}."""
        if place in self.cache:
            return self.cache[place]
        shard = self.shard(place.shard)
        entry = shard.entries[place.sample]
        wanted = {name: member for name, member in entry.members.items() if name in self.fields}
        members = self._decoded(place, shard, entry, wanted)
        sample = as_sample(entry.key, members, size_of(self.manifest))
        cost = sum(value.nbytes for value in sample.values() if isinstance(value, np.ndarray))
        if cost <= self.room and not self.only_arrays:
            self.cache[place] = sample
            self.room -= cost
        return sample

    def _decoded(self, place: Place, shard: OpenShard, entry: IndexEntry, members: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return {
                name: codec.decode(name, shard.data[offset : offset + size].tobytes())
                for name, (offset, size) in members.items()
            }
        except DataError as error:
            name = self.manifest.shards[place.shard].name
            raise DataError(f"sample {entry.key} of shard {storage.join(self.root, name)}: {error}") from error

    def expect(self, numbers: set[int]) -> None:
        """Begin to open these shards; their errors come when a sample of them is asked for."""
        for number in sorted(numbers - self.shards.keys() - self.opening.keys()):
            self.opening[number] = self.openers.submit(self._open, number)

    def shard(self, number: int) -> OpenShard:
        """An open shard, waited for if need be."""
        if number not in self.shards:
            self.expect({number})
            self.shards[number] = self.opening.pop(number).result()
        return self.shards[number]

    def _open(self, number: int) -> OpenShard:
        data, entries = self._shard(number)
        return OpenShard(np.frombuffer(data, np.uint8), entries)

    def _shard(self, number: int) -> tuple[Any, list[IndexEntry]]:
        """A shard's bytes, mapped or in memory, and its index."""
        shard = self.manifest.shards[number]
        entries = read_index(self.root, shard)
        path = storage.join(self.root, shard.name)
        if storage.is_s3(path):
            data = read_whole(self.root, shard)
        else:
            with open(path, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            data.madvise(mmap.MADV_WILLNEED)
            if self.verify and number not in self.checked:  # 0.1 s for 180 MB, which also reads them ahead
                refuse_other_bytes(data, path, shard)
                self.checked.add(number)
        return data, entries

    def keep_only(self, numbers: set[int]) -> None:
        """Let go of the shards that no stream is in any more."""
        for number in self.shards.keys() - numbers:
            del self.shards[number]
        for number in self.opening.keys() - numbers:
            self.opening.pop(number).cancel()

    def close(self) -> None:
        """End the threads."""
        self.openers.shutdown(wait=False, cancel_futures=True)


def _allow_many_open_files() -> None:
    """A mapped shard keeps its file open, and many streams map more than the 1024 that most shells allow."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def pin(value: Tensor, pinned: bool) -> Tensor:
    """Where CUDA is: memory that a GPU can fetch from while the CPU goes on."""
    return value.pin_memory() if pinned else value


def as_sample(key: str, members: dict[str, Any], size: int | None = None) -> dict[str, Any]:
    """Members by extension -> a sample by field name; a picture as its centre square of `size`, where that is given."""
    sample = {"key": key, "caption": codec.caption_in(members), "meta": members.get("json") or {}}
    for member, value in members.items():
        if member in codec.IMAGES:
            sample["image"] = square_of(value, size) if size else value
        elif member.endswith(".npy"):
            sample[member.removesuffix(".npy")] = value
    return sample


def size_of(manifest: Manifest) -> int | None:
    """Pixels a side that pictures are cut to when they are read: shards that others wrote hold any."""
    return manifest.info.get("size") if manifest.kind == "image-text" else None


def fields_of(manifest: Manifest) -> tuple[str, ...]:
    """The members of a data set's samples that are read."""
    return PICTURES if manifest.kind == "image-text" else tuple(manifest.fields)


class Loader:
    """Endless batches from `start` on. Rank r has streams [r*C/world, (r+1)*C/world); micro-batch m of a step has the
    m-th part of them. Workers share a rank's streams, so that no byte is read twice and the result does not change."""

    def __init__(
        self,
        root: str,
        global_batch_size: int,
        streams: int = 8,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        num_workers: int = 0,
        window_shards: int = 4,
        shuffle: bool = True,
        cache_mb: float = 512.0,
        start: DataCursor = DataCursor(),  # noqa: B008  (frozen)
        overlap: bool = True,
        prefetch: int = 2,  # steps that are read ahead, by a thread or by each worker
        verify: bool = True,
    ) -> None:
        if streams % (world_size * accumulation):
            raise UserError(
                f"data.streams={streams} can't be shared by {world_size} ranks x accumulation={accumulation}: "
                f"make it a multiple of {world_size * accumulation}."
            )
        self.manifest = Manifest.load(root)
        self.manifest.check_shards(root)
        sizes = [shard.samples for shard in self.manifest.shards]
        self.plan = EpochPlan(sizes, seed, global_batch_size, streams, window_shards, shuffle, overlap)
        own = streams // world_size
        self.streams = list(range(rank * own, (rank + 1) * own))
        if num_workers > own:
            raise UserError(f"data.num_workers={num_workers} is more than a rank's {own} streams: lower it.")
        if num_workers < 0 or prefetch < 0:
            raise UserError("data.num_workers and data.prefetch must be at least 0.")
        self.root, self.accumulation, self.start = root, accumulation, start
        self.num_workers, self.cache_mb, self.prefetch, self.verify = num_workers, cache_mb, prefetch, verify

    def __iter__(self) -> Iterator[Batch]:
        for parts in self._steps():
            yield from self._micro_batches(parts)

    def _steps(self) -> Iterator[Sequence[Part]]:
        """The parts of each step, which are put together in the order of streams."""
        parts = _StreamParts(self)
        if self.num_workers:
            yield from Workers(parts, self.num_workers, self.prefetch)
        elif self.prefetch:
            with Ahead(parts(), self.prefetch) as ahead:
                for part in ahead:
                    yield [part]
        else:
            for part in parts():
                yield [part]

    def _micro_batches(self, parts: Sequence[Part]) -> Iterator[Batch]:
        step, per_stream = parts[0].step, self.plan.per_step
        keys = [key for part in parts for key in part.keys]
        captions = [caption for part in parts for caption in part.captions]
        tensors = joined([part.tensors for part in parts]) if self.num_workers else parts[0].tensors
        streams = len(self.streams) // self.accumulation
        size = streams * per_stream
        for m in range(self.accumulation):
            part = slice(m * size, (m + 1) * size)
            yield Batch(
                tuple(keys[part]),
                tuple(captions[part]),
                {name: value[part] for name, value in tensors.items()},
                tuple(self.streams[m * streams : (m + 1) * streams]),
                step,
                DataCursor(step + 1),
                self.plan.streams,
            )


def joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Workers' tensors put together; widened where only some came in the dtype that they are stored in."""
    tensors = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if len({value.dtype for value in values}) > 1:
            values = [widened(value) for value in values]
        tensors[name] = pin(torch.cat(values), torch.cuda.is_available())
    return tensors


class Part(NamedTuple):
    """The samples of some streams, for one step."""

    step: int
    keys: list[str]
    captions: list[str]
    tensors: dict[str, Tensor]


class _StreamParts:
    """Called in a thread or, with its number, in a worker: the parts of each step, of all or of its streams."""

    def __init__(self, loader: Loader) -> None:
        self.root, self.manifest, self.plan = loader.root, loader.manifest, loader.plan
        self.streams, self.first_step = loader.streams, loader.start.step
        self.cache_mb, self.verify = loader.cache_mb, loader.verify

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"plan": self.plan.arguments}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"plan": EpochPlan(*state["plan"])})

    def __call__(self, worker: int | None = None, of: int = 1) -> Iterator[Part]:
        streams = np.array_split(self.streams, of)[worker or 0].tolist()
        reader = SampleReader(self.root, self.manifest, self.cache_mb / of, self.verify)
        pinned = worker is None and torch.cuda.is_available()
        windows = -1
        try:
            for step in itertools.count(self.first_step):
                places = self.plan.step(step, streams)
                moved = self.plan.windows_made != windows
                if moved:
                    windows, needed = self.plan.windows_made, self.plan.shards_in_use() | self.plan.shards_next()
                    reader.expect(self.plan.shards_in_use())
                    reader.expect(needed)
                yield Part(step, *reader.batch(places, pinned))
                if moved and len(reader.shards) > WINDOWS_HELD * self.plan.window_shards * len(streams):
                    reader.keep_only(needed)
        finally:
            reader.close()


def read_dataset(root: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The samples of a data set in order, decoded; at most `limit`."""
    manifest = Manifest.load(root)
    samples: list[dict[str, Any]] = []
    for shard in manifest.shards:
        if limit is not None and len(samples) >= limit:
            break
        for members in read_shard(root, shard, fields_of(manifest)):
            samples.append(as_sample(members.pop("__key__"), members, size_of(manifest)))
    return samples[:limit]
