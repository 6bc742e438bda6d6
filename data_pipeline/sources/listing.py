"""Looks through a source before anything is decoded, and then takes its items one by one."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipeline.common.errors import UserError
from data_pipeline.images.decode import UNDECODABLE
from data_pipeline.shards.rejects import Rejects
from data_pipeline.sources.filters import Candidate, Filters
from data_pipeline.sources.source import Source, SourceItem

LATER = ("caption", "encoding", "key", "unended")


def scan_source(options: Mapping[str, Any], source: Source, filters: Filters | None = None) -> tuple[str, int, int]:
    """Mark, count, and count of held-out items: one pass over the source before anything is decoded.

    The mark identifies a finished output: the script's options, the listed items, and their files' stamps. A key that
    comes twice is refused. It holds 8 bytes a key: 10^7 items need a few hundred MB while they are sorted.
    """
    config = marked_options(options)
    mark = hashlib.sha256(f"[{json.dumps(config, sort_keys=True)}, [".encode())
    keys, heldout, number = array("Q"), 0, -1
    for number, item in enumerate(source.items()):
        looked_at = (item.meta,) if options["filters"] else ()
        if filters is not None:
            filters.look(item.meta)
        row = json.dumps(
            (item.key, item.caption, *getattr(item, "stamp", ()), *several(item), *looked_at), sort_keys=True
        )
        mark.update(f"{', ' if number else ''}{row}".encode())
        keys.append(key_hash(item.key))
        heldout += is_heldout(item, number, options["heldout_every"])
    mark.update(b"]]")
    ordered = np.sort(np.frombuffer(keys, np.uint64))
    again = ordered[1:][ordered[1:] == ordered[:-1]].tolist()
    if again:
        twice = next(item.key for item in source.items() if key_hash(item.key) == again[0])
        raise UserError(f"two pictures have the key {twice}: rename one of them.")
    return mark.hexdigest()[:16], number + 1, heldout


def marked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a mark covers. Those that came later don't count while they are null: what was made before them
    stays finished."""
    config = {**options, "output": None}
    if not config["filters"]:
        del config["filters"]
    if "source" in config:
        given = config["source"].items()
        config["source"] = {name: value for name, value in given if value is not None or name not in LATER}
    return config


def several(item: SourceItem) -> tuple[list[tuple[str, str]], ...]:
    """What a mark covers of several captions: their names and their order, too."""
    return (list(item.captions.items()),) if item.captions else ()


def key_hash(key: str) -> int:
    """A 64-bit hash of a key."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(key), digest_size=8).digest(), "little")


def is_heldout(item: SourceItem, number: int, every: int | None) -> bool:
    """As the source says; else every tenth thing (`every`; None: nothing at all)."""
    if not every:
        return False
    return number % every == every - 1 if item.heldout is None else item.heldout


def prepared_sample(item: SourceItem, size: int, filters: Filters, rejects: Rejects) -> dict[str, Any] | None:
    """The members of an item; None if it is filtered or set aside, which is recorded with the reason."""
    if item.absent:
        filters.add(item.key, item.absent)
        return None
    if item.unusable:
        rejects.add(item.key, item.unusable, item.where)
        return None
    if item.caption is None:
        rejects.add(item.key, item.uncaptioned or "missing caption", item.where)
        return None
    load = functools.cache(functools.partial(item.load, size))
    try:
        reason = filters.reason_against(Candidate(item.caption, item.meta, item.sides or (lambda: None), load))
        if reason is None:
            captions = {"captions": item.captions} if item.captions else {}
            return {"png": load(), "txt": item.caption, "json": item.meta | captions}
        filters.add(item.key, reason)
    except UNDECODABLE as error:
        rejects.add(item.key, f"undecodable picture ({type(error).__name__})", item.where)
    return None
