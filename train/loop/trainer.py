"""The loop, and what happens periodically in it. It knows no model, no diffusion and no configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from data_pipeline.common.progress import Progress
from data_pipeline.loading.batch import Batch
from train.checkpointing.checkpoints import Checkpoints
from train.distributed.collectives import barrier
from train.distributed.preemption import Preempted, Preemption
from train.engine.deepspeed_engine import Engine
from train.engine.ema import Ema
from train.engine.train_state import TrainState, due
from train.loop.heartbeat import Heart
from train.loop.meter import Meter
from train.loop.stability_monitor import Watch
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
