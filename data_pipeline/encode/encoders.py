"""What precompute needs from a model. train/ provides the models; entry scripts build them by `_target_`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Groups of conf/ with text encoders -> their name among a data set's fingerprints.
TEXT_ENCODERS = {"clip": "text_encoder", "text_encoder": "text_encoder_2"}


class ImageEncoder(Protocol):
    """Encodes pictures to what is stored: posterior "moments", codebook "indices", or the "pixels" themselves."""

    fingerprint: str
    stored_as: str
    factor: int
    stated_scaling: Mapping[str, Sequence[float]] | None  # mean and std per channel, if its files state them

    def encode_stored(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> moments (B, 2C, h, w), indices (B, h, w), or pixels (B, 3, H, W)."""
        ...

    def posterior_of(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of stored latents, each (B, C, h, w), unscaled."""
        ...


class TextEncoder(Protocol):
    """Encodes captions to states; a whole CLIP also encodes pictures to embeddings. masked, if it has that: whether its
    states of padding are normally not attended to."""

    fingerprint: str

    def encode_text(self, captions: Sequence[str]) -> TextStates:
        """B captions -> tokens (B, T, D) and pooled (B, P); "" gives the null."""
        ...

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, E)."""
        ...


@dataclass(frozen=True, slots=True)
class TextStates:
    """A text encoder's output for B captions: tokens (B, T, D), one state a token, pooled (B, P), and how many of the
    tokens, the first ones, are the caption's (B,); the others are padding."""

    tokens: Tensor
    pooled: Tensor
    lengths: Tensor | None = None


def first(lengths: Tensor, count: int) -> Tensor:
    """Lengths (B,) -> (B, count): true for the first so many of each row."""
    return torch.arange(count, device=lengths.device) < lengths[:, None]
