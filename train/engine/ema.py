"""Exponential moving averages of the weights, over each rank's own fp32 master shards: no communication."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from data_pipeline.common.errors import UserError


class Ema:
    """shadow <- d * shadow + (1 - d) * weights, d = min(decay, (1 + n) / (10 + n)) at its n-th update.

    The ramp (as in TensorFlow's ExponentialMovingAverage) lets short runs forget their random start. Beside it, for
    each of `sigma_rels`, a power-function average, from whose snapshots one of any length is rebuilt (posthoc_ema.py):
    d = (1 - 1/n)^(gamma + 1) (Karras et al. 2024, eq. 2).
    """

    def __init__(self, master_shards: Sequence[Tensor], decay: float, sigma_rels: Sequence[float] = ()) -> None:
        self.decay, self.updates = decay, 0
        self.gammas = {power_kind(sigma_rel): gamma_of(sigma_rel) for sigma_rel in sigma_rels}
        self.shards = [shard.detach().clone().float() for shard in master_shards]
        self.powers = {kind: [shard.clone() for shard in self.shards] for kind in self.gammas}

    @torch.no_grad()
    def update(self, master_shards: Sequence[Tensor]) -> None:
        """After each applied step."""
        self.updates += 1
        weights = [shard.detach() for shard in master_shards]
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shards, weights, 1.0 - decay)
        for kind, gamma in self.gammas.items():
            torch._foreach_lerp_(self.powers[kind], weights, 1.0 - (1.0 - 1.0 / self.updates) ** (gamma + 1.0))

    def tensors(self) -> dict[str, list[Tensor]]:
        """This rank's part, by kind, cut as its master shards are."""
        return {"ema": self.shards, **self.powers}

    def scalars(self) -> dict[str, int]:
        """What is saved beside `tensors`."""
        return {"updates": self.updates}

    def load_scalars(self, saved: dict[str, int]) -> None:
        """`tensors` have been filled: go on counting."""
        self.updates = saved["updates"]


def power_kind(sigma_rel: float) -> str:
    """The name under which an average of this width is saved."""
    return f"ema_{sigma_rel:g}"


def gamma_of(sigma_rel: float) -> float:
    """The exponent whose average has a relative standard deviation of sigma_rel (Karras et al. 2024, eq. 126)."""
    if not 0 < sigma_rel < 1 / sqrt(12):
        raise UserError(f"sigma_rel={sigma_rel} is no width of an average: take one above 0 and below 0.288.")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())
