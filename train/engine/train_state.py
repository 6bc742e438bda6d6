"""The progress of a run: the same on every rank, and the trainer's only mutable state."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from data_pipeline.loading.batch import DataCursor


@dataclass(slots=True)
class TrainState:
    """step: optimizer steps, skipped ones included; applied_steps: those not skipped for non-finite gradients.

    passed_over: steps' worth of data that rollbacks left out; rollbacks: how many there were.
    """

    total_steps: int
    step: int = 0
    applied_steps: int = 0
    samples_seen: int = 0
    run_id: str = ""
    passed_over: int = 0
    rollbacks: int = 0
    # total_steps at the run's first start, to which shares refer (run_shares.py); 0: this is the first start.
    first_total: int = 0

    def __post_init__(self) -> None:
        self.first_total = self.first_total or self.total_steps

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps

    @property
    def cursor(self) -> DataCursor:
        """Where the data continues: the cursor's number determines the samples (epoch_plan.py)."""
        return DataCursor(self.step + self.passed_over)

    def advance(self, cursor: DataCursor, samples: int, applied: bool) -> None:
        """Count one global step of `samples` pictures."""
        self.step = cursor.step - self.passed_over
        self.applied_steps += applied
        self.samples_seen += samples

    def state_dict(self) -> dict[str, int | str]:
        return asdict(self)

    def load_state_dict(self, saved: dict[str, int | str]) -> None:
        """Continue from `saved`; total_steps stays that of this start. Earlier versions did not save first_total."""
        for name in ("step", "applied_steps", "samples_seen", "run_id", "passed_over", "rollbacks"):
            setattr(self, name, saved[name])
        self.first_total = saved.get("first_total") or saved.get("total_steps") or self.total_steps


def due(step: int, every: int | None, total: int | None = None) -> bool:
    """Whether something due every `every` steps (None: never), and at step `total`, is due now."""
    return bool(every) and (step % every == 0 or step == total)
