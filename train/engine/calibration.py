"""Measures how fast this machine computes, so that the demo can estimate its duration in advance."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

CHANNELS, SIDE, BATCH = 64, 16, 32  # as in the demo's networks


def calibration_seconds(budget_s: float = 3.0) -> float:
    """Median seconds of a fixed piece of fp32 work with all of torch's threads, repeated for about `budget_s`.

    The work is that of the demo's networks: 3x3 convolutions, norms and a matrix product, forward and backward.
    """
    layers = [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.GroupNorm(8, CHANNELS), nn.SiLU()] * 4
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(CHANNELS * SIDE**2, CHANNELS))
    network.to(memory_format=torch.channels_last)
    pictures = torch.randn(BATCH, CHANNELS, SIDE, SIDE).contiguous(memory_format=torch.channels_last)

    def work() -> None:
        network(pictures).square().mean().backward()

    work()  # the first pass also sets up the kernels
    return median(_durations(work, budget_s))


def _durations(work: Callable[[], None], budget_s: float) -> list[float]:
    """Seconds of each of at least three repeated calls."""
    durations: list[float] = []
    while len(durations) < 3 or sum(durations) < budget_s:
        started = time.perf_counter()
        work()
        durations.append(time.perf_counter() - started)
    return durations
