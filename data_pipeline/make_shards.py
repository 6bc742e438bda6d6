"""Turn a source of pictures with captions into image-text shards; every tenth thing is held out."""

from __future__ import annotations

from data_pipeline.common.entry import start_entry

if __name__ == "__main__":
    start_entry("data_pipeline.make_shards")  # checks the options, runs main() and exits

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from data_pipeline.common import storage
from data_pipeline.common.errors import UserError
from data_pipeline.common.progress import Progress
from data_pipeline.images.aspect_buckets import Sizes, sizes_of
from data_pipeline.images.framing import Framing
from data_pipeline.shards.manifest import Manifest, find_splits
from data_pipeline.shards.provenance import refuse_made_otherwise, settings_of, without_later
from data_pipeline.shards.rejects import (
    Conversions,
    Rejects,
    accounting,
    examples,
    format_counts,
    passed_over_lines,
    summary,
)
from data_pipeline.shards.split_writer import SplitWriter
from data_pipeline.sources.caption_counts import CaptionCounts
from data_pipeline.sources.filters import Filters
from data_pipeline.sources.listing import is_heldout, prepared_sample, scan_source


def refuse_wrong_options(cfg: DictConfig) -> None:
    """UserError for mistakes that the options alone show."""
    for name, value in (("size", cfg.size), ("source.limit", cfg.source.get("limit") or 1)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name}={value} must be a whole number, 1 or more.")
    if cfg.shard_size < 1:
        raise UserError(f"shard_size={cfg.shard_size} must be 1 or more.")
    if cfg.heldout_every and cfg.heldout_every < 2:
        raise UserError(
            f"heldout_every={cfg.heldout_every} leaves nothing to train on: use 2 or more, or null to hold out nothing."
        )
    if "path" in cfg.source and cfg.source.path is None:
        raise UserError("this source reads a folder: add input=FOLDER.")
    if cfg.input and storage.absolute(cfg.output) == storage.absolute(cfg.input):
        raise UserError(f"output={cfg.output} is the same folder as input=: choose another one for the shards.")


def framing_of(cfg: DictConfig) -> Framing:
    """The target size of pictures, and how they are resized."""
    buckets = sizes_of(cfg.size, cfg.buckets, cfg.bucket_step, 1) if cfg.buckets else Sizes()
    return Framing(cfg.size, buckets, cfg.resize, str(cfg.source.get("background") or "white"))


def main(cfg: DictConfig) -> None:
    refuse_wrong_options(cfg)
    framing = framing_of(cfg)
    source, filters = instantiate(cfg.source, _convert_="all"), Filters(instantiate(cfg.filters, _convert_="all"))
    captions = CaptionCounts(instantiate(cfg.tokenizer) if cfg.get("tokenizer") else None)
    options = without_later(OmegaConf.to_container(cfg, resolve=True) | {"tokenizer": None})  # it only counts
    mark, listed, heldout = scan_source(options, source, filters)
    filters.refuse_unknown_columns()
    if finished(cfg.output, mark, settings_of(options)):
        print(f"make_shards: {cfg.output} is finished already")
        return
    rejects = Rejects(listed, cfg.max_aside_fraction, getattr(source, "remedies", None))
    splits = {"train": SplitWriter(storage.join(cfg.output, "train"), cfg.shard_size)}
    if heldout:
        splits["heldout"] = SplitWriter(storage.join(cfg.output, "heldout"), cfg.shard_size)
    converted = Conversions()
    with Progress("make_shards", listed, "pictures") as bar:
        for number, item in enumerate(source.items()):
            sample = prepared_sample(item, framing, filters, rejects)
            if sample is not None:
                name = "heldout" if is_heldout(item, number, cfg.heldout_every) else "train"
                splits[name].add(item.key, sample.members)
                converted.add(sample.converted, item.where or item.key)
                captions.add(name, item.key, sample.members["txt"], sample.members["json"])
            bar.advance()
    close(splits.values(), filters.counts, rejects)
    rejects.save(cfg.output, "make_shards")
    filters.save(cfg.output, "filtered")
    reasons, processed = summary(rejects.rows), sum(split.samples for split in splits.values())
    info = {"made_from": mark, "made_with": settings_of(options), "size": cfg.size}
    info |= {"accounting": accounting(processed, filters.counts, reasons, listed)}
    passed_over = getattr(source, "passed_over", Counter())
    info |= converted.as_info() | ({"passed_over": dict(passed_over)} if passed_over else {})
    shape = {} if framing.buckets.sides else {"shape": [cfg.size, cfg.size, 3]}
    fields = {"png": {"dtype": "uint8", **shape}, "txt": {}, "json": {}}
    for name, split in reversed(splits.items()):  # train is finished last: its manifest completes the data set
        Manifest("image-text", tuple(split.shards), fields, info | captions.info(name)).save(split.root)
    report(cfg.output, splits, filters.counts, rejects)
    buckets = bucket_lines(splits.values()) if framing.buckets.sides else []
    for line in [*buckets, *converted.lines(), *passed_over_lines(passed_over), *captions.sentences()]:
        print(f"make_shards: {line}")


def bucket_lines(splits: Iterable[SplitWriter]) -> list[str]:
    """One line of text: the buckets that are used, with the number of pictures in each."""
    counts = sum((split.sides for split in splits), Counter[tuple[int, int]]())
    used = ", ".join(f"{height}x{width} ({count})" for (height, width), count in sorted(counts.items()))
    return [f"buckets with pictures (height x width, number): {used}"]


def close(splits: Collection[SplitWriter], counts: Counter[str], rejects: Rejects) -> None:
    """Publish the last shards. UserError, with the reasons, for a split without samples."""
    alone = all(split.is_empty for split in splits)
    filtered = f" ({format_counts(counts, 3)})" if counts else ""
    for split in splits:
        left_out = f"{counts.total()} of {rejects.listed} filtered{filtered}, {len(rejects.rows)} set aside"
        split.close(left_out, rejects.rows, alone)


def report(output: str, splits: Mapping[str, SplitWriter], filtered: Counter[str], rejects: Rejects) -> None:
    """Print the outcome of the listed pictures, and the first ones set aside for each reason."""
    counts = ", ".join(f"{split.samples} {name}" for name, split in splits.items())
    left_out = f"{filtered.total()} filtered, {len(rejects.rows)} set aside"
    print(f"make_shards: {counts}, {left_out}, of {rejects.listed} listed; in {output}")
    for reason, count in filtered.items():
        print(f"make_shards: filtered {count} x {reason}")
    for reason, count in summary(rejects.rows).items():
        print(f"make_shards: set aside {count} x {reason}, {examples(rejects.rows, reason)}")


def finished(output: str, mark: str, settings: Mapping[str, Any]) -> bool:
    """Whether the same configuration has made this output; an output that holds anything else is refused."""
    try:
        splits = find_splits(output)
    except UserError:
        if set(storage.subfolders(output)) - {"train", "heldout", "aside"}:
            raise UserError(f"output={output} contains other folders: choose another output=.") from None
        return False
    refuse_made_otherwise(splits.values(), f"output={output} holds shards", mark, settings)
    return "train" in splits
