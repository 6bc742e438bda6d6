"""Measurements between two logged steps: losses, throughput, memory."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data_pipeline.loading.batch import Batch
from train.distributed.collectives import mean_over_ranks
from train.engine.deepspeed_engine import Engine, StepResult
from train.engine.flops import peak


@dataclass(slots=True)
class BucketSums:
    """Sums over the steps on one aspect-ratio bucket."""

    steps: int = 0
    applied: int = 0
    seconds: float = 0.0
    loss: Tensor | float = 0.0  # over the applied steps


@dataclass(slots=True)
class Interval:
    """Sums since the last log line; times from the monotonic clock."""

    began: float
    last: float  # when the last step ended
    away: float = 0.0  # seconds not spent training
    waited: float = 0.0  # seconds spent waiting for batches
    steps: int = 0
    skipped: int = 0
    flops: int = 0
    lr: float = 0.0
    sums: dict[str, Tensor] = field(default_factory=dict)  # of each part of the loss, over the applied steps
    buckets: dict[str, BucketSums] = field(default_factory=dict)  # by name; empty in a run on one size

    @classmethod
    def now(cls) -> Interval:
        began = time.monotonic()
        return cls(began, began)


class Meter:
    """Means since the last log line. Losses stay on the device until then: one host sync per log line."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.shown: dict[str, str] = {}
        self.flops: dict[str, int] = {}  # of one step on this rank, by bucket ("" in a run on one size)
        self.since = Interval.now()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; adds up the time spent waiting for them."""
        while True:
            started = time.monotonic()
            batch = next(batches)
            self.since.waited += time.monotonic() - started
            yield batch

    def counted(self, batches: Iterator[Batch], engine: Engine) -> Iterator[Batch]:
        """The same batches; counts the FLOPs of a step once for each bucket, at its first batch. The time for this is
        not part of the rate."""
        for batch in batches:
            bucket = getattr(batch, "bucket", "")
            if bucket not in self.flops:
                started = time.monotonic()
                self.flops[bucket] = engine.flops(batch)
                spent = time.monotonic() - started
                self.since.away += spent
                self.since.last += spent
            yield batch

    def add(self, result: StepResult) -> None:
        """Add a step."""
        since = self.since
        since.steps += 1
        since.skipped += not result.applied
        since.lr = result.lr
        since.flops += self.flops.get(result.bucket, 0)
        for name, value in result.parts.items():  # one non-finite value would hide all others
            counted = value if result.applied else torch.zeros_like(value)
            since.sums[name] = since.sums.get(name, 0.0) + counted
        now = time.monotonic()
        if result.bucket:
            self._add_to_bucket(result, now - since.last)
        since.last = now

    def _add_to_bucket(self, result: StepResult, seconds: float) -> None:
        sums = self.since.buckets.setdefault(result.bucket, BucketSums())
        sums.steps += 1
        sums.seconds += seconds
        sums.applied += result.applied
        loss = result.parts["loss"]
        sums.loss = sums.loss + (loss if result.applied else torch.zeros_like(loss))

    def restart_clock(self) -> None:
        """Exclude the time since the last step, which was not training, from the rate."""
        now = time.monotonic()
        self.since.away += now - self.since.last
        self.since.last = now

    def summary(self, engine: Engine) -> dict[str, float]:
        """The values of a log line, since the last one. Collective, as the losses are means over all ranks."""
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
            **utilisation(engine, since.flops / seconds),
            "data_wait": since.waited / seconds,
            "skipped_steps": since.skipped,
            "peak_memory_gb": peak_memory_gb(),
            **of_buckets(since.buckets),
        }
        self.since = Interval.now()
        return row


def of_buckets(buckets: Mapping[str, BucketSums]) -> dict[str, float]:
    """loss/NAME and step_s/NAME (seconds) of each bucket with at least one step. Collective; the names are the same on
    all ranks, as a step takes one bucket on all of them."""
    if not buckets:
        return {}
    names = sorted(buckets)
    losses = mean_over_ranks(torch.stack([buckets[name].loss for name in names]).double()).tolist()
    row = {}
    for name, loss in zip(names, losses, strict=True):
        sums = buckets[name]
        row[f"loss/{name}"] = loss / sums.applied if sums.applied else math.nan
        row[f"step_s/{name}"] = sums.seconds / sums.steps
    return row


def utilisation(engine: Engine, achieved: float) -> dict[str, float]:
    """Model FLOP/s on this rank and, if the device's peak is known, their share of it (MFU)."""
    if not achieved:
        return {}
    most = peak(engine.ranks.device, engine.dtype)
    return {"tflops_per_s": achieved / 1e12, **({"mfu": achieved / most} if most else {})}


def peak_memory_gb() -> float:
    """Peak memory so far: of the device on CUDA, otherwise of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
