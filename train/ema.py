"""Exponential moving average of the weights, over each rank's own fp32 master shards: no communication."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Ema:
    """shadow <- d * shadow + (1 - d) * weights, d = min(decay, (1 + n) / (10 + n)) at its n-th update.

    The ramp (as in TensorFlow's ExponentialMovingAverage) lets short runs forget their random start.
    """

    def __init__(self, master_shards: Sequence[Tensor], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.shards = [shard.detach().clone().float() for shard in master_shards]

    @torch.no_grad()
    def update(self, master_shards: Sequence[Tensor]) -> None:
        """After each applied step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shards, [s.detach() for s in master_shards], 1.0 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """This rank's part, for its checkpoint file."""
        return {
            "updates": torch.tensor(self.updates),
            **{f"shard.{i}": s.contiguous() for i, s in enumerate(self.shards)},
        }

    def load_tensors(self, saved: dict[str, Tensor]) -> None:
        """From a file that `tensors` made at the same world size and ZeRO stage."""
        self.updates = int(saved["updates"])
        for i, shard in enumerate(self.shards):
            shard.copy_(saved[f"shard.{i}"])
