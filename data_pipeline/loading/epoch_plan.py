"""Which samples of one data set a global step trains on: a pure function of (manifest, seed, global batch, streams).

An epoch's shards are permuted and laid end to end; its N samples are cut into C contiguous segments, one per canonical
stream. Within a stream, windows of a few shards' pieces are shuffled; then the samples between the middles of two
neighbouring windows are shuffled again, so that windows overlap and no fixed border separates their samples.
Every stream continues through epoch after epoch, and global step i takes from each stream its positions [i*b, (i+1)*b),
b = global batch / C. So every sample comes exactly once an epoch, and a batch may span two epochs: the samples left at
the end of an epoch go into the next batch and are not lost.

N need not be a multiple of C: the r = N mod C extra samples of each epoch are dealt round-robin, continuing where the
last epoch stopped, so that streams never drift apart by more than one sample. N may be less than C: then a stream has
no sample in some epochs. The plan is independent of ranks and workers.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.common.errors import DataError, UserError


class Place(NamedTuple):
    """A sample: the number of its shard, and its position in it."""

    shard: int
    sample: int


class Window(NamedTuple):
    """A stream's present samples, shuffled: their epoch, shards and positions, and the shards of the next window."""

    epoch: int
    number: int
    shards: np.ndarray
    samples: np.ndarray
    shards_next: tuple[int, ...]


class EpochPlan:
    """Seeking to any step costs the same as starting: one epoch's shard order, and the requested window."""

    def __init__(
        self,
        shard_sizes: Sequence[int],
        seed: int,
        global_batch_size: int,
        streams: int,
        window_shards: int = 4,
        shuffle: bool = True,
        overlap: bool = True,
    ) -> None:
        self.sizes = np.asarray(shard_sizes, np.int64)
        self.samples, self.seed, self.window_shards, self.shuffle = int(self.sizes.sum()), seed, window_shards, shuffle
        self.streams, self.batch, self.overlap = streams, global_batch_size, overlap
        if streams < 1 or window_shards < 1 or global_batch_size < 1:
            raise UserError("training.batch_size, data.streams and data.window_shards must be at least 1.")
        if not self.samples:
            raise DataError("the data set has no samples: make it again from usable pictures.")
        if global_batch_size % streams:
            raise UserError(
                f"training.batch_size={global_batch_size} is not a multiple of data.streams={streams}: change one of "
                "them."
            )
        self.arguments = (self.sizes, seed, global_batch_size, streams, window_shards, shuffle, overlap)
        self.per_step = global_batch_size // streams
        self.windows_made = 0
        self._epoch = functools.lru_cache(maxsize=3)(self._make_epoch)
        # A stream only goes forward, so it is enough to keep one window and one epoch's borders of each.
        self._current: dict[int, Window] = {}
        self._borders: dict[int, tuple[int, list[int], list[int]]] = {}
        self._epoch_before: dict[int, int] = {}  # of the previous window: a step may end in the next one

    def __reduce__(self) -> tuple[type[EpochPlan], tuple[Any, ...]]:
        """Copied and sent to workers as its arguments: each copy has its own windows."""
        return EpochPlan, self.arguments

    def set_of(self, step: int) -> int:
        """None: there is only one data set."""
        return 0

    def epochs(self, step: int) -> list[float]:
        """How many epochs of the data set are done after `step` global steps."""
        return [step * self.batch / self.samples]

    @property
    def steps_per_epoch(self) -> float:
        return self.samples / self.batch

    def stream_start(self, stream: int, epoch: int) -> int:
        """How many samples a stream has had before `epoch`: e*(N//C), and its share of the extras so far."""
        base, extra = divmod(self.samples, self.streams)
        return epoch * base + (epoch * extra - stream + self.streams - 1) // self.streams

    def epoch_of(self, stream: int, position: int) -> int:
        """The epoch that a stream's position falls into."""
        return (position * self.streams + stream) // self.samples  # as stream_start(e) = ceil((e*N - stream) / C)

    def at(self, stream: int, position: int) -> Place:
        """The sample at a stream's position, counted over all epochs."""
        return self.span(stream, position, 1)[0]

    def step(self, step: int, streams: Sequence[int] | None = None) -> list[Place]:
        """The samples of a global step, stream after stream (only of `streams`; all: None)."""
        chosen = range(self.streams) if streams is None else streams
        return [place for stream in chosen for place in self.span(stream, step * self.per_step, self.per_step)]

    def shards_in_use(self) -> set[int]:
        """The shards of the last requested windows: those that a reader should keep open."""
        return {shard for window in self._current.values() for shard in np.unique(window.shards).tolist()}

    def shards_next(self) -> set[int]:
        """The shards of the windows after those: the ones that a reader may open ahead."""
        return {shard for window in self._current.values() for shard in window.shards_next}

    def pieces(self, shard: int) -> list[tuple[int, int]]:
        """The pieces of a shard that the last requested streams take, each as (first sample, one past the last): for
        their whole epochs, not only their windows, which overlap, so that nothing is fetched twice."""
        now = {(stream, window.epoch) for stream, window in self._current.items()}
        own = [self._piece(shard, stream, epoch) for stream, epoch in sorted(now | set(self._epoch_before.items()))]
        return [(first, end) for first, end in own if first < end]

    def _piece(self, shard: int, stream: int, epoch: int) -> tuple[int, int]:
        """The piece of a shard that a stream has in an epoch, as above; empty if the first is not before the end."""
        order, starts = self._epoch(epoch)
        start = int(starts[np.flatnonzero(order == shard)[0]])
        begin, end = self._segment(stream, epoch)
        return max(begin - start, 0), min(end - start, int(self.sizes[shard]))

    def span(self, stream: int, position: int, count: int) -> list[Place]:
        """`count` samples of a stream from `position` on, across as many windows and epochs as needed."""
        places: list[Place] = []
        while len(places) < count:
            epoch = self.epoch_of(stream, position)
            offset = position - self.stream_start(stream, epoch)
            _, borders = self._borders_of(stream, epoch)
            number = bisect_right(borders, offset) - 1
            window = self._window(stream, epoch, number)
            part = slice(offset - borders[number], offset - borders[number] + count - len(places))
            found = zip(window.shards[part].tolist(), window.samples[part].tolist(), strict=True)
            before = len(places)
            places += map(Place._make, found)
            position += len(places) - before
        return places

    def _window(self, stream: int, epoch: int, number: int) -> Window:
        held = self._current.get(stream)
        if held is None or held[:2] != (epoch, number):
            if held is not None:
                self._epoch_before[stream] = held.epoch
            held = self._current[stream] = self._make_window(stream, epoch, number)
            self.windows_made += 1
        return held

    def _rng(self, *position: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence([self.seed & (2**63 - 1), *position]))

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard order of an epoch, and where each shard begins in it (one more at the end)."""
        count = len(self.sizes)
        order = self._rng(0, epoch).permutation(count) if self.shuffle else np.arange(count)
        return order, np.concatenate([[0], np.cumsum(self.sizes[order])])

    def _segment(self, stream: int, epoch: int) -> tuple[int, int]:
        """Begin and end of a stream's samples in the laid-out epoch."""
        base, extra = divmod(self.samples, self.streams)
        dealt = (epoch * extra) % self.streams  # the stream that gets this epoch's first extra
        taken = (stream - dealt) % self.streams  # its turn
        last = dealt + extra  # streams [dealt, last) get one each, wrapping around
        before = max(min(stream, last) - dealt, 0) + max(min(stream, last - self.streams), 0)
        begin = stream * base + before
        return begin, begin + base + (taken < extra)

    def _borders_of(self, stream: int, epoch: int) -> tuple[list[int], list[int]]:
        """Offsets in a stream's segment: where its piles begin, `window_shards` pieces of shards each, and where its
        windows begin. Without overlap they are the same; with it, windows begin at the segment's start and at the
        middles of all piles but the first and last, so that a segment of one or two piles is one window. Both end with
        the segment's length."""
        held = self._borders.get(stream)
        if held is None or held[0] != epoch:
            begin, end = self._segment(stream, epoch)
            _, starts = self._epoch(epoch)
            first, last = (int(np.searchsorted(starts, x, "right")) - 1 for x in (begin, end - 1))
            piles = np.append(np.maximum(starts[first : last + 1 : self.window_shards] - begin, 0), end - begin)
            windows = piles
            if self.overlap and self.shuffle:
                middles = (piles[1:-2] + piles[2:-1]) // 2
                windows = np.concatenate([piles[:1], middles, piles[-1:]])
            held = self._borders[stream] = (epoch, piles.tolist(), windows.tolist())
        return held[1:]

    def _make_window(self, stream: int, epoch: int, number: int) -> Window:
        """A window's samples: each pile that it takes from is shuffled, then the window's part of them again."""
        begin, _ = self._segment(stream, epoch)
        piles, windows = self._borders_of(stream, epoch)
        low, high = windows[number], windows[number + 1]
        first = bisect_right(piles, low) - 1
        parts = []
        while piles[first] < high:
            pile = self._pile(stream, epoch, first)
            parts.append(pile[max(low - piles[first], 0) : high - piles[first]])
            first += 1
        positions = begin + np.concatenate(parts)
        if len(parts) > 1:
            positions = self._rng(2, epoch, stream, number).permutation(positions)
        following = (epoch, number + 1)
        if number + 2 >= len(windows):  # in the next epoch that has samples for this stream
            following = (self.epoch_of(stream, self.stream_start(stream, epoch + 1)), 0)
        return Window(epoch, number, *self._places(epoch, positions), self._shards_of(stream, *following))

    def _pile(self, stream: int, epoch: int, pile: int) -> np.ndarray:
        """Offsets in a stream's segment of the samples of a pile, shuffled."""
        piles, _ = self._borders_of(stream, epoch)
        offsets = np.arange(piles[pile], piles[pile + 1])
        return self._rng(1, epoch, stream, pile).permutation(offsets) if self.shuffle else offsets

    def _places(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and sample numbers of positions in the laid-out epoch."""
        order, starts = self._epoch(epoch)
        low, high = int(positions.min()), int(positions.max()) + 1
        first, last = np.searchsorted(starts, (low, high - 1), "right") - 1
        lengths = np.diff(starts[first : last + 2].clip(low, high))
        which = np.repeat(np.arange(first, last + 1), lengths)[
            positions - low
        ]  # a table: faster than a search for each position
        return order[which].astype(np.int32), (positions - starts[which]).astype(np.int32)

    def _shards_of(self, stream: int, epoch: int, number: int) -> tuple[int, ...]:
        """The shards that a window's piles lie in."""
        begin, _ = self._segment(stream, epoch)
        piles, windows = self._borders_of(stream, epoch)
        low = begin + piles[bisect_right(piles, windows[number]) - 1]
        high = begin + piles[bisect_right(piles, windows[number + 1] - 1)]
        order, starts = self._epoch(epoch)
        first, last = (int(np.searchsorted(starts, x, "right")) - 1 for x in (low, high - 1))
        return tuple(order[first : last + 1].tolist())
