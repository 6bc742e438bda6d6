"""Turn a source of pictures with captions into image-text shards, every tenth thing held out."""

from __future__ import annotations

from data_pipeline.common.entry import start_entry

if __name__ == "__main__":
    start_entry("data_pipeline.make_shards")  # imports the rest when the options are right, and ends

import functools
import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from data_pipeline.common import storage
from data_pipeline.common.errors import UserError
from data_pipeline.common.progress import Progress
from data_pipeline.filters import Candidate, Filters
from data_pipeline.images.decode import UNDECODABLE
from data_pipeline.shards.manifest import Manifest, find_splits
from data_pipeline.shards.provenance import refuse_made_otherwise, settings_of
from data_pipeline.shards.rejects import Aside, accounting, summary
from data_pipeline.shards.split_writer import Split
from data_pipeline.sources.source import Source, SourceItem


def main(cfg: DictConfig) -> None:
    for name, value in (("size", cfg.size), ("source.limit", cfg.source.get("limit") or 1)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name}={value} can't be: take a whole number, 1 or more.")
    if cfg.shard_size < 1:
        raise UserError(f"shard_size={cfg.shard_size} can't be: take 1 or more.")
    if cfg.heldout_every and cfg.heldout_every < 2:
        raise UserError(f"heldout_every={cfg.heldout_every} leaves none to train on: take 2 or more, or null for none.")
    source, filters = instantiate(cfg.source, _convert_="all"), Filters(instantiate(cfg.filters, _convert_="all"))
    if cfg.input and storage.absolute(cfg.output) == storage.absolute(cfg.input):
        raise UserError(f"output={cfg.output} is input=: choose a folder of its own for the shards.")
    mark, listed, heldout = look_through(cfg, source, filters)
    filters.refuse_unknown_columns()
    if finished(cfg.output, mark, settings_of(OmegaConf.to_container(cfg, resolve=True))):
        print(f"make_shards: {cfg.output} is finished already")
        return
    aside = Aside(listed, cfg.max_aside_fraction)
    splits = {"train": Split(storage.join(cfg.output, "train"), cfg.shard_size)}
    if heldout:
        splits["heldout"] = Split(storage.join(cfg.output, "heldout"), cfg.shard_size)
    with Progress("make_shards", listed, "pictures") as bar:
        for number, item in enumerate(source.items()):
            sample = taken(item, cfg.size, filters, aside)
            if sample is not None:
                splits["heldout" if is_heldout(item, number, cfg.heldout_every) else "train"].add(item.key, sample)
            bar.advance()
    for split in splits.values():
        split.close()
    aside.save(cfg.output, "make_shards")
    filters.save(cfg.output, "filtered")
    reasons, processed = summary(aside.rows), sum(split.samples for split in splits.values())
    info = {"made_from": mark, "made_with": settings_of(OmegaConf.to_container(cfg, resolve=True)), "size": cfg.size}
    info |= {"accounting": accounting(processed, filters.counts, reasons, listed)}
    fields = {"png": {"dtype": "uint8", "shape": [cfg.size, cfg.size, 3]}, "txt": {}, "json": {}}
    for split in reversed(splits.values()):  # train's makes the whole complete
        Manifest("image-text", tuple(split.shards), fields, info).save(split.root)
    report(cfg.output, splits, filters.counts, aside)


def report(output: str, splits: Mapping[str, Split], filtered: Counter[str], aside: Aside) -> None:
    """What became of each picture that was listed; of what was set aside by its path, the first."""
    counts = ", ".join(f"{split.samples} {name}" for name, split in splits.items())
    left_out = f"{filtered.total()} filtered, {len(aside.rows)} set aside"
    print(f"make_shards: {counts}, {left_out}, of {aside.listed} listed; in {output}")
    for reason, count in filtered.items():
        print(f"make_shards: filtered {count} x {reason}")
    for reason, count in aside.by_reason().items():
        where = next((row["where"] for row in aside.rows if row["reason"] == reason and "where" in row), "")
        print(f"make_shards: set aside {count} x {reason}" + (f", first {where}" if where else ""))


def finished(output: str, mark: str, settings: Mapping[str, Any]) -> bool:
    """Whether the same configuration has made this output; an output that holds anything else is refused."""
    try:
        splits = find_splits(output)
    except UserError:
        if set(storage.subfolders(output)) - {"train", "heldout", "aside"}:
            raise UserError(f"output={output} holds something else: choose another output=.") from None
        return False
    refuse_made_otherwise(splits.values(), f"output={output} holds shards", mark, settings)
    return "train" in splits


def look_through(cfg: DictConfig, source: Source, filters: Filters | None = None) -> tuple[str, int, int]:
    """Mark, count, and count of held-out items: a pass over the source before anything is decoded.

    The mark is what a finished output is recognised by: the configuration, what is listed, and its files' stamps. A
    key that comes twice is refused. It holds 8 bytes a key: 10^7 items are a few hundred MB while they are sorted.
    """
    config = OmegaConf.to_container(cfg, resolve=True) | {"output": None}
    if not config["filters"]:
        del config["filters"]
    mark = hashlib.sha256(f"[{json.dumps(config, sort_keys=True)}, [".encode())
    keys, heldout, number = array("Q"), 0, -1
    for number, item in enumerate(source.items()):
        looked_at = (item.meta,) if cfg.filters else ()
        if filters is not None:
            filters.look(item.meta)
        row = json.dumps((item.key, item.caption, *getattr(item, "stamp", ()), *looked_at), sort_keys=True)
        mark.update(f"{', ' if number else ''}{row}".encode())
        keys.append(digest_of(item.key))
        heldout += is_heldout(item, number, cfg.heldout_every)
    mark.update(b"]]")
    ordered = np.sort(np.frombuffer(keys, np.uint64))
    again = ordered[1:][ordered[1:] == ordered[:-1]].tolist()
    if again:
        twice = next(item.key for item in source.items() if digest_of(item.key) == again[0])
        raise UserError(f"two pictures have the key {twice}: rename one of them.")
    return mark.hexdigest()[:16], number + 1, heldout


def digest_of(key: str) -> int:
    """64 bits that stand for a key."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(key), digest_size=8).digest(), "little")


def is_heldout(item: SourceItem, number: int, every: int | None) -> bool:
    """As the source says; else every tenth thing (`every`; None: nothing at all)."""
    if not every:
        return False
    return number % every == every - 1 if item.heldout is None else item.heldout


def taken(item: SourceItem, size: int, filters: Filters, aside: Aside) -> dict[str, Any] | None:
    """The members of an item; None where it is filtered or set aside, which is noted under its reason."""
    if item.absent:
        filters.add(item.key, item.absent)
        return None
    if item.unusable:
        aside.add(item.key, item.unusable, item.where)
        return None
    if item.caption is None:
        aside.add(item.key, "missing caption")
        return None
    load = functools.cache(functools.partial(item.load, size))
    try:
        reason = filters.reason_against(Candidate(item.caption, item.meta, item.sides or (lambda: None), load))
        if reason is None:
            return {"png": load(), "txt": item.caption, "json": item.meta}
        filters.add(item.key, reason)
    except UNDECODABLE as error:
        aside.add(item.key, f"undecodable picture ({type(error).__name__})")
    return None
