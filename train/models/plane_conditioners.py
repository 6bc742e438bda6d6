"""Conditions that are concatenated to x_t as planes: a small picture, or a hole and the rest of the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from train.models.conditioning import Conditioner, Conditioning, DataFacts, Parts


class LowResolutionImage(Conditioner):
    """A small picture (B, 3, H, W), enlarged to the latents and concatenated (Rombach et al. 2022, sec. 4.4).

    drop: whether dropout and guidance replace it, too, by its null (grey), or keep it.
    """

    needs = ("low_resolution",)
    one_size = True

    def __init__(self, facts: DataFacts, drop: bool = True) -> None:
        super().__init__()
        self.drop, self.fold = drop, facts.scaling.fold
        self.size = tuple(side * self.fold for side in facts.unet_shape[1:])
        self.concat_channels = 3 * self.fold**2

    def forward(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Conditioning:
        image = fields["low_resolution"]
        if tuple(image.shape[-2:]) != self.size:
            image = F.interpolate(image, self.size, mode="bilinear", antialias=True)
        planes = F.pixel_unshuffle(image, self.fold)
        null = torch.zeros_like(planes[:1]) if self.drop else planes
        return Conditioning(Parts(concat=planes), Parts(concat=null))


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
