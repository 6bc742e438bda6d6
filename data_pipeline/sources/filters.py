"""What a data set leaves out by choice: set in the configuration, counted by reason; no errors, and no limit."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image

from data_pipeline.common.errors import UserError
from data_pipeline.shards.rejects import write_or_remove

HASH_SIDE, HASH_BITS = 8, 64
CLEARLY = 300.0  # a third of a grey level: terms that are zero, as in symmetric drawings, are not decided by rounding


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sample before it is accepted. sides(): width and height as first stored, None for a drawing of any size;
    pixels(): (H, W, 3) uint8. Both may raise the errors in codec.UNDECODABLE."""

    caption: str
    meta: Mapping[str, Any]
    sides: Callable[[], tuple[int, int] | None]
    pixels: Callable[[], np.ndarray]


class Filter(Protocol):
    """`cost` orders filters: 0 looks at facts, 1 at a picture's header, 2 at its pixels."""

    cost: int

    def reason_against(self, candidate: Candidate) -> str | None:
        """Why the sample is left out, in words that many samples share; None: it stays."""
        ...


class ShortestSide:
    """Keeps pictures whose shorter side has at least this many pixels."""

    cost: ClassVar[int] = 1

    def __init__(self, at_least: int) -> None:
        self.at_least = at_least

    def reason_against(self, candidate: Candidate) -> str | None:
        sides = candidate.sides()
        return f"shortest side under {self.at_least}" if sides and min(sides) < self.at_least else None


class Aspect:
    """Keeps pictures whose longer side is at most `at_most` times the shorter."""

    cost: ClassVar[int] = 1

    def __init__(self, at_most: float) -> None:
        if at_most < 1:
            raise UserError(f"filters.aspect.at_most={at_most} would leave no picture: take 1 or more.")
        self.at_most = at_most

    def reason_against(self, candidate: Candidate) -> str | None:
        sides = candidate.sides()
        return f"aspect over {self.at_most:g}" if sides and max(sides) > self.at_most * min(sides) else None


class CaptionLength:
    """Keeps captions of `at_least` to `at_most` characters (None: any number)."""

    cost: ClassVar[int] = 0

    def __init__(self, at_least: int = 1, at_most: int | None = None) -> None:
        self.at_least, self.at_most = at_least, at_most

    def reason_against(self, candidate: Candidate) -> str | None:
        length = len(candidate.caption)
        if length < self.at_least:
            return f"caption under {self.at_least} characters"
        return f"caption over {self.at_most} characters" if self.at_most and length > self.at_most else None


class Columns:
    """Keeps samples whose numbers in the json are within bounds: {"aesthetic": {"min": 5}, "pwatermark": {"max": 0.5}}.

    A sample without the number is left out, too.
    """

    cost: ClassVar[int] = 0

    def __init__(self, bounds: Mapping[str, Mapping[str, float]] | None = None) -> None:
        if not bounds:
            raise UserError("filters.columns.bounds must be set, as filters.columns.bounds='{aesthetic: {min: 5}}'.")
        self.bounds = {name: bounds_of(name, pair) for name, pair in bounds.items()}
        self.seen: set[str] = set()  # columns with a number in some sample

    def look(self, meta: Mapping[str, Any]) -> None:
        """Note which columns have a number."""
        self.seen |= {name for name, value in meta.items() if name not in self.seen and as_number(value) is not None}

    def refuse_unknown(self) -> None:
        """Refuse a column that has a number in no sample: it is a typo, not a filter."""
        for name in self.bounds:
            if name not in self.seen:
                known = ", ".join(sorted(self.seen)) or "none: no sample has a number in its table or json"
                raise UserError(f"filters.columns.bounds: no sample has a number as {name}; columns are {known}.")

    def reason_against(self, candidate: Candidate) -> str | None:
        self.look(candidate.meta)
        for name, (low, high) in self.bounds.items():
            number = as_number(candidate.meta.get(name))
            if number is None:
                return f"no number as {name}"
            if number < low:
                return f"{name} under {low:g}"
            if number > high:
                return f"{name} over {high:g}"
        return None


def bounds_of(name: str, pair: Any) -> tuple[float, float]:
    """{min: a, max: b} of a column as numbers; null: no bound."""
    given = {k: as_number(v) for k, v in pair.items() if v is not None} if isinstance(pair, Mapping) else {}
    if not given or set(given) - {"min", "max"} or None in given.values():
        raise UserError(
            f"filters.columns.bounds.{name} is not {{min: a, max: b}}: set one of them or both, as numbers."
        )
    return given.get("min", -math.inf), given.get("max", math.inf)


def as_number(value: Any) -> float | None:
    """A finite number, also if a table gave it as text."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


class Duplicates:
    """Keeps pictures whose perceptual hash differs in more than `distance` of 64 bits from all pictures kept before.

    Exact and fast: hashes within distance d agree on one of d + 1 bands, so only those are compared. It holds all
    hashes: 10^6 pictures at distance 4 cost 120 MB, and 30 microseconds each.
    """

    cost: ClassVar[int] = 2

    def __init__(self, distance: int = 4) -> None:
        if not 0 <= distance < 16:
            raise UserError(f"filters.duplicates.distance={distance} is not valid: use 0 (equal) to 15 of 64 bits.")
        self.distance = distance
        edges = np.linspace(0, HASH_BITS, distance + 2).astype(int).tolist()
        self.bands = [(low, (1 << high - low) - 1) for low, high in itertools.pairwise(edges)]
        self.seen: list[dict[int, list[int]]] = [defaultdict(list) for _ in self.bands]

    def reason_against(self, candidate: Candidate) -> str | None:
        return "like a picture before it" if self.is_known(perceptual_hash(candidate.pixels())) else None

    def is_known(self, number: int) -> bool:
        """Whether a hash is close to an earlier one; if not, it is remembered."""
        alike = [held[number >> low & mask] for held, (low, mask) in zip(self.seen, self.bands, strict=True)]
        if any((number ^ other).bit_count() <= self.distance for others in alike for other in others):
            return True
        for others in alike:
            others.append(number)
        return False


def perceptual_hash(pixels: np.ndarray) -> int:
    """64 bits that scaling and compression hardly change: which of the lowest 8 x 8 cosine terms of 32 x 32 greys are
    clearly above their median."""
    side = 4 * HASH_SIDE
    grey = np.asarray(Image.fromarray(pixels).convert("L").resize((side, side), Image.Resampling.BOX), np.float64)
    waves = np.cos(np.pi / side * np.outer(np.arange(HASH_SIDE), np.arange(side) + 0.5))
    terms = (waves @ grey @ waves.T).ravel()
    bits = terms > np.median(terms[1:]) + CLEARLY
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


class Filters:
    """All filters of a configuration, cheapest first; counts and lists what they leave out."""

    def __init__(self, filters: Mapping[str, Filter]) -> None:
        for name, each in filters.items():
            if not hasattr(each, "cost"):
                raise UserError(f"filters.{name} is set, but no such filter chosen: add filters=[{name}].")
        self.filters = sorted(filters.values(), key=lambda each: each.cost)
        self.counts: Counter[str] = Counter()
        self.lines: list[bytes] = []  # encoded: some 100 bytes per sample left out

    def reason_against(self, candidate: Candidate) -> str | None:
        """The first reason; a picture is decoded only if the cheaper filters let it pass."""
        return next((reason for each in self.filters if (reason := each.reason_against(candidate))), None)

    def look(self, meta: Mapping[str, Any]) -> None:
        """Note the columns of a sample's table or json, before any filter is asked."""
        for each in self.filters:
            if isinstance(each, Columns):
                each.look(meta)

    def refuse_unknown_columns(self) -> None:
        """Called after all samples were looked at."""
        for each in self.filters:
            if isinstance(each, Columns):
                each.refuse_unknown()

    def add(self, key: str, reason: str) -> None:
        """Record one sample that is left out."""
        self.counts[reason] += 1
        self.lines.append(json.dumps({"key": key, "reason": reason}).encode() + b"\n")

    def save(self, root: str | Path, name: str) -> None:
        """Write one JSON line a sample to <root>/aside/<name>.jsonl; no file if nothing was left out."""
        write_or_remove(root, name, b"".join(self.lines))
        self.lines = []
