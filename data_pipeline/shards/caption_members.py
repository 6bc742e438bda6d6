"""How a data set stores several captions a sample: names of members, and the number of samples with each caption.

In a latent sample, the fields of the first caption are stored as text.npy, as in a sample with one caption, and those
of another caption as text.NAME.npy, beside the picture, which is encoded once. So a reader copies only the caption that
it needs, samples may have any number of captions, and a reader without support for several captions reads the first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from data_pipeline.shards.captions import ONE

PLAIN = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_-.")


def member_of(field: str, caption: str) -> str:
    """The name under which `field` of a further caption is stored: text, long -> text.long. Members of tars have
    names in lower case without slashes: any other character becomes its UTF-8 bytes, as %c3%a9."""
    escaped = "".join(c if c in PLAIN else "".join(f"%{byte:02x}" for byte in c.encode()) for c in caption)
    return f"{field}.{escaped}"


def line_of(member: str, fields: Mapping[str, Any]) -> str:
    """The manifest's line for a member: text.long.npy -> text.npy, if that field depends on captions."""
    field = member.partition(".")[0] + ".npy"
    return field if member.endswith(".npy") and fields.get(field, {}).get("captions") else member


def others_of(captions: Mapping[str, str]) -> dict[str, str]:
    """All captions except the first."""
    return dict(list(captions.items())[1:])


def names_in(captions: Mapping[str, str]) -> list[str]:
    """The names of a sample's captions that are counted: a single caption has no name of its own."""
    return list(captions) if len(captions) > 1 else [ONE]


def counted(names: Mapping[str, int]) -> dict[str, int]:
    """Caption -> number of samples with it, as stored in manifests; {} if no sample has several."""
    return dict(names) if set(names) - {ONE} else {}


def summed(parts: list[tuple[Mapping[str, int] | None, int]]) -> dict[str, int]:
    """The sum over several shards, given as pairs (counts, None if no sample has several; number of samples)."""
    total: Counter[str] = Counter()
    for counts, samples in parts:
        total.update(counts or {ONE: samples})
    return counted(total)
