"""A batch of samples to what is stored of each: encoded, in the dtype of the data set, looked over, measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline import codec
from data_pipeline.common.errors import DataError
from data_pipeline.conditions import Condition, PlainCondition, Sample, Tools
from data_pipeline.encoders import ImageEncoder, OnceEach

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LARGEST = 1e6  # no first stage's moments and no encoder's states come near it


class Encoders(NamedTuple):
    """What turns samples into latent samples, and how they are stored."""

    image: ImageEncoder
    text: OnceEach | None
    conditions: Mapping[str, Condition]
    device: torch.device
    batch_size: int
    dtype: str = "float16"  # one of DTYPES
    flips: bool = False  # also encode each picture mirrored: moments_flip.npy

    @property
    def makers(self) -> list[Condition]:
        """All that fields come from, the first stage among them."""
        return [FirstStage(self.image, self.flips), *self.conditions.values()]


class FirstStage(PlainCondition):
    """moments (B, 2C, h, w) or what else the first stage stores, and of the mirrored picture, as if a condition."""

    made_from, uses_first_stage = ("picture",), True

    def __init__(self, image: ImageEncoder, flips: bool) -> None:
        self.fields = (image.stored_as, f"{image.stored_as}_flip") if flips else (image.stored_as,)

    def encode(self, samples: Sequence[Sample], images: Tensor | None, tools: Tools) -> dict[str, Tensor]:
        pictures = (images, images.flip(-1)) if len(self.fields) == 2 else (images,)
        return {name: tools.image.encode_stored(each) for name, each in zip(self.fields, pictures, strict=True)}


@dataclass(slots=True)
class Item:
    """A sample on its way: its place in its shard, the data set it goes to, and fields that need not be made again."""

    position: int
    sample: dict[str, Any]
    bucket: str = ""
    reused: dict[str, np.ndarray] = field(default_factory=dict)

    def lacks(self, maker: Condition) -> bool:
        return not all(name in self.reused for name in maker.fields)


@torch.no_grad()
def encode_batch(items: Sequence[Item], images: Tensor | None, encoders: Encoders) -> dict[str, np.ndarray]:
    """Fields by name, each (B, ...) as stored. images (N, 3, H, W): of the items that have a picture, in order."""
    images = None if images is None else images.to(encoders.device)
    with_picture = [i for i, item in enumerate(items) if "image" in item.sample]
    stored: dict[str, np.ndarray] = {}
    for maker in encoders.makers:
        lacking = [i for i, item in enumerate(items) if item.lacks(maker)]
        fresh = encoded(maker, lacking, with_picture, items, images, encoders) if lacking else {}
        for name in maker.fields:
            stored[name] = merged(fresh.get(name), lacking, [item.reused.get(name) for item in items])
    return stored


def encoded(
    maker: Condition,
    lacking: Sequence[int],
    with_picture: Sequence[int],
    items: Sequence[Item],
    images: Tensor | None,
    encoders: Encoders,
) -> dict[str, np.ndarray]:
    """The fields of one maker for the items that lack them."""
    if "picture" in maker.made_from and len(lacking) != len(with_picture):
        images = images[[with_picture.index(i) for i in lacking]]
    made = maker.encode([items[i].sample for i in lacking], images, encoders)
    for name, value in made.items():
        if value.is_complex() or value.ndim < 1 or len(value) != len(lacking):
            raise DataError(
                f"{name} of {len(lacking)} samples came as {tuple(value.shape)} {value.dtype}: this encoder is not one "
                "that can be stored."
            )
    return {name: as_stored(value, encoders.dtype) for name, value in made.items()}


def merged(fresh: np.ndarray | None, lacking: Sequence[int], reused: Sequence[np.ndarray | None]) -> np.ndarray:
    """Rows that were made and rows that were there already, in order."""
    if len(lacking) == len(reused):
        return fresh
    rows = list(reused)
    for i, row in zip(lacking, fresh if fresh is not None else (), strict=True):
        rows[i] = row
    return np.stack(rows)


def as_stored(value: Tensor, dtype: str) -> np.ndarray:
    """Floats in `dtype` (too large: infinite), whole numbers in 32 bits. numpy knows no bfloat16: codec.BFLOAT16."""
    if not value.is_floating_point():
        return value.to(torch.int32).cpu().numpy()
    value = value.to(DTYPES[dtype]).contiguous().cpu()
    if dtype == "bfloat16":
        return value.view(torch.int16).numpy().view(codec.BFLOAT16)
    return value.numpy()


def readable(stored: np.ndarray) -> np.ndarray:
    """As numbers that numpy can work with."""
    return codec.widened(stored) if stored.dtype == codec.BFLOAT16 else stored


def narrowed(value: np.ndarray, dtype: str) -> np.ndarray:
    """What was read of a data set of that dtype, as it is stored: the inverse of `readable`, exact."""
    if dtype != "bfloat16" or value.dtype != np.float32:
        return value
    return (value.view(np.uint32) >> 16).astype(np.uint16).view(codec.BFLOAT16)


def described(stored: np.ndarray) -> dict[str, Any]:
    """A field's line in the manifest, of its values (B, ...)."""
    name = "bfloat16" if stored.dtype == codec.BFLOAT16 else stored.dtype.name
    return {"dtype": name, "shape": list(stored.shape[1:])}


def unusable(stored: Mapping[str, np.ndarray], image: ImageEncoder, dtype: str) -> Iterator[tuple[int, str]]:
    """(row, reason) of samples whose values can't be trained on; a row comes once."""
    named: dict[int, str] = {}
    for name, values in stored.items():
        axes = tuple(range(1, values.ndim))
        if values.dtype.kind == "i":
            codes = len(image.codebook) if name.startswith("indices") else None
            bad = ((values < 0) | (values >= codes)).any(axes) if codes else np.zeros(len(values), bool)
            reasons = [(bad, f"{name} are no codes of the codebook")]
        else:
            numbers = readable(values)
            finite = np.isfinite(numbers).all(axes)
            remedy = "" if dtype == "float32" else ": use dtype=float32"
            large = (np.abs(numbers) > LARGEST).any(axes) if numbers.dtype == np.float32 else ~finite
            reasons = [(~finite, f"{name} is not finite in {dtype}{remedy}"), (large, f"{name} is beyond {LARGEST:g}")]
        for bad, reason in reasons:
            for row in np.flatnonzero(bad):
                named.setdefault(int(row), reason)
    yield from sorted(named.items())


@torch.no_grad()
def batch_statistics(image: ImageEncoder, stored: np.ndarray) -> dict[str, Any]:
    """Count of values a channel, and sums of the first and second moment of posterior draws, per channel."""
    wide = np.int64 if stored.dtype.kind == "i" else np.float32
    mean, variance = (part.double() for part in image.posterior_of(torch.from_numpy(readable(stored).astype(wide))))
    return {
        "count": mean.numel() // mean.shape[1],
        "mean": mean.mean((0, 2, 3)).tolist(),
        "square": (mean.square() + variance).mean((0, 2, 3)).tolist(),
    }


def combined_statistics(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Weighted means of the above, with the standard deviation they give."""
    if not parts:
        return {}
    weights = np.array([part["count"] for part in parts], np.float64)
    mean, square = (np.average([part[name] for part in parts], axis=0, weights=weights) for name in ("mean", "square"))
    std = np.sqrt(square - mean**2)
    return {"count": int(weights.sum()), "mean": mean.tolist(), "square": square.tolist(), "std": std.tolist()}
