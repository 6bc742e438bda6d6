"""Image-text shards to latent shards: raw posterior moments or codes, what to condition on, and the encoders' nulls."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from safetensors.torch import save

from data_pipeline import codec, storage
from data_pipeline.aside import Aside
from data_pipeline.conditions import Condition
from data_pipeline.encoders import ImageEncoder, TextEncoder
from data_pipeline.entry import entry
from data_pipeline.errors import DataError, UserError
from data_pipeline.loader import as_sample
from data_pipeline.manifest import Manifest, Shard, find_splits
from data_pipeline.progress import Progress
from data_pipeline.samples import collated
from data_pipeline.shard_writer import ShardWriter, read_index, read_shard, read_whole

DTYPES = {"float16": np.float16, "float32": np.float32}


class Encoders(NamedTuple):
    """What turns samples into latent samples, and how they are stored."""

    image: ImageEncoder
    text: TextEncoder | None
    conditions: Mapping[str, Condition]
    device: torch.device
    batch_size: int
    dtype: type
    flips: bool = False  # also encode each picture mirrored: moments_flip.npy


@entry("precompute_latents")
def main(cfg: DictConfig) -> None:
    if cfg.dtype not in DTYPES:
        raise UserError(f"dtype={cfg.dtype} is unknown: take one of {', '.join(DTYPES)}.")
    splits = find_splits(cfg.input)
    device = chosen_device(cfg.device)
    conditions = instantiate(cfg.conditions, _convert_="all")
    image, text = instantiate(cfg.autoencoder).to(device), clip_for(cfg, conditions)
    encoders = Encoders(
        image,
        text.to(device) if text is not None else None,
        conditions,
        device,
        cfg.batch_size,
        DTYPES[cfg.dtype],
        cfg.get("flips", False),
    )
    for number, (name, path) in enumerate(sorted(splits.items(), reverse=True)):  # train before heldout
        source = Manifest.load(path, "image-text")
        if number == 0:
            for condition in conditions.values():
                condition.learn(facts_of_samples(path, source))
        root = storage.join(cfg.output, name) if name else cfg.output
        claim(root, identity(source, encoders))
        encode_split(path, source, root, encoders, cfg.max_aside_fraction, name or "samples")


def clip_for(cfg: DictConfig, conditions: Mapping[str, Condition]) -> TextEncoder | None:
    """The CLIP, where a condition needs one."""
    using = [name for name, condition in conditions.items() if condition.uses_clip]
    if not using:
        return None
    if cfg.clip.path is None:
        raise UserError(f"clip.path must be given, as conditions=[{','.join(using)}] needs it: add clip.path=....")
    return instantiate(cfg.clip)


def facts_of_samples(path: str, source: Manifest) -> Iterator[dict[str, Any]]:
    """Every sample without its picture."""
    for shard in source.shards:
        for members in read_shard(path, shard, ("json", "txt")):
            yield as_sample(members.pop("__key__"), members)


def chosen_device(name: str) -> torch.device:
    """auto: the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda") or (name.startswith("cuda") and not torch.cuda.is_available()):
        raise UserError(f"device={name} is not to be had here: take device=auto or device=cpu.")
    return torch.device(name)


def identity(source: Manifest, encoders: Encoders) -> dict[str, str]:
    """What a latent data set is made of, by name."""
    made_of = {
        "images": source.fingerprint,
        "autoencoder": encoders.image.fingerprint,
        "dtype": np.dtype(encoders.dtype).name,
        "conditions": json.dumps(conditions_config(encoders), sort_keys=True),
    }
    if encoders.text is not None:
        made_of["text_encoder"] = encoders.text.fingerprint
    return made_of | ({"flips": "encoded"} if encoders.flips else {})


def conditions_config(encoders: Encoders) -> dict[str, Any]:
    """What builds the conditions again, for sampling."""
    return {name: condition.config() for name, condition in encoders.conditions.items()}


def claim(root: str, made_of: dict[str, str]) -> None:
    """Note what `root` is being made of, before the first shard; refuse to go on with other encoders or pictures."""
    path = storage.join(root, "precompute.json")
    if storage.exists(path):
        before = json.loads(storage.read_bytes(path))
        differing = [name for name in {**made_of, **before} if before.get(name) != made_of.get(name)]
        if differing:
            what = "; ".join(f"{name} was {before.get(name)} and is {made_of.get(name)}" for name in differing)
            raise UserError(f"{root} was begun with others: {what}. Give those, or choose another output=.")
    else:
        storage.write_atomically(path, json.dumps(made_of, indent=1).encode())


def encode_split(
    path: str, source: Manifest, root: str, encoders: Encoders, max_aside_fraction: float, name: str
) -> None:
    """Encode the shards that are missing, then write null and manifest."""
    if storage.exists(storage.join(root, "manifest.json")):
        print(f"precompute {name}: {root} is finished already")
        return
    aside = Aside(source.samples, max_aside_fraction)
    done = {shard.name: record for shard in source.shards if (record := finished_record(root, shard))}
    if done:
        print(f"precompute {name}: {len(done)} of {len(source.shards)} shards are there already")
    with Progress(f"precompute {name}", source.samples, "images", sum(r["listed"] for r in done.values())) as bar:
        for shard in source.shards:
            if shard.name not in done:
                done[shard.name] = encode_shard(path, shard, root, encoders, aside, bar)
            else:
                aside.rows += done[shard.name]["aside"]
    write_constants(root, encoders)
    records = [done[shard.name] for shard in source.shards]
    written = [record for record in records if record["shard"]]
    if not written:
        raise DataError(f"not one sample of {path} can be encoded: see {len(aside.rows)} reasons in {root}/shards.")
    info = {
        **source.info,
        "pixel_range": [-1.0, 1.0],
        "crop": "centre",
        "conditions": conditions_config(encoders),
        "latents": combined_statistics([record["latents"] for record in written]),
    }
    made_of = identity(source, encoders)
    shards = tuple(Shard(**record["shard"]) for record in written)
    aside.save(root, "precompute")
    Manifest("latents", shards, written[0]["fields"], info, made_of).save(root)
    print(f"precompute {name}: {sum(s.samples for s in shards)} encoded, {len(aside.rows)} set aside; in {root}")


def finished_record(root: str, shard: Shard) -> dict[str, Any] | None:
    """What was noted when a shard was finished, if its tar is still there as it was written."""
    path = storage.join(root, shard.name + ".done.json")
    if not storage.exists(path):
        return None
    record = json.loads(storage.read_bytes(path))
    tar = storage.join(root, shard.name)
    if record["shard"] and not (storage.exists(tar) and storage.size(tar) == record["shard"]["bytes"]):
        return None
    return record


def encode_shard(path: str, shard: Shard, root: str, encoders: Encoders, aside: Aside, bar: Progress) -> dict[str, Any]:
    """One latent shard of the same name, and the note that it is finished."""
    samples, rejected = decodable(path, shard, encoders.conditions)
    for key, reason in rejected:
        aside.add(key, reason)
    writer, statistics, fields = ShardWriter(), [], {}
    for first in range(0, len(samples), encoders.batch_size):
        part = samples[first : first + encoders.batch_size]
        encoded = encode_batch(part, encoders)
        statistics.append(batch_statistics(encoders.image, encoded[f"{encoders.image.stored_as}.npy"]))
        for i, sample in enumerate(part):
            members = {name: values[i] for name, values in encoded.items()}
            writer.add(sample["key"], {**members, "json": {**sample["meta"], "caption": sample["caption"]}})
        fields = {n: {"dtype": v.dtype.name, "shape": list(v.shape[1:])} for n, v in encoded.items()}
        bar.advance(len(part))
    bar.advance(len(rejected))
    record = {
        "shard": None,
        "listed": shard.samples,
        "aside": [{"key": key, "reason": reason} for key, reason in rejected],
        "latents": combined_statistics(statistics),
        "fields": {**fields, "json": {}},
    }
    if samples:
        published = writer.publish(root, shard.name)
        record["shard"] = {name: getattr(published, name) for name in ("name", "samples", "bytes", "sha256")}
    storage.write_atomically(storage.join(root, shard.name + ".done.json"), json.dumps(record).encode())
    return record


def decodable(
    path: str, shard: Shard, conditions: Mapping[str, Condition]
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """A shard's samples, and (key, reason) of those that can't be used. A cut shard is a DataError."""
    entries = read_index(path, shard)
    data = read_whole(path, shard)
    samples, rejected = [], []
    for key, places in entries:
        try:
            members = {name: codec.decode(name, data[at : at + size]) for name, (at, size) in places.items()}
            sample = as_sample(key, members)
            if "image" not in sample or not sample["caption"]:
                raise DataError("missing picture or caption")
            for condition in conditions.values():
                if reason := condition.reason_against(sample):
                    raise DataError(reason)
            samples.append(sample)
        except DataError as error:
            rejected.append((key, str(error)))
    return samples, rejected


@torch.no_grad()
def encode_batch(samples: Sequence[dict[str, Any]], encoders: Encoders) -> dict[str, np.ndarray]:
    """moments.npy (B, 2C, h, w) or what else the first stage stores, and the fields of each condition."""
    images = collated(samples)["image"].to(encoders.device)
    latents = encoders.image.stored_as
    encoded = {latents: encoders.image.encode_stored(images)}
    if encoders.flips:
        encoded[f"{latents}_flip"] = encoders.image.encode_stored(images.flip(-1))
    for condition in encoders.conditions.values():
        encoded |= condition.encode(samples, images, encoders)
    arrays = {f"{name}.npy": as_stored(value, encoders.dtype) for name, value in encoded.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise DataError(
                f"{name} of {samples[0]['key']} or a neighbour is not finite in {array.dtype}: use dtype=float32."
            )
    return arrays


def as_stored(value: torch.Tensor, dtype: type) -> np.ndarray:
    """Floats in `dtype`, whole numbers in 32 bits."""
    if not value.is_floating_point():
        return value.cpu().numpy().astype(np.int32)
    with np.errstate(over="ignore"):  # what overflows is not finite, and is refused by the caller
        return value.float().cpu().numpy().astype(dtype)


def batch_statistics(image: ImageEncoder, stored: np.ndarray) -> dict[str, Any]:
    """Count of values a channel, and sums of the first and second moment of posterior draws, per channel."""
    wide = np.float32 if stored.dtype.kind == "f" else np.int64
    mean, variance = (part.double() for part in image.posterior_of(torch.from_numpy(stored.astype(wide))))
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


@torch.no_grad()
def write_constants(root: str, encoders: Encoders) -> None:
    """null.safetensors: the encoders' own values where there is no condition; codebook.safetensors of a VQ model."""
    null: dict[str, torch.Tensor] = {}
    for condition in encoders.conditions.values():
        null |= {name: value.float().cpu().contiguous() for name, value in condition.null(encoders).items()}
    storage.write_atomically(storage.join(root, "null.safetensors"), save(null))
    if encoders.image.stored_as == "indices":
        codebook = encoders.image.codebook.detach().float().cpu().contiguous()
        storage.write_atomically(storage.join(root, "codebook.safetensors"), save({"codebook": codebook}))


if __name__ == "__main__":
    main()
