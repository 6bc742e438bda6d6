"""What precompute needs of a model. train/ provides them; entry scripts build them by `_target_`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from data_pipeline.samples import TextStates


class ImageEncoder(Protocol):
    """Pictures to posterior moments."""

    fingerprint: str

    def encode_moments(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 2C, h, w): mean and log-variance, unscaled."""
        ...


class TextEncoder(Protocol):
    """Captions to states."""

    fingerprint: str

    def encode_text(self, captions: Sequence[str]) -> TextStates:
        """B captions -> tokens (B, T, D) and pooled (B, P); "" gives the null."""
        ...
