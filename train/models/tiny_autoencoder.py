"""A small distilled autoencoder (TAESD, diffusers' AutoencoderTiny), which decodes quickly, for previews."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class TinyBlock(nn.Module):
    """Three 3x3 convolutions with a skip connection and ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        convs = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class Layers(nn.Module):
    """A sequence of layers under the name that diffusers' files have for it."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class TinyAutoencoder(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] <-> x0 (B, C, H/f, W/f), f = 2^(levels - 1), already scaled for the diffusion
    model of its family. One width for all levels; `encoder_blocks` per level, full resolution first."""

    def __init__(
        self,
        latent_channels: int = 4,
        channels: int = 64,
        encoder_blocks: Sequence[int] = (1, 3, 3, 3),
        decoder_blocks: Sequence[int] = (3, 3, 3, 1),
    ) -> None:
        super().__init__()
        self.latent_channels, self.factor = latent_channels, 2 ** (len(decoder_blocks) - 1)
        self.encoder = Layers(_encoder_layers(latent_channels, channels, encoder_blocks))
        self.decoder = Layers(_decoder_layers(latent_channels, channels, decoder_blocks))

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> x0 (B, C, h, w)."""
        return self.encoder((images + 1) / 2)

    def decode(self, x0: Tensor) -> Tensor:
        """x0 (B, C, h, w) -> (B, 3, H, W), approximately in [-1, 1]. Latents are soft-clamped to [-3, 3] first."""
        return self.decoder(torch.tanh(x0 / 3) * 3) * 2 - 1


def _encoder_layers(latent_channels: int, channels: int, blocks: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for level, count in enumerate(blocks):
        first = {"in_channels": 3} if level == 0 else {"in_channels": channels, "stride": 2, "bias": False}
        layers.append(nn.Conv2d(out_channels=channels, kernel_size=3, padding=1, **first))
        layers += [TinyBlock(channels) for _ in range(count)]
    return [*layers, nn.Conv2d(channels, latent_channels, 3, padding=1)]


def _decoder_layers(latent_channels: int, channels: int, blocks: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(latent_channels, channels, 3, padding=1), nn.ReLU()]
    for count, _ in pairwise(blocks):
        layers += [TinyBlock(channels) for _ in range(count)]
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels, 3, padding=1, bias=False)]
    layers += [TinyBlock(channels) for _ in range(blocks[-1])]
    return [*layers, nn.Conv2d(channels, 3, 3, padding=1)]
