"""What could not be used: counted, written down with its reason, and capped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError


class Aside:
    """processed + set aside = listed, always. Past `max_fraction` of what is listed the run stops with the reasons."""

    def __init__(self, listed: int, max_fraction: float) -> None:
        self.listed, self.max_fraction = listed, max_fraction
        self.rows: list[dict[str, str]] = []

    def add(self, key: str, reason: str, where: str = "") -> None:
        """Set one sample aside; where: the path that was tried."""
        self.rows.append({"key": key, "reason": reason} | ({"where": where} if where else {}))
        if len(self.rows) > self.max_fraction * self.listed:
            reasons = "; ".join(f"{count} x {reason}" for reason, count in self.by_reason().most_common(3))
            raise DataError(
                f"{len(self.rows)} of {self.listed} samples can't be used ({reasons}; the last is {key}"
                f"{where and f', {where}'}): mend the source, or raise max_aside_fraction={self.max_fraction}."
            )

    def by_reason(self) -> Counter[str]:
        return Counter(row["reason"] for row in self.rows)

    def save(self, root: str | Path, name: str) -> None:
        """One JSON line a sample in <root>/aside/<name>.jsonl; no file, nor an earlier run's, where there is none."""
        write_or_remove(root, name, "".join(json.dumps(row) + "\n" for row in self.rows).encode())


def write_or_remove(root: str | Path, name: str, lines: bytes) -> None:
    """<root>/aside/<name>.jsonl with these lines; none: no such file."""
    path = storage.join(root, "aside", f"{name}.jsonl")
    if lines:
        storage.write_atomically(path, lines)
    else:
        storage.remove(path)


def summary(rows: Iterable[Mapping[str, str]]) -> Counter[str]:
    """Rows set aside by reason, without what stands in brackets: that differs from sample to sample."""
    return Counter(row["reason"].partition(" (")[0] for row in rows)


def worded(counts: Counter[str], most: int) -> str:
    """The `most` common reasons, in words."""
    return "; ".join(f"{count} x {reason}" for reason, count in counts.most_common(most))


def accounting(processed: int, filtered: Mapping[str, int], aside: Mapping[str, int], listed: int) -> dict[str, Any]:
    """What a manifest's info says of it: processed + filtered + set aside = listed."""
    assert processed + sum(filtered.values()) + sum(aside.values()) == listed
    return {"listed": listed, "processed": processed, "filtered": dict(filtered), "set_aside": dict(aside)}
