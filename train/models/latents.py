"""From an autoencoder's raw latents to what the U-Net sees, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


class LatentScaling:
    """x0 = fold((z - mean) / std), per channel; and its inverse.

    Rombach et al. 2022 (app. G) divide by one standard deviation so that noise meets unit variance; Stable Diffusion's
    scaling_factor is 1 / std with mean 0. fold > 1 trades resolution for channels (pixel-unshuffle): a cheaper U-Net.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], fold: int = 1) -> None:
        self.mean = torch.tensor(list(mean)).view(1, -1, 1, 1)
        self.std = torch.tensor(list(std)).view(1, -1, 1, 1)
        self.fold = fold

    def to_model(self, z: Tensor) -> Tensor:
        """(B, C, h, w) unscaled -> (B, C*fold^2, h/fold, w/fold)."""
        x = (z - self.mean.to(z)) / self.std.to(z)
        return F.pixel_unshuffle(x, self.fold) if self.fold > 1 else x

    def from_model(self, x: Tensor) -> Tensor:
        """The inverse of `to_model`."""
        z = F.pixel_shuffle(x, self.fold) if self.fold > 1 else x
        return z * self.std.to(z) + self.mean.to(z)
