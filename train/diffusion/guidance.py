"""Guidance wraps a denoiser and is one."""

from __future__ import annotations

import torch
from torch import Tensor

from train.diffusion.denoiser import Conditioned, Denoiser


class ClassifierFreeGuidance:
    """s x0(c) + (1 - s) x0(null) (Ho & Salimans 2022, eq. 6, s = 1 + w), the same for eps, v and flow.

    One pass over both halves. At scale 1 the null is not evaluated: the result is the unguided one, bit for bit.
    """

    def __init__(self, denoise: Denoiser, scale: float) -> None:
        self.denoise, self.scale = denoise, scale

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioned) -> Tensor:
        if self.scale == 1.0:
            return self.denoise(x_t, t, conditioning)
        both = self.denoise(torch.cat([x_t, x_t]), t, conditioning.for_guidance())
        conditional, unconditional = both.chunk(2)
        return self.scale * conditional + (1.0 - self.scale) * unconditional
