"""Which samples of a mix of data sets a global step trains on: a pure function of (manifests, weights, seed, batch).

Each set has its own EpochPlan with the same C streams. Position p of stream s takes the q-th sample of stream s of set
k, where k and q are functions of p: the sets are the leaves of a binary tree, and at each node the left half, with
weight a of a + b, gets floor(r a/(a+b) + phase) of the first r samples that arrive there; the right half gets the rest.
All numbers are whole, and counts are closed formulas, so seeking to a step costs the same as starting.

The phases of a node are 1/2C, 3/2C, ..., (2C-1)/2C, dealt to the streams by the seed. So the left half of the root
gets P a/(a+b), rounded, of the first P samples of all streams (Hermite's identity), and every set gets its share of
each batch, within a few samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.loading.epoch_plan import EpochPlan, Place
from data_pipeline.loading.joined_plans import JoinedPlans


class Node(NamedTuple):
    """left and right: nodes, or numbers of sets; the left gets left_weight / weight of all samples that arrive here."""

    left: Node | int
    right: Node | int
    left_weight: int
    weight: int
    phases: tuple[int, ...]  # of each stream, in units of 1/2C


class Shares:
    """Deals the positions of each stream to sets in proportion to whole numbers `shares`, exactly and evenly."""

    def __init__(self, shares: Sequence[int], streams: int, seed: int) -> None:
        self.sets, self.streams = len(shares), streams
        self.root = self._node(tuple(shares), 0, seed)

    def at(self, stream: int, position: int) -> tuple[int, int]:
        """The set that a stream's position takes from, and how many earlier positions of the stream took from it."""
        node, rest = self.root, position
        while isinstance(node, Node):
            before = self._left(node, stream, rest)
            if self._left(node, stream, rest + 1) > before:
                node, rest = node.left, before
            else:
                node, rest = node.right, rest - before
        return node, rest

    def counts(self, stream: int, positions: int) -> list[int]:
        """How many of a stream's first positions take from each set."""
        found, waiting = [0] * self.sets, [(self.root, positions)]
        while waiting:
            node, rest = waiting.pop()
            if isinstance(node, Node):
                left = self._left(node, stream, rest)
                waiting += [(node.left, left), (node.right, rest - left)]
            else:
                found[node] = rest
        return found

    def _left(self, node: Node, stream: int, rest: int) -> int:
        """floor(rest * left_weight / weight + phase / 2C)."""
        dealt = 2 * rest * node.left_weight * self.streams + node.phases[stream] * node.weight
        return dealt // (2 * node.weight * self.streams)

    def _node(self, shares: tuple[int, ...], first: int, seed: int) -> Node | int:
        """The tree of the sets `first`, `first` + 1, ...: split where the two halves are most nearly equal."""
        if len(shares) == 1:
            return first
        weight = sum(shares)
        cut = min(range(1, len(shares)), key=lambda i: abs(2 * sum(shares[:i]) - weight))
        sequence = np.random.SeedSequence([seed & (2**63 - 1), 3, first, len(shares)])
        phases = 2 * np.random.default_rng(sequence).permutation(self.streams) + 1
        left, right = self._node(shares[:cut], first, seed), self._node(shares[cut:], first + cut, seed)
        return Node(left, right, sum(shares[:cut]), weight, tuple(phases.tolist()))


class MixPlan(JoinedPlans):
    """A plan (plan.py) that takes from several sets in each step, in proportion to `shares`."""

    def __init__(self, plans: Sequence[EpochPlan], starts: Sequence[int], shares: Sequence[int], seed: int) -> None:
        super().__init__(plans, starts)
        self.shares = Shares(shares, self.streams, seed)
        self.arguments = (self.plans, self.starts, tuple(shares), seed)

    def __reduce__(self) -> tuple[type[MixPlan], tuple[object, ...]]:
        return MixPlan, self.arguments

    def step(self, step: int, streams: Sequence[int] | None = None) -> list[Place]:
        """The samples of a global step, stream after stream (only of `streams`; all: None)."""
        chosen = range(self.streams) if streams is None else streams
        return [place for stream in chosen for place in self._span(stream, step * self.per_step)]

    def set_of(self, step: int) -> None:
        """None: a step takes from several sets."""

    def epochs(self, step: int) -> list[float]:
        """How many epochs of each set are done after `step` global steps."""
        counts = np.sum([self.shares.counts(stream, step * self.per_step) for stream in range(self.streams)], 0)
        return [int(count) / plan.samples for count, plan in zip(counts, self.plans, strict=True)]

    def _span(self, stream: int, position: int) -> list[Place]:
        """A step's samples of one stream: consecutive samples of this stream in each set, in the order of the mix."""
        order = [self.shares.at(stream, at) for at in range(position, position + self.per_step)]
        firsts: dict[int, int] = {}
        for which, number in order:
            firsts.setdefault(which, number)
        taken = [which for which, _ in order]
        runs = {
            which: iter(self._moved(which, self.plans[which].span(stream, first, taken.count(which))))
            for which, first in firsts.items()
        }
        return [next(runs[which]) for which in taken]
