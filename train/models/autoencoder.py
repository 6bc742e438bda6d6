"""The KL-regularised autoencoder, the first stage of latent diffusion (Rombach et al. 2022, sec. 3.1, app. G).

With its defaults shaped and named as diffusers' `AutoencoderKL`. Beyond that: a pixel-unshuffle stem (`patch`), which
saves the costly full-resolution level on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.models.attention import Attention
from train.models.resblocks import Downsample, ResnetBlock, Upsample


@dataclass(frozen=True, slots=True)
class DiagonalGaussian:
    """The posterior q(z|x): mean and log-variance, each (B, C, h, w)."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> DiagonalGaussian:
        """(B, 2C, h, w), means first; log-variances are held within [-30, 20] as CompVis does."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, the reparameterization of Kingma & Welling 2014, eq. 10."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) in nats, summed over a picture: (B,)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum((1, 2, 3))


class PixelAttention(Attention):
    """Single-head self-attention over pixels, residual: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__(channels, None, heads=1, head_dim=channels, qkv_bias=True)
        self.group_norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, h*w, C)
        return x + super().forward(y).transpose(1, 2).unflatten(2, x.shape[-2:])


class AutoencoderMid(nn.Module):
    """Residual block, attention (optional), residual block."""

    def __init__(self, channels: int, norm_groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([PixelAttention(channels, norm_groups)] if attention else [])
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, None, norm_groups, eps=1e-6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Level(nn.Module):
    """Residual blocks, then a change of resolution by `downsamplers` or `upsamplers`, where the level has one."""

    def __init__(
        self, in_channels: int, out_channels: int, layers: int, norm_groups: int, resample: str | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, None, norm_groups, eps=1e-6)
            for i in range(layers)
        )
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(out_channels, asymmetric=True)])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(out_channels)])
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        if self.resample is None:
            return x
        return (self.downsamplers if self.resample == "down" else self.upsamplers)[0](x)


class Encoder(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> (B, 2C, H/f, W/f)."""

    def __init__(
        self, in_channels: int, moments: int, channels: Sequence[int], layers: int, norm_groups: int, attention: bool
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(channels[max(i - 1, 0)], width, layers, norm_groups, "down" if i < len(channels) - 1 else None)
            for i, width in enumerate(channels)
        )
        self.mid_block = AutoencoderMid(channels[-1], norm_groups, attention)
        self.conv_norm_out = nn.GroupNorm(norm_groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], moments, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """(B, C, H/f, W/f) -> (B, 3, H, W)."""

    def __init__(
        self, out_channels: int, latent: int, channels: Sequence[int], layers: int, norm_groups: int, attention: bool
    ) -> None:
        super().__init__()
        widths = list(reversed(channels))
        self.conv_in = nn.Conv2d(latent, widths[0], 3, padding=1)
        self.mid_block = AutoencoderMid(widths[0], norm_groups, attention)
        self.up_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, layers + 1, norm_groups, "up" if i < len(widths) - 1 else None)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(norm_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] <-> latents (B, C, H/f, W/f), f = patch * 2^(levels - 1)."""

    fingerprint = ""  # of the weights it was loaded from

    def __init__(
        self,
        latent_channels: int = 4,
        channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_groups: int = 32,
        mid_attention: bool = True,
        patch: int = 1,  # pixel-unshuffle before the encoder, pixel-shuffle behind the decoder
        channels_last: bool = False,  # memory format of the activations: faster on CPUs and in bf16
    ) -> None:
        super().__init__()
        pixels = 3 * patch * patch
        self.patch, self.latent_channels = patch, latent_channels
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.factor = patch * 2 ** (len(channels) - 1)
        common = (channels, layers_per_block, norm_groups, mid_attention)
        self.encoder = Encoder(pixels, 2 * latent_channels, *common)
        self.decoder = Decoder(pixels, latent_channels, *common)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode_moments(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 2C, h, w): the posterior's mean and log-variance, unscaled."""
        x = F.pixel_unshuffle(images, self.patch) if self.patch > 1 else images
        return self.quant_conv(self.encoder(x.contiguous(memory_format=self.memory_format)))

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """The posterior of each picture."""
        return DiagonalGaussian.from_moments(self.encode_moments(images))

    def decode(self, z: Tensor) -> Tensor:
        """(B, C, h, w) unscaled -> (B, 3, H, W), about in [-1, 1]."""
        x = self.decoder(self.post_quant_conv(z.contiguous(memory_format=self.memory_format)))
        return F.pixel_shuffle(x, self.patch) if self.patch > 1 else x

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Decode of the posterior's mean."""
        return self.decode(self.encode(images).mean)
