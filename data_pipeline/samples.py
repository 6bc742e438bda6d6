"""The types that flow from a shard to a training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DataCursor:
    """Where the data stands: the next global step to be trained on. With seed and manifest it fixes everything else."""

    step: int = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of a rank: whole streams, one after another, `len(keys) // len(streams)` samples each.

    tensors: field name -> (B, ...); for latents `moments` (B, 2C, h, w), `text` (B, T, D), `pooled` (B, P);
    for image-text `image` (B, 3, H, W) uint8 or float in [-1, 1].
    """

    keys: tuple[str, ...]
    captions: tuple[str, ...]
    tensors: dict[str, Tensor]
    streams: tuple[int, ...]  # global numbers of the streams that this micro-batch holds
    step: int  # the global step that these samples belong to
    cursor: DataCursor  # what to save once this step is trained on
    meta: tuple[dict[str, Any], ...] = field(default=())

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device` (asynchronously where they are pinned)."""
        return replace(self, tensors={k: v.to(device, non_blocking=True) for k, v in self.tensors.items()})


@dataclass(frozen=True, slots=True)
class TextStates:
    """What a text encoder makes of B captions: tokens (B, T, D), one state a token, and pooled (B, P)."""

    tokens: Tensor
    pooled: Tensor


def stacked(samples: Sequence[Mapping[str, Any]], name: str) -> Tensor:
    """Field `name` of samples as one float32 tensor: (B, ...)."""
    return torch.from_numpy(np.stack([sample[name] for sample in samples])).float()
