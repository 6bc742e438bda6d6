"""The data sets that a training reads as one: a single one, a mix of several, or aspect-ratio buckets."""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from data_pipeline.shards.manifest import Manifest, Shard

ONE, MIX, BUCKETS = "one", "mix", "buckets"  # layouts


class DataSet(NamedTuple):
    """A data set, or a split of one. name: in metrics; weight: its share of a mix, None: its number of samples."""

    name: str
    root: str
    manifest: Manifest
    weight: Fraction | None = None


@dataclass(frozen=True, slots=True)
class DataSets:
    """One or several data sets that are read as one. Shards are numbered through, set after set."""

    sets: tuple[DataSet, ...]
    layout: str = ONE

    @classmethod
    def of(cls, root: str) -> DataSets:
        """One data set."""
        return cls((DataSet("", str(root), Manifest.load(root)),))

    def __iter__(self) -> Iterator[DataSet]:
        return iter(self.sets)

    def __len__(self) -> int:
        return len(self.sets)

    @property
    def root(self) -> str:
        """The path of a single data set; for several, the paths in words."""
        return " and ".join(each.root for each in self.sets)

    @property
    def kind(self) -> str:
        return self.sets[0].manifest.kind

    @property
    def samples(self) -> int:
        return sum(each.manifest.samples for each in self.sets)

    @property
    def starts(self) -> list[int]:
        """The number of each set's first shard."""
        counts = [len(each.manifest.shards) for each in self.sets]
        return [sum(counts[:i]) for i in range(len(counts))]

    @property
    def shares(self) -> list[int]:
        """The smallest whole numbers in proportion to the samples that training takes from each set."""
        natural = [each.manifest.samples for each in self.sets]
        parts = [
            Fraction(n) if each.weight is None else each.weight for n, each in zip(natural, self.sets, strict=True)
        ]
        whole = [int(part * math.lcm(*(p.denominator for p in parts))) for part in parts]
        divisor = math.gcd(*whole) or 1
        return [share // divisor for share in whole]

    def fractions(self) -> dict[str, float]:
        """The fraction of all training samples that comes from each set, by name."""
        shares = self.shares
        return {each.name: share / sum(shares) for each, share in zip(self.sets, shares, strict=True)}

    @property
    def fingerprint(self) -> str:
        """The fingerprint of a single set; for several, 16 hex digits of the layout and of all their fingerprints, in
        order."""
        marks = [each.manifest.fingerprint for each in self.sets]
        if self.layout == ONE:
            return marks[0]
        return hashlib.sha256(json.dumps([self.layout, marks]).encode()).hexdigest()[:16]

    def identity(self, name: str) -> dict[str, Any]:
        """What a resumed run must share with its checkpoint: the fingerprint under `name`, and the weights of a mix.
        "sets" is not compared: it says which of several sets changed, should the fingerprint differ."""
        weights = {"weights": self.shares} if self.layout == MIX else {}
        sets = [[each.name, each.manifest.fingerprint] for each in self.sets]
        return {name: self.fingerprint, **weights} | ({"sets": sets} if self.layout != ONE else {})

    def for_loader(self) -> str | DataSets:
        """The path of a single data set, which a user's own loader may expect; several data sets unchanged."""
        return self.sets[0].root if self.layout == ONE else self

    def read(self, read: Callable[..., list[Any]], limit: int | None) -> dict[str, list[Any]]:
        """The first samples of each set by the set's name, at most `limit` from each."""
        return {each.name: read(root=each.root, limit=limit) for each in self.sets}

    def first(self, read: Callable[..., list[Any]], limit: int | None) -> list[Any]:
        """The first samples of all sets, at most `limit` in all, the same number from each if it has that many."""
        cuts = [None if limit is None else limit * i // len(self) for i in range(len(self) + 1)]
        parts = (
            read(root=each.root, limit=None if limit is None else cuts[i + 1] - cuts[i])
            for i, each in enumerate(self.sets)
        )
        return [sample for part in parts for sample in part]

    def check_shards(self) -> None:
        """As Manifest.check_shards, for each set."""
        for each in self.sets:
            each.manifest.check_shards(each.root)

    def describe(self, batch_size: int) -> str:
        """The sets with their sizes and shares, in one line."""
        parts, lines = self.fractions(), []
        for name, samples in ((each.name, each.manifest.samples) for each in self):
            line = f"{name} has {samples:,} samples, {parts[name]:.3%} of all that "
            line += "steps take" if self.layout == BUCKETS else "each step takes"
            if self.layout == BUCKETS and samples < batch_size:
                line += f" (less than a batch: a step takes each {batch_size / samples:.3g} times)"
            lines.append(line)
        return f"{self.layout} of {len(self)} data sets: {'; '.join(lines)}"


class Numbered:
    """Finds the set and the shard for a number that counts through all sets."""

    def __init__(self, data: DataSets) -> None:
        self.sets, self.starts = data.sets, data.starts

    def __getitem__(self, number: int) -> tuple[int, DataSet, Shard]:
        which = bisect_right(self.starts, number) - 1  # the last of those that begin here: the others have no shards
        return which, self.sets[which], self.sets[which].manifest.shards[number - self.starts[which]]
