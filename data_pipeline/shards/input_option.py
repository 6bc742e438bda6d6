"""The option input= of a training: a path, a list of data sets with weights, or a folder of aspect-ratio buckets."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, UserError
from data_pipeline.shards.data_sets import BUCKETS, MIX, ONE, DataSet, DataSets
from data_pipeline.shards.likeness import refuse_unlike
from data_pipeline.shards.manifest import Manifest, refuse_no_heldout

EXAMPLE = "input=[{path: A, weight: 3}, {path: B, weight: 1}]"


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
        found = [(source, storage.join(source.path, name)) for source in self.sources]
        if self.layout == BUCKETS and name != "train":
            found = [pair for pair in found if storage.exists(storage.join(pair[1], "manifest.json"))] or found
        for source, _ in found if name == "heldout" else ():
            refuse_no_heldout(source.path)
        data = DataSets(
            tuple(DataSet(s.name, root, Manifest.load(root, kind), s.weight) for s, root in found), self.layout
        )
        refuse_unlike(data)
        return data


def _source(entry: Any) -> Source:
    if isinstance(entry, str):
        return Source(entry)
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        raise UserError(f"input: {entry} is not a data set: write its path and weight, as in {EXAMPLE}.")
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
