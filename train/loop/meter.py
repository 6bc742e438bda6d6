"""What is measured between two logged steps: losses, throughput, memory."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data_pipeline.loading.batch import Batch
from train.distributed.collectives import mean_over_ranks
from train.engine.deepspeed_engine import Engine, StepResult
from train.engine.flops import peak


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
