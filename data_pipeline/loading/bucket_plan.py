"""Which bucket, and which of its samples, a global step trains on: a pure function of (manifests, seed, batch).

A step takes one bucket, so that all its samples, on all ranks and in all micro-batches, have one shape. The m-th step
of a bucket is step m of its own EpochPlan: each of its samples comes once per epoch of the bucket, and samples that do
not fill a batch are carried into the bucket's next one. Buckets take turns in proportion to their samples.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence

import numpy as np

from data_pipeline.loading.epoch_plan import EpochPlan, Place
from data_pipeline.loading.joined_plans import JoinedPlans


class Turns:
    """Deals turns 0, 1, 2, ... in proportion to whole numbers `shares`: after any number of turns, the count of each
    differs from its exact share by less than one.

    Turn m of a share n of N may not come before turn floor(m N/n), and must come before ceil((m+1) N/n). Of the turns
    that may come, the one with the earliest deadline is next, which keeps all these bounds (Tijdeman 1980, "The
    chairman assignment problem"; Baruah et al. 1996, "Proportionate progress"). No formula gives this order, so it is
    computed from the first turn on and kept: two seconds and 12 MB for a million turns.
    """

    def __init__(self, shares: Sequence[int], seed: int) -> None:
        self.shares, self.total = tuple(shares), sum(shares)
        # The seed decides between two with the same deadline.
        sequence = np.random.SeedSequence([seed & (2**63 - 1), 4])
        self.ranks = np.random.default_rng(sequence).permutation(len(shares)).tolist()
        self.whose, self.numbers = array("i"), array("q")
        self.waiting = [(0, which, 0) for which in range(len(shares))]  # (first turn, whose, number)
        self.ready: list[tuple[int, int, int, int]] = []  # (end, rank, whose, number)

    def at(self, turn: int) -> tuple[int, int]:
        """Whose turn it is, and how many turns it has had before."""
        while len(self.whose) <= turn:
            self._deal()
        return self.whose[turn], self.numbers[turn]

    def counts(self, turns: int) -> list[int]:
        """How many of the first turns went to each."""
        if turns:
            self.at(turns - 1)
        return np.bincount(np.frombuffer(self.whose, np.int32)[:turns], minlength=len(self.shares)).tolist()

    def _deal(self) -> None:
        turn = len(self.whose)
        while self.waiting and self.waiting[0][0] <= turn:
            _, which, number = heapq.heappop(self.waiting)
            end = -(-(number + 1) * self.total // self.shares[which])
            heapq.heappush(self.ready, (end, self.ranks[which], which, number))
        _, _, which, number = heapq.heappop(self.ready)
        self.whose.append(which)
        self.numbers.append(number)
        heapq.heappush(self.waiting, ((number + 1) * self.total // self.shares[which], which, number + 1))


class BucketPlan(JoinedPlans):
    """A plan (plan.py) in which each step takes from one data set."""

    def __init__(self, plans: Sequence[EpochPlan], starts: Sequence[int], seed: int) -> None:
        super().__init__(plans, starts)
        self.turns = Turns([plan.samples for plan in plans], seed)
        self.arguments = (self.plans, self.starts, seed)

    def __reduce__(self) -> tuple[type[BucketPlan], tuple[object, ...]]:
        return BucketPlan, self.arguments

    def step(self, step: int, streams: Sequence[int] | None = None) -> list[Place]:
        """The samples of a global step, stream after stream (only of `streams`; all: None)."""
        which, number = self.turns.at(step)
        return self._moved(which, self.plans[which].step(number, streams))

    def set_of(self, step: int) -> int:
        """The bucket of a step."""
        return self.turns.at(step)[0]

    def epochs(self, step: int) -> list[float]:
        """How many epochs of each bucket are done after `step` global steps."""
        counts = self.turns.counts(step)
        return [count * self.batch / plan.samples for count, plan in zip(counts, self.plans, strict=True)]
