"""What is measured between two logged steps: losses, throughput, memory."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from data_pipeline.loading.batch import Batch
from train.distributed.collectives import mean_over_ranks
from train.engine.deepspeed_engine import Engine, StepResult
from train.engine.flops import peak


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
