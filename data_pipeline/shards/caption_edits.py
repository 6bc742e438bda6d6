"""What is done to captions before they are encoded: words around them, and their comma-separated tags."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

from data_pipeline.common.option_checks import Count, Within, refuse_wrong

TRIES = 10  # shuffles for each order wanted: a few tags may have fewer orders, and some come twice


@dataclass(frozen=True, slots=True)
class CaptionEdits:
    """first_tags: only so many tags are kept; fixed_tags: so many stay in front when tags are shuffled. prefix and
    suffix are put around the result as they are, blanks included."""

    prefix: str = ""
    suffix: str = ""
    first_tags: Count | None = None
    fixed_tags: Annotated[int, Within(0)] = 0

    def __post_init__(self) -> None:
        refuse_wrong(self, "captions")

    def edited(self, text: str, order: str | None = None) -> str:
        """The caption to encode. order: what the order of its tags depends on; None: their own order."""
        tags = [tag for part in text.split(",") if (tag := part.strip())]
        kept = tags[: self.first_tags]
        shuffled = kept if order is None else self._shuffled(kept, order)
        return f"{self.prefix}{text if shuffled == tags else ', '.join(shuffled)}{self.suffix}"

    def _shuffled(self, tags: list[str], order: str) -> list[str]:
        """The same on every machine: sorted by a hash."""
        ranks = [hashlib.blake2b(f"{order} {i}".encode(), digest_size=8).digest() for i in range(len(tags))]
        moved = sorted(range(self.fixed_tags, len(tags)), key=ranks.__getitem__)
        return tags[: self.fixed_tags] + [tags[i] for i in moved]

    def changed(self) -> dict[str, Any]:
        """The options that are not their defaults, by name."""
        defaults = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != defaults.get(name)}


@dataclass(frozen=True, slots=True)
class StoredEdits(CaptionEdits):
    """Edits of captions that are encoded once and stored. tag_orders: so many orders of each caption's tags, the first
    being its own; the others depend on the text and `seed` only."""

    tag_orders: Count = 1
    seed: int = 0

    def applied(self, captions: Mapping[str, str]) -> dict[str, str]:
        """The captions to encode, by name, in order; the orders of `long` are long.0, long.1, ... if they differ."""
        found: dict[str, str] = {}
        for name, text in captions.items():
            texts = self._orders(text)
            found |= {f"{name}.{i}": each for i, each in enumerate(texts)} if len(texts) > 1 else {name: texts[0]}
        return found

    def _orders(self, text: str) -> list[str]:
        """tag_orders different texts; fewer, if its tags have no more orders."""
        texts = {self.edited(text): None}
        for number in range(1, TRIES * (self.tag_orders - 1) + 1):
            if len(texts) == self.tag_orders:
                break
            texts[self.edited(text, f"{self.seed} {number} {text}")] = None
        return list(texts)
