"""Conditions whose tokens are learnt with the U-Net: a class, boxes, a picture's embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from train.models.attention import TransformerBlock
from train.models.conditioning import Conditioner, Conditioning, DataFacts, Parts


class ClassLabel(Conditioner):
    """One token (B, 1, D), a learnt vector per class, and one more as the null (Rombach et al. 2022, app. E.1)."""

    needs = ("label",)

    def __init__(self, facts: DataFacts, dim: int) -> None:
        super().__init__()
        self.context_dim = dim
        self.embedding = nn.Embedding(len(facts.classes("label")) + 1, dim)

    def forward(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Conditioning:
        label = fields["label"]
        none = label.new_full((1,), self.embedding.num_embeddings - 1)
        rows = self.embedding(torch.cat([label, none]))[:, None]  # not its .weight: ZeRO stage 3 may have released it
        return Conditioning(Parts(rows[:-1]), Parts(rows[-1:]))


class LayoutTokens(Conditioner):
    """One token per box (B, N, D): the vector of its class and sinusoids of its corners, through transformer blocks.

    Like tau for layouts (Rombach et al. 2022, sec. 4.3.1), but the corners are numbers, not tokens of a vocabulary.
    The null is a layout without boxes.
    """

    needs = ("boxes", "box_label")
    FREQUENCIES = 8

    def __init__(self, facts: DataFacts, dim: int, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.context_dim = dim
        self.embedding = nn.Embedding(len(facts.classes("layout")) + 1, dim)  # index 0: no box
        self.corners = nn.Linear(4 * 2 * self.FREQUENCIES, dim)
        self.blocks = nn.ModuleList(TransformerBlock(dim, None, heads, dim // heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Conditioning:
        boxes, labels = fields["boxes"], fields["box_label"]
        # One more row, without boxes, so that the null passes through the same weights.
        boxes = torch.cat([boxes, torch.zeros_like(boxes[:1])])  # (B + 1, N, 4)
        labels = torch.cat([labels, torch.full_like(labels[:1], -1)])  # (B + 1, N)
        tokens = self.embedding(labels + 1)
        waves = self.corners(fourier(boxes, self.FREQUENCIES).to(tokens.dtype))
        tokens = tokens + waves * (labels >= 0)[..., None]
        for block in self.blocks:
            tokens = block(tokens, None)
        tokens = self.norm(tokens)
        return Conditioning(Parts(tokens[:-1]), Parts(tokens[-1:]))


def fourier(x: Tensor, frequencies: int) -> Tensor:
    """(..., D) in [0, 1] -> (..., D * 2 * frequencies): sin and cos of pi 2^k x (Mildenhall et al. 2020, eq. 4)."""
    angles = x[..., None] * (torch.pi * 2.0 ** torch.arange(frequencies, device=x.device))
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


class ImageTokens(Conditioner):
    """Projects a CLIP image embedding (B, E) to `tokens` tokens (B, T, D); the null is the projection of zeros."""

    needs = ("image_embedding",)

    def __init__(self, facts: DataFacts, dim: int, tokens: int = 4) -> None:
        super().__init__()
        self.context_dim, self.tokens = dim, tokens
        self.projection = nn.Linear(facts.shapes["image_embedding"][-1], tokens * dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Conditioning:
        embedding = fields["image_embedding"]
        rows = torch.cat([embedding, torch.zeros_like(embedding[:1])]).to(self.projection.weight.dtype)
        tokens = self.norm(self.projection(rows).unflatten(-1, (self.tokens, -1)))  # (B + 1, T*D) -> (B + 1, T, D)
        return Conditioning(Parts(tokens[:-1]), Parts(tokens[-1:]))
