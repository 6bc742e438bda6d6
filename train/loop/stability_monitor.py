"""Detects unstable training: many steps skipped in a row, or a loss far above its usual value."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import UserError
from train.distributed.collectives import gathered_objects
from train.distributed.ranks import Ranks
from train.engine.deepspeed_engine import StepResult
from train.engine.train_state import TrainState

log = logging.getLogger(__name__)


class TrainingDiverged(Exception):
    """Training has become unstable, and must be rolled back. good_step: the last step without a fault."""

    def __init__(self, why: str, good_step: int) -> None:
        super().__init__(why)
        self.why, self.good_step = why, good_step


@dataclass(frozen=True, slots=True)
class StabilityConfig:
    """Limits. spike_factor: a loss this many times the median of the last `spike_window` logged ones is a spike;
    None: no loss is. max_rollbacks: how often a run may go back to a checkpoint, past the data that it failed on.
    """

    max_skipped: int = 100
    spike_factor: float | None = None
    spike_window: int = 20
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        if self.max_skipped < 1 or self.spike_window < 2 or self.max_rollbacks < 0:
            raise UserError(
                "training.stability: max_skipped must be at least 1, spike_window at least 2, and max_rollbacks at "
                "least 0."
            )
        if self.spike_factor is not None and self.spike_factor <= 1:
            raise UserError(f"training.stability.spike_factor={self.spike_factor} must be above 1, or null.")


@dataclass(slots=True)
class StabilityMonitor:
    """Monitors a run on every rank; all decide alike at the same step, as skips and logged losses are global."""

    limits: StabilityConfig
    ranks: Ranks
    skipped_log: Path  # skipped.jsonl: the samples of steps that were not applied
    skipped: int = 0
    good_step: int = 0
    losses: deque[float] = field(default_factory=deque)

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Record a step that was not applied, with its samples; TrainingDiverged after too many in a row."""
        if result.applied:
            self.skipped = 0
            return
        self.skipped += 1
        if self.skipped == 1 and self.ranks.is_main:
            log.warning(
                "step %d is skipped, as its gradients are not finite; %s lists such steps", state.step, self.skipped_log
            )
        keys = [key for part in gathered_objects(result.keys) for key in part]
        self.write_row({"step": state.step, "skipped": "gradients not finite", "keys": keys})
        if self.skipped >= self.limits.max_skipped:
            why = f"the gradients of {self.skipped} steps in a row, up to step {state.step}, were not finite"
            raise TrainingDiverged(why, state.step - self.skipped)  # skipped steps changed no weights

    def after_log(self, step: int, loss: float) -> None:
        """Check a logged loss, which is the mean over all ranks; TrainingDiverged if it is a spike."""
        usual = statistics.median(self.losses) if len(self.losses) >= self.limits.spike_window else None
        factor = self.limits.spike_factor
        # The loss is NaN if all steps were skipped; those are counted separately.
        if factor is not None and usual is not None and loss >= factor * usual:
            why = f"the loss of step {step} is {loss:.4g}, {loss / usual:.1f} times its recent median"
            raise TrainingDiverged(why, self.good_step)
        if math.isfinite(loss):
            self.losses.append(loss)
        if len(self.losses) > self.limits.spike_window:
            self.losses.popleft()
        if not self.skipped:
            self.good_step = step

    def after_rollback(self, from_step: int, step: int, why: str) -> None:
        """Start over from `step`, and record the rollback."""
        self.skipped, self.good_step = 0, step
        self.write_row({"step": from_step, "rolled_back_to": step, "why": why})

    def write_row(self, row: dict[str, Any]) -> None:
        if self.ranks.is_main:
            with self.skipped_log.open("a") as file:
                file.write(json.dumps(row) + "\n")
