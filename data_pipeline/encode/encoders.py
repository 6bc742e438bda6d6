"""What precompute needs of a model. train/ provides them; entry scripts build them by `_target_`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class ImageEncoder(Protocol):
    """Pictures to what is stored of them: posterior "moments", codebook "indices", or the "pixels" themselves."""

    fingerprint: str
    stored_as: str
    factor: int

    def encode_stored(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> moments (B, 2C, h, w), indices (B, h, w), or pixels (B, 3, H, W)."""
        ...

    def posterior_of(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the latents that are stored, each (B, C, h, w), unscaled."""
        ...


class TextEncoder(Protocol):
    """Captions to states, and where it is a whole CLIP, pictures to embeddings."""

    fingerprint: str

    def encode_text(self, captions: Sequence[str]) -> TextStates:
        """B captions -> tokens (B, T, D) and pooled (B, P); "" gives the null."""
        ...

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, E)."""
        ...


@dataclass(frozen=True, slots=True)
class TextStates:
    """What a text encoder makes of B captions: tokens (B, T, D), one state a token, and pooled (B, P)."""

    tokens: Tensor
    pooled: Tensor
