"""Counts the captions of a new data set: how many samples have each, and how many a text encoder would cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from data_pipeline.shards.caption_members import counted, names_in
from data_pipeline.shards.samples import captions_of
from data_pipeline.shards.truncation import CutCaptions, TokenCounter, sentence


class CaptionCounts:
    """Counts the captions of each split. tokens: counts their tokens for a text encoder; None: not counted."""

    def __init__(self, tokens: TokenCounter | None = None) -> None:
        self.names: dict[str, Counter[str]] = {}
        self.cut = CutCaptions(tokens)

    def add(self, split: str, key: str, caption: str, meta: Mapping[str, Any]) -> None:
        """Count a sample's captions."""
        captions = captions_of({"caption": caption, "meta": meta})
        self.names.setdefault(split, Counter()).update(names_in(captions))
        self.cut.add(key, captions.values())

    def info(self, split: str) -> dict[str, Any]:
        """A split's entry in its manifest; empty, if no sample has several captions."""
        several = counted(self.names.get(split, {}))
        return {"captions": several} if several else {}

    def sentences(self) -> list[str]:
        """The sentences to print."""
        total = counted(sum(self.names.values(), Counter()))
        found = ["captions: " + ", ".join(f"{name} of {count}" for name, count in total.items())] if total else []
        if self.cut.counter is not None:
            found.append(
                sentence(self.cut.found) if self.cut.found else "no caption is longer than the text encoder reads"
            )
        return found
