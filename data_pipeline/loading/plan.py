"""The interface of plans, which give a loader the order of samples: for one data set, a mix, or buckets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from data_pipeline.common.errors import UserError
from data_pipeline.loading.bucket_plan import BucketPlan
from data_pipeline.loading.epoch_plan import EpochPlan, Place
from data_pipeline.loading.mix_plan import MixPlan
from data_pipeline.shards.data_sets import BUCKETS, MIX, DataSets

EPOCHS_A_BATCH = 10  # a sample may repeat in a batch, each time with other noise; more repeats are a mistake


class Plan(Protocol):
    """Which samples each global step takes: `batch` in all, `per_step` from each of `streams` streams. Shards are
    numbered through all data sets. Windows are not part of a pickle or copy."""

    streams: int
    batch: int
    per_step: int

    @property
    def windows_made(self) -> int:
        """A counter that grows whenever the shards in use change."""

    def step(self, step: int, streams: Sequence[int] | None = None) -> list[Place]: ...
    def shards_in_use(self) -> set[int]: ...
    def shards_next(self) -> set[int]: ...
    def pieces(self, shard: int) -> list[tuple[int, int]]: ...
    def set_of(self, step: int) -> int | None:
        """The data set that all samples of a step come from; None: the step takes from several."""

    def epochs(self, step: int) -> list[float]:
        """How many epochs of each data set are done after `step` global steps."""


def plan_of(data: DataSets, seed: int, batch_size: int, streams: int, window_shards: int, **how: bool) -> Plan:
    """The plan for one data set, a mix or buckets. how: shuffle and overlap, as in EpochPlan."""
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
            f"training.batch_size={batch_size} would read all of {data.root} ({data.samples} samples) more than "
            f"{EPOCHS_A_BATCH} times a step: lower it."
        )
    return BucketPlan(plans, data.starts, seed) if data.layout == BUCKETS else plans[0]


def seeds(seed: int, count: int) -> list[int]:
    """A seed for each data set. The first has the run's own seed, so that a single set keeps its order."""
    words = (np.random.SeedSequence([seed & (2**63 - 1), 5, i]).generate_state(2) for i in range(1, count))
    return [seed, *(int(high) << 31 ^ int(low) for high, low in words)]


def refuse_small(data: DataSets, batch_size: int) -> None:
    """UserError for a set of a mix that is too small: each of its samples would repeat too often in a batch."""
    for each in data:
        if batch_size * data.fractions()[each.name] > EPOCHS_A_BATCH * each.manifest.samples:
            raise UserError(
                f"training.batch_size={batch_size} would read all of {each.root} ({each.manifest.samples} samples) "
                f"more than {EPOCHS_A_BATCH} times a step: lower it, or its weight."
            )
