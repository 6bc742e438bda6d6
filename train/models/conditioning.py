"""What the U-Net is conditioned on, with the null of each part: text per token, and a pooled vector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Conditioning:
    """context (B, T, D) for cross-attention and vector (B, P) for the time embedding, either None; and their nulls.

    null_context (T, D) and null_vector (P,) are the encoder's own states of the empty prompt: what a dropped prompt is
    replaced by in training and what guidance steers away from in sampling (Ho & Salimans 2022, alg. 1).
    """

    context: Tensor | None
    vector: Tensor | None
    null_context: Tensor | None
    null_vector: Tensor | None

    def dropped(self, drop: Tensor) -> Conditioning:
        """The null in place of the condition where drop (B,) is true; both parts together."""

        def replaced(value: Tensor | None, null: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            return torch.where(drop.view(-1, *[1] * (value.dim() - 1)), null.to(value), value)

        return Conditioning(
            replaced(self.context, self.null_context),
            replaced(self.vector, self.null_vector),
            self.null_context,
            self.null_vector,
        )

    def for_guidance(self) -> Conditioning:
        """Twice the batch: the condition, then its null."""

        def doubled(value: Tensor | None, null: Tensor | None) -> Tensor | None:
            return None if value is None else torch.cat([value, null.to(value).expand_as(value)])

        return Conditioning(
            doubled(self.context, self.null_context),
            doubled(self.vector, self.null_vector),
            self.null_context,
            self.null_vector,
        )

    def to(self, device: torch.device | str) -> Conditioning:
        """The same on `device`."""
        values = (self.context, self.vector, self.null_context, self.null_vector)
        return Conditioning(*(None if v is None else v.to(device) for v in values))


def conditioned(unet: torch.nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """The U-Net's prediction: the one place that spreads a Conditioning over its arguments."""
    return unet(x_t, t, conditioning.context, conditioning.vector)
