"""Turn a source of pictures with captions into image-text shards, every tenth thing held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from data_pipeline import storage
from data_pipeline.aside import Aside
from data_pipeline.codec import UNDECODABLE
from data_pipeline.entry import entry
from data_pipeline.errors import UserError
from data_pipeline.manifest import Manifest, Shard, find_splits
from data_pipeline.progress import Progress
from data_pipeline.shard_writer import ShardWriter
from data_pipeline.sources.source import SourceItem


@entry("make_shards")
def main(cfg: DictConfig) -> None:
    if cfg.shard_size < 1:
        raise UserError(f"shard_size={cfg.shard_size} can't be: take 1 or more.")
    if cfg.heldout_every and cfg.heldout_every < 2:
        raise UserError(f"heldout_every={cfg.heldout_every} leaves none to train on: take 2 or more, or null for none.")
    items = instantiate(cfg.source, _convert_="all").items()
    mark = mark_of(cfg, items)
    if finished(cfg.output, mark):
        print(f"make_shards: {cfg.output} is finished already")
        return
    keys = [item.key for item in items]
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"two pictures have the key {twice}: rename one of them.")
    aside = Aside(len(items), cfg.max_aside_fraction)
    every = cfg.heldout_every
    heldout = [item for i, item in enumerate(items) if every and i % every == every - 1]
    kept = [item for i, item in enumerate(items) if not (every and i % every == every - 1)]
    with Progress("make_shards", len(items), "pictures") as bar:
        manifests = {
            split: write_split(part, storage.join(cfg.output, split), cfg.size, cfg.shard_size, aside, bar)
            for split, part in (("train", kept), ("heldout", heldout))
            if part
        }
    aside.save(cfg.output, "make_shards")
    for split, (shards, fields) in reversed(manifests.items()):  # train's makes the whole complete
        info = {"made_from": mark, "size": cfg.size}
        Manifest("image-text", tuple(shards), fields, info).save(storage.join(cfg.output, split))
    counts = ", ".join(f"{sum(s.samples for s in shards)} {split}" for split, (shards, _) in manifests.items())
    print(f"make_shards: {counts}, {len(aside.rows)} set aside, of {len(items)} listed; in {cfg.output}")
    for reason, count in aside.by_reason().items():
        print(f"make_shards: set aside {count} x {reason}")


def mark_of(cfg: DictConfig, items: Sequence[SourceItem]) -> str:
    """What a finished output is recognised by: the configuration, what the source lists, and its files' stamps."""
    config = OmegaConf.to_container(cfg, resolve=True) | {"output": None}
    listed = [(item.key, item.caption, *getattr(item, "stamp", ())) for item in items]
    return hashlib.sha256(json.dumps([config, listed], sort_keys=True).encode()).hexdigest()[:16]


def finished(output: str, mark: str) -> bool:
    """Whether the same configuration has made this output; an output that holds anything else is refused."""
    try:
        splits = find_splits(output)
    except UserError:
        if set(storage.subfolders(output)) - {"train", "heldout", "aside"}:
            raise UserError(f"output={output} holds something else: choose another output=.") from None
        return False
    marks = {Manifest.load(path).info.get("made_from") for path in splits.values()}
    if marks != {mark}:
        raise UserError(f"output={output} holds shards made otherwise: remove it, or choose another output=.")
    return "train" in splits


def write_split(
    items: Sequence[SourceItem], root: str | Path, size: int, shard_size: int, aside: Aside, bar: Progress
) -> tuple[list[Shard], dict[str, dict]]:
    """All items of a split as shards of `shard_size`; returns them and what their fields are."""
    shards: list[Shard] = []
    writer = ShardWriter()

    def publish() -> None:
        nonlocal writer
        shards.append(writer.publish(root, f"shards/{len(shards):06d}.tar"))
        writer = ShardWriter()

    for item in items:
        sample, reason = load_sample(item, size)
        if sample is None:
            aside.add(item.key, reason)
        else:
            writer.add(item.key, sample)
        if writer.count == shard_size:
            publish()
        bar.advance()
    if writer.count:
        publish()
    remove_leftovers(root, len(shards))
    if not shards:
        raise UserError("not one picture of a split can be used: check the source, or set heldout_every=null.")
    return shards, {"png": {"dtype": "uint8", "shape": [size, size, 3]}, "txt": {}, "json": {}}


def remove_leftovers(root: str | Path, number: int) -> None:
    """Shards from `number` on: an earlier run that was cut short, and had more of them, may have left some."""
    while storage.exists(storage.join(root, f"shards/{number:06d}.idx")):
        for ending in ("tar", "idx"):
            storage.remove(storage.join(root, f"shards/{number:06d}.{ending}"))
        number += 1


def load_sample(item: SourceItem, size: int) -> tuple[dict | None, str]:
    """The members of an item, or None and why not."""
    if item.caption is None:
        return None, "missing caption"
    try:
        image = item.load(size)
    except UNDECODABLE as error:
        return None, f"undecodable picture ({type(error).__name__})"
    return {"png": image, "txt": item.caption, "json": item.meta}, ""


if __name__ == "__main__":
    main()
