"""From a data set to batches that follow the epoch plan, at any number of ranks and workers."""

from __future__ import annotations

import atexit
import functools
import mmap
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data_pipeline import codec, storage
from data_pipeline.epoch_plan import EpochPlan, Place
from data_pipeline.errors import DataError, UserError
from data_pipeline.image_transforms import square_of
from data_pipeline.manifest import Manifest
from data_pipeline.samples import Batch, DataCursor, collated
from data_pipeline.shard_cache import open_shard
from data_pipeline.shard_writer import read_index, read_shard, refuse_other_bytes

PICTURES = (*codec.IMAGES, "txt", "json")


class SampleReader:
    """Single samples of a data set by place, decoded; kept in memory up to `cache_mb`, which small sets fit into."""

    def __init__(self, root: str, manifest: Manifest, cache_mb: float) -> None:
        self.root, self.manifest = root, manifest
        self.fields = fields_of(manifest)
        self.shards: dict[int, tuple[Any, list]] = {}
        self.checked: set[int] = set()
        self.cache: dict[Place, dict[str, Any]] = {}
        self.room = cache_mb * 2**20
        self.pieces: Callable[[int], list[tuple[int, int]]] = lambda shard: []  # of a shard, what will be asked for

    def read(self, place: Place) -> dict[str, Any]:
        """{"key", "caption", "meta", and arrays by name: image, or moments, text and what else is stored}."""
        if place in self.cache:
            return self.cache[place]
        data, entries = self._shard(place.shard)
        entry = entries[place.sample]
        try:
            members = {
                name: codec.decode(name, data[offset : offset + size])
                for name, (offset, size) in entry.members.items()
                if name in self.fields
            }
        except DataError as error:
            shard = self.manifest.shards[place.shard].name
            raise DataError(f"sample {entry.key} of shard {storage.join(self.root, shard)}: {error}") from error
        sample = as_sample(entry.key, members, size_of(self.manifest))
        cost = sum(value.nbytes for value in sample.values() if isinstance(value, np.ndarray))
        if cost <= self.room:
            self.cache[place] = sample
            self.room -= cost
        return sample

    def _shard(self, number: int) -> tuple[Any, list]:
        if number not in self.shards:
            shard = self.manifest.shards[number]
            entries = read_index(self.root, shard)
            path = storage.join(self.root, shard.name)
            if storage.is_s3(path):
                data = open_shard(self.root, shard, entries, lambda: self.pieces(number))
            else:
                with open(path, "rb") as file:
                    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                if number not in self.checked:  # once: 0.12 s for 100 MB, beside reading them
                    refuse_other_bytes(data, path, shard)
                    self.checked.add(number)
            self.shards[number] = (data, entries)
        return self.shards[number]

    def keep_only(self, numbers: set[int]) -> None:
        """Let go of the shards that no stream is in any more."""
        for number in set(self.shards) - numbers:
            data, _ = self.shards.pop(number)
            if isinstance(data, mmap.mmap):
                data.close()


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
    ) -> None:
        if streams % (world_size * accumulation):
            raise UserError(
                f"data.streams={streams} can't be shared by {world_size} ranks x accumulation={accumulation}: "
                f"make it a multiple of {world_size * accumulation}."
            )
        self.manifest = Manifest.load(root)
        self.manifest.check_shards(root)
        sizes = [shard.samples for shard in self.manifest.shards]
        self.plan = EpochPlan(sizes, seed, global_batch_size, streams, window_shards, shuffle)
        own = streams // world_size
        self.streams = list(range(rank * own, (rank + 1) * own))
        if num_workers > own:
            raise UserError(f"data.num_workers={num_workers} is more than a rank's {own} streams: lower it.")
        self.root, self.accumulation, self.start = root, accumulation, start
        self.num_workers, self.cache_mb = num_workers, cache_mb

    def __iter__(self) -> Iterator[Batch]:
        parts = _StreamParts(self)
        if not self.num_workers:
            return (batch for part in parts for batch in self._micro_batches([part]))
        _kill_workers_at_exit()
        loader = DataLoader(
            parts,
            batch_size=None,
            num_workers=self.num_workers,
            worker_init_fn=_ignore_requests_to_stop,
            multiprocessing_context="spawn",  # s3fs does not survive a fork
            pin_memory=torch.cuda.is_available(),
            persistent_workers=False,
        )
        return self._merged(iter(loader))

    def shards_of(self, step: int) -> list[str]:
        """The shards that this rank's samples of a step are in. From another thread, too: by a plan of its own."""
        plan = EpochPlan(*self.plan.arguments)
        return sorted({self.manifest.shards[place.shard].name for place in plan.step(step, self.streams)})

    def _merged(self, parts: Iterator[tuple]) -> Iterator[Batch]:
        """Workers take turns, one part of a step each; parts are put together in the order of streams."""
        while True:
            step = [next(parts) for _ in range(self.num_workers)]
            for part in step:
                if isinstance(part, UserError):  # raised here, its sentence is not buried in a worker's traceback
                    raise part
            yield from self._micro_batches(step)

    def _micro_batches(self, parts: Sequence[tuple]) -> Iterator[Batch]:
        step, per_stream = parts[0][0], self.plan.per_step
        keys = [key for part in parts for key in part[1]]
        captions = [caption for part in parts for caption in part[2]]
        tensors = parts[0][3]
        if len(parts) > 1:
            tensors = {name: torch.cat([part[3][name] for part in parts]) for name in tensors}
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


def _ignore_requests_to_stop(worker: int) -> None:
    """A signal to the process group reaches workers, too: they must go on, for the run to save and to end them."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@functools.cache
def _kill_workers_at_exit() -> None:
    """Python asks its children by a TERM, which they ignore, and would wait for them without end."""
    atexit.register(lambda: [child.kill() for child in multiprocessing.active_children() if child.daemon])


class _StreamParts(IterableDataset):
    """For each step, the samples of this worker's streams: (step, keys, captions, tensors)."""

    def __init__(self, loader: Loader) -> None:
        self.root, self.manifest, self.plan = loader.root, loader.manifest, loader.plan
        self.streams, self.first_step, self.cache_mb = loader.streams, loader.start.step, loader.cache_mb

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"plan": self.plan.arguments}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"plan": EpochPlan(*state["plan"])})

    def __iter__(self) -> Iterator[tuple | UserError]:
        worker = get_worker_info()
        if worker is None:
            yield from self._steps(self.streams, self.cache_mb)
            return
        own = np.array_split(self.streams, worker.num_workers)[worker.id].tolist()
        try:
            yield from self._steps(own, self.cache_mb / worker.num_workers)
        except UserError as error:
            yield error

    def _steps(self, streams: Sequence[int], cache_mb: float) -> Iterator[tuple]:
        reader = SampleReader(self.root, self.manifest, cache_mb)
        reader.pieces = self.plan.pieces
        step = self.first_step
        while True:
            places = self.plan.step(step, streams)
            samples = [reader.read(place) for place in places]
            if len(reader.shards) > self.plan.window_shards * len(streams):
                reader.keep_only(self.plan.shards_in_use())
            yield step, [s["key"] for s in samples], [s["caption"] for s in samples], collated(samples)
            step += 1


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
