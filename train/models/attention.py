"""The attention function of all models, and latent diffusion's spatial transformer (Rombach et al. 2022, sec. 3.3).

Parameter names are those of diffusers' `Transformer2DModel`, so that weights load there unchanged.
Letters: B batch, T tokens (h*w or text length), C channels, H heads, D head width.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor, nn
from torch.nn import functional as F

log = logging.getLogger(__name__)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, all (B, T, H, D) -> (B, T, H, D). mask (B, S): keys that are attended to, at least
    one a row; None: all, which costs nothing."""
    if attention_backend(q.device.type, q.dtype, q.shape[-1], mask is not None) == "xformers":
        import xformers.ops

        bias = None if mask is None else _bias(mask, q)
        return xformers.ops.memory_efficient_attention(q, k, v, attn_bias=bias)
    dtype = q.dtype
    # On a CPU the bf16 kernel takes four to eight times as long as the fp32 kernel, mainly in the backward pass.
    half = dtype in (torch.bfloat16, torch.float16)
    working = torch.float32 if half and q.device.type == "cpu" else dtype
    q, k, v = (x.transpose(1, 2).to(working) for x in (q, k, v))  # (B, T, H, D) -> (B, H, T, D)
    mask = None if mask is None else mask[:, None, None]  # (B, S) -> (B, 1, 1, S)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).to(dtype)


def _bias(mask: Tensor, q: Tensor) -> Tensor:
    """A mask (B, S) as xformers' bias (B, H, T, S), 0 or -inf. Heads and queries share one row of memory, whose length
    is a multiple of 8, as the kernels require."""
    rows, keys = mask.shape
    bias = q.new_full((rows, 1, 1, -(-keys // 8) * 8), -torch.inf)[..., :keys]
    bias = bias.masked_fill_(mask[:, None, None], 0.0)
    return bias.expand(rows, q.shape[2], q.shape[1], keys)


def attention_backend(device_type: str, dtype: torch.dtype, head_dim: int, masked: bool = False) -> str:
    """The backend that can run forward and backward for this device, dtype and head width, with a mask or without:
    "xformers" or "sdpa"."""
    return _probed(device_type, dtype, head_dim, masked)


@functools.cache
def _probed(device_type: str, dtype: torch.dtype, head_dim: int, masked: bool) -> str:
    if device_type != "cuda":
        return "sdpa"
    try:
        import xformers.ops
        from xformers.ops.fmha import common

        # xformers' C extension may not load with a newer CUDA, but the kernels that it dispatches to are torch's own.
        common._built_with_cuda = True
        probe = torch.randn(2, 16, 2, head_dim, device=device_type, dtype=dtype, requires_grad=True)
        with torch.enable_grad():
            bias = _bias(torch.ones(2, 13, dtype=torch.bool, device=device_type), probe) if masked else None
            keys = probe[:, :13] if masked else probe
            xformers.ops.memory_efficient_attention(probe, keys, keys, attn_bias=bias).sum().backward()
    except Exception as error:  # whatever the error, training can continue with sdpa; the log says so
        what = f"{dtype} with head width {head_dim}{' and a mask' if masked else ''}"
        log.warning("attention: xformers can't run %s (%s); using sdpa", what, error)
        return "sdpa"
    return "xformers"


class Attention(nn.Module):
    """Multi-head attention: queries from x (B, T, C), keys and values from the context (B, S, D) or from x itself; with
    a mask (B, S), only from the tokens where it is true."""

    def __init__(
        self, channels: int, context_dim: int | None, heads: int, head_dim: int, qkv_bias: bool = False
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_q = nn.Linear(channels, inner, bias=qkv_bias)
        self.to_k = nn.Linear(context_dim or channels, inner, bias=qkv_bias)
        self.to_v = nn.Linear(context_dim or channels, inner, bias=qkv_bias)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])  # a list because diffusers has dropout after it

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)) for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )  # (B, T, H*D) -> (B, T, H, D)
        return self.to_out[0](attention(q, k, v, mask).flatten(2))


class PixelAttention(Attention):
    """Self-attention over pixels, residual: (B, C, h, w) -> (B, C, h, w). The autoencoder uses one head and eps 1e-6.

    The unconditional U-Net (Dhariwal & Nichol 2021; Rombach et al. 2022, app. E) uses any number of heads. No context.
    """

    def __init__(self, channels: int, norm_groups: int, heads: int = 1, eps: float = 1e-6) -> None:
        super().__init__(channels, None, heads, channels // heads, qkv_bias=True)
        self.group_norm = nn.GroupNorm(norm_groups, channels, eps=eps)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        y = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, h*w, C)
        return x + super().forward(y).transpose(1, 2).unflatten(2, x.shape[-2:])


class GEGLU(nn.Module):
    """x W * gelu(x V) (Shazeer 2020)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to `expansion` times the width, then a linear layer back."""

    def __init__(self, channels: int, expansion: int = 4) -> None:
        super().__init__()
        inner = expansion * channels
        self.net = nn.ModuleList([GEGLU(channels, inner), nn.Identity(), nn.Linear(inner, channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention (optional), cross-attention to the context (optional), feed-forward; each pre-normed, residual."""

    def __init__(
        self, channels: int, context_dim: int | None, heads: int, head_dim: int, self_attention: bool = True
    ) -> None:
        super().__init__()
        self.self_attention, self.cross_attention = self_attention, context_dim is not None
        if self_attention:
            self.norm1 = nn.LayerNorm(channels)
            self.attn1 = Attention(channels, None, heads, head_dim)
        if context_dim is not None:
            self.norm2 = nn.LayerNorm(channels)
            self.attn2 = Attention(channels, context_dim, heads, head_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None = None) -> Tensor:
        if self.self_attention:
            x = x + self.attn1(self.norm1(x))
        if self.cross_attention:
            x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over a picture's pixels as a sequence: (B, C, h, w) -> (B, C, h, w), residual.

    linear_projection: proj_in and proj_out as linear layers (SD 2.x) instead of 1x1 convolutions (SD 1.x).
    """

    def __init__(
        self,
        channels: int,
        context_dim: int | None,
        heads: int,
        head_dim: int,
        depth: int = 1,
        self_attention: bool = True,
        linear_projection: bool = False,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.linear_projection = linear_projection
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner) if linear_projection else nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(inner, context_dim, heads, head_dim, self_attention) for _ in range(depth)
        )
        self.proj_out = nn.Linear(inner, channels) if linear_projection else nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None = None) -> Tensor:
        h, w = x.shape[-2:]
        y = self.norm(x)
        if not self.linear_projection:
            y = self.proj_in(y)
        y = y.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, h*w, C)
        if self.linear_projection:
            y = self.proj_in(y)
        for block in self.transformer_blocks:
            y = block(y, context, mask)
        if self.linear_projection:
            y = self.proj_out(y)
        y = y.transpose(1, 2).unflatten(2, (h, w))  # (B, h*w, C) -> (B, C, h, w)
        if not self.linear_projection:
            y = self.proj_out(y)
        return x + y
