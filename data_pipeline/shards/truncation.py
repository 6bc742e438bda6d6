"""Counts the captions that are longer than a text encoder reads: it cuts them silently."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol


class TokenCounter(Protocol):
    """A text encoder, or its tokenizer alone: how many tokens it reads and how many a caption has, both including start
    and end."""

    context_length: int

    def count_tokens(self, captions: Sequence[str]) -> list[int]: ...


REMEMBERED = 2**16  # texts whose length is known: captions repeat, and a whole data set's would fill the memory


class CutCaptions:
    """Captions that are longer than `counter` reads; none are counted if it can't count tokens."""

    def __init__(self, counter: TokenCounter | None) -> None:
        self.counter = counter if hasattr(counter, "count_tokens") else None
        self.lengths: dict[str, int] = {}
        self.found: dict[str, Any] = {}

    def add(self, key: str, texts: Iterable[str]) -> None:
        """Count a sample's captions."""
        for text in texts if self.counter is not None else ():
            if text not in self.lengths:
                if len(self.lengths) == REMEMBERED:
                    self.lengths.clear()
                (self.lengths[text],) = self.counter.count_tokens([text])
            if (tokens := self.lengths[text]) > self.counter.context_length:
                one = {"captions": 1, "context_length": self.counter.context_length, "longest": tokens, "example": key}
                self.found = joined([self.found, one])


def cut_captions(condition: str) -> str:
    """The name of a condition's count in manifests and notes on shards."""
    return "cut_captions" if condition == "text" else f"cut_captions_{condition}"


def joined(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of the counts of several parts; the example is the key of the longest caption."""
    parts = [part for part in parts if part]
    if not parts:
        return {}
    longest = max(parts, key=lambda part: part["longest"])
    return {**longest, "captions": sum(part["captions"] for part in parts)}


def sentence(found: Mapping[str, Any], condition: str = "text") -> str:
    """The counts in words."""
    which = "" if condition == "text" else f" of {condition}"
    return (
        f"captions longer than the {found['context_length']} tokens that the text encoder{which} reads, and cut there: "
        f"{found['captions']} (the longest has {found['longest']}, of {found['example']})"
    )
