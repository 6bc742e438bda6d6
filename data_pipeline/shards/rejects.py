"""Samples that can't be used: counted, recorded with the reason, and limited in number."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError


class Rejects:
    """processed + filtered + set aside = listed, always. If more than `max_fraction` of what is listed is set
    aside, the run stops with the reasons. remedies: for the most common reason (as `summary` has it), what helps."""

    def __init__(self, listed: int, max_fraction: float, remedies: Mapping[str, str] | None = None) -> None:
        self.listed, self.max_fraction, self.remedies = listed, max_fraction, remedies or {}
        self.rows: list[dict[str, str]] = []

    def add(self, key: str, reason: str, where: str = "") -> None:
        """Set one sample aside; where: the path that was tried."""
        self.rows.append({"key": key, "reason": reason} | ({"where": where} if where else {}))
        if len(self.rows) > self.max_fraction * self.listed:
            counts, number = summary(self.rows), len(self.rows)
            remedy = self.remedies.get(counts.most_common(1)[0][0], "fix the source")
            raise DataError(
                f"stopped early: at least {number} of {self.listed} samples can't be used "
                f"({format_counts(counts, 3)}; {examples(self.rows)}): {remedy}, or raise "
                f"max_aside_fraction={self.max_fraction}."
            )

    def save(self, root: str | Path, name: str) -> None:
        """Write one JSON line a sample to <root>/aside/<name>.jsonl; if none, remove an earlier run's file."""
        write_or_remove(root, name, "".join(json.dumps(row) + "\n" for row in self.rows).encode())


class Conversions:
    """Conversions of accepted samples: the number of each, under its words without the part in brackets, which differs
    from sample to sample; and the first sample of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.firsts: dict[str, str] = {}

    def add(self, converted: Iterable[str], where: str) -> None:
        """Record what was done to one sample."""
        for what in converted:
            words, _, details = what.partition(" (")
            self.counts[words] += 1
            self.firsts.setdefault(words, f"{where}, {details.removesuffix(')')}".removesuffix(", "))

    def as_info(self) -> dict[str, Any]:
        """Its entry in a manifest; empty, if there were no conversions."""
        return {"converted": dict(self.counts)} if self.counts else {}

    def lines(self) -> list[str]:
        """One line of text for each kind."""
        return [f"converted {count} x {what}, first {self.firsts[what]}" for what, count in self.counts.most_common()]


def passed_over_lines(counts: Counter[str]) -> list[str]:
    """Lines of text on files that are part of no sample."""
    return [f"passed over {count} x {what}" for what, count in counts.most_common()]


def write_or_remove(root: str | Path, name: str, lines: bytes) -> None:
    """Write <root>/aside/<name>.jsonl with these lines; if there are none, remove it."""
    path = storage.join(root, "aside", f"{name}.jsonl")
    if lines:
        storage.write_atomically(path, lines)
    else:
        storage.remove(path)


def examples(rows: Iterable[Mapping[str, str]], reason: str = "", most: int = 3) -> str:
    """The first rows (with a reason as `summary` gives it; "": any), in words: key, reason and place."""
    shown = [row for row in rows if not reason or short(row) == reason][:most]
    said = [f"{row['key']}, {said_of(row, bool(reason))}".removesuffix(", ") for row in shown]
    return f"first {'; '.join(said)}" if said else ""


def said_of(row: Mapping[str, str], brief: bool) -> str:
    """Reason and place of a row (brief: of the reason, only the part in brackets)."""
    reason = row["reason"]
    if brief:
        reason = reason.removeprefix(short(row)).strip().removeprefix("(").removesuffix(")")
    return ", ".join(part for part in (reason, row.get("where", "")) if part)


def short(row: Mapping[str, str]) -> str:
    """A row's reason without the part in brackets, which differs from sample to sample."""
    return row["reason"].partition(" (")[0]


def summary(rows: Iterable[Mapping[str, str]]) -> Counter[str]:
    """The numbers of rows set aside, by reason without the part that differs from sample to sample."""
    return Counter(short(row) for row in rows)


def format_counts(counts: Counter[str], most: int) -> str:
    """The `most` common reasons, in words."""
    return "; ".join(f"{count} x {reason}" for reason, count in counts.most_common(most))


def accounting(processed: int, filtered: Mapping[str, int], aside: Mapping[str, int], listed: int) -> dict[str, Any]:
    """The counts in a manifest's info: processed + filtered + set aside = listed."""
    assert processed + sum(filtered.values()) + sum(aside.values()) == listed
    return {"listed": listed, "processed": processed, "filtered": dict(filtered), "set_aside": dict(aside)}
