"""Looks through a source before anything is decoded, and then takes its items one by one."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.common.errors import UserError
from data_pipeline.images.decode import UNDECODABLE, PictureError
from data_pipeline.images.framing import Framing
from data_pipeline.shards.rejects import Rejects
from data_pipeline.sources.filters import Candidate, Filters
from data_pipeline.sources.source import Source, SourceItem


def scan_source(options: Mapping[str, Any], source: Source, filters: Filters | None = None) -> tuple[str, int, int]:
    """Mark, count, and count of held-out items: one pass over the source before anything is decoded.

    The mark identifies a finished output: the script's options, the listed items, and their files' stamps. A key that
    comes twice is refused. It holds 8 bytes a key: 10^7 items need a few hundred MB while they are sorted.
    """
    config = {**options, "output": None}
    if not config["filters"]:
        del config["filters"]
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
        refuse_same_key(source, again)
    return mark.hexdigest()[:16], number + 1, heldout


def refuse_same_key(source: Source, again: Sequence[int]) -> None:
    """UserError that names two items whose keys are the same. again: hashes of all such keys."""
    items = [item for item in source.items() if key_hash(item.key) == again[0]]
    one, other = (item.where or item.key for item in items[:2])
    more = f" (and {len(set(again)) - 1:,} more such keys)" if len(set(again)) > 1 else ""
    raise UserError(
        f"{one} and {other} would both have the key {items[0].key}{more}, as a key is the path without its extension, "
        "with _ for / and for dots: rename one of them, or move one to another folder."
    )


def several(item: SourceItem) -> tuple[list[tuple[str, str]], ...]:
    """The part of a mark that covers several captions, including their names and order."""
    return (list(item.captions.items()),) if item.captions else ()


def key_hash(key: str) -> int:
    """A 64-bit hash of a key."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(key), digest_size=8).digest(), "little")


def is_heldout(item: SourceItem, number: int, every: int | None) -> bool:
    """As the source says; else every tenth thing (`every`; None: nothing at all)."""
    if not every:
        return False
    return number % every == every - 1 if item.heldout is None else item.heldout


class Prepared(NamedTuple):
    """An item's members, and the conversions that were made, in words."""

    members: dict[str, Any]
    converted: tuple[str, ...]


def prepared_sample(item: SourceItem, framing: Framing, filters: Filters, rejects: Rejects) -> Prepared | None:
    """An item's sample to write; None if it is filtered or set aside, which is recorded with the reason."""
    if item.absent:
        filters.add(item.key, item.absent)
        return None
    if item.unusable:
        rejects.add(item.key, item.unusable, item.where)
        return None
    if item.caption is None:
        rejects.add(item.key, item.uncaptioned or "missing caption", item.where)
        return None
    load = functools.cache(functools.partial(item.load, framing))
    try:
        reason = filters.reason_against(
            Candidate(item.caption, item.meta, item.sides or (lambda: None), lambda: load().pixels)
        )
        if reason is None:
            picture = load()
            meta = item.meta | ({"captions": item.captions} if item.captions else {})
            members = {"png": picture.pixels, "txt": item.caption, "json": framing.facts(picture) | meta}
            return Prepared(members, (*picture.converted, *item.converted))
        filters.add(item.key, reason)
    except UNDECODABLE as error:
        known = isinstance(error, PictureError)
        reason = str(error) if known else f"undecodable picture ({type(error).__name__}: {error})"
        rejects.add(item.key, reason, item.where)
    return None
