"""From data sets to batches that follow their plan, at any number of ranks and workers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.common.errors import UserError
from data_pipeline.common.threads import Prefetcher
from data_pipeline.loading.batch import Batch, DataCursor, widened
from data_pipeline.loading.caption_draw import CaptionOptions, draws_of
from data_pipeline.loading.epoch_plan import Place
from data_pipeline.loading.plan import Plan, plan_of
from data_pipeline.loading.sample_reader import SampleReader, pin
from data_pipeline.loading.shard_cache import refuse_little_room
from data_pipeline.loading.worker_pool import Workers
from data_pipeline.shards.data_sets import BUCKETS, ONE, DataSets, Numbered

WINDOWS_HELD = 3  # piles of a stream's shards that stay open: two for its window, and the next


@dataclass(frozen=True, slots=True)
class LoaderConfig:
    """How a data set is read (conf/data/): independent of rank and of the position in the data."""

    streams: int = 8  # canonical streams of the epoch plan
    num_workers: int = 0  # decoding processes; 0: a thread
    prefetch: int = 2  # steps read ahead, by a thread or by each worker
    window_shards: int = 4
    overlap: bool = True
    cache_mb: float = 512.0
    verify: bool = True
    shuffle: bool = True
    captions: CaptionOptions = field(default_factory=CaptionOptions)  # which of several captions a step takes

    def loader(self, data: str | DataSets, batch_size: int, **position: Any) -> Loader:
        """The loader of a data set, given by its path, or of several. A subclass may return another loader
        (`data._target_=my_package.MyLoaderConfig`)."""
        return Loader(data, batch_size, self, **position)


class Loader:
    """Endless batches from `start` on. Rank r has streams [r*C/world, (r+1)*C/world); micro-batch m of a step has their
    m-th part. Workers share a rank's streams, so that no byte is read twice and the result is the same.
    batch_size is global: over all ranks and micro-batches."""

    def __init__(
        self,
        data: str | DataSets,
        batch_size: int,
        config: LoaderConfig = LoaderConfig(),  # noqa: B008  (frozen)
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        start: DataCursor = DataCursor(),  # noqa: B008  (frozen)
        json_fields: Sequence[str] = (),  # names in FROM_JSON: what to read from each sample's json besides its caption
    ) -> None:
        if config.streams % (world_size * accumulation):
            raise UserError(
                f"data.streams={config.streams} can't be shared by {world_size} ranks x accumulation={accumulation}: "
                f"make it a multiple of {world_size * accumulation}."
            )
        self.data = data if isinstance(data, DataSets) else DataSets.of(data)
        self.data.check_shards()
        refuse_little_room([shard for each in self.data for shard in each.manifest.shards])
        config.captions.refuse_unfit(self.data.root, [each.manifest for each in self.data])
        order = {"shuffle": config.shuffle, "overlap": config.overlap}
        self.plan: Plan = plan_of(self.data, seed, batch_size, config.streams, config.window_shards, **order)
        self.counting = copy.deepcopy(self.plan)  # for this thread; another thread uses self.plan
        own = config.streams // world_size
        self.streams = list(range(rank * own, (rank + 1) * own))
        if config.num_workers > own:
            raise UserError(f"data.num_workers={config.num_workers} is more than a rank's {own} streams: lower it.")
        if config.num_workers < 0 or config.prefetch < 0:
            raise UserError("data.num_workers and data.prefetch must be at least 0.")
        self.config, self.accumulation, self.start, self.seed = config, accumulation, start, seed
        self.json_fields = tuple(json_fields)

    def __iter__(self) -> Iterator[Batch]:
        for parts in self._steps():
            yield from self._micro_batches(parts)

    def shards_of(self, step: int) -> list[str]:
        """The shards that hold this rank's samples of a step. Thread-safe: it uses its own plan."""
        plan, numbered = copy.deepcopy(self.plan), Numbered(self.data)
        found = (numbered[place.shard] for place in plan.step(step, self.streams))
        return sorted({f"{each.name}/{shard.name}".lstrip("/") for _, each, shard in found})

    def epochs(self, step: int) -> dict[str, float]:
        """How many epochs of each data set are done after `step` steps, by name; empty for a single data set."""
        if self.data.layout == ONE:
            return {}
        return dict(zip((each.name for each in self.data), self.counting.epochs(step), strict=True))

    def _steps(self) -> Iterator[Sequence[StepPart]]:
        """The parts of each step, joined in the order of streams."""
        parts = _StreamParts(self)
        if self.config.num_workers:
            yield from Workers(parts, self.config.num_workers, self.config.prefetch)
        elif self.config.prefetch:
            with Prefetcher(parts(), self.config.prefetch) as ahead:
                for part in ahead:
                    yield [part]
        else:
            for part in parts():
                yield [part]

    def _micro_batches(self, parts: Sequence[StepPart]) -> Iterator[Batch]:
        step, per_stream = parts[0].step, self.plan.per_step
        keys = [key for part in parts for key in part.keys]
        captions = [caption for part in parts for caption in part.captions]
        tensors = joined([part.tensors for part in parts]) if self.config.num_workers else parts[0].tensors
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
                parts[0].bucket,
            )


def joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Workers' tensors joined; widened if only some came in their stored dtype."""
    tensors = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if len({value.dtype for value in values}) > 1:
            values = [widened(value) for value in values]
        tensors[name] = pin(torch.cat(values), torch.cuda.is_available())
    return tensors


class StepPart(NamedTuple):
    """The samples of some streams, for one step."""

    step: int
    keys: list[str]
    captions: list[str]
    tensors: dict[str, Tensor]
    bucket: str  # the bucket's name; "" if there are no buckets


class _StreamParts:
    """Called in a thread or, with its number, in a worker: the parts of each step, of all or of its streams."""

    def __init__(self, loader: Loader) -> None:
        self.data, self.plan, self.config = loader.data, loader.plan, loader.config
        self.streams, self.first_step = loader.streams, loader.start.step
        self.seed, self.json_fields = loader.seed, loader.json_fields

    def __call__(self, worker: int | None = None, of: int = 1) -> Iterator[StepPart]:
        streams = np.array_split(self.streams, of)[worker or 0].tolist()
        # Values that are not finite cost training a step, which it logs (stability_monitor.py), not the run.
        how = {"verify": self.config.verify, "finite": False, "json_fields": self.json_fields}
        how |= {"captions": self.config.captions}
        reader = SampleReader(self.data, self.config.cache_mb / of, **how)
        reader.pieces = self.plan.pieces
        pinned = worker is None and torch.cuda.is_available()
        windows = -1
        try:
            for step in itertools.count(self.first_step):
                places = self.plan.step(step, streams)
                moved = self.plan.windows_made != windows
                if moved:
                    windows, needed = self.plan.windows_made, self.plan.shards_in_use() | self.plan.shards_next()
                    reader.prefetch(self.plan.shards_in_use())
                    reader.prefetch(needed)
                draws = draws_of(self.seed, step, streams, self.plan.per_step)
                yield StepPart(step, *reader.batch(places, pinned, draws), self._bucket(step))
                most = WINDOWS_HELD * self.config.window_shards * len(streams) * len(self.data)
                if moved and len(reader.shards) + len(reader.opening) > most:
                    reader.keep_only(needed)
        finally:
            reader.close()

    def _bucket(self, step: int) -> str:
        """The name of a step's bucket; "" if there are none."""
        return self.data.sets[self.plan.set_of(step)].name if self.data.layout == BUCKETS else ""


def read_dataset(
    root: str,
    limit: int | None = None,
    json_fields: Sequence[str] = (),
    captions: CaptionOptions = CaptionOptions(),  # noqa: B008  (frozen)
) -> list[dict[str, Any]]:
    """The samples of a data set in order, decoded, each with its first caption; at most `limit` samples."""
    data = DataSets.of(root)
    reader = SampleReader(data, cache_mb=0, json_fields=json_fields, captions=captions)
    shards = data.sets[0].manifest.shards
    places = (Place(number, i) for number, shard in enumerate(shards) for i in range(shard.samples))
    samples: list[dict[str, Any]] = []
    try:
        for place in itertools.islice(places, limit):
            samples.append(reader.read(place))
            reader.keep_only({place.shard})
    finally:
        reader.close()
    return samples
