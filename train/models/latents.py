"""From a picture's stored latents to the U-Net's input x0, and back to raw latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.common.errors import UserError
from train.models.autoencoder import DiagonalGaussian

STORED_AS = ("moments", "indices", "pixels")


class OneFactor(NamedTuple):
    """x0 = factor * (z - shift), the same for all channels, as published models state it (scaling_factor and
    shift_factor)."""

    factor: float
    shift: float = 0.0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> OneFactor | None:
        """From the options scaling_factor and shift_factor; None if neither is set."""
        factor, shift = config.get("scaling_factor"), config.get("shift_factor")
        if factor is None and shift is not None:
            raise UserError(
                f"shift_factor={shift:g} needs scaling_factor, as x0 = scaling_factor * (latents - shift_factor): add "
                "scaling_factor=...."
            )
        return None if factor is None else cls(factor, shift or 0.0)

    def per_channel(self, channels: int) -> dict[str, list[float]]:
        """Mean and std of each channel, as LatentScaling takes them."""
        return {"mean": [self.shift] * channels, "std": [1.0 / self.factor] * channels}


class LatentScaling:
    """x0 = fold((z - mean) / std), with mean and std per channel; and its inverse.

    Rombach et al. 2022 (app. G) divide by one standard deviation, so that latents have unit variance; Stable
    Diffusion's scaling_factor is 1 / std with mean 0. fold > 1 trades resolution for channels (pixel-unshuffle), which
    makes the U-Net cheaper.
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


@dataclass(frozen=True, slots=True)
class StoredLatents:
    """Latents in the form that precompute stored, one of STORED_AS; codebook (N, C) for indices."""

    stored_as: str
    scaling: LatentScaling
    codebook: Tensor | None = None

    def draw(self, fields: Mapping[str, Tensor], normal: Callable[[Sequence[int]], Tensor]) -> Tensor:
        """x0 for the U-Net, (B, C, h, w): a new posterior sample with noise normal(shape), or the codes of indices."""
        stored = fields[self.stored_as]
        if self.stored_as == "moments":
            posterior = DiagonalGaussian.from_moments(stored)
            return self.scaling.to_model(posterior.sample(normal(posterior.mean.shape[1:])))
        if self.stored_as == "indices":
            stored = self.codebook.to(stored.device)[stored].permute(0, 3, 1, 2)  # (B, h, w) -> (B, C, h, w)
        return self.scaling.to_model(stored)
