"""Distributions of training times: uniform draws in [0, 1) -> fractions of the process, (B,) -> (B,)."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(u: Tensor) -> Tensor:
    """All times equally likely."""
    return u


class LogitNormal:
    """Sigmoid of a normal variable (Esser et al. 2024, eq. 19): more times in the middle, where the task is hardest."""

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        self.mean, self.std = mean, std

    def __call__(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))


def stratified(u: Tensor, stratum: Tensor, count: int) -> Tensor:
    """Moves uniform draws (B,) each into its own stratum, one of `count` equal parts of [0, 1): (stratum + u) / count.

    If a batch of `count` uses each stratum once, its times are spread evenly, and each is still uniform by itself: less
    variance at no cost (Kingma et al. 2021, app. I.1, with a jitter per sample).
    """
    return (stratum.to(u.dtype) + u) / count


def evenly_spaced(count: int) -> Tensor:
    """Midpoints of `count` equal parts of [0, 1]: the fixed times of every validation."""
    return (torch.arange(count) + 0.5) / count
