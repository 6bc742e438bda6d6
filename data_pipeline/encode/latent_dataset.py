"""What belongs to a latent data set as a whole: what it is made from, its constants, accounting and manifest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from safetensors.torch import save

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, UserError
from data_pipeline.common.saved_names import named
from data_pipeline.encode.base_dataset import Base
from data_pipeline.encode.batch_encoder import Encoders, combined_statistics
from data_pipeline.encode.latent_shard import OutputPaths
from data_pipeline.encode.shard_reader import ShardReader
from data_pipeline.images.aspect_buckets import Sizes
from data_pipeline.shards.caption_members import summed
from data_pipeline.shards.json_fields import mean_in_manifest
from data_pipeline.shards.manifest import Manifest, Shard
from data_pipeline.shards.rejects import Rejects, accounting, summary
from data_pipeline.shards.truncation import cut_captions, joined, sentence


class SplitToEncode(NamedTuple):
    """A split to encode: its name, what it is made from, where it goes, and what reads and encodes it."""

    name: str
    source: Manifest
    paths: OutputPaths
    reader: ShardReader
    max_aside_fraction: float = 0.05

    @property
    def encoders(self) -> Encoders:
        return self.reader.encoders

    @property
    def title(self) -> str:
        return f"precompute {self.name or 'samples'}"


def recipe_of(
    source: Manifest, encoders: Encoders, sizes: Sizes | None = None, base: Base | None = None
) -> dict[str, str]:
    """What a latent data set is made from, by name."""
    made_of = {
        "images": source.fingerprint,
        "autoencoder": encoders.image.fingerprint,
        "dtype": encoders.dtype,
        "conditions": json.dumps(conditions_config(encoders), sort_keys=True),
    }
    made_of |= encoders.fingerprints
    if sizes and sizes.sides and (sizes.split or sizes.sides[0] != (source.info.get("size"),) * 2):
        made_of["sizes"] = sizes.described
    if any(text is not None and text.size for text in encoders.texts):
        made_of["captions"] = "encoded one by one"
    if edits := encoders.edits.changed():
        made_of["caption_edits"] = json.dumps(edits, sort_keys=True)
    if base is not None:
        made_of["base"] = base.fingerprint
    return made_of | ({"flips": "encoded"} if encoders.flips else {})


def conditions_config(encoders: Encoders) -> dict[str, Any]:
    """The configuration that builds the conditions again, for sampling."""
    return {name: condition.config() for name, condition in encoders.conditions.items()}


def claim(root: str, made_of: dict[str, str]) -> None:
    """Record what `root` is made from, before the first shard; refuse to continue with other encoders or pictures."""
    path = storage.join(root, "precompute.json")
    if not storage.write_first(path, json.dumps(made_of, indent=1).encode()):
        before = read_recipe(path)
        differing = [name for name in {**made_of, **before} if before.get(name) != made_of.get(name)]
        if differing:
            what = "; ".join(f"{name} was {before.get(name)} and is {made_of.get(name)}" for name in differing)
            raise UserError(f"{root} was begun with others: {what}. Give those, or choose another output=.")


def read_recipe(path: str) -> dict[str, str]:
    """The contents of a precompute.json; an earlier version's, with conditions by Python path, in today's form."""
    note = storage.read_bytes(path)
    try:
        made_of = dict(json.loads(note).items())
        if "conditions" in made_of:
            made_of["conditions"] = json.dumps(named(json.loads(made_of["conditions"])), sort_keys=True)
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}): remove that folder, or choose another output=.") from error
    return made_of


def refuse_other_layout(paths: OutputPaths) -> None:
    """Refuse an output that holds one set per bucket where a single set is wanted, or the other way round."""
    other = paths._replace(bucketed=not paths.bucketed)
    if storage.exists(storage.join(other.markers_root, "precompute.json")):
        how = "buckets" if other.bucketed else "one size"
        raise UserError(f"{paths.output} was begun with {how}: use those sizes, or choose another output=.")


def refuse_pictures(paths: OutputPaths) -> None:
    """Refuse an output that is itself a data set of pictures: it would be taken for finished."""
    if storage.exists(storage.join(paths.root(), "manifest.json")) and Manifest.load(paths.root()).kind != "latents":
        raise UserError(f"output={paths.output} holds image-text shards: choose another folder for the latents.")


def temp_folders(split: SplitToEncode) -> list[str]:
    """Folders that may hold temporary files of this split."""
    paths = split.paths
    roots = {paths.markers_root, paths.root()}
    if paths.bucketed:
        roots |= {paths.root(name) for name in storage.subfolders(paths.output)}
    below = {shard.name.rpartition("/")[0] for shard in split.source.shards} | {"aside"}
    return sorted(roots | {storage.join(root, folder) for root in roots for folder in below if folder})


class Finished(NamedTuple):
    """The numbers of finished and of rejected samples of a split, over all workers."""

    samples: int
    rejected: int


def finish(split: SplitToEncode, records: Sequence[dict[str, Any]], made_of: dict[str, str]) -> Finished:
    """Write what belongs to the whole: constants, rejects, manifests. Every worker writes the same bytes."""
    source, paths, encoders = split.source, split.paths, split.encoders
    rejects = Rejects(source.samples, split.max_aside_fraction)
    for row in (row for record in records for row in record["aside"]):
        rejects.add(**row)
    buckets = sorted({bucket for record in records for bucket in record["sets"]})
    parts = {bucket: [r["sets"][bucket] for r in records if bucket in r["sets"]] for bucket in buckets}
    if not buckets:
        raise DataError(f"not one sample of {split.reader.path} can be encoded: see {paths.markers_root}/shards.")
    processed = sum(part["shard"]["samples"] for each in parts.values() for part in each)
    info = {
        **{name: fact for name, fact in source.info.items() if name not in ("made_with", "captions")},
        "accounting": accounting(
            processed, {}, summary(rejects.rows), source.samples
        ),  # of this stage, over all buckets
        "pixel_range": [-1.0, 1.0],
        "crop": "centre",
        "sizes": split.reader.sizes.described,
        "conditions": conditions_config(encoders),
        "latents": combined_statistics([part["latents"] for each in parts.values() for part in each])
        | ({"stated": encoders.image.stated_scaling} if encoders.image.stated_scaling else {}),
    }
    info |= caption_facts(records, encoders)
    rejects.save(paths.markers_root, "precompute")
    for bucket in buckets:
        root, shards = paths.root(bucket), tuple(Shard(**part["shard"]) for part in parts[bucket])
        write_constants(root, encoders)
        fields = common_fields(root, parts[bucket])
        if "captions" in info:
            fields = with_captions(fields, encoders)
        sizes = mean_in_manifest([part.get("size_sums") for part in parts[bucket]])
        Manifest("latents", shards, fields, info | sizes, made_of).save(root)
    counts = {bucket: sum(part["shard"]["samples"] for part in parts[bucket]) for bucket in buckets}
    if paths.bucketed:
        storage.write_atomically(paths.final_file, json.dumps(counts, indent=1).encode())
        print(f"{split.title}: " + ", ".join(f"{count} of {bucket}" for bucket, count in counts.items()))
    for name in encoders.token_counters:
        if cut := info.get(cut_captions(name)):
            print(f"{split.title}: {sentence(cut, name)}")
    return Finished(processed, len(rejects.rows))


def caption_facts(records: Sequence[dict[str, Any]], encoders: Encoders) -> dict[str, Any]:
    """The number of samples with each caption, if some have several; the captions that each encoder cuts, if any."""
    parts = [part for record in records for part in record["sets"].values()]
    captions = summed([(part.get("captions"), part["shard"]["samples"]) for part in parts])
    cut = {
        name: joined(record.get(name, {}) for record in records) for name in map(cut_captions, encoders.token_counters)
    }
    return ({"captions": captions} if captions else {}) | {name: counts for name, counts in cut.items() if counts}


def with_captions(fields: dict[str, Any], encoders: Encoders) -> dict[str, Any]:
    """The lines of a manifest, with a mark on fields that are stored per caption."""
    made = {f"{name}.npy" for each in encoders.field_encoders if "caption" in each.made_from for name in each.fields}
    return {name: {**line, "captions": True} if name in made else line for name, line in fields.items()}


def common_fields(root: str, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fields, which must be the same in all shards."""
    first = parts[0]
    for part in parts:
        if part["fields"] != first["fields"]:
            raise DataError(
                f"pictures of {part['shard']['name']} and {first['shard']['name']} in {root} are not of one size: "
                "set size= or buckets=auto, and another output=."
            )
    return first["fields"]


@torch.no_grad()
def write_constants(root: str, encoders: Encoders) -> None:
    """null.safetensors: the encoders' own values for no condition; codebook.safetensors of a VQ model."""
    null: dict[str, torch.Tensor] = {}
    for condition in encoders.conditions.values():
        null |= {name: value.float().cpu().contiguous() for name, value in condition.null(encoders).items()}
    storage.write_atomically(storage.join(root, "null.safetensors"), save(null))
    if encoders.image.stored_as == "indices":
        codebook = encoders.image.codebook.detach().float().cpu().contiguous()
        storage.write_atomically(storage.join(root, "codebook.safetensors"), save({"codebook": codebook}))
