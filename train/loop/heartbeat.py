"""Ends a run of which a rank hangs or starves: each rank records its phase, and a thread on each watches the clock.

<run>/heartbeats/rank-00000.json has the phase of a rank. A rank that exceeds its timeout reads all of them, names the
rank that all wait for, prints its own stacks, and exits at once with HUNG; the launcher then ends the others.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from data_pipeline.common.errors import UserError
from data_pipeline.loading.batch import Batch
from train.distributed.ranks import Ranks
from train.engine.train_state import TrainState

HUNG = 76
WAITS_FOR_OTHERS = ("step",)  # a rank in this phase may be waiting in a collective
SLOW = ("start", "first step", "actions", "save", "finish")  # phases that compile, sample or write
SLOW_FACTOR = 6.0
BEATS_PER_TIMEOUT = 20


@dataclass(frozen=True, slots=True)
class RankStatus:
    """The last report of a rank about itself; times are from its own clock."""

    rank: int
    host: str
    phase: str
    step: int
    shards: str
    since: float  # when the phase began
    written: float

    def silent_for(self, now: float) -> float:
        return now - self.written

    def __str__(self) -> str:
        at = f"rank {self.rank} on {self.host}, in phase {self.phase} after step {self.step}"
        return f"{at}, at shards {self.shards}" if self.shards else at


class NoWatchdog:
    """A heartbeat that does nothing."""

    def beat(self, phase: str, step: int) -> None:
        """Report that a phase begins, which counts as progress."""

    def watched(self, batches: Iterator[Batch], state: TrainState, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yields the batches unchanged; waiting for one is phase "data", processing it phase "step". The first batch of
        each shape may be compiled, which takes long."""
        known = set()
        while True:
            self.beat("data", state.step)
            batch = next(batches)
            bucket = getattr(batch, "bucket", "")
            self.beat("step" if bucket in known else "first step", state.step)
            known.add(bucket)
            yield batch


class HangWatchdog(NoWatchdog):
    """`with HangWatchdog(folder, ranks, 300) as heart:`; hang_timeout_s: for a step or a batch; 6 times it for SLOW."""

    def __init__(self, folder: Path, ranks: Ranks, hang_timeout_s: float) -> None:
        self.folder, self.ranks, self.timeout = folder, ranks, hang_timeout_s
        self.interval = min(max(hang_timeout_s / BEATS_PER_TIMEOUT, 0.5), 30.0)
        self.path, self.host = _path(folder, ranks.rank), socket.gethostname()
        self.phase, self.step, self.shards, self.began = "start", 0, "", time.monotonic()
        self.loader: Iterable[Batch] | None = None
        self.state: TrainState | None = None
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True, name="heartbeat")

    def beat(self, phase: str, step: int) -> None:
        self.phase, self.step, self.shards, self.began = phase, step, "", time.monotonic()

    def watched(self, batches: Iterator[Batch], state: TrainState, loader: Iterable[Batch]) -> Iterator[Batch]:
        self.loader, self.state = loader, state
        return super().watched(batches, state, loader)

    def __enter__(self) -> HangWatchdog:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write()
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopped.set()
        faulthandler.cancel_dump_traceback_later()
        if error is not None and not isinstance(error, SystemExit):
            self._name_shards()
            self._say_failed(error)
            self.phase = "failed"
        elif error is None:
            self.phase = "finished"
        self._write()

    def _say_failed(self, error: BaseException) -> None:
        """Says which rank failed, and where. A UserError is said once, at the program's end (composition.py)."""
        if not isinstance(error, UserError):
            _say(f"{self._status()}: failed with {type(error).__name__}: {error}")
        elif self.phase != "start":
            _say(f"{self._status()}: failed")

    def _watch(self) -> None:
        last = time.monotonic()
        while not self.stopped.wait(self.interval):
            late = time.monotonic() - last - self.interval
            last += self.interval + late
            if late > self.interval:  # the process was stopped and continued, which is no hang
                self.began += late
            # A timer in C, in case a call that never returns keeps Python from running this thread.
            faulthandler.dump_traceback_later(self.timeout * SLOW_FACTOR, exit=True, file=sys.__stderr__)
            try:
                self._look()
            except Exception as error:  # if this thread ended, the timer would kill a healthy rank
                _say(f"{self._status()}: the watchdog failed with {type(error).__name__}: {error}")

    def _look(self) -> None:
        if self.phase == "data" and time.monotonic() - self.began > self.interval:
            self._name_shards()
        self._write()
        if time.monotonic() - self.began > self._allowed(self.phase):
            self._end_unless_another_is_at_work()

    def _allowed(self, phase: str) -> float:
        return self.timeout * (SLOW_FACTOR if phase in SLOW else 1.0)

    def _name_shards(self) -> None:
        """Note the shards of the awaited batch, if the loader names them."""
        names = getattr(self.loader, "shards_of", None)
        if self.phase == "data" and not self.shards and self.state is not None and names is not None:
            self.shards = ", ".join(names(self.state.cursor.step))

    def _status(self) -> RankStatus:
        now = time.time()
        since = now - (time.monotonic() - self.began)
        return RankStatus(self.ranks.rank, self.host, self.phase, self.step, self.shards, since, now)

    def _write(self) -> None:
        """Written without a sync, as only running ranks read it; a full disk is ignored."""
        with contextlib.suppress(OSError):
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(json.dumps(asdict(self._status())))
            temporary.replace(self.path)

    def _end_unless_another_is_at_work(self) -> None:
        statuses, now = read_statuses(self.folder, self.ranks.world_size), time.time()
        blamed = slowest(statuses, now, self.timeout / 2)
        silent = blamed.silent_for(now) > self.timeout / 2
        if blamed.rank != self.ranks.rank and not silent and now - blamed.since < self._allowed(blamed.phase):
            return
        heard = f"silent for {blamed.silent_for(now):.0f} s" if silent else f"for {now - blamed.since:.0f} s"
        _say(
            f"error: no progress on rank {self.ranks.rank} for {time.monotonic() - self.began:.0f} s in phase "
            f"{self.phase} after step {self.step} (training.hang_timeout_s={self.timeout:g}); all wait for {blamed}, "
            f"{heard}. Every rank is stopped; start the run again to continue from its last checkpoint."
        )
        faulthandler.dump_traceback(file=sys.__stderr__)
        os._exit(HUNG)


def read_statuses(folder: Path, world_size: int) -> list[RankStatus]:
    """The sign of every rank; a rank that has not written any is taken to be in phase start."""
    statuses = []
    for rank in range(world_size):
        try:
            statuses.append(RankStatus(**json.loads(_path(folder, rank).read_text())))
        except (OSError, ValueError, TypeError):
            statuses.append(RankStatus(rank, "an unknown node", "start", 0, "", 0.0, 0.0))
    return statuses


def slowest(statuses: list[RankStatus], now: float, silence: float) -> RankStatus:
    """The rank that the others wait for: a silent one, else one behind in steps, else one not waiting in a collective,
    else the one longest in its phase."""
    return min(
        statuses,
        key=lambda each: (each.silent_for(now) < silence, each.step, each.phase in WAITS_FOR_OTHERS, each.since),
    )


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"


def _say(sentence: str) -> None:
    print(sentence, file=sys.__stderr__, flush=True)
