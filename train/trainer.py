"""The loop, and what happens periodically in it. It knows no model, no diffusion and no configuration."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipeline.progress import Progress
from data_pipeline.samples import Batch
from train.bad_numbers import Watch
from train.engine import Engine, StepResult
from train.flops import peak
from train.preemption import Preempted
from train.ranks import barrier, mean_over_ranks
from train.train_state import TrainState, due
from train.training_context import TrainingContext


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
        context: TrainingContext,
        batches: Iterable[Batch],
        watch: Watch,
        cadence: Cadence,
        actions: Sequence[Action],
    ) -> None:
        self.context, self.batches, self.watch, self.cadence, self.actions = context, batches, watch, cadence, actions
        self.meter = Meter(context.engine.batch_size)

    def fit(self) -> None:
        """Train to the end, or to a signal: then save, and leave with preemption.EXIT_CODE.

        NumbersWentBad is raised by all ranks at once.
        """
        context, state, meter = self.context, self.context.state, self.meter
        batches = context.watchdog.watched(meter.timed(iter(self.batches)), state, self.batches)
        first = next(batches)
        meter.flops = context.engine.flops(first)
        batches = chain([first], batches)
        main = context.ranks.is_main
        with Progress(context.model.name, state.total_steps, "steps", initial=state.step, shown=main) as bar:
            while not state.finished:
                self._step(batches)
                bar.advance(1, **meter.shown)
                self._log_when_due()
                self._act_when_due()
                self._save_when_due()
                self._stop_when_asked(bar)

    def _step(self, batches: Iterator[Batch]) -> None:
        context, state = self.context, self.context.state
        result = context.engine.train_step(batches, state.applied_steps, state.total_steps)
        if result.applied:
            context.ema.update(context.engine.master_shards())
        state.advance(result.cursor, context.engine.batch_size, result.applied)
        self.meter.add(result)
        self.watch.after_step(state, result)

    def _log_when_due(self) -> None:
        """First, then the actions, then the save: so a kill in between loses no row. Those past the last checkpoint
        are cut, and come again."""
        context, state = self.context, self.context.state
        if due(state.step, self.cadence.log_every, state.total_steps):
            values = self.meter.summary(context.engine)
            context.reporter.log(state.step, values)
            self.watch.after_log(state.step, values["loss"])

    def _act_when_due(self) -> None:
        """The entry's own actions: validate, preview."""
        state = self.context.state
        for action in self.actions:
            if due(state.step, action.every, state.total_steps):
                self.context.watchdog.beat("actions", state.step)
                action.run(state)
                self.meter.restart_clock()

    def _save_when_due(self) -> None:
        state = self.context.state
        self.context.checkpoints.raise_if_failed()
        if state.finished:
            self._save_and_wait()
        elif due(state.step, self.cadence.save_every) and not self.watch.skipped:  # the way back stays kept
            self._save()

    def _stop_when_asked(self, bar: Progress) -> None:
        context, state = self.context, self.context.state
        if not state.finished and context.preemption.agreed(state.step, context.ranks.device):
            self._save_and_wait()
            bar.note(f"stopped by a signal after step {state.step}; the checkpoint is saved, start again to go on")
            context.reporter.close()
            raise Preempted

    def _save(self) -> None:
        self.context.save()
        self.meter.restart_clock()

    def _save_and_wait(self) -> None:
        """Until it is published: then any rank may leave."""
        self._save()
        self.context.checkpoints.finish()
        barrier()


@dataclass(slots=True)
class Interval:
    """What has come since the last log line; times by the monotonic clock."""

    began: float
    last: float  # when the last step ended
    away: float = 0.0  # seconds in between that were not training
    waited: float = 0.0  # seconds for batches
    steps: int = 0
    skipped: int = 0
    lr: float = 0.0
    sums: dict[str, Tensor] = field(default_factory=dict)  # of each part of the loss, over the applied steps

    @classmethod
    def now(cls) -> Interval:
        began = time.monotonic()
        return cls(began, began)


class Meter:
    """Means since the last log line. Losses stay on the device until then: one host sync per log line."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.shown: dict[str, str] = {}
        self.flops = 0  # of a step, on this rank
        self.since = Interval.now()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, the time spent waiting for each counted."""
        while True:
            started = time.monotonic()
            batch = next(batches)
            self.since.waited += time.monotonic() - started
            yield batch

    def add(self, result: StepResult) -> None:
        """Count a step in."""
        since = self.since
        since.steps += 1
        since.skipped += not result.applied
        since.lr = result.lr
        for name, value in result.parts.items():  # one that is not finite would hide all others
            counted = value if result.applied else torch.zeros_like(value)
            since.sums[name] = since.sums.get(name, 0.0) + counted
        since.last = time.monotonic()

    def restart_clock(self) -> None:
        """Leave out of the rate what passed since the last step: it was not training."""
        now = time.monotonic()
        self.since.away += now - self.since.last
        self.since.last = now

    def summary(self, engine: Engine) -> dict[str, float]:
        """What a log line says, of the time since the last one; collective, as the losses are means over all ranks."""
        since = self.since
        names = sorted(since.sums)
        means = mean_over_ranks(torch.stack([since.sums[name] for name in names]).double()).tolist()
        seconds = max(time.monotonic() - since.began - since.away, 1e-9)
        applied = since.steps - since.skipped
        values = {name: mean / applied if applied else math.nan for name, mean in zip(names, means, strict=True)}
        self.shown = {"loss": f"{values['loss']:.4f}"}
        row = {
            **values,
            "lr": since.lr,
            "gradient_norm": engine.gradient_norm(),
            "samples_per_s": since.steps * self.batch_size / seconds,
            **utilisation(engine, self.flops * since.steps / seconds),
            "data_wait": since.waited / seconds,
            "skipped_steps": since.skipped,
            "peak_memory_gb": peak_memory_gb(),
        }
        self.since = Interval.now()
        return row


def utilisation(engine: Engine, achieved: float) -> dict[str, float]:
    """Model FLOPs a second on this rank and, where a data sheet says what it could do, their share of that."""
    if not achieved:
        return {}
    most = peak(engine.ranks.device, engine.dtype)
    return {"tflops_per_s": achieved / 1e12, **({"mfu": achieved / most} if most else {})}


def peak_memory_gb() -> float:
    """Highest so far: the device's on CUDA, else the process'."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
