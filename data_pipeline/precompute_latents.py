"""Image-text shards to latent shards: raw posterior moments or codes, conditions, and the encoders' nulls."""

from __future__ import annotations

from data_pipeline.common.entry import start_entry

if __name__ == "__main__":
    start_entry("data_pipeline.precompute_latents")  # checks the options, runs main() and exits

import os
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from data_pipeline.common import storage
from data_pipeline.common.device import chosen_device, usable_cpus
from data_pipeline.common.errors import UserError
from data_pipeline.common.stop_request import StopRequest
from data_pipeline.encode.base_dataset import base_of
from data_pipeline.encode.batch_encoder import Encoders
from data_pipeline.encode.caption_cache import CaptionCache
from data_pipeline.encode.conditions import Condition, refuse_text_alone
from data_pipeline.encode.encoders import TEXT_ENCODERS, TextEncoder
from data_pipeline.encode.latent_dataset import SplitToEncode
from data_pipeline.encode.latent_shard import OutputPaths
from data_pipeline.encode.shard_reader import ShardReader
from data_pipeline.encode.split_encoder import encode_split
from data_pipeline.encode.text_conditions import choose_encoders
from data_pipeline.encode.workers import worker_of
from data_pipeline.images.aspect_buckets import sizes_of
from data_pipeline.shards.arrays import DTYPES
from data_pipeline.shards.manifest import Manifest, find_splits, parent, refuse_latents
from data_pipeline.shards.reader import read_shard
from data_pipeline.shards.samples import as_sample


def main(cfg: DictConfig) -> None:
    if cfg.dtype not in DTYPES:
        raise UserError(f"dtype={cfg.dtype} is unknown: use one of {', '.join(DTYPES)}.")
    worker = worker_of(cfg.worker, cfg.workers, os.environ)
    if storage.absolute(cfg.output) == storage.absolute(cfg.input):
        raise UserError(f"output={cfg.output} is the same folder as input=: choose another one for the latents.")
    edits = instantiate(cfg.captions)
    refuse_latents(cfg.input)
    splits = find_splits(cfg.input)
    device = chosen_device(cfg.device)
    conditions = instantiate(cfg.conditions, _convert_="all")
    image, loaded = instantiate(cfg.autoencoder).to(device), text_encoders_for(cfg, conditions)
    cached = {
        name: CaptionCache(encoder.to(device), cfg.batch_size, cfg.caption_cache_size)
        for name, encoder in loaded.items()
    }
    how = (conditions, device, cfg.batch_size, cfg.dtype, cfg.flips, edits)
    encoders = Encoders(image, cached.get("clip"), *how, cached.get("text_encoder"))
    for condition in conditions.values():
        condition.settle(encoders)
    ordered = sorted(splits.items(), reverse=True)  # train before heldout
    for condition in conditions.values():
        condition.learn(facts_of_samples(ordered[0][1], Manifest.load(ordered[0][1], "image-text")))
    stop = StopRequest()
    for name, path in ordered:
        source = Manifest.load(path, "image-text")
        if said := note_on_sizes(cfg.buckets, path, source) or note_on_one_split(cfg.input, name):
            print(f"precompute: {said}")
        sizes = sizes_of(cfg.size or source.info.get("size"), cfg.buckets, cfg.bucket_step, image.factor)
        base = base_of(cfg.base, name, encoders, sizes.described) if cfg.base else None
        reader = ShardReader(path, encoders, sizes, base, cfg.decoders or usable_cpus())
        split = SplitToEncode(name, source, OutputPaths(cfg.output, name, sizes.split), reader, cfg.max_aside_fraction)
        encode_split(split, worker, stop)


def note_on_sizes(buckets: Any, path: str, source: Manifest) -> str:
    """What the sizes of the shards mean for those of the latents, if it may be unexpected; "" otherwise."""
    cut_to, made_with = source.fields.get("png", {}).get("shape"), source.info.get("made_with") or {}
    if buckets and cut_to:
        return (
            f"make_shards.py has cut the pictures of {path} to squares of {cut_to[0]}, so all of them fall into one "
            "bucket; make_shards.py buckets=... or index_shards.py keeps pictures whole."
        )
    if made_with.get("buckets") and not buckets:
        there = {name: made_with[name] for name in ("buckets", "size", "bucket_step") if name in made_with}
        same = " ".join(f"{name}={value}" for name, value in there.items()).replace("', '", ",").replace("'", "")
        return (
            f"make_shards.py has made the pictures of {path} with {same}, but without buckets= they are all cut to "
            f"squares now; to keep them whole, add {same}, and choose another output=."
        )
    return ""


def note_on_one_split(given: str, name: str) -> str:
    """A sentence if input= is one split of a data set; "" otherwise."""
    folder, last = parent(given), given.rstrip("/").rpartition("/")[2]
    splits = ("train", "heldout")
    if name or last not in splits or not all(storage.exists(f"{folder}/{each}/manifest.json") for each in splits):
        return ""
    return f"{given} is one split of a data set, but training needs both: use input={folder}."


def text_encoders_for(cfg: DictConfig, conditions: Mapping[str, Condition]) -> dict[str, TextEncoder]:
    """The text encoders that the conditions need, by their groups in conf/: clip, text_encoder."""
    used = choose_encoders(conditions, {name: cfg[name] for name in TEXT_ENCODERS if name in cfg})
    loaded = {name: instantiate(cfg[name]) for name in used}
    if any(condition.uses_image_tower for condition in conditions.values()):
        refuse_text_alone(loaded["clip"])  # here, before the output is claimed
    return loaded


def facts_of_samples(path: str, source: Manifest) -> Iterator[dict[str, Any]]:
    """Every sample without its picture."""
    for shard in source.shards:
        for members in read_shard(path, shard, ("json", "txt")):
            yield as_sample(members.pop("__key__"), members)
