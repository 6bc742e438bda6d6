"""A text encoder that is trained with the U-Net: latent diffusion's tau for text (Rombach et al. 2022, app. E.2.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train.models.attention import TransformerBlock
from train.models.clip import VOCABULARY, tokenizer
from train.models.conditioning import Conditioner, Conditioning, DataFacts, Parts


class JointText(Conditioner):
    """Captions -> (B, T, D): byte-pair tokens with learnt positions, transformer blocks without a mask, final norm.

    LDM's 1.45 B model has dim 1280, 32 layers and 77 tokens. The null is the empty caption through the same weights.
    captions: as in StoredText.
    """

    of_text = True

    def __init__(
        self,
        facts: DataFacts,
        dim: int = 1280,
        layers: int = 32,
        heads: int = 8,
        context_length: int = 77,
        captions: Mapping[Any, float] | None = None,
    ) -> None:
        super().__init__()
        self.context_dim = dim
        self.tokenize = tokenizer(context_length)
        self.tokens = nn.Embedding(VOCABULARY, dim)
        self.positions = nn.Parameter(torch.randn(context_length, dim) * 0.01)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.blocks = nn.ModuleList(TransformerBlock(dim, None, heads, dim // heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Conditioning:
        ids = self.tokenize([*captions, ""]).to(self.positions.device)  # (B + 1, T)
        x = self.tokens(ids) + self.positions
        for block in self.blocks:
            x = block(x, None)
        x = self.norm(x)
        return Conditioning(Parts(x[:-1]), Parts(x[-1:]))
