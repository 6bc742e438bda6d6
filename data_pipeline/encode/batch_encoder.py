"""Encodes a batch of samples: fields in the data set's dtype, checked, and with their statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.common.errors import DataError
from data_pipeline.encode.caption_cache import CaptionCache
from data_pipeline.encode.conditions import Condition, PlainCondition, Sample, Tools
from data_pipeline.encode.encoders import TEXT_ENCODERS, ImageEncoder
from data_pipeline.shards.arrays import as_stored, readable
from data_pipeline.shards.caption_edits import StoredEdits
from data_pipeline.shards.caption_members import member_of, others_of


class Encoders(NamedTuple):
    """What turns samples into latent samples, and how they are stored."""

    image: ImageEncoder
    text: CaptionCache | None
    conditions: Mapping[str, Condition]
    device: torch.device
    batch_size: int
    dtype: str = "float16"  # one of DTYPES
    flips: bool = False  # also encode each picture mirrored: moments_flip.npy
    edits: StoredEdits = StoredEdits()  # edits of captions before they are encoded
    text_encoder: CaptionCache | None = None  # beside `text`, the CLIP

    @property
    def texts(self) -> tuple[CaptionCache | None, CaptionCache | None]:
        """The text encoders, in the order of TEXT_ENCODERS."""
        return self.text, self.text_encoder

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of each encoder, by the name in manifests."""
        found = {"autoencoder": self.image, **dict(zip(TEXT_ENCODERS.values(), self.texts, strict=True))}
        return {name: encoder.fingerprint for name, encoder in found.items() if encoder is not None}

    @property
    def token_counters(self) -> dict[str, CaptionCache]:
        """The encoder of each condition on the caption."""
        made = {name: each for name, each in self.conditions.items() if each.made_from == ("caption",)}
        by_group = dict(zip(TEXT_ENCODERS, self.texts, strict=True))
        return {name: by_group[each.encoder] for name, each in made.items() if by_group.get(each.encoder)}

    @property
    def field_encoders(self) -> list[Condition]:
        """Everything that makes fields, including the first stage."""
        return [FirstStage(self.image, self.flips), *self.conditions.values()]


class FirstStage(PlainCondition):
    """The first stage in the form of a condition: stores moments (B, 2C, h, w) or its other output, also of the
    mirrored picture if wanted."""

    made_from, uses_first_stage = ("picture",), True

    def __init__(self, image: ImageEncoder, flips: bool) -> None:
        self.fields = (image.stored_as, f"{image.stored_as}_flip") if flips else (image.stored_as,)

    def encode(self, samples: Sequence[Sample], images: Tensor | None, tools: Tools) -> dict[str, Tensor]:
        pictures = (images, images.flip(-1)) if len(self.fields) == 2 else (images,)
        return {name: tools.image.encode_stored(each) for name, each in zip(self.fields, pictures, strict=True)}


@dataclass(slots=True)
class Item:
    """A sample in the pipeline: its position in its shard, its bucket, and the fields taken from a base data set; those
    of further captions by the names under which they are stored. captions: all of them, if there are several."""

    position: int
    sample: dict[str, Any]
    bucket: str = ""
    reused: dict[str, np.ndarray] = field(default_factory=dict)
    captions: Mapping[str, str] = field(default_factory=dict)

    def lacks(self, encoder: Condition) -> bool:
        return not all(name in self.reused for name in encoder.fields)

    def lacking(self, encoder: Condition) -> Iterator[tuple[str, str]]:
        """(name, text) of the further captions that must still be encoded."""
        for name, text in others_of(self.captions).items() if "caption" in encoder.made_from else ():
            if not all(member_of(each, name) in self.reused for each in encoder.fields):
                yield name, text

    @property
    def texts(self) -> list[str]:
        """All of its captions, in order."""
        return list(self.captions.values()) or [self.sample["caption"]]


@torch.no_grad()
def encode_batch(items: Sequence[Item], images: Tensor | None, encoders: Encoders) -> dict[str, np.ndarray]:
    """Fields by name, each (B, ...) as stored. images (N, 3, H, W): of the items that have a picture, in order."""
    images = None if images is None else images.to(encoders.device)
    with_picture = pictured(items)
    stored: dict[str, np.ndarray] = {}
    for encoder in encoders.field_encoders:
        lacking = [i for i, item in enumerate(items) if item.lacks(encoder)]
        fresh = encoded(encoder, lacking, with_picture, items, images, encoders) if lacking else {}
        for name in encoder.fields:
            stored[name] = merged(fresh.get(name), lacking, [item.reused.get(name) for item in items])
    return stored


Others = dict[str, dict[int, np.ndarray]]  # of further captions: name, as text.long -> row of the batch -> value


@torch.no_grad()
def encode_others(items: Sequence[Item], images: Tensor | None, encoders: Encoders) -> Others:
    """The fields of further captions, in addition to what `encode_batch` returns; pictures are not encoded again."""
    found: Others = {}
    if not any(item.captions for item in items):
        return found
    for row, item in enumerate(items):
        for name in item.reused.keys() - {each for encoder in encoders.field_encoders for each in encoder.fields}:
            found.setdefault(name, {})[row] = item.reused[name]
    for encoder in encoders.field_encoders:
        jobs = [(row, name, text) for row, item in enumerate(items) for name, text in item.lacking(encoder)]
        for first in range(0, len(jobs), encoders.batch_size):
            part = jobs[first : first + encoders.batch_size]
            copies = [Item(0, {**items[row].sample, "caption": text}) for row, _, text in part]
            pictures = None
            if "picture" in encoder.made_from:
                pictures = images[[pictured(items).index(row) for row, _, _ in part]].to(encoders.device)
            made = encoded(encoder, range(len(part)), range(len(part)), copies, pictures, encoders)
            for name, values in made.items():
                for (row, caption, _), value in zip(part, values, strict=True):
                    found.setdefault(member_of(name, caption), {})[row] = value
    return found


def pictured(items: Sequence[Item]) -> list[int]:
    """The rows of the items whose pictures are in the batch, in order."""
    return [row for row, item in enumerate(items) if "image" in item.sample]


def encoded(
    encoder: Condition,
    lacking: Sequence[int],
    with_picture: Sequence[int],
    items: Sequence[Item],
    images: Tensor | None,
    encoders: Encoders,
) -> dict[str, np.ndarray]:
    """The fields of one maker for the items that don't have them yet."""
    if "picture" in encoder.made_from and len(lacking) != len(with_picture):
        images = images[[with_picture.index(i) for i in lacking]]
    made = encoder.encode([items[i].sample for i in lacking], images, encoders)
    for name, value in made.items():
        if value.is_complex() or value.ndim < 1 or len(value) != len(lacking):
            raise DataError(
                f"{name} of {len(lacking)} samples has shape {tuple(value.shape)} and dtype {value.dtype}: an encoder "
                "must return one row of real numbers per sample."
            )
    return {name: as_stored(value, encoders.dtype) for name, value in made.items()}


def merged(fresh: np.ndarray | None, lacking: Sequence[int], reused: Sequence[np.ndarray | None]) -> np.ndarray:
    """New rows and reused rows, in order."""
    if len(lacking) == len(reused):
        return fresh
    rows = list(reused)
    for i, row in zip(lacking, fresh if fresh is not None else (), strict=True):
        rows[i] = row
    return np.stack(rows)


@torch.no_grad()
def batch_statistics(image: ImageEncoder, stored: np.ndarray) -> dict[str, Any]:
    """The number of values per channel, and per channel the sums of the first and second moment of posterior draws."""
    wide = np.int64 if stored.dtype.kind == "i" else np.float32
    mean, variance = (part.double() for part in image.posterior_of(torch.from_numpy(readable(stored).astype(wide))))
    return {
        "count": mean.numel() // mean.shape[1],
        "mean": mean.mean((0, 2, 3)).tolist(),
        "square": (mean.square() + variance).mean((0, 2, 3)).tolist(),
    }


def combined_statistics(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Weighted means of these statistics, with the standard deviation that follows."""
    if not parts:
        return {}
    weights = np.array([part["count"] for part in parts], np.float64)
    mean, square = (np.average([part[name] for part in parts], axis=0, weights=weights) for name in ("mean", "square"))
    std = np.sqrt(square - mean**2)
    return {"count": int(weights.sum()), "mean": mean.tolist(), "square": square.tolist(), "std": std.tolist()}
