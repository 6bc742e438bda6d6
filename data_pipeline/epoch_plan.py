"""Which samples a global step trains on: a pure function of (manifest, seed, global batch size, streams).

An epoch's shards are permuted and laid end to end; its N samples are cut into C contiguous segments, one a canonical
stream; within a stream, windows of a few shards' pieces are shuffled. Every stream goes on through epoch after epoch,
and global step i takes from each stream its positions [i*b, (i+1)*b), b = global batch / C. So every sample comes
exactly once an epoch, and a batch may span two epochs: the rest of an epoch is carried into the next batch, not lost.

N need not be a multiple of C: the r = N mod C extra samples of each epoch are dealt round-robin, going on where the
last epoch stopped, so that streams never drift apart by more than one sample. Ranks and workers do not appear here.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.errors import UserError


class Place(NamedTuple):
    """A sample: number of its shard, and its place in it."""

    shard: int
    sample: int


class EpochPlan:
    """Seeking to any step costs the same as starting: an epoch's shard order, and the window that is asked for."""

    def __init__(
        self,
        shard_sizes: Sequence[int],
        seed: int,
        global_batch_size: int,
        streams: int,
        window_shards: int = 4,
        shuffle: bool = True,
    ) -> None:
        self.sizes = np.asarray(shard_sizes, np.int64)
        self.samples, self.seed, self.window_shards, self.shuffle = int(self.sizes.sum()), seed, window_shards, shuffle
        self.streams, self.batch = streams, global_batch_size
        if streams < 1 or window_shards < 1 or global_batch_size < 1:
            raise UserError("batch_size, data.streams and data.window_shards must be at least 1.")
        if self.samples < streams:
            raise UserError(
                f"{self.samples} samples can't fill {streams} streams: set data.streams={max(self.samples, 1)}."
            )
        if global_batch_size % streams:
            raise UserError(
                f"batch_size={global_batch_size} is not a multiple of data.streams={streams}: change one of them."
            )
        self.per_step = global_batch_size // streams
        self._epoch = functools.lru_cache(maxsize=3)(self._make_epoch)
        # A stream only goes forward, so one window of each is all that is worth keeping.
        self._current: dict[int, tuple[int, int, np.ndarray, np.ndarray]] = {}
        self._asked: list[tuple[int, int, np.ndarray, np.ndarray]] = []  # all windows that the last step came of

    @property
    def arguments(self) -> tuple:
        """What makes the same plan again."""
        return self.sizes, self.seed, self.batch, self.streams, self.window_shards, self.shuffle

    @property
    def steps_per_epoch(self) -> float:
        return self.samples / self.batch

    def stream_start(self, stream: int, epoch: int) -> int:
        """How many samples a stream has had before `epoch`: e*(N//C), and its share of the extras so far."""
        base, extra = divmod(self.samples, self.streams)
        return epoch * base + (epoch * extra - stream + self.streams - 1) // self.streams

    def epoch_of(self, stream: int, position: int) -> int:
        """The epoch that a stream's position falls into."""
        epoch = position * self.streams // self.samples  # right to within one, as streams are even to within one
        while self.stream_start(stream, epoch) > position:
            epoch -= 1
        while self.stream_start(stream, epoch + 1) <= position:
            epoch += 1
        return epoch

    def at(self, stream: int, position: int) -> Place:
        """The sample at a stream's position, counted over all epochs."""
        epoch = self.epoch_of(stream, position)
        offset = position - self.stream_start(stream, epoch)
        starts = self._window_starts(stream, epoch)
        window = bisect_right(starts, offset) - 1
        shards, samples = self._window(stream, epoch, window)
        i = offset - starts[window]
        return Place(int(shards[i]), int(samples[i]))

    def step(self, step: int, streams: Sequence[int] | None = None) -> list[Place]:
        """The samples of a global step, stream after stream (of `streams`; all: None)."""
        chosen = range(self.streams) if streams is None else streams
        first = step * self.per_step
        self._asked = [self._current[stream] for stream in chosen if stream in self._current]
        return [self.at(stream, first + i) for stream in chosen for i in range(self.per_step)]

    def shards_in_use(self) -> set[int]:
        """The shards of the windows that were last asked for: what a reader should go on holding."""
        return {shard for *_, shards, _ in self._current.values() for shard in np.unique(shards).tolist()}

    def pieces(self, shard: int) -> list[tuple[int, int]]:
        """What the windows of the last step hold of a shard: first sample and one past the last, of each."""
        own = [samples[shards == shard] for *_, shards, samples in self._asked]
        return [(int(samples.min()), int(samples.max()) + 1) for samples in own if samples.size]

    def _window(self, stream: int, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        held = self._current.get(stream)
        if held is None or held[:2] != (epoch, window):
            held = self._current[stream] = (epoch, window, *self._make_window(stream, epoch, window))
            self._asked.append(held)
        return held[2:]

    def _rng(self, *position: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence([self.seed & (2**63 - 1), *position]))

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard order of an epoch, and where each shard begins in it (one more at the end)."""
        count = len(self.sizes)
        order = self._rng(0, epoch).permutation(count) if self.shuffle else np.arange(count)
        return order, np.concatenate([[0], np.cumsum(self.sizes[order])])

    def _segment(self, stream: int, epoch: int) -> tuple[int, int]:
        """Where a stream's samples of an epoch lie in the laid-out epoch: begin and end."""
        base, extra = divmod(self.samples, self.streams)
        dealt = (epoch * extra) % self.streams  # the stream that gets this epoch's first extra
        taken = (stream - dealt) % self.streams  # its turn
        wrapped = sum((s - dealt) % self.streams < extra for s in range(stream)) if extra else 0
        begin = stream * base + wrapped
        return begin, begin + base + (taken < extra)

    @functools.lru_cache(maxsize=4096)  # noqa: B019  (a plan lives as long as its loader)
    def _window_starts(self, stream: int, epoch: int) -> list[int]:
        """Offsets in a stream's segment at which its windows begin: each `window_shards` pieces of shards."""
        begin, end = self._segment(stream, epoch)
        _, starts = self._epoch(epoch)
        first, last = (int(np.searchsorted(starts, x, "right")) - 1 for x in (begin, end - 1))
        return [max(int(starts[i]) - begin, 0) for i in range(first, last + 1, self.window_shards)]

    def _make_window(self, stream: int, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard and sample numbers of a window, shuffled."""
        begin, end = self._segment(stream, epoch)
        offsets = self._window_starts(stream, epoch)
        order, starts = self._epoch(epoch)
        low = begin + offsets[window]
        high = begin + offsets[window + 1] if window + 1 < len(offsets) else end
        positions = np.arange(low, high)
        if self.shuffle:
            positions = self._rng(1, epoch, stream, window).permutation(positions)
        which = np.searchsorted(starts, positions, "right") - 1
        return order[which], positions - starts[which]
