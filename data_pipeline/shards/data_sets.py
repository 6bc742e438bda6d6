"""The data sets named by a training's input=: one, a mix of several, or a folder of aspect-ratio buckets; and what
the data sets of a split must have in common to be read as one."""

from __future__ import annotations

import hashlib
import json
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, UserError
from data_pipeline.shards.manifest import Manifest, Shard, refuse_no_heldout

ONE, MIX, BUCKETS = "one", "mix", "buckets"  # layouts
EXAMPLE = "input=[{path: A, weight: 3}, {path: B, weight: 1}]"
ENCODERS = ("autoencoder", "text_encoder", "text_encoder_2")


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

    @property
    def mix(self) -> dict[str, list[int]]:
        """What a resumed run must share with its checkpoint in addition to the fingerprint: the weights of a mix."""
        return {"weights": self.shares} if self.layout == MIX else {}

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


class Source(NamedTuple):
    """One entry of input=: a folder that holds train/ and heldout/."""

    path: str
    name: str = ""
    weight: Fraction | None = None


@dataclass(frozen=True, slots=True)
class Input:
    """The parsed input=, before anything is read."""

    sources: tuple[Source, ...]
    layout: str = ONE

    @classmethod
    def of(cls, given: Any) -> Input:
        """From a path, or from a list of paths or of {path, weight}. UserError for anything else."""
        if isinstance(given, str):
            buckets = buckets_in(given)
            found = tuple(Source(storage.join(given, name), name) for name in buckets)
            return cls(found, BUCKETS) if buckets else cls((Source(given),))
        if not isinstance(given, Sequence) or not given:
            raise UserError(f"input={given} is not valid: use a folder, or a list such as {EXAMPLE}.")
        sources = [_source(entry) for entry in given]
        for source in sources:
            if buckets_in(source.path):
                raise UserError(
                    f"input: {source.path} holds aspect-ratio buckets, which can't be mixed with other data sets: use "
                    "it alone (input=FOLDER), or one bucket of each (FOLDER/512x512)."
                )
        _refuse_twice(sources)
        _refuse_some_weights(sources)
        if len(sources) == 1:
            return cls((Source(sources[0].path),))
        names = names_of([source.path for source in sources])
        return cls(tuple(s._replace(name=name) for s, name in zip(sources, names, strict=True)), MIX)

    def split(self, name: str, kind: str | None = None) -> DataSets:
        """The data sets of `train` or `heldout`. A bucket may lack held-out samples; a data set of a mix may not."""
        if name == "heldout" and self.layout != BUCKETS:
            for source in self.sources:
                refuse_no_heldout(source.path)
        roots = [storage.join(source.path, name) for source in self.sources]
        found = list(zip(self.sources, roots, strict=True))
        if self.layout == BUCKETS and name != "train":
            found = [pair for pair in found if storage.exists(storage.join(pair[1], "manifest.json"))] or found
        data = DataSets(
            tuple(DataSet(s.name, root, Manifest.load(root, kind), s.weight) for s, root in found), self.layout
        )
        refuse_unlike(data)
        return data


def _source(entry: Any) -> Source:
    if isinstance(entry, str):
        return Source(entry)
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        raise UserError(f"input: {entry} is not a data set: give its path and weight, as in {EXAMPLE}.")
    if unknown := sorted(set(entry) - {"path", "weight"}):
        raise UserError(f"input: {entry['path']} has {', '.join(unknown)}: an entry has path and weight only.")
    weight = entry.get("weight")
    if weight is None:
        return Source(entry["path"])
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise UserError(
            f"input: weight={weight} of {entry['path']} is not valid: use a number above 0, or leave this data set out."
        )
    return Source(entry["path"], weight=Fraction(str(weight)))  # so that 0.1 is exactly a tenth


def _refuse_twice(sources: Sequence[Source]) -> None:
    paths = [storage.absolute(source.path) for source in sources]
    for path, source in zip(paths, sources, strict=True):
        if paths.count(path) > 1:
            raise UserError(f"input names {source.path} twice: name it once, and give it a larger weight.")


def _refuse_some_weights(sources: Sequence[Source]) -> None:
    lacking = [source.path for source in sources if source.weight is None]
    if 0 < len(lacking) < len(sources):
        raise UserError(
            f"input: {', '.join(lacking)} has no weight, but the others have: give each data set a weight, or none of "
            "them, so that each sample comes equally often."
        )


def names_of(paths: Sequence[str]) -> list[str]:
    """The shortest endings of the paths, in whole folders, that differ from one another."""
    parts = [storage.absolute(path).rstrip("/").split("/") for path in paths]
    for length in range(1, max(map(len, parts))):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(part) for part in parts]


def buckets_in(path: str) -> list[str]:
    """The names of the aspect-ratio buckets in a folder written by precompute_latents.py; empty: it has none."""
    if storage.exists(storage.join(path, "train", "manifest.json")):
        return []
    note = storage.join(path, "work", "train", "buckets.json")
    content = storage.read_if_there(note)
    below = [name for name in storage.subfolders(path) if re.fullmatch(r"\d+x\d+", name)]
    if content is None:
        if below and "work" in storage.subfolders(path):
            raise UserError(f"{path} contains buckets that are not finished: start precompute_latents.py again.")
        return [name for name in below if storage.exists(storage.join(path, name, "train", "manifest.json"))]
    try:
        names = sorted(json.loads(content))
    except (ValueError, TypeError) as error:
        raise DataError(f"{note} is damaged ({error}): make or copy the buckets again.") from error
    if missing := sorted(set(names) - set(below)):
        raise DataError(f"{path} lacks the bucket {missing[0]}, which {note} names: make or copy it again.")
    return names


def refuse_unlike(data: DataSets) -> None:
    """UserError for data sets that can't be read as one; it names two of them and the difference."""
    first = data.sets[0]
    if empty := [each.root for each in data if not each.manifest.samples and len(data) > 1]:
        raise DataError(f"{empty[0]} has no samples: leave it out, or make it again.")
    if data.layout == BUCKETS and data.kind != "latents":
        raise UserError(f"{first.root} contains pictures: only latents can be trained on in buckets.")
    for other in data.sets[1:]:
        for what, a, b in _differences(first.manifest, other.manifest, data.layout):
            raise UserError(
                f"{first.root} and {other.root} can't be read as one: {what} is {a} in the first and {b} in the "
                "second. Make both with the same encoders and options."
            )


def _differences(one: Manifest, other: Manifest, layout: str) -> Iterator[tuple[str, Any, Any]]:
    """The properties that must be equal and are not: name, and both values."""
    yield from _unequal("the kind", one.kind, other.kind)
    if one.kind != "latents":
        yield from _unequal("the size of pictures", one.info.get("size"), other.info.get("size"))
        return
    for name in ENCODERS:
        yield from _unequal(f"the {name}", one.fingerprints.get(name), other.fingerprints.get(name))
    for name in sorted(one.fields.keys() | other.fields.keys()):
        yield from _unequal(name, *(_field(of.fields.get(name), layout) for of in (one, other)))
    ours, theirs = (of.info.get("conditions") or {} for of in (one, other))
    for name in sorted(ours.keys() | theirs.keys()):
        yield from _unequal(f"the condition {name}", ours.get(name), theirs.get(name))


def _unequal(what: str, a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    if a != b:
        yield what, *("none" if value is None else value for value in (a, b))


def _field(field: Mapping[str, Any] | None, layout: str) -> str | None:
    """dtype and shape of a field; for buckets, only the number of dimensions, as each bucket has its own size."""
    if field is None or "shape" not in field:
        return None if field is None else "there"
    shape = f"of {len(field['shape'])} dimensions" if layout == BUCKETS else field["shape"]
    return f"{field.get('dtype')} {shape}"
