"""Vector quantization with a learned codebook (van den Oord et al. 2017), the regulariser of VQ first stages.

Letters: B batch, C channels of a latent and of a code, h x w latent resolution, N codes, M = B*h*w vectors of a batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

DISTANCES_AT_ONCE = 2**25  # 128 MiB in fp32: all of them at once would be gigabytes for a codebook of 16384


class Quantized(NamedTuple):
    """Latents as codes; the losses have equal values and different gradients (van den Oord et al. 2017, eq. 3)."""

    z: Tensor  # (B, C, h, w), the nearest codes; its gradient goes straight through to the encoder
    indices: Tensor  # (B, h, w), int64
    codebook: Tensor  # (B,), mean of (sg[z] - e)^2: moves codes to encoder outputs
    commitment: Tensor  # (B,), mean of (z - sg[e])^2: moves encoder outputs to codes
    revival: Tensor | None  # scalar: moves unused codes


class Quantizer(nn.Module):
    """The codebook, and the nearest code of each latent vector. Named as diffusers' VectorQuantizer."""

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, channels)
        nn.init.uniform_(self.embedding.weight, -1.0 / codes, 1.0 / codes)

    def forward(self, z: Tensor, anchors: Tensor | None = None) -> Quantized:
        """(B, C, h, w) -> Quantized, in fp32 but for its z. anchors (N, C): standard normal, adds the revival."""
        codes, latents = self.embedding.weight.float(), z.float()
        vectors = latents.permute(0, 2, 3, 1).flatten(0, 2)  # (B, C, h, w) -> (M, C)
        flat = nearest(vectors, codes)
        indices = flat.view(len(z), *z.shape[2:])
        e = codes[indices].permute(0, 3, 1, 2)  # (B, h, w, C) -> (B, C, h, w)
        through = e.detach() + (latents - latents.detach())  # exactly e, with the gradient of z
        return Quantized(
            through.to(z.dtype),
            indices,
            (latents.detach() - e).square().mean((1, 2, 3)),
            (latents - e.detach()).square().mean((1, 2, 3)),
            None if anchors is None else revival(vectors.detach(), codes, flat, anchors),
        )


@torch.no_grad()
def nearest(vectors: Tensor, codes: Tensor) -> Tensor:
    """argmin_k |v - e_k|^2, the first of equals: (M, C), (N, C) -> (M,).

    |v|^2 is left out: it is the same for all codes, and would cost the digits that tell near codes apart.
    """
    squares, rows = codes.square().sum(1), max(DISTANCES_AT_ONCE // len(codes), 1)
    return torch.cat([torch.addmm(squares, part, codes.T, alpha=-2).argmin(1) for part in vectors.split(rows)])


def revival(vectors: Tensor, codes: Tensor, indices: Tensor, anchors: Tensor) -> Tensor:
    """What brings dead codes back: squared distance of each code unused in this batch to an encoder output of it,
    divided among all N codes.

    Each code has an output of its own, the nearest to mean + std * anchor: fixed anchors spread the codes as the
    outputs are spread. A code in use feels its own pictures more than this; a dead one feels nothing else, and Adam
    then moves it at the full learning rate, whatever the weight of this loss.

    It is a loss, and a function of weights and batch alone, because of ZeRO: a code written in place would be lost at
    the next step, behind which stands the optimizer's fp32 master copy, of which each rank holds a part; and counts of
    use would be a state that differs between ranks and must be resumed. This gradient is averaged over ranks as all
    are. A batch is a rank's micro-batch here: so what is pulled where depends on their number, as a statistic does.
    """
    with torch.no_grad():
        goals = vectors.mean(0) + vectors.std(0) * anchors
        targets = vectors[nearest(goals, vectors)]
        unused = torch.bincount(indices, minlength=len(codes)) == 0
    return ((codes - targets).square().mean(1) * unused).mean()


def usage(indices: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Of a batch of indices, how many codes it uses, and its perplexity exp(-sum p log p): `codes` at most."""
    counts = torch.bincount(indices.flatten(), minlength=codes).float()
    return (counts > 0).sum().float(), torch.special.entr(counts / counts.sum()).sum().exp()
