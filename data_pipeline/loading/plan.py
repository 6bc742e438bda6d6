"""What a loader needs to know of the order of samples: one data set, a mix and buckets each have their own plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from data_pipeline.common.errors import UserError
from data_pipeline.loading.bucket_plan import BucketPlan
from data_pipeline.loading.epoch_plan import EpochPlan, Place
from data_pipeline.loading.mix_plan import MixPlan
from data_pipeline.shards.data_sets import BUCKETS, MIX, DataSets

EPOCHS_A_BATCH = 10  # a sample may well repeat within a batch, each time with its own noise; more repeats are a mistake


class Plan(Protocol):
    """Which samples each global step takes: `batch` of them, `per_step` of each of `streams` streams. Shards are
    numbered through all data sets. It is pickled and copied without its windows."""

    streams: int
    batch: int
    per_step: int

    @property
    def windows_made(self) -> int:
        """Grows whenever the shards in use change."""

    def step(self, step: int, streams: Sequence[int] | None = None) -> list[Place]: ...
    def shards_in_use(self) -> set[int]: ...
    def shards_next(self) -> set[int]: ...
    def pieces(self, shard: int) -> list[tuple[int, int]]: ...
    def set_of(self, step: int) -> int | None:
        """The data set that all samples of a step come from; None: it takes from several."""

    def epochs(self, step: int) -> list[float]:
        """How often each data set has been gone through after `step` global steps."""


def plan_of(data: DataSets, seed: int, batch_size: int, streams: int, window_shards: int, **how: bool) -> Plan:
    """The plan of one data set, a mix or buckets. how: shuffle and overlap, as of EpochPlan."""
    plans = [
        EpochPlan([shard.samples for shard in each.manifest.shards], own, batch_size, streams, window_shards, **how)
        for each, own in zip(data, seeds(seed, len(data)), strict=True)
    ]
    if data.layout == MIX:
        refuse_small(data, batch_size)
        return MixPlan(plans, data.starts, data.shares, seed)
    if data.samples < streams:
        raise UserError(f"{data.samples} samples can't fill {streams} streams: set data.streams={data.samples}.")
    if batch_size > EPOCHS_A_BATCH * data.samples:
        raise UserError(
            f"batch_size={batch_size} would read all of {data.root} ({data.samples} samples) more than "
            f"{EPOCHS_A_BATCH} times a step: lower it."
        )
    return BucketPlan(plans, data.starts, seed) if data.layout == BUCKETS else plans[0]


def seeds(seed: int, count: int) -> list[int]:
    """A seed for each data set: the first has the run's own, so that alone it comes in the same order."""
    words = (np.random.SeedSequence([seed & (2**63 - 1), 5, i]).generate_state(2) for i in range(1, count))
    return [seed, *(int(high) << 31 ^ int(low) for high, low in words)]


def refuse_small(data: DataSets, batch_size: int) -> None:
    """UserError for a set of a mix whose part of a batch repeats it too often."""
    for each in data:
        if batch_size * data.fractions()[each.name] > EPOCHS_A_BATCH * each.manifest.samples:
            raise UserError(
                f"batch_size={batch_size} would read all of {each.root} ({each.manifest.samples} samples) more than "
                f"{EPOCHS_A_BATCH} times a step: lower it, or its weight."
            )
