"""Conditions that are concatenated to x_t as planes: a small picture, or a hole and the rest of the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F

from train.models.conditioning import Conditioner, Conditioning, DataFacts, Parts


class LowResolutionImage(Conditioner):
    """A small picture (B, 3, H, W), enlarged to the latents and concatenated (Rombach et al. 2022, sec. 4.4).

    drop: whether dropout and guidance replace it, too, by its null (grey), or keep it. In buckets, each picture is
    enlarged by the factors of the bucket whose shapes are the facts'.
    """

    needs = ("low_resolution",)

    def __init__(self, facts: DataFacts, drop: bool = True) -> None:
        super().__init__()
        self.drop, self.fold, self.factors = drop, facts.scaling.fold, enlargement(facts)
        self.concat_channels = 3 * self.fold**2

    def fits(self, facts: DataFacts) -> bool:
        return enlargement(facts) == self.factors

    def forward(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Conditioning:
        image = fields["low_resolution"]
        size = tuple(int(side * factor) for side, factor in zip(image.shape[-2:], self.factors, strict=True))
        if tuple(image.shape[-2:]) != size:
            image = F.interpolate(image, size, mode="bilinear", antialias=True)
        planes = F.pixel_unshuffle(image, self.fold)
        null = torch.zeros_like(planes[:1]) if self.drop else planes
        return Conditioning(Parts(concat=planes), Parts(concat=null))


def enlargement(facts: DataFacts) -> tuple[Fraction, ...]:
    """Height and width of unfolded latents, divided by those of the small picture."""
    fold, sides = facts.scaling.fold, facts.shapes["low_resolution"][-2:]
    return tuple(Fraction(side * fold, small) for side, small in zip(facts.unet_shape[1:], sides, strict=True))


class HoleAndRest(Conditioner):
    """The hole (B, 1, h, w), then the latents of the rest (B, C, h, w), concatenated in the order of Stable Diffusion's
    inpainting (Rombach et al. 2022, sec. 4.5). The null is a hole everywhere; drop: as in LowResolutionImage."""

    needs = ("hole", "masked_latents")

    def __init__(self, facts: DataFacts, drop: bool = True) -> None:
        super().__init__()
        self.drop, self.scaling = drop, facts.scaling
        self.concat_channels = facts.scaling.fold**2 + facts.unet_shape[0]

    def forward(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Conditioning:
        hole = F.pixel_unshuffle(fields["hole"], self.scaling.fold)
        planes = torch.cat([hole, self.scaling.to_model(fields["masked_latents"])], 1)
        null = torch.cat([torch.ones_like(hole[:1]), torch.zeros_like(planes[:1, hole.shape[1] :])], 1)
        return Conditioning(Parts(concat=planes), Parts(concat=null if self.drop else planes))
