"""The types that flow from a shard to a training step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.common.errors import DataError
from data_pipeline.images.pixels import from_uint8


@dataclass(frozen=True, slots=True)
class DataCursor:
    """Where the data stands: the next global step to be trained on. With seed and manifest it fixes everything else."""

    step: int = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of a rank: whole streams, one after another, `len(keys) // len(streams)` samples each.

    tensors: field name -> (B, ...), as they are stored until `to` makes them float32 or int64; for latents `moments`
    (B, 2C, h, w) and what to condition on, as `text` (B, T, D); for image-text `image` (B, 3, H, W) in [-1, 1].
    """

    keys: tuple[str, ...]
    captions: tuple[str, ...]
    tensors: dict[str, Tensor]
    streams: tuple[int, ...]  # global numbers of the streams that this micro-batch holds
    step: int  # the global step that these samples belong to
    cursor: DataCursor  # what to save once this step is trained on
    of_streams: int = 0  # how many streams the global batch has

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch in float32 and int64 on `device`: copied there (asynchronously where pinned) as it is stored,
        which is half as much, and widened there, which changes no value."""
        moved = {name: value.to(device, non_blocking=True) for name, value in self.tensors.items()}
        return replace(self, tensors={name: widened(value) for name, value in moved.items()})


def widened(value: Tensor) -> Tensor:
    """Numbers of any width as float32 or int64."""
    return value.float() if value.is_floating_point() else value.long()


@dataclass(frozen=True, slots=True)
class TextStates:
    """What a text encoder makes of B captions: tokens (B, T, D), one state a token, and pooled (B, P)."""

    tokens: Tensor
    pooled: Tensor


def collated(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Samples' arrays as float32 or int64 tensors; pictures as (B, 3, H, W) in [-1, 1].

    In numpy: torch would hand each of these small steps to a second thread, which is slow to come on busy cores.
    """
    tensors = {}
    for name, first in samples[0].items():
        if isinstance(first, np.ndarray) and name != "image":
            with _naming_what_differs(samples, name):
                values = np.stack([sample[name] for sample in samples])
                wide = np.float32 if values.dtype.kind == "f" else np.int64
                tensors[name] = torch.from_numpy(values.astype(wide, copy=False))
    if "image" in samples[0]:
        with _naming_what_differs(samples, "image"):
            pixels = np.stack([sample["image"].transpose(2, 0, 1) for sample in samples])
        tensors["image"] = torch.from_numpy(from_uint8(pixels))
    return tensors


@contextlib.contextmanager
def _naming_what_differs(samples: Sequence[dict[str, Any]], name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError) as error:
        shapes = {sample["key"]: getattr(sample.get(name), "shape", None) for sample in samples}
        odd = next(key for key, shape in shapes.items() if shape != shapes[samples[0]["key"]])
        raise DataError(
            f"sample {odd} has {name} of shape {shapes[odd]} beside {shapes[samples[0]['key']]}: one data set holds "
            "one shape; make it again."
        ) from error
