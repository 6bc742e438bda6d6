"""The time-conditional U-Net of latent diffusion, with and without cross-attention (Rombach et al. 2022, sec. 3.2-3.3).

With the defaults, shapes and names are those of diffusers' `UNet2DConditionModel`; with transformer_depth 0, those of
its `UNet2DModel`: the weights load there unchanged. Additions: per-level switches for self- and cross-attention, and a
vector condition (pooled text) added to the time embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.common.errors import UserError
from train.models.attention import PixelAttention, SpatialTransformer, attention_backend
from train.models.resblocks import Downsample, ResnetBlock, Upsample, through

GRAPHS_A_SHAPE = 2  # one with gradients, one without (to count FLOPs)


def sinusoidal_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Timesteps (B,), in thousandths of the process -> (B, dim), cosines first (Ho et al. 2020; as in SD)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers on the sinusoids, or on a vector condition: (B, Din) -> (B, D)."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


MakeAttention = Callable[[], nn.Module]  # a module (x (B, C, h, w), context, mask) -> (B, C, h, w)


class AttentionKind(NamedTuple):
    """Attention options that all levels share. depth: of the transformers; 0: plain attention over pixels."""

    depth: int
    context_dim: int | None
    linear_projection: bool
    norm_groups: int

    def of(self, channels: int, heads: int, self_attention: bool) -> MakeAttention:
        """A factory for the attention modules of one level."""
        if self.depth == 0:
            return partial(PixelAttention, channels, self.norm_groups, heads, eps=1e-5)
        make = partial(SpatialTransformer, channels, self.context_dim, heads, channels // heads, self.depth)
        return partial(make, self_attention, self.linear_projection, self.norm_groups)


class DownBlock(nn.Module):
    """`layers` residual blocks, each followed by attention if the level has it; then downsampling by 2."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_dim: int,
        layers: int,
        norm_groups: int,
        attention: MakeAttention | None,
        downsample: bool,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, time_dim, norm_groups)
            for i in range(layers)
        )
        if attention is not None:
            self.attentions = nn.ModuleList(attention() for _ in range(layers))
        self.has_attention = attention is not None
        self.downsamplers = nn.ModuleList([Downsample(out_channels)]) if downsample else None

    def forward(
        self, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb)
            if self.has_attention:
                x = self.attentions[i](x, context, mask)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, time_dim: int, norm_groups: int, attention: MakeAttention) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([attention()])
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, time_dim, norm_groups) for _ in range(2))

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None = None) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, emb), context, mask)
        return self.resnets[1](x, emb)


class UpBlock(nn.Module):
    """Like DownBlock, but each residual block takes one skip; then upsampling by 2."""

    def __init__(
        self,
        in_channels: int,
        skip_channels: Sequence[int],
        out_channels: int,
        time_dim: int,
        norm_groups: int,
        attention: MakeAttention | None,
        upsample: bool,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock((in_channels if i == 0 else out_channels) + skip, out_channels, time_dim, norm_groups)
            for i, skip in enumerate(skip_channels)
        )
        if attention is not None:
            self.attentions = nn.ModuleList(attention() for _ in skip_channels)
        self.has_attention = attention is not None
        self.upsamplers = nn.ModuleList([Upsample(out_channels)]) if upsample else None

    def forward(
        self, x: Tensor, skips: list[Tensor], emb: Tensor, context: Tensor | None, mask: Tensor | None = None
    ) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips[-1 - i]], dim=1), emb)
            if self.has_attention:
                x = self.attentions[i](x, context, mask)
        return x if self.upsamplers is None else self.upsamplers[0](x)


def _down_blocks(
    channels: Sequence[int], layers: int, time_dim: int, norm_groups: int, attentions: Sequence[MakeAttention | None]
) -> nn.ModuleList:
    """From the highest resolution to the lowest; the last block keeps its resolution."""
    inputs, last = [channels[0], *channels[:-1]], len(channels) - 1
    return nn.ModuleList(
        DownBlock(inputs[level], width, time_dim, layers, norm_groups, attentions[level], downsample=level < last)
        for level, width in enumerate(channels)
    )


def _up_blocks(
    channels: Sequence[int], layers: int, time_dim: int, norm_groups: int, attentions: Sequence[MakeAttention | None]
) -> nn.ModuleList:
    """From the lowest resolution to the highest, with one residual block more per level than on the way down; each
    takes the output of conv_in or of a layer on the way down as its skip."""
    skips = [channels[0]]
    for level, width in enumerate(channels):
        skips += [width] * (layers + (level < len(channels) - 1))
    blocks, below = nn.ModuleList(), channels[-1]
    for level in reversed(range(len(channels))):
        taken = [skips.pop() for _ in range(layers + 1)]
        make, upsample = attentions[level], level > 0
        blocks.append(UpBlock(below, taken, channels[level], time_dim, norm_groups, make, upsample))
        below = channels[level]
    return blocks


class UNet(nn.Module):
    """(x_t (B, C, h, w), t (B,), context (B, T, D), vector (B, P), mask (B, T) of the context) -> (B, C, h, w).

    t is in thousandths of the process (0..999 for Stable Diffusion). h and w must be divisible by 2^(levels - 1).
    """

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        context_dim: int | None = 768,
        vector_dim: int | None = None,  # width of a pooled condition added to the time embedding
        attention_levels: Sequence[bool] = (True, True, True, False),
        self_attention_levels: Sequence[bool] | None = None,  # levels with self-attention; None: all
        heads: int | Sequence[int] = 8,  # per level; SD 1.x: 8 everywhere, SD 2.x: 5, 10, 20, 20
        transformer_depth: int = 1,  # 0: plain attention over pixels, for a U-Net without context
        linear_projection: bool = False,
        norm_groups: int = 32,
        channels_last: bool = False,  # memory format of the activations: faster on CPUs and in bf16
        zero_init: bool = False,  # zeros in the last layer of each residual branch and of the U-Net, as in CompVis
    ) -> None:
        super().__init__()
        heads = [heads] * len(channels) if isinstance(heads, int) else list(heads)
        self_attention_levels = [True] * len(channels) if self_attention_levels is None else self_attention_levels
        _check_levels(channels, attention_levels, self_attention_levels, heads, norm_groups)
        _check_pixel_attention(transformer_depth, context_dim, self_attention_levels)
        self.in_channels, self.context_dim, self.vector_dim = in_channels, context_dim, vector_dim
        self.base_channels, self.heads, self.checkpoint_activations = channels[0], heads, False
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        kind = AttentionKind(transformer_depth, context_dim, linear_projection, norm_groups)
        attentions = [kind.of(*of_level) for of_level in zip(channels, heads, self_attention_levels, strict=True)]
        time_dim = 4 * channels[0]
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], time_dim)
        if vector_dim is not None:
            self.vector_embedding = TimestepEmbedding(vector_dim, time_dim)
        chosen = [make if there else None for make, there in zip(attentions, attention_levels, strict=True)]
        self.down_blocks = _down_blocks(channels, layers_per_block, time_dim, norm_groups, chosen)
        self.mid_block = MidBlock(channels[-1], time_dim, norm_groups, attentions[-1])
        self.up_blocks = _up_blocks(channels, layers_per_block, time_dim, norm_groups, chosen)
        self.conv_norm_out = nn.GroupNorm(norm_groups, channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)
        if zero_init:
            for layer in _last_layers(self):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        vector: Tensor | None = None,
        mask: Tensor | None = None,  # None: all tokens of the context are attended to
    ) -> Tensor:
        dtype = self.conv_in.weight.dtype
        x = x.to(dtype, memory_format=self.memory_format)
        context = None if context is None else context.to(dtype)
        emb = self.time_embedding(sinusoidal_embedding(t, self.base_channels).to(dtype))
        if self.vector_dim is not None:
            emb = emb + self.vector_embedding(vector.to(dtype))
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x, new_skips = self._through(block, x, emb, context, mask)
            skips += new_skips
        x = self._through(self.mid_block, x, emb, context, mask)
        for block in self.up_blocks:
            count = len(block.resnets)
            x = self._through(block, x, skips[-count:], emb, context, mask)
            del skips[-count:]
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def tune(self, compiled: bool, checkpoint_activations: bool) -> None:
        """Options for training. Checkpointing stores only the inputs of each block and recomputes the rest."""
        self.checkpoint_activations = checkpoint_activations
        if compiled:  # else torch.compile would trace into the probe and break the graph at each attention
            torch.compiler.assume_constant_result(attention_backend)
            self.compile(dynamic=False)  # one graph per shape: each is as fast as in a run on one shape

    def _through(self, block: nn.Module, *arguments: Any) -> Any:
        return through(block, *arguments, keep=not self.checkpoint_activations)


def _last_layers(unet: UNet) -> Iterator[nn.Module]:
    """The last layer of each residual block and attention, and of the U-Net: the function starts as the identity of
    every branch, and its output at zero (Dhariwal & Nichol 2021; CompVis' zero_module)."""
    for module in unet.modules():
        if isinstance(module, ResnetBlock):
            yield module.conv2
        elif isinstance(module, SpatialTransformer):
            yield module.proj_out
        elif isinstance(module, PixelAttention):
            yield module.to_out[0]
    yield unet.conv_out


def allow_graphs(shapes: int) -> None:
    """Let torch.compile keep the graphs of this many latent shapes: beyond its limit of 8 graphs, it would only warn
    and run the network uncompiled."""
    import torch._dynamo  # takes seconds to import

    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, GRAPHS_A_SHAPE * shapes)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, config.recompile_limit)


def _check_levels(
    channels: Sequence[int],
    attention: Sequence[bool],
    self_attention: Sequence[bool],
    heads: Sequence[int],
    groups: int,
) -> None:
    if not len(channels) == len(attention) == len(self_attention) == len(heads):
        raise UserError(
            f"unet: {len(channels)} channels, {len(attention)} attention_levels, {len(self_attention)} "
            f"self_attention_levels and {len(heads)} heads: each must have one entry per level."
        )
    for width, count in zip(channels, heads, strict=True):
        if width % count or width % groups:
            raise UserError(f"unet: {width} channels must be a multiple of {count} heads and of {groups} norm groups.")


def _check_pixel_attention(depth: int, context_dim: int | None, self_attention: Sequence[bool]) -> None:
    if depth == 0 and context_dim is not None:
        raise UserError(
            "unet.transformer_depth=0 uses no context: set unet.context_dim=null, or a depth of at least 1."
        )
    if depth == 0 and not all(self_attention):
        raise UserError(
            "unet.transformer_depth=0 means self-attention only: choose its levels in unet.attention_levels, and "
            "leave unet.self_attention_levels=null."
        )
