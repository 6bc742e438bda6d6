"""Exponential moving averages of the weights, on each rank's own fp32 master shards, without communication."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from data_pipeline.common.errors import UserError


class Ema:
    """shadow <- d * shadow + (1 - d) * weights, d = min(decay, (1 + n) / (10 + n)) at the n-th update.

    The ramp (as in TensorFlow's ExponentialMovingAverage) lets short runs forget their random initial weights. In
    addition, each of `sigma_rels` has a power-function average, d = (1 - 1/n)^(gamma + 1) (Karras et al. 2024, eq. 2);
    posthoc_ema.py rebuilds averages of any length from their snapshots.
    """

    def __init__(self, master_shards: Sequence[Tensor], decay: float, sigma_rels: Sequence[float] = ()) -> None:
        self.decay, self.updates = decay, 0
        self.gammas = {power_kind(sigma_rel): gamma_of(sigma_rel) for sigma_rel in sigma_rels}
        self.shards = [shard.detach().clone().float() for shard in master_shards]
        self.powers = {kind: [shard.clone() for shard in self.shards] for kind in self.gammas}

    @torch.no_grad()
    def update(self, master_shards: Sequence[Tensor]) -> None:
        """To be called after each applied step."""
        self.updates += 1
        weights = [shard.detach() for shard in master_shards]
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shards, weights, 1.0 - decay)
        for kind, gamma in self.gammas.items():
            torch._foreach_lerp_(self.powers[kind], weights, 1.0 - (1.0 - 1.0 / self.updates) ** (gamma + 1.0))

    def tensors(self) -> dict[str, list[Tensor]]:
        """This rank's shards of each average, by kind, with the shapes of its master shards."""
        return {"ema": self.shards, **self.powers}

    def scalars(self) -> dict[str, int]:
        """The scalars saved with `tensors`."""
        return {"updates": self.updates}

    def load_scalars(self, saved: dict[str, int]) -> None:
        """Restore the update count, after `tensors` have been filled."""
        self.updates = saved["updates"]


def power_kind(sigma_rel: float) -> str:
    """The name under which the average of this relative width is saved."""
    return f"ema_{sigma_rel:g}"


def gamma_of(sigma_rel: float) -> float:
    """The exponent whose average has a relative standard deviation of sigma_rel (Karras et al. 2024, eq. 126)."""
    if not 0 < sigma_rel < 1 / sqrt(12):
        raise UserError(f"sigma_rel={sigma_rel} is not a valid width of an average: use one above 0 and below 0.288.")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())
