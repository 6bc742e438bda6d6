"""How a data set holds several captions a sample: names of members, and how many samples have which caption.

A latent sample has what its first caption made as text.npy, as one with a single caption has, and what another made as
text.NAME.npy, beside one encoded picture. So a reader copies only the caption that it wants, samples may have any
number of captions, and whoever knows nothing of several captions reads the first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from data_pipeline.shards.captions import ONE

PLAIN = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_-.")


def member_of(field: str, caption: str) -> str:
    """The name under which `field` is stored of a caption other than the first: text, long -> text.long. Tars' members
    are in lower case and without slashes: any other character becomes its UTF-8 bytes, as %c3%a9."""
    escaped = "".join(c if c in PLAIN else "".join(f"%{byte:02x}" for byte in c.encode()) for c in caption)
    return f"{field}.{escaped}"


def line_of(member: str, fields: Mapping[str, Any]) -> str:
    """The line of a manifest that describes a member: text.long.npy -> text.npy, if that is made of captions."""
    field = member.partition(".")[0] + ".npy"
    return field if member.endswith(".npy") and fields.get(field, {}).get("captions") else member


def others_of(captions: Mapping[str, str]) -> dict[str, str]:
    """All captions but the first."""
    return dict(list(captions.items())[1:])


def names_in(captions: Mapping[str, str]) -> list[str]:
    """The names to count of a sample's captions: a single one has no name of its own."""
    return list(captions) if len(captions) > 1 else [ONE]


def counted(names: Mapping[str, int]) -> dict[str, int]:
    """Caption -> number of samples that have it, as manifests hold it; {} if no sample has several."""
    return dict(names) if set(names) - {ONE} else {}


def summed(parts: list[tuple[Mapping[str, int] | None, int]]) -> dict[str, int]:
    """The counts of several shards, each (its counts, None if no sample has several; its samples)."""
    total: Counter[str] = Counter()
    for counts, samples in parts:
        total.update(counts or {ONE: samples})
    return counted(total)
