"""The parts that plans over several data sets share."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from data_pipeline.loading.epoch_plan import EpochPlan, Place


class JoinedPlans:
    """The EpochPlan of each data set, whose shards are numbered from `starts` on."""

    def __init__(self, plans: Sequence[EpochPlan], starts: Sequence[int]) -> None:
        self.plans, self.starts = tuple(plans), tuple(starts)
        self.streams, self.batch, self.per_step = plans[0].streams, plans[0].batch, plans[0].per_step

    @property
    def windows_made(self) -> int:
        return sum(plan.windows_made for plan in self.plans)

    def shards_in_use(self) -> set[int]:
        """As EpochPlan.shards_in_use, over all sets."""
        return {number + start for plan, start in self._numbered() for number in plan.shards_in_use()}

    def shards_next(self) -> set[int]:
        """As EpochPlan.shards_next, over all sets."""
        return {number + start for plan, start in self._numbered() for number in plan.shards_next()}

    def pieces(self, shard: int) -> list[tuple[int, int]]:
        """As EpochPlan.pieces, for the set that the shard belongs to."""
        which = bisect_right(self.starts, shard) - 1
        return self.plans[which].pieces(shard - self.starts[which])

    def _numbered(self) -> list[tuple[EpochPlan, int]]:
        return list(zip(self.plans, self.starts, strict=True))

    def _moved(self, which: int, places: Sequence[Place]) -> list[Place]:
        """Places of one set, with shard numbers that count through all sets."""
        start = self.starts[which]
        return [Place(shard + start, sample) for shard, sample in places]
