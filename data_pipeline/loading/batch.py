"""The types that flow from a shard to a training step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DataCursor:
    """The position in the data: the next global step. With seed and manifest it determines everything else."""

    step: int = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of a rank: whole streams, one after another, `len(keys) // len(streams)` samples each.

    tensors: field name -> (B, ...), in the stored dtype until `to` makes them float32 or int64; for latents `moments`
    (B, 2C, h, w) and conditions such as `text` (B, T, D); for image-text `image` (B, 3, H, W) in [-1, 1].
    """

    keys: tuple[str, ...]
    captions: tuple[str, ...]
    tensors: dict[str, Tensor]
    streams: tuple[int, ...]  # global numbers of the streams that this micro-batch holds
    step: int  # the global step that these samples belong to
    cursor: DataCursor  # what to save once this step is trained on
    of_streams: int = 0  # how many streams the global batch has
    bucket: str = ""  # on aspect-ratio buckets: the one that all samples of the step come from

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch in float32 and int64 on `device`: copied there (asynchronously if pinned) in its stored dtype,
        which is half as much, and widened there, which changes no value."""
        moved = {name: value.to(device, non_blocking=True) for name, value in self.tensors.items()}
        return replace(self, tensors={name: widened(value) for name, value in moved.items()})


def widened(value: Tensor) -> Tensor:
    """Numbers of any width, as float32 or int64."""
    return value.float() if value.is_floating_point() else value.long()
