"""A classifier of noisy latents: the U-Net's downsampling half, pooled (Dhariwal & Nichol 2021, sec. 4 and app. H)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.models.attention import PixelAttention
from train.models.unet import DownBlock, MidBlock, TimestepEmbedding, sinusoidal_embedding


class NoisyClassifier(nn.Module):
    """(x_t (B, C, h, w), t (B,) in thousandths of the process) -> logits (B, classes)."""

    def __init__(
        self,
        in_channels: int,
        classes: int,
        channels: Sequence[int] = (64, 128),
        layers_per_block: int = 1,
        heads: int = 4,
        norm_groups: int = 16,
    ) -> None:
        super().__init__()
        time_dim, widest, levels = 4 * channels[0], channels[-1], len(channels)
        self.base_channels = channels[0]
        self.time_embedding = TimestepEmbedding(channels[0], time_dim)
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(channels[max(i - 1, 0)], width, time_dim, layers_per_block, norm_groups, None, i < levels - 1)
            for i, width in enumerate(channels)
        )
        attention = partial(PixelAttention, widest, norm_groups, heads, eps=1e-5)
        self.mid_block = MidBlock(widest, time_dim, norm_groups, attention)
        self.norm_out = nn.GroupNorm(norm_groups, widest)
        self.out = nn.Linear(widest, classes)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        dtype = self.conv_in.weight.dtype
        emb = self.time_embedding(sinusoidal_embedding(t, self.base_channels).to(dtype))
        x = self.conv_in(x.to(dtype))
        for block in self.down_blocks:
            x, _ = block(x, emb, None)
        x = F.silu(self.norm_out(self.mid_block(x, emb, None)))
        return self.out(x.mean((2, 3))).float()

    def log_prob(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """log p(label | x_t) for each row, (B,)."""
        return self(x, t).log_softmax(-1).gather(1, labels[:, None])[:, 0]


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Fraction of rows whose highest logit is that of the label, a scalar."""
    return (logits.argmax(-1) == labels).to(torch.float32).mean()
