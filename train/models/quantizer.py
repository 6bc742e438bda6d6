"""Vector quantization with a learned codebook (van den Oord et al. 2017), the regulariser of VQ first stages.

Letters: B batch, C channels of a latent and of a code, h x w latent resolution, N codes, M = B*h*w vectors of a batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

DISTANCES_AT_ONCE = 2**25  # 128 MiB in fp32; all at once would take gigabytes with a codebook of 16384


class Quantized(NamedTuple):
    """Latents as codes. Both losses have equal values but different gradients (van den Oord et al. 2017, eq. 3)."""

    z: Tensor  # (B, C, h, w), the nearest codes; straight-through gradient to the encoder
    indices: Tensor  # (B, h, w), int64
    codebook: Tensor  # (B,), mean of (sg[z] - e)^2: moves codes to encoder outputs
    commitment: Tensor  # (B,), mean of (z - sg[e])^2: moves encoder outputs to codes
    revival: Tensor | None  # scalar: moves unused codes


class Quantizer(nn.Module):
    """The codebook, and the nearest code of each latent vector. Parameter names of diffusers' VectorQuantizer."""

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, channels)
        nn.init.uniform_(self.embedding.weight, -1.0 / codes, 1.0 / codes)

    def forward(self, z: Tensor, anchors: Tensor | None = None) -> Quantized:
        """(B, C, h, w) -> Quantized, in fp32 except z. anchors (N, C): standard normal; if given, adds the revival."""
        codes, latents = self.embedding.weight.float(), z.float()
        vectors = latents.permute(0, 2, 3, 1).flatten(0, 2)  # (B, C, h, w) -> (M, C)
        flat = nearest(vectors, codes)
        indices = flat.view(len(z), *z.shape[2:])
        e = codes[indices].permute(0, 3, 1, 2)  # (B, h, w, C) -> (B, C, h, w)
        through = e.detach() + (latents - latents.detach())  # value e exactly, gradient of z
        return Quantized(
            through.to(z.dtype),
            indices,
            (latents.detach() - e).square().mean((1, 2, 3)),
            (latents - e.detach()).square().mean((1, 2, 3)),
            None if anchors is None else revival(vectors.detach(), codes, flat, anchors),
        )


@torch.no_grad()
def nearest(vectors: Tensor, codes: Tensor) -> Tensor:
    """argmin_k |v - e_k|^2, the first index in a tie: (M, C), (N, C) -> (M,).

    |v|^2 is left out: it is the same for all codes, and adding it would round away differences between close codes.
    """
    squares, rows = codes.square().sum(1), max(DISTANCES_AT_ONCE // len(codes), 1)
    return torch.cat([torch.addmm(squares, part, codes.T, alpha=-2).argmin(1) for part in vectors.split(rows)])


def revival(vectors: Tensor, codes: Tensor, indices: Tensor, anchors: Tensor) -> Tensor:
    """Loss that revives dead codes: squared distance of each code that the batch does not use to one of the batch's
    encoder outputs, divided by all N codes.

    The target of each code is the output nearest to mean + std * anchor, so fixed anchors spread the codes as the
    outputs are spread. For a code in use, the gradients of its own pictures dominate; a dead code gets no other
    gradient, so Adam moves it at the full learning rate, independent of the weight of this loss.

    ZeRO is the reason that this is a loss, and a function of weights and batch alone. A code written in place would be
    overwritten at the next step from the optimizer's fp32 master copy, of which each rank holds a part; usage counts
    would be state that differs between ranks and must be resumed. This gradient is averaged over ranks like all others.
    The batch here is one rank's micro-batch, so the targets depend on the number of ranks, as batch statistics do.
    """
    with torch.no_grad():
        goals = vectors.mean(0) + vectors.std(0) * anchors
        targets = vectors[nearest(goals, vectors)]
        unused = torch.bincount(indices, minlength=len(codes)) == 0
    return ((codes - targets).square().mean(1) * unused).mean()


def counts_of(indices: Tensor, codes: int) -> Tensor:
    """How often each of `codes` codes occurs: (codes,) fp32."""
    return torch.bincount(indices.flatten(), minlength=codes).float()


def usage(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Number of codes that are used, and the perplexity exp(-sum p log p), at most the number of codes. counts: of each
    code, (N,), or multiples of that."""
    return (counts > 0).sum().float(), torch.special.entr(counts / counts.sum()).sum().exp()
