"""The training loop and its periodic actions; independent of the model, of diffusion and of the configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from data_pipeline.common.progress import Progress
from data_pipeline.loading.batch import Batch
from train.distributed.collectives import barrier
from train.distributed.preemption import Preempted
from train.engine.train_state import TrainState, due
from train.loop.context import TrainingContext
from train.loop.meter import Meter
from train.loop.stability_monitor import StabilityMonitor


class Action(NamedTuple):
    """Something that all ranks do every `every` steps (None: never) and at the last step."""

    every: int | None
    run: Callable[[TrainState], None]


@dataclass(frozen=True, slots=True)
class Cadence:
    """How often to log and save, in steps."""

    log_every: int = 50
    save_every: int | None = 1000  # None: at the last step only


class Trainer:
    """Runs an engine over batches until the state is finished."""

    def __init__(
        self,
        context: TrainingContext,
        batches: Iterable[Batch],
        monitor: StabilityMonitor,
        cadence: Cadence,
        actions: Sequence[Action],
    ) -> None:
        self.context, self.batches, self.monitor = context, batches, monitor
        self.cadence, self.actions = cadence, actions
        self.meter = Meter(context.engine.batch_size)

    def fit(self) -> None:
        """Train to the end, or until a signal: then save, and exit with stop_request.EXIT_CODE.

        All ranks raise TrainingDiverged together.
        """
        context, state, meter = self.context, self.context.state, self.meter
        batches = context.watchdog.watched(meter.timed(iter(self.batches)), state, self.batches)
        batches = meter.counted(batches, context.engine)
        batches = chain([next(batches)], batches)  # problems of the first batch come before the progress bar
        main = context.ranks.is_main
        with Progress(context.model.name, state.total_steps, "steps", initial=state.step, shown=main) as bar:
            while not state.finished:
                self._step(batches)
                self.context.preemption.begun()
                bar.advance(1, **meter.shown)
                self._log_when_due()
                self._act_when_due()
                self._save_when_due()
                self._stop_if_requested(bar)

    def _step(self, batches: Iterator[Batch]) -> None:
        context, state = self.context, self.context.state
        result = context.engine.train_step(batches, state.applied_steps, state.total_steps)
        if result.applied:
            context.ema.update(context.engine.master_shards())
        state.advance(result.cursor, context.engine.batch_size, result.applied)
        self.meter.add(result)
        self.monitor.after_step(state, result)

    def _log_when_due(self) -> None:
        """Called before the actions and the save, so that a kill in between loses no row: rows past the last
        checkpoint are cut, and logged again."""
        context, state = self.context, self.context.state
        if due(state.step, self.cadence.log_every, state.total_steps):
            values = self.meter.summary(context.engine) | self._epochs()
            context.reporter.log(state.step, values)
            self.monitor.after_log(state.step, values["loss"])

    def _epochs(self) -> dict[str, float]:
        """epochs/NAME of each data set, if the loader has several."""
        epochs = getattr(self.batches, "epochs", None)
        found = epochs(self.context.state.step) if epochs is not None else {}
        return {f"epochs/{name}": value for name, value in found.items()}

    def _act_when_due(self) -> None:
        """Run the entry script's own actions: validation, previews."""
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
        elif due(state.step, self.cadence.save_every) and not self.monitor.skipped:  # keep what to roll back to
            self._save()

    def _stop_if_requested(self, bar: Progress) -> None:
        context, state = self.context, self.context.state
        if not state.finished and context.preemption.agreed(state.step, context.ranks.device):
            self._save_and_wait()
            bar.note(f"stopped by a signal after step {state.step}; the checkpoint is saved, start again to continue")
            context.reporter.close()
            raise Preempted

    def _save(self) -> None:
        self.context.save()
        self.meter.restart_clock()

    def _save_and_wait(self) -> None:
        """Save and wait until the checkpoint is published: then any rank may exit."""
        self._save()
        self.context.checkpoints.finish()
        barrier()
