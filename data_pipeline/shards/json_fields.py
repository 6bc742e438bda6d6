"""Numeric fields in a latent sample's json: read along with its caption, so that they are not stored a second time.

size (6,): original height and width, top and left of the crop, target height and width, in pixels: the
micro-conditioning of SDXL (Podell et al. 2023, sec. 2.2), in the order of diffusers' time_ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, UserError
from data_pipeline.common.saved_objects import refuse_wrong_kinds
from data_pipeline.shards import codec
from data_pipeline.shards.manifest import Manifest, Shard
from data_pipeline.shards.tar_index import IndexEntry, read_index

GEOMETRY = ("original_size", "crop_top_left", "target_size")  # keys of the json, each with two numbers
LARGEST = 2**31  # pixels per side
IN_MANIFEST = "size_conditioning"  # entry of a manifest's info: number of samples, and the means of their sizes
MEASURED_ON = 1024  # number of samples to average, if the manifest has no means
READERS = 8  # threads: reading one sample from a bucket takes tens of milliseconds


def size_in(meta: Mapping[str, Any]) -> np.ndarray:
    """size (6,) float32, which is exact for such whole numbers; DataError if the json lacks it."""
    pairs = [meta.get(name) for name in GEOMETRY]
    if wrong := [name for name, pair in zip(GEOMETRY, pairs, strict=True) if not is_pair(pair)]:
        raise DataError(f"its json has no {', '.join(wrong)} of two numbers in pixels")
    return np.asarray(pairs, np.float32).reshape(-1)


def is_pair(value: Any) -> bool:
    """Whether `value` is a list of two pixel counts."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    return all(isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v <= LARGEST for v in value)


FROM_JSON: Mapping[str, Callable[[Mapping[str, Any]], np.ndarray]] = {"size": size_in}


def size_sums(metas: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The number of samples and the sums of their sizes, which are exact, so the order of addition does not matter.
    None if a json lacks its size."""
    try:
        sizes = np.stack([size_in(meta) for meta in metas]).astype(np.float64)
    except DataError:
        return None
    return {"count": len(sizes), "sum": sizes.sum(0).tolist()}


def mean_in_manifest(sums: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """The entry of a manifest's info, from the sums of its shards; {} if a shard of an earlier version has no sums."""
    if not sums or not all(sums):
        return {}
    count = sum(each["count"] for each in sums)
    total = np.sum([each["sum"] for each in sums], axis=0)
    return {IN_MANIFEST: {"count": count, "mean": (total / count).tolist()}}


def mean_size(root: str, manifest: Manifest) -> tuple[list[float], int]:
    """The mean sizes of a latent data set, and the number of samples averaged: all samples, as measured by precompute;
    for data sets of earlier versions, at most MEASURED_ON evenly spaced ones. UserError if the samples have none."""
    if known := manifest.info.get(IN_MANIFEST):
        where = f"{storage.join(root, 'manifest.json')}: {IN_MANIFEST}"
        refuse_wrong_kinds({"it": known}, {"it": Mapping[str, Any]}, where)
        refuse_wrong_kinds(known, {"mean": Sequence[float], "count": int}, where)
        return list(known["mean"]), known["count"]
    with ThreadPoolExecutor(READERS) as pool:
        parts = pool.map(lambda part: _metas(root, *part), _evenly_spaced(manifest))
        sums = [size_sums(metas) for metas in parts]
    (found,) = mean_in_manifest(sums).values()
    return found["mean"], found["count"]


def _evenly_spaced(manifest: Manifest) -> list[tuple[Shard, list[int]]]:
    """Shards, and positions in them, of at most MEASURED_ON samples; determined by the manifest."""
    count = min(manifest.samples, MEASURED_ON)
    chosen = np.arange(count) * manifest.samples // max(count, 1)
    ends = np.cumsum([shard.samples for shard in manifest.shards])
    of_shard = np.searchsorted(ends, chosen, "right")
    firsts = ends - [shard.samples for shard in manifest.shards]
    return [
        (manifest.shards[number], (chosen[of_shard == number] - firsts[number]).tolist())
        for number in np.unique(of_shard).tolist()
    ]


def _metas(root: str, shard: Shard, positions: Sequence[int]) -> list[dict[str, Any]]:
    """The jsons of some samples of a shard, read without their other members."""
    entries = read_index(root, shard)
    return [_meta(root, shard, entries[position]) for position in positions]


def _meta(root: str, shard: Shard, entry: IndexEntry) -> dict[str, Any]:
    path = storage.join(root, shard.name)
    try:
        if "json" not in entry.members:
            raise DataError("it has no json")
        meta = codec.decode("json", storage.read_bytes(path, *entry.members["json"]))
        size_in(meta)
    except DataError as error:
        raise UserError(
            f"conditioning=size: sample {entry.key} of shard {path}: {error}: make the latents with "
            "precompute_latents.py, which writes them, or leave size out."
        ) from error
    return meta
