"""Edits of captions before they are encoded: words around them, and their comma-separated tags."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

from data_pipeline.common.option_checks import Count, Within, refuse_wrong

TRIES = 10  # shuffles tried per requested order: few tags may have fewer orders, and some shuffles repeat


@dataclass(frozen=True, slots=True)
class CaptionEdits:
    """first_tags: keep only this many tags; fixed_tags: this many stay in front when tags are shuffled. prefix and
    suffix are put around the result unchanged, including blanks."""

    prefix: str = ""
    suffix: str = ""
    first_tags: Count | None = None
    fixed_tags: Annotated[int, Within(0)] = 0

    def __post_init__(self) -> None:
        refuse_wrong(self, "captions")

    def edited(self, text: str, order: str | None = None) -> str:
        """The edited caption. order: a seed of the order of its tags; None: their own order."""
        tags = [tag for part in text.split(",") if (tag := part.strip())]
        kept = tags[: self.first_tags]
        shuffled = kept if order is None else self._shuffled(kept, order)
        return f"{self.prefix}{text if shuffled == tags else ', '.join(shuffled)}{self.suffix}"

    def _shuffled(self, tags: list[str], order: str) -> list[str]:
        """Shuffled alike on every machine: sorted by a hash."""
        ranks = [hashlib.blake2b(f"{order} {i}".encode(), digest_size=8).digest() for i in range(len(tags))]
        moved = sorted(range(self.fixed_tags, len(tags)), key=ranks.__getitem__)
        return tags[: self.fixed_tags] + [tags[i] for i in moved]

    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults, by name."""
        defaults = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != defaults.get(name)}


@dataclass(frozen=True, slots=True)
class StoredEdits(CaptionEdits):
    """Edits of captions that are encoded once and stored. tag_orders: the number of orders of each caption's tags, of
    which the first is its own; the others are a function of the text and `seed`."""

    tag_orders: Count = 1
    seed: int = 0

    def applied(self, captions: Mapping[str, str]) -> dict[str, str]:
        """The captions to encode, by name, in order; different orders of `long` are long.0, long.1, ..."""
        found: dict[str, str] = {}
        for name, text in captions.items():
            texts = self._orders(text)
            found |= {f"{name}.{i}": each for i, each in enumerate(texts)} if len(texts) > 1 else {name: texts[0]}
        return found

    def _orders(self, text: str) -> list[str]:
        """tag_orders different texts; fewer, if the tags have fewer orders."""
        texts = {self.edited(text): None}
        for number in range(1, TRIES * (self.tag_orders - 1) + 1):
            if len(texts) == self.tag_orders:
                break
            texts[self.edited(text, f"{self.seed} {number} {text}")] = None
        return list(texts)
