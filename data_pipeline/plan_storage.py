"""What N images cost, computed in advance: bytes, shards and bandwidth of latents, text states and pictures."""

from __future__ import annotations

from data_pipeline.common.entry import CONF, start_entry

if __name__ == "__main__":
    start_entry("data_pipeline.plan_storage")  # checks the options, runs main() and exits

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from data_pipeline.audit.storage_cost import (
    HEADINGS,
    MEGA,
    Rates,
    Row,
    StorageLayout,
    deduplicated,
    duration,
    field_bytes,
    for_captions,
    json_of,
    shard_bytes,
    words,
)
from data_pipeline.common import storage
from data_pipeline.common.errors import UserError
from data_pipeline.encode.batch_encoder import Encoders
from data_pipeline.encode.caption_cache import CaptionCache
from data_pipeline.encode.conditions import Condition
from data_pipeline.encode.encoders import TEXT_ENCODERS
from data_pipeline.encode.text_conditions import choose_encoders
from data_pipeline.shards.arrays import DTYPES
from data_pipeline.shards.caption_members import line_of
from data_pipeline.shards.manifest import Manifest


def main(cfg: DictConfig) -> None:
    refuse_impossible(cfg)
    images, limit, rates = int(float(cfg.images)), int(cfg.shard_mb * MEGA), Rates(**cfg.training)
    stages = encoders_of(cfg, HydraConfig.get().runtime.choices["autoencoder"])
    layouts = layouts_of(cfg, stages, images)
    rows = [Row(layout, images, limit, rates) for layout in layouts]
    parts = [Row(layout, images, limit, rates) for layout in parts_of(cfg, stages)]
    facts = sentences(cfg, images, rates)
    measured = compare_with_measured(cfg, layouts[0]) if cfg.input else None
    text = "\n\n".join([*facts, table(parts), table(rows), *([measured["sentence"]] if measured else [])])
    print(text)
    if cfg.output:
        options = {name: value for name, value in OmegaConf.to_container(cfg, resolve=True).items() if name != "output"}
        figures = {"layouts": [r.figures for r in rows], "parts": [r.figures for r in parts], "measured": measured}
        content = json.dumps({**figures, "options": options}, indent=1)
        storage.write_atomically(storage.join(cfg.output, "plan.json"), content.encode())
        storage.write_atomically(storage.join(cfg.output, "plan.md"), (text + "\n").encode())
        print(f"\nplan_storage: plan.json and plan.md in {cfg.output}")


def refuse_impossible(cfg: DictConfig) -> None:
    """Refuse options that can't be planned with."""
    if cfg.dtype not in DTYPES:
        raise UserError(f"dtype={cfg.dtype} is unknown: use one of {', '.join(DTYPES)}.")
    if not 0 < cfg.unique_captions <= 1:
        raise UserError(f"unique_captions={cfg.unique_captions} must be above 0 and at most 1.")
    if not isinstance(cfg.captions, int) or cfg.captions < 1:
        raise UserError(f"captions={cfg.captions} must be the number of captions per picture, 1 or more.")
    for name in ("images", "size", "shard_mb", "training.images_per_s", "training.gpus_per_node", "training.nodes",
                 "encoding.images_per_s", "encoding.gpus"):  # fmt: skip
        value = OmegaConf.select(cfg, name)
        if not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{name}={value} must be a number above 0.")


def encoders_of(cfg: DictConfig, chosen: str) -> dict[str, Encoders]:
    """The encoders as precompute has them, by the first stage's name: the `chosen` one, then those to compare."""
    conditions = instantiate(cfg.conditions, _convert_="all")
    texts = text_encoders(cfg, conditions)
    found = {}
    for name, config in first_stages(cfg, chosen).items():
        image = weightless(config)
        if cfg.size % image.factor:
            raise UserError(f"size={cfg.size} must be a multiple of {image.factor}, the downsampling factor of {name}.")
        how = (conditions, torch.device("meta"), 1, cfg.dtype, cfg.flips)
        found[name] = Encoders(image, texts.get("clip"), *how, text_encoder=texts.get("text_encoder"))
        for condition in conditions.values():
            condition.settle(found[name])
    return found


def first_stages(cfg: DictConfig, chosen: str) -> dict[str, DictConfig]:
    """The configured first stage, under the name `chosen`, and those that it is compared with."""
    found = {chosen: cfg.autoencoder}
    for name in cfg.beside:
        path = f"{CONF}/autoencoder/{name}.yaml"
        if not storage.exists(path):
            raise UserError(f"beside={name} is not a first stage: use names from conf/autoencoder/.")
        found[name] = OmegaConf.load(path)
        if OmegaConf.missing_keys(found[name]):
            raise UserError(f"beside={name} is loaded from a path: use autoencoder= and autoencoder.path= for it.")
    return found


def text_encoders(cfg: DictConfig, conditions: Mapping[str, Condition]) -> dict[str, CaptionCache]:
    """Those that the conditions need, by their groups in conf/; loaded if they are given by a path."""
    used = choose_encoders(conditions, {name: cfg[name] for name in TEXT_ENCODERS})
    return {name: CaptionCache(weightless(cfg[name]), 1) for name in used}


def weightless(config: DictConfig) -> Any:
    """A model with shapes but no memory: built that way from its configuration, or loaded and emptied."""
    if "path" in config:
        return instantiate(config).to("meta")
    with torch.device("meta"):
        return instantiate(config)


def members_of(cfg: DictConfig, encoders: Encoders) -> dict[str, int]:
    """Extension -> bytes of a latent sample."""
    sides = (cfg.size, cfg.size)
    members = field_bytes(encoders, sides)
    return members | {"json": json_of(cfg.caption_bytes, cfg.json_bytes, sides, cfg.captions)}


def of_caption(encoders: Encoders) -> list[str]:
    """The members that each caption of a sample has of its own."""
    made = [condition for condition in encoders.conditions.values() if "caption" in condition.made_from]
    return [f"{field}.npy" for condition in made for field in condition.fields]


def layouts_of(cfg: DictConfig, stages: Mapping[str, Encoders], images: int) -> list[StorageLayout]:
    """Whole data sets; the first is what precompute_latents.py writes with the same options."""
    layouts = []
    for name, encoders in stages.items():
        members, text = members_of(cfg, encoders), of_caption(encoders)
        each = for_captions(members, text, cfg.captions)
        layouts.append(StorageLayout(f"{name}: latents and conditions", each))
        if text:
            title = f"{name}: latents, text once per caption"
            layouts.append(deduplicated(title, members, text, images, cfg.unique_captions, cfg.captions))
            kept = {extension: size for extension, size in members.items() if extension not in text}
            layouts.append(StorageLayout(f"{name}: latents, text encoded during training", kept))
    for kind, per_pixel in cfg.bytes_per_pixel.items():
        several = cfg.captions * (cfg.caption_bytes + len('"0": "", ')) + len('"captions": {}, ')
        beside = max(2, cfg.json_bytes) + (several if cfg.captions > 1 else 0)
        members = {kind: round(per_pixel * cfg.size**2), "txt": cfg.caption_bytes, "json": beside}
        layouts.append(StorageLayout(f"pictures ({kind}), all encoded during training", members))
    return layouts


def parts_of(cfg: DictConfig, stages: Mapping[str, Encoders]) -> list[StorageLayout]:
    """Each member by itself, in each possible dtype; members that all first stages share appear once."""
    parts: dict[str, StorageLayout] = {}
    for name, encoders in stages.items():
        by_dtype = {dtype: members_of(cfg, encoders._replace(dtype=dtype)) for dtype in ("float16", "float32")}
        own = {f"{field}.npy" for field in encoders.field_encoders[0].fields}
        for extension in by_dtype["float16"]:
            label = f"{name}: {extension}" if extension in own else extension
            sizes = {dtype: members[extension] for dtype, members in by_dtype.items()}
            if len(set(sizes.values())) == 1:
                sizes = {"": sizes["float16"]}
            for dtype, size in sizes.items():
                title = f"{label}, {dtype}" if dtype else label
                parts.setdefault(title, StorageLayout(title, {extension: size}))
    return list(parts.values())


def sentences(cfg: DictConfig, images: int, rates: Rates) -> list[str]:
    """The assumptions behind the tables, and the times."""
    encoding = images / (cfg.encoding.images_per_s * cfg.encoding.gpus)
    return [
        f"{images:,} images of {cfg.size} x {cfg.size}, stored in {cfg.dtype}; "
        f"{f'{cfg.captions} ' if cfg.captions > 1 else ''}captions of {cfg.caption_bytes} bytes, "
        f"{cfg.unique_captions:.0%} of them distinct; shards of {cfg.shard_mb} MB; units are powers of 1000.",
        f"Training at {rates.images_per_s:g} images/s per GPU, with {rates.gpus_per_node} GPUs per node and "
        f"{rates.nodes} nodes: {rates.cluster:,.0f} images/s, so an epoch takes {duration(images / rates.cluster)}. "
        f"Precompute at {cfg.encoding.images_per_s:g} images/s per GPU on {cfg.encoding.gpus} GPUs takes "
        f"{duration(encoding)}.",
    ]


def table(rows: Sequence[Row]) -> str:
    """In Markdown, aligned to be read as plain text."""
    lines = [HEADINGS, *(row.cells for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
    padded = []
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
        padded.append(f"| {' | '.join(cells)} |")
    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([padded[0], rule, *padded[1:]])


def compare_with_measured(cfg: DictConfig, layout: StorageLayout) -> dict[str, Any]:
    """Compare the plan for the latents at input= with the actual size of their tars."""
    manifest = Manifest.load(cfg.input, "latents")
    several = manifest.info.get("captions") or {}
    stored = sum(several.values()) / manifest.samples if several else 1
    if round(stored) != cfg.captions:
        raise UserError(f"{cfg.input} has {stored:.3g} captions per picture: set captions={round(stored)}.")
    differing = sorted({line_of(name, manifest.fields) for name in layout.members} ^ set(manifest.fields))
    if differing:
        raise UserError(
            f"{cfg.input} and the plan differ in {', '.join(differing)}: use the autoencoder, clip and conditions "
            "that made it."
        )
    written = sum(shard.bytes for shard in manifest.shards)
    planned = sum(shard_bytes(layout.sample, shard.samples) for shard in manifest.shards)
    sentence = (
        f"{cfg.input}: {manifest.samples:,} samples in {len(manifest.shards)} shards take {words(written)}; the plan "
        f"says {words(planned)} ({planned / written - 1:+.2%})."
    )
    return {"bytes": written, "planned_bytes": planned, "samples": manifest.samples, "sentence": sentence}
