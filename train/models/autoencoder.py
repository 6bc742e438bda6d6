"""First stages of latent diffusion (Rombach et al. 2022, sec. 3.1, app. G): KL-regularised, VQ-regularised, identity.

With the defaults, shapes and names are those of diffusers' `AutoencoderKL` and `VQModel`. An addition is the
pixel-unshuffle stem (`patch`), which saves the full-resolution level, costly on a CPU. Precompute and sampling use only
data_pipeline.encode.encoders.ImageEncoder, `latent_channels`, `decode` and `reconstruct` of each class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.common.errors import UserError
from train.models.attention import PixelAttention, attention_backend
from train.models.quantizer import Quantizer
from train.models.resblocks import Downsample, ResnetBlock, Upsample, through

ENCODER = ("encoder.", "quant_conv.", "quantize.")  # prefixes of the weights that determine the latents


@dataclass(frozen=True, slots=True)
class DiagonalGaussian:
    """The posterior q(z|x): mean and log-variance, each (B, C, h, w)."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> DiagonalGaussian:
        """(B, 2C, h, w), means first; log-variances are clamped to [-30, 20] as in CompVis' code."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, the reparameterization of Kingma & Welling 2014, eq. 10."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) in nats, summed over each picture: (B,)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum((1, 2, 3))


@dataclass(frozen=True, slots=True)
class Trunk:
    """Options that encoder and decoder share; channels and attention per level, full resolution first."""

    channels: Sequence[int]
    attention: Sequence[bool]
    layers: int
    norm_groups: int
    mid_attention: bool


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
    """Residual blocks, each followed by attention or not, then `downsamplers` or `upsamplers`, if any."""

    def __init__(
        self, in_channels: int, out_channels: int, layers: int, norm_groups: int, attention: bool, resample: str | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, None, norm_groups, eps=1e-6)
            for i in range(layers)
        )
        self.attentions = nn.ModuleList(PixelAttention(out_channels, norm_groups) for _ in range(layers * attention))
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(out_channels, asymmetric=True)])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(out_channels)])
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.attentions:
                x = self.attentions[i](x)
        if self.resample is None:
            return x
        return (self.downsamplers if self.resample == "down" else self.upsamplers)[0](x)


def levels_of(
    channels: Sequence[int], attention: Sequence[bool], layers: int, norm_groups: int, resample: str
) -> nn.ModuleList:
    """Levels in the order of the forward pass; the last one keeps its resolution."""
    last = len(channels) - 1
    return nn.ModuleList(
        Level(channels[max(i - 1, 0)], width, layers, norm_groups, attention[i], resample if i < last else None)
        for i, width in enumerate(channels)
    )


class Encoder(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> (B, out_channels, H/f, W/f)."""

    def __init__(self, in_channels: int, out_channels: int, trunk: Trunk) -> None:
        super().__init__()
        widths, groups = trunk.channels, trunk.norm_groups
        self.checkpoint_activations = False
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks = levels_of(widths, trunk.attention, trunk.layers, groups, "down")
        self.mid_block = AutoencoderMid(widths[-1], groups, trunk.mid_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.down_blocks, self.mid_block):
            x = through(block, x, keep=not self.checkpoint_activations)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """(B, C, H/f, W/f) -> (B, channels[0], H, W), the input of `conv_out`, which gives (B, 3, H, W).

    `conv_out` is applied by the caller, outside of the compiled graph: the adversary differentiates twice there, and a
    compiled backward pass frees its buffers.
    """

    def __init__(self, in_channels: int, out_channels: int, trunk: Trunk) -> None:
        super().__init__()
        widths, groups = trunk.channels[::-1], trunk.norm_groups
        self.checkpoint_activations = False
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.mid_block = AutoencoderMid(widths[0], groups, trunk.mid_attention)
        self.up_blocks = levels_of(widths, trunk.attention[::-1], trunk.layers + 1, groups, "up")
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for block in (self.mid_block, *self.up_blocks):
            x = through(block, x, keep=not self.checkpoint_activations)
        return F.silu(self.conv_norm_out(x))


class Autoencoder(nn.Module):
    """Base of both regularisations: pictures (B, 3, H, W) <-> (B, C, H/f, W/f), f = patch * 2^(levels - 1)."""

    fingerprint = ""  # of configuration and weights, if loaded
    stated_scaling: Mapping[str, Sequence[float]] | None = None  # mean and std per channel, if a loaded folder has them

    def __init__(
        self,
        latent_channels: int = 4,
        channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_groups: int = 32,
        mid_attention: bool = True,
        patch: int = 1,  # pixel-unshuffle before the encoder, pixel-shuffle after the decoder
        attention_levels: Sequence[bool] | None = None,  # attention after each residual block; None: in no level
        channels_last: bool = False,  # memory format of the activations: faster on CPUs and in bf16
        quant_conv: bool = True,  # 1x1 convolutions next to the latents; SD3's and FLUX' autoencoders have none
        encoded_channels: int | None = None,  # output channels of the encoder; None: latent_channels
    ) -> None:
        super().__init__()
        pixels, encoded = 3 * patch * patch, encoded_channels or latent_channels
        self.patch, self.latent_channels = patch, latent_channels
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.factor = patch * 2 ** (len(channels) - 1)
        attention = [False] * len(channels) if attention_levels is None else list(attention_levels)
        if len(attention) != len(channels):
            raise UserError(
                f"autoencoder.attention_levels={attention} must have {len(channels)} entries, one per level."
            )
        trunk = Trunk(list(channels), attention, layers_per_block, norm_groups, mid_attention)
        self.encoder = Encoder(pixels, encoded, trunk)
        self.decoder = Decoder(latent_channels, pixels, trunk)
        self.quant_conv = nn.Conv2d(encoded, encoded, 1) if quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if quant_conv else nn.Identity()

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weights: the adaptive weight compares the two losses' gradients there."""
        return self.decoder.conv_out.weight

    def tune(self, compiled: bool, checkpoint_activations: bool) -> None:
        """Options for training. Checkpointing stores only the inputs of each level and recomputes the rest."""
        for part in (self.encoder, self.decoder):
            part.checkpoint_activations = checkpoint_activations
            if compiled:
                torch.compiler.assume_constant_result(attention_backend)  # as in UNet.tune
                part.compile(dynamic=False)

    def freeze_encoder(self) -> None:
        """Train only the decoder, so that latents made before can be decoded."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not name.startswith(ENCODER))

    def encoded(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, encoded_channels, h, w)."""
        x = F.pixel_unshuffle(images, self.patch) if self.patch > 1 else images
        return self.quant_conv(self.encoder(x.contiguous(memory_format=self.memory_format)))

    def decoded(self, z: Tensor) -> Tensor:
        """(B, C, h, w), as the decoder receives them in training -> (B, 3, H, W), approximately in [-1, 1]."""
        features = self.decoder(self.post_quant_conv(z.contiguous(memory_format=self.memory_format)))
        x = self.decoder.conv_out(features)
        return F.pixel_shuffle(x, self.patch) if self.patch > 1 else x


class AutoencoderKL(Autoencoder):
    """Gaussian posterior, weakly regularised to N(0, 1); its moments are stored. Keyword arguments of Autoencoder."""

    stored_as = "moments"

    def __init__(self, latent_channels: int = 4, **options: int | bool | Sequence[int]) -> None:
        super().__init__(latent_channels, encoded_channels=2 * latent_channels, **options)

    def encode_moments(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 2C, h, w): the posterior's mean and log-variance, unscaled."""
        return self.encoded(images)

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """The posterior of each picture."""
        return DiagonalGaussian.from_moments(self.encoded(images))

    def encode_stored(self, images: Tensor) -> Tensor:
        """The moments, so that each read can draw a new sample from the posterior."""
        return self.encoded(images)

    def posterior_of(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """Moments (B, 2C, h, w) -> mean and variance, each (B, C, h, w)."""
        posterior = DiagonalGaussian.from_moments(stored)
        return posterior.mean, posterior.logvar.exp()

    def decode(self, z: Tensor) -> Tensor:
        """(B, C, h, w) unscaled -> (B, 3, H, W), approximately in [-1, 1]."""
        return self.decoded(z)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """The decoded mean of the posterior."""
        return self.decode(self.encode(images).mean)


class VQModel(Autoencoder):
    """Codebook of codebook_size latent vectors; indices are stored. Other keyword arguments: those of Autoencoder.

    The quantization layer belongs to the decoder (Rombach et al. 2022, sec. 3.1), so a diffusion model's latents need
    not be codes.
    """

    stored_as = "indices"

    def __init__(
        self, latent_channels: int = 3, codebook_size: int = 8192, **options: int | bool | Sequence[int]
    ) -> None:
        super().__init__(latent_channels, **options)
        self.quantize = Quantizer(codebook_size, latent_channels)

    @property
    def codebook(self) -> Tensor:
        """The N codes, (N, C)."""
        return self.quantize.embedding.weight

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, h, w), not yet quantized."""
        return self.encoded(images)

    def encode_stored(self, images: Tensor) -> Tensor:
        """The nearest codes' indices, (B, h, w) int64."""
        return self.quantize(self.encoded(images)).indices

    def posterior_of(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """Indices (B, h, w) -> the codes, and a variance of zero, each (B, C, h, w)."""
        codes = self.codebook[stored.to(self.codebook.device)].permute(0, 3, 1, 2)  # (B, h, w, C) -> (B, C, h, w)
        return codes, torch.zeros_like(codes)

    def decode(self, z: Tensor) -> Tensor:
        """(B, C, h, w) unscaled, quantized first -> (B, 3, H, W), approximately in [-1, 1]."""
        return self.decoded(self.quantize(z).z)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """The decoded nearest codes."""
        return self.decode(self.encode(images))


class Identity(nn.Module):
    """No first stage: the latents are the pixels, and the diffusion model works in pixel space."""

    stored_as, fingerprint, latent_channels, factor = "pixels", "identity", 3, 1
    stated_scaling: Mapping[str, Sequence[float]] | None = None

    def encode_stored(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), unchanged."""
        return images

    def posterior_of(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """The pixels, and a variance of zero."""
        return stored, torch.zeros_like(stored)

    def decode(self, z: Tensor) -> Tensor:
        """(B, 3, H, W), unchanged."""
        return z

    def reconstruct(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), unchanged."""
        return images
