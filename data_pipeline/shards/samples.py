"""A sample's members by extension to fields by name, and samples to tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.common.errors import DataError
from data_pipeline.images.formats import IMAGES, OLDEST, RAW
from data_pipeline.images.pixels import from_uint8
from data_pipeline.images.resize import fitted
from data_pipeline.shards.captions import ONE, caption_in, lenient_texts
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.tar_index import IndexEntry

PICTURES = (*IMAGES, "txt", "json")


def picture_in(entry: IndexEntry) -> str | None:
    """The name of the member that is the picture: if there are several, the first in a usual format."""
    return next((name for names in (OLDEST, IMAGES, RAW) for name in entry.members if name in names), None)


def without_other_pictures(entry: IndexEntry) -> IndexEntry:
    """A sample with only one picture: readers decode no other."""
    picture = picture_in(entry)
    return IndexEntry(entry.key, {n: m for n, m in entry.members.items() if n == picture or n not in (*IMAGES, *RAW)})


def as_sample(key: str, members: dict[str, Any], size: int | None = None) -> dict[str, Any]:
    """Members by extension -> a sample by field name; a picture as its centre square of `size`, if that is given."""
    sample = {"key": key, "caption": caption_in(members), "meta": members.get("json") or {}}
    if isinstance(sample["meta"].get("caption"), list) and len(several := captions_of(sample)) > 1:
        sample["meta"] = {"captions": several, **sample["meta"]}  # latents keep only one "caption"
    for member, value in members.items():
        if member in IMAGES:
            sample["image"] = fitted(value, (size, size)).pixels if size else value
        elif member.endswith(".npy"):
            sample[member.removesuffix(".npy")] = value
    return sample


def captions_of(sample: Mapping[str, Any]) -> dict[str, str]:
    """All captions of a sample ({"caption", "meta"}) by name, in order: the json's "captions"; else a list under the
    json's "caption", named "0", "1", ...; else {"caption": the caption}; {} if it has none."""
    caption, meta = sample["caption"], sample.get("meta") or {}
    stored = meta.get("captions")
    if isinstance(stored, dict):
        several = {name: text for name, value in stored.items() if (text := lenient_texts(value).get(ONE))}
    else:
        several = lenient_texts(meta.get("caption")) if isinstance(meta.get("caption"), list) else {}
    if caption in several.values():  # otherwise a .txt beside it was taken
        return several
    return {ONE: caption} if caption else {}


def size_of(manifest: Manifest) -> int | None:
    """Pixels a side that pictures are cut to when they are read: shards that others wrote hold any size."""
    return manifest.info.get("size") if manifest.kind == "image-text" else None


def fields_of(manifest: Manifest) -> tuple[str, ...]:
    """The members of a data set's samples that are read."""
    return PICTURES if manifest.kind == "image-text" else tuple(manifest.fields)


def collated(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """The samples' arrays as float32 or int64 tensors; pictures as (B, 3, H, W) in [-1, 1].

    In numpy: torch would hand each of these small steps to a second thread, which starts late on busy cores.
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
            f"sample {odd} has {name} of shape {shapes[odd]}, but others have {shapes[samples[0]['key']]}: all samples "
            "of a data set must have the same shape; make it again."
        ) from error
