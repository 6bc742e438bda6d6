"""The loop, and what happens periodically in it. It knows no model, no diffusion and no configuration."""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipeline.common.progress import Progress
from data_pipeline.loading.batch import Batch
from train.bad_numbers import Watch
from train.checkpointing.checkpoints import Checkpoints
from train.distributed.collectives import barrier, mean_over_ranks
from train.distributed.preemption import Preempted, Preemption
from train.engine.deepspeed_engine import Engine, StepResult
from train.engine.ema import Ema
from train.engine.flops import peak
from train.engine.train_state import TrainState, due
from train.heartbeat import Heart
from train.runs.metrics import Reporter

log = logging.getLogger(__name__)


class Action(NamedTuple):
    """Something done by all ranks every `every` steps (None: never), and at the last one."""

    every: int | None
    run: Callable[[TrainState], None]


@dataclass(frozen=True, slots=True)
class Cadence:
    """How often, in steps."""

    log_every: int = 50
    save_every: int | None = 1000  # None: at the last step only


class Trainer:
    """Runs an engine over batches until the state is finished."""

    def __init__(
        self,
        engine: Engine,
        ema: Ema,
        batches: Iterable[Batch],
        state: TrainState,
        checkpoints: Checkpoints,
        watch: Watch,
        reporter: Reporter,
        cadence: Cadence,
        actions: list[Action],
        batch_size: int,
        what: str,
        heart: Heart | None = None,
        preemption: Preemption | None = None,
    ) -> None:
        self.heart, self.preemption = heart or Heart(), preemption or Preemption()
        self.engine, self.ema, self.batches, self.state = engine, ema, batches, state
        self.checkpoints, self.reporter, self.cadence, self.actions = checkpoints, reporter, cadence, actions
        self.watch = watch
        self.batch_size, self.what = batch_size, what
        self.meter = Meter(batch_size)

    def fit(self) -> None:
        """Train to the end, or to a signal: then save, and leave with stop_request.EXIT_CODE.

        NumbersWentBad is raised by all ranks at once.
        """
        state, main = self.state, self.engine.ranks.is_main
        batches = self.heart.watched(self.meter.timed(iter(self.batches)), state, self.batches)
        first = next(batches)
        self.meter.flops = self.engine.flops(first)
        batches = chain([first], batches)
        with Progress(self.what, state.total_steps, "steps", initial=state.step, shown=main) as bar:
            while not state.finished:
                result = self.engine.train_step(batches, state.applied_steps, state.total_steps)
                if result.applied:
                    self.ema.update(self.engine.master_shards())
                state.advance(result.cursor, self.batch_size, result.applied)
                self.meter.add(result)
                self.watch.after_step(state, result)
                bar.advance(1, **self.meter.shown)
                self.act_when_due(bar)

    def act_when_due(self, bar: Progress) -> None:
        """Log, then the entry's own actions (validate, preview), then save; stop where asked to.

        In this order a kill in between loses no row: those past the last checkpoint are cut, and come again.
        """
        state = self.state
        if due(state.step, self.cadence.log_every, state.total_steps):
            values = self.meter.summary(self.engine)
            self.reporter.log(state.step, values)
            self.watch.after_log(state.step, values["loss"])
        for action in self.actions:
            if due(state.step, action.every, state.total_steps):
                self.heart.beat("actions", state.step)
                action.run(state)
                self.meter.restart_clock()
        self.checkpoints.raise_if_failed()
        if state.finished:
            self._save_and_wait()
        elif due(state.step, self.cadence.save_every) and not self.watch.skipped:  # the way back stays kept
            self._save()
        if not state.finished and self.preemption.agreed(state.step, self.engine.ranks.device):
            self._save_and_wait()
            bar.note(f"stopped by a signal after step {state.step}; the checkpoint is saved, start again to go on")
            self.reporter.close()
            raise Preempted

    def _save(self) -> None:
        self.heart.beat("save", self.state.step)
        self.checkpoints.save(self.engine, self.ema, self.state)
        self.meter.restart_clock()

    def _save_and_wait(self) -> None:
        """Until it is published: then any rank may leave."""
        self._save()
        self.checkpoints.finish()
        barrier()


class Meter:
    """Means since the last log line. Losses stay on the device until then: one host sync per log line."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.shown: dict[str, str] = {}
        self.flops = 0  # of a step, on this rank
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps, self.skipped, self.waited, self.lr = 0, 0, 0.0, 0.0
        self.restarted, self.away = time.monotonic(), 0.0
        self.last = self.restarted

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, the time spent waiting for each counted."""
        while True:
            started = time.monotonic()
            batch = next(batches)
            self.waited += time.monotonic() - started
            yield batch

    def add(self, result: StepResult) -> None:
        """Count a step in."""
        self.steps += 1
        self.skipped += not result.applied
        self.lr = result.lr
        for name, value in result.parts.items():  # one that is not finite would hide all others
            counted = value if result.applied else torch.zeros_like(value)
            self.sums[name] = self.sums.get(name, 0.0) + counted
        self.last = time.monotonic()

    def restart_clock(self) -> None:
        """Leave out of the rate what passed since the last step: it was not training."""
        now = time.monotonic()
        self.away += now - self.last
        self.last = now

    def summary(self, engine: Engine) -> dict[str, float]:
        """What a log line says; collective, as the losses are means over all ranks."""
        names = sorted(self.sums)
        means = mean_over_ranks(torch.stack([self.sums[name] for name in names]).double()).tolist()
        seconds = max(time.monotonic() - self.restarted - self.away, 1e-9)
        applied = self.steps - self.skipped
        values = {name: mean / applied if applied else math.nan for name, mean in zip(names, means, strict=True)}
        self.shown = {"loss": f"{values['loss']:.4f}"}
        row = {
            **values,
            "lr": self.lr,
            "gradient_norm": engine.gradient_norm(),
            "samples_per_s": self.steps * self.batch_size / seconds,
            **self._utilisation(engine, seconds),
            "data_wait": self.waited / seconds,
            "skipped_steps": self.skipped,
            "peak_memory_gb": peak_memory_gb(),
        }
        self._reset()
        return row

    def _utilisation(self, engine: Engine, seconds: float) -> dict[str, float]:
        """Model FLOPs a second on this rank and, where a data sheet says what it could do, their share of that."""
        if not self.flops:
            return {}
        achieved = self.flops * self.steps / seconds
        most = peak(engine.ranks.device, engine.dtype)
        return {"tflops_per_s": achieved / 1e12, **({"mfu": achieved / most} if most else {})}


def peak_memory_gb() -> float:
    """Highest so far: the device's on CUDA, else the process'."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
