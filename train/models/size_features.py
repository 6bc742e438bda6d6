"""Micro-conditioning as in SDXL: original size, crop and target size of a picture, for the time embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from train.models.conditioning import Conditioner, Conditioning, DataFacts, Parts
from train.models.unet import sinusoidal_embedding


class SizeFeatures(Conditioner):
    """Six pixel counts (B, 6), each as 256 sinusoids, in one vector (B, 1536) (Podell et al. 2023, sec. 2.2).

    Concatenated after the pooled text state, it goes through the U-Net's vector_embedding: diffusers' add_embedding for
    addition_embed_type=text_time. Its null is the size itself, as in SDXL; drop: dropout and guidance use zeros
    instead.
    """

    needs, needs_vector = ("size",), True
    WIDTH = 256  # per number

    def __init__(self, facts: DataFacts, drop: bool = False) -> None:
        super().__init__()
        self.drop, self.vector_dim = drop, 6 * self.WIDTH

    def forward(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Conditioning:
        size = fields["size"]
        vector = sinusoidal_embedding(size.flatten(), self.WIDTH).view(len(size), -1)  # (B*6, 256) -> (B, 1536), fp32
        return Conditioning(Parts(vector=vector), Parts(vector=torch.zeros_like(vector[:1]) if self.drop else vector))
