"""Scale equivariance of latents: resized latents decode to the equally resized picture (EQ-VAE, Kouzelis et al. 2025,
arXiv 2502.09509; Skorokhodov et al. 2025, arXiv 2502.14831, who add it to the plain loss as here)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.common.errors import UserError
from train.diffusion.randomness import generator_at


@dataclass(frozen=True, slots=True)
class Equivariance:
    """weight: of the reconstruction error at the smaller size. scales: of height and width, one of them per step."""

    weight: float
    scales: Sequence[float]

    def __post_init__(self) -> None:
        if not self.scales or not all(0 < scale < 1 for scale in self.scales):
            raise UserError(
                f"objective.equivariance_scales={list(self.scales)} must be one or more numbers between 0 and 1, such "
                "as [0.5,0.25]."
            )

    def scale_at(self, seed: int, step: int) -> float:
        """The scale of a step. One for the whole global batch: ranks that decode other sizes would wait for each other
        at ZeRO stage 3, and each size is a compiled graph."""
        draw = torch.rand((), generator=generator_at("cpu", seed, step, "equivariance"))
        return self.scales[int(draw * len(self.scales))]

    def refuse_sizes(self, sizes: Sequence[Sequence[int]], factor: int, smallest: int) -> None:
        """UserError for pictures of a size (height, width) whose latents can't be resized, or become too small for the
        loss. smallest: side of the smallest picture that it takes."""
        for height, width in sizes:
            for scale in self.scales:
                sides = [side // factor * scale for side in (height, width)]
                if any(side % 1 for side in sides) or min(sides) * factor < smallest:
                    raise UserError(
                        f"objective.equivariance_scales: latents of {height}x{width} pixels scaled by {scale:g} have "
                        f"{sides[0]:g}x{sides[1]:g} values, but need whole numbers and {max(smallest, factor)} pixels: "
                        "use other scales, or larger pictures and crops."
                    )


def resized(x: Tensor, scale: float) -> Tensor:
    """(B, C, H, W) -> (B, C, scale * H, scale * W) by bilinear interpolation without aliasing, in fp32."""
    size = [round(scale * side) for side in x.shape[-2:]]
    return F.interpolate(x.float(), size, mode="bilinear", align_corners=False, antialias=True)
