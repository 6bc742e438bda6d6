"""Tars that others wrote, used as shards: which samples are kept, and what became of the rest."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, UserError
from data_pipeline.common.threads import ordered_map
from data_pipeline.images.decode import Decoding
from data_pipeline.shards import codec
from data_pipeline.shards.key_set import KnownKeys
from data_pipeline.shards.manifest import Manifest, Shard
from data_pipeline.shards.rejects import (
    Conversions,
    Rejects,
    accounting,
    examples,
    format_counts,
    passed_over_lines,
    summary,
)
from data_pipeline.shards.tar_index import IndexEntry, digest_of, index_digest
from data_pipeline.sources.caption_counts import CaptionCounts
from data_pipeline.sources.filters import Filters
from data_pipeline.sources.tars import Inspected, inspected, told_apart

TWICE = "a key that the same tar has twice"
AGAIN = "a key that came before; tars that all count from 0 want shard_in_keys=true"


def linked(source: str, output: str, name: str) -> str:
    """The shard's name below `output`: the tar itself, or a link to it if output is another folder."""
    if storage.absolute(source) == storage.absolute(output):
        return name
    if storage.is_s3(source) or storage.is_s3(output):
        raise UserError(f"in a bucket, the index is stored beside the tars: leave out output={output}.")
    target, link = os.path.realpath(storage.join(source, name)), Path(output, "shards", name)
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink() or os.readlink(link) != target:
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    return f"shards/{name}"


def fetched_by_img2dataset(path: str, found: int) -> Counter[str]:
    """The counts of listed and fetched samples that img2dataset wrote beside a tar; DataError if it holds fewer."""
    beside = path.removesuffix(".tar") + "_stats.json"
    if not storage.exists(beside):
        return Counter()
    try:
        stats = codec.decode("json", storage.read_bytes(beside))
        counts = Counter({name: int(stats[name]) for name in ("count", "successes")})
    except (DataError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{beside} is damaged: remove it, or fetch the shard again.") from error
    if counts["successes"] > found:
        raise DataError(f"shard {path} has {found} samples, but {beside} says {counts['successes']}: fetch it again.")
    return counts


class Index:
    """Takes shards one after another and accounts for each sample."""

    def __init__(
        self, root: str, filters: Filters, shard_in_keys: bool, max_aside_fraction: float, animated: str = "first"
    ) -> None:
        self.root, self.filters, self.shard_in_keys = root, filters, shard_in_keys
        self.max_fraction, self.how = max_aside_fraction, Decoding.of("white", animated)
        self.converted = Conversions()
        self.passed_over: Counter[str] = Counter()  # files that are part of no sample
        self.rejects = Rejects(sys.maxsize, 1.0)  # only counts: the number listed is known at the end
        self.listed, self.seen, self.digest = 0, KnownKeys(), hashlib.sha256()
        self.captions = CaptionCounts()

    def add(self, name: str, data: bytes | mmap.mmap, entries: list[IndexEntry]) -> Shard:
        """Check a shard's samples, write its .idx and the rejects; returns its line of the manifest."""
        entries = told_apart(entries)
        self.listed += len(entries)
        first, stem = len(self.rejects.rows), name.removesuffix(".tar").rpartition("/")[2]
        prefix = f"{stem}/" if self.shard_in_keys else ""
        known = self.seen.contains([prefix + each.key for each in entries])
        lines, twice = [], keys_twice(entries)
        for sample, again in zip(self._inspected(entries, data), known, strict=True):
            key, members = prefix + sample.entry.key, sample.entry.members
            if sample.candidate is not None:
                self.filters.look(sample.candidate.meta)
            if sample.candidate is None and sample.absent:
                self.filters.add(key, sample.reason)
            elif sample.candidate is None or again:
                self.rejects.add(key, reason_of(sample, twice), f"in {name}")
            elif reason := self.filters.reason_against(sample.candidate):
                self.filters.add(key, reason)
            else:
                self.converted.add(sample.converted, f"{key} in {name}")
                self.captions.add("", key, sample.candidate.caption, sample.candidate.meta)
                lines.append(json.dumps([key, {extension: list(place) for extension, place in members.items()}]) + "\n")
        index = "".join(lines).encode()
        shard = Shard(name, len(lines), len(data), digest_of(data), index_digest(index))
        self.digest.update(index)
        storage.write_atomically(storage.join(self.root, shard.index_name), index)
        self.filters.save(self.root, f"{stem}.filtered")
        of_this_tar = Rejects(sys.maxsize, 1.0)
        of_this_tar.rows = self.rejects.rows[first:]
        of_this_tar.save(self.root, stem)
        return shard

    def _inspected(self, entries: Sequence[IndexEntry], data: bytes | mmap.mmap) -> Iterator[Inspected]:
        """Inspect each sample, in threads that are a few samples ahead (Pillow decodes without the lock)."""
        threads = os.cpu_count() or 1
        with ThreadPoolExecutor(threads) as pool:
            yield from ordered_map(pool, lambda each: inspected(each, data, self.how), entries, 2 * threads)

    def refuse_too_many_rejects(self, whole: float = 1.0) -> None:
        """Stop if more is set aside than allowed of all samples: `whole` times those listed so far."""
        listed, aside = round(self.listed * whole), len(self.rejects.rows)
        if aside > self.max_fraction * listed:
            raise DataError(
                f"{aside} of {'about ' if whole > 1 else ''}{listed} samples can't be used "
                f"({format_counts(summary(self.rejects.rows), 3)}; {examples(self.rejects.rows)}): repair the tars, or "
                f"raise max_aside_fraction={self.max_fraction}."
            )

    def finish(self, shards: list[Shard], info: dict[str, Any]) -> None:
        """Write the manifest, and print what became of the samples."""
        self.refuse_too_many_rejects()
        self.filters.refuse_unknown_columns()
        aside, processed = summary(self.rejects.rows), sum(shard.samples for shard in shards)
        if not processed:
            why = format_counts(aside + self.filters.counts, 3) or "the tars are empty"
            why += f"; {examples(self.rejects.rows)}" if self.rejects.rows else ""
            raise UserError(f"not one of {self.listed} samples is left ({why}): check input= and filters=.")
        info |= {"index": self.digest.hexdigest()[:16]}  # the same tars, filtered differently, are another data set
        info |= self.converted.as_info() | ({"passed_over": dict(self.passed_over)} if self.passed_over else {})
        info |= {"accounting": accounting(processed, self.filters.counts, aside, self.listed)}
        info |= self.captions.info("")
        Manifest("image-text", tuple(shards), {"txt": {}, "json": {}}, info).save(self.root)
        print(
            f"index_shards: {processed} processed, {self.filters.counts.total()} filtered, {aside.total()} set aside, "
            f"of {self.listed} listed; in {self.root}"
        )
        for reason, count in self.filters.counts.most_common():
            print(f"index_shards: filtered {count} x {reason}")
        for reason, count in aside.most_common():
            print(f"index_shards: set aside {count} x {reason}, {examples(self.rejects.rows, reason)}")
        for line in [*self.converted.lines(), *passed_over_lines(self.passed_over), *self.captions.sentences()]:
            print(f"index_shards: {line}")


def keys_twice(entries: Sequence[IndexEntry]) -> set[str]:
    """The keys that one tar has more than once."""
    return {key for key, times in Counter(entry.key for entry in entries).items() if times > 1}


def reason_of(sample: Inspected, twice: set[str]) -> str:
    """Why a sample is set aside: its own reason, or its key comes twice in its tar or came in an earlier one."""
    if sample.entry.key not in twice:
        return sample.reason or AGAIN
    lacks = sample.reason.startswith("missing caption (")
    return f"{sample.reason.removesuffix(')')}; {TWICE})" if lacks else sample.reason or TWICE
