"""Perceptual distance of pictures: LPIPS on VGG16 (Zhang et al. 2018, eq. 1), and its shift-tolerant variant."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)  # VGG16's convolutions, a pooling between groups
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # LPIPS' normalisation of pictures in [-1, 1]
EPSILON = 1e-10


class BlurPool(nn.Module):
    """Halves the resolution after a 3x3 low-pass filter (Zhang 2019). Side n -> floor((n + 1) / 2) + 1: padded by two
    pixels, mirrored, as in ST-LPIPS (Ghildyal & Liu 2022)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("filt", row.outer(row).expand(channels, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=x.shape[1])


class VGG16(nn.Module):
    """The convolutions of VGG16: normalised pictures (B, 3, H, W) -> the maps before each pooling and the last one.

    blurred: pooling without stride, then BlurPool, as in ST-LPIPS.
    """

    def __init__(self, blurred: bool = False) -> None:
        super().__init__()
        self.stages, last = nn.ModuleList(), 3
        for widths in WIDTHS:
            layers: list[nn.Module] = []
            if last > 3:
                layers = [nn.MaxPool2d(2, 1), BlurPool(last)] if blurred else [nn.MaxPool2d(2, 2)]
            for width in widths:
                layers += [nn.Conv2d(last, width, 3, padding=1), nn.ReLU(inplace=True)]
                last = width
            self.stages.append(nn.Sequential(*layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class LPIPS(nn.Module):
    """A frozen distance of pictures. Weights: train/weights/perceptual.py. `space` names it in records: distances of
    different spaces can't be compared."""

    fingerprint = ""  # of the weights, if loaded

    def __init__(self, blurred: bool = False) -> None:
        super().__init__()
        self.space = "ST-LPIPS VGG16" if blurred else "LPIPS VGG16"
        self.smallest_picture = 18 if blurred else 16  # side in pixels: the last map needs one
        self.trunk = VGG16(blurred)
        self.heads = nn.ParameterList(torch.ones(1, widths[-1], 1, 1) for widths in WIDTHS)
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Two batches of pictures (B, 3, H, W) in [-1, 1] -> (B,). In fp32 under any autocast: squared differences of
        unit vectors are smaller than bf16 can tell from 0."""
        self.to(y.device)  # no engine moves this network
        with torch.autocast(y.device.type, enabled=False):
            pairs = zip(self.heads, self.maps(x), self.maps(y), strict=True)
            return sum(F.conv2d((normalised(a) - normalised(b)).square(), head).mean((1, 2, 3)) for head, a, b in pairs)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Pictures (B, 3, H, W) in [-1, 1] -> VGG16's five maps."""
        return self.trunk((images.float() - self.shift) / self.scale)


def normalised(maps: Tensor) -> Tensor:
    """Unit vectors over channels, (B, C, h, w). Epsilon is inside the root, else its gradient is NaN where no channel
    is active."""
    return maps / (maps.square().sum(1, keepdim=True) + EPSILON).sqrt()


class PerceptualTerm(NamedTuple):
    """A distance and its weight in the loss. A tuple, so that an objective's parameters, which the engine trains,
    broadcasts and saves, don't include the frozen network."""

    distance: LPIPS
    weight: float
