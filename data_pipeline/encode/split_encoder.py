"""Encodes a split of image-text shards to latent data sets: first the missing shards, then the files of the whole.

Three threads: one reads and decodes ahead (ShardReader.steps), the caller's encodes (encode_steps), and one writes tars
behind it (write_step). Each passes values on; a SplitProgress collects the outcomes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from data_pipeline.common import storage
from data_pipeline.common.progress import Progress
from data_pipeline.common.stop_request import Stopped, StopRequest, speaks
from data_pipeline.common.temp_files import sweep
from data_pipeline.common.threads import Prefetcher, ordered_map
from data_pipeline.encode.batch_encoder import Encoders, Others, encode_batch, encode_others
from data_pipeline.encode.latent_dataset import (
    SplitToEncode,
    claim,
    finish,
    recipe_of,
    refuse_other_layout,
    refuse_pictures,
    temp_folders,
)
from data_pipeline.encode.latent_shard import (
    DoneMarker,
    LatentShardBuilder,
    OutputPaths,
    Rejected,
    read_done_marker,
    verify_done_markers,
)
from data_pipeline.encode.shard_reader import AlreadyDone, EncodeBatch, ShardEnd, ShardStart, Step
from data_pipeline.encode.workers import Worker
from data_pipeline.shards.manifest import Shard
from data_pipeline.shards.rejects import Rejects

STEPS_AHEAD, STEPS_BEHIND = 4, 4  # batches queued between decoding and encoding, and between encoding and writing
MARKER_THREADS = 16  # threads that look for finished shards: in a bucket each look takes some 20 ms


def encode_split(split: SplitToEncode, worker: Worker = Worker(), stop: StopRequest | None = None) -> None:  # noqa: B008
    """Encode the missing shards, then write constants and manifests. Raises Stopped if asked to stop before that."""
    source, paths = split.source, split.paths
    made_of = recipe_of(source, split.encoders, split.reader.sizes, split.reader.base)
    refuse_other_layout(paths)
    refuse_pictures(paths)
    claim(paths.markers_root, made_of)
    if storage.exists(paths.final_file):
        print(f"{split.title}: {paths.markers_root} is finished already")
        return
    swept = sum(sweep(folder) for folder in temp_folders(split))
    if swept:
        print(f"{split.title}: deleted {swept} temporary files that killed workers left")
    done = read_done_markers(split)
    if done:
        print(f"{split.title}: {len(done)} of {len(source.shards)} shards are there already")
    if stop is not None:
        stop.hear_interrupts()  # from here on, there is something to save
    progress = encode_missing(split, worker, done, stop)
    if len(progress.done) < len(source.shards):
        if speaks():
            title = split.title + str(worker)
            print(f"{title}: stopped by a signal; start the same command again to continue", flush=True)
        raise Stopped
    done = progress.done | verify_done_markers(paths, [build.shard for build in progress.made], progress.done)
    finished = finish(split, [done[shard.name] for shard in source.shards], made_of)
    counts = progress.counts(finished.samples)
    print(f"{split.title}: {counts}, {finished.rejected} set aside; in {paths.root('*' if paths.bucketed else '')}")


def read_done_markers(split: SplitToEncode) -> dict[str, DoneMarker]:
    """The notes of finished shards, written by any worker, by the shard's name."""
    with ThreadPoolExecutor(MARKER_THREADS) as pool:
        markers = pool.map(lambda shard: read_done_marker(split.paths, shard), split.source.shards)
        return {shard.name: record for shard, record in zip(split.source.shards, markers, strict=True) if record}


def encode_missing(
    split: SplitToEncode, worker: Worker, done: dict[str, DoneMarker], stop: StopRequest | None
) -> SplitProgress:
    """Make the shards that are not in `done`, as one of several workers. Stops early on request: shards that are
    already encoded are still written."""
    progress = SplitProgress(split, done)
    missing = [shard for shard in worker.order(split.source.shards) if shard.name not in done]
    shared = worker.workers > 1
    steps = split.reader.steps(missing, split.paths, shared)
    there = sum(record["listed"] for record in done.values())
    with (
        Progress(split.title + str(worker), split.source.samples, "images", there) as bar,
        Prefetcher(steps, STEPS_AHEAD) as ahead,
        ThreadPoolExecutor(1, "write") as writer,
    ):
        wanted = ahead if stop is None else itertools.takewhile(lambda _: not stop.requested, ahead)
        encoded = encode_steps(wanted, split.encoders, split.paths, shared)
        for outcome in ordered_map(writer, functools.partial(write_step, split.paths), encoded, STEPS_BEHIND):
            progress.add(outcome)
            if isinstance(outcome, ShardDone):
                bar.skip(outcome.by_others)
            else:
                bar.advance(outcome.samples, aside=str(len(progress.rejects.rows)))
    return progress


class EncodedStep(NamedTuple):
    """A step of the reader with its shard; for a batch also the fields by name, each (B, ...) as stored, and those of
    further captions. counted: how many of the shard's samples were passed on before."""

    step: EncodeBatch | ShardEnd | AlreadyDone
    build: LatentShardBuilder | None
    counted: int
    fields: dict[str, np.ndarray]
    others: Others | None = None


def encode_steps(
    steps: Iterable[Step], encoders: Encoders, paths: OutputPaths, shared: bool = False
) -> Iterator[EncodedStep]:
    """Encode batches. shared: another worker may finish a shard meanwhile, and it is then dropped here."""
    build, counted = None, 0
    for step in steps:
        if shared and build is not None and (record := read_done_marker(paths, build.shard)):
            step = AlreadyDone(build.shard, record)
        if isinstance(step, ShardStart):
            build, counted = LatentShardBuilder(step.shard, encoders), 0
            for text in encoders.texts:
                if text is not None:
                    text.begin(step.captions)
        elif isinstance(step, EncodeBatch):
            if build is not None:  # None: the batch was read ahead, and its shard has been dropped
                fields = encode_batch(step.items, step.images, encoders) if step.items else {}
                yield EncodedStep(step, build, counted, fields, encode_others(step.items, step.images, encoders))
                counted += len(step.items) + len(step.rejected)
        elif isinstance(step, AlreadyDone) or build is not None:
            yield EncodedStep(step, build, counted, {})
            build, counted = None, 0


class BatchDone(NamedTuple):
    """`samples` of a shard were processed; these of them were rejected."""

    shard: Shard
    samples: int
    rejected: Sequence[Rejected]


class ShardDone(NamedTuple):
    """A shard is finished, with its note. made: by this worker. by_others: samples not counted in batches."""

    shard: Shard
    record: DoneMarker
    made: LatentShardBuilder | None = None
    by_others: int = 0


def write_step(paths: OutputPaths, encoded: EncodedStep) -> BatchDone | ShardDone:
    """Add a batch to its shard; at a shard's end, publish it."""
    step, build, counted, fields, others = encoded
    if isinstance(step, AlreadyDone):
        return ShardDone(step.shard, step.record, by_others=step.record["listed"] - counted)
    if isinstance(step, ShardEnd):
        record = build.publish(paths)
        return ShardDone(build.shard, record, build if record is build.done_marker else None)
    bad = build.add(step.items, fields, step.rejected, others)
    return BatchDone(build.shard, len(step.items) + len(step.rejected), [*step.rejected, *bad])


class SplitProgress:
    """The outcomes of a split's shards so far: notes of finished ones, rejected samples, and what this worker made."""

    def __init__(self, split: SplitToEncode, done: dict[str, DoneMarker]) -> None:
        self.done = dict(done)
        self.made: list[LatentShardBuilder] = []
        self.rejects = Rejects(split.source.samples, split.max_aside_fraction)
        self.seen_rejects: set[tuple[str, str, str]] = set()
        for name, record in done.items():
            self._add_rejects_of(name, record)

    def add(self, outcome: BatchDone | ShardDone) -> None:
        """Record an outcome. DataError if too many samples are rejected."""
        if isinstance(outcome, BatchDone):
            for _, key, reason in outcome.rejected:
                self.seen_rejects.add((outcome.shard.name, key, reason))
                self.rejects.add(key, reason)
        else:
            self.done[outcome.shard.name] = outcome.record
            self._add_rejects_of(outcome.shard.name, outcome.record)
            self.made += [outcome.made] if outcome.made is not None else []

    def _add_rejects_of(self, shard: str, record: DoneMarker) -> None:
        """Record the rejects listed in a note, once each, whichever worker wrote it."""
        for row in record["aside"]:
            if (mark := (shard, row["key"], row["reason"])) not in self.seen_rejects:
                self.seen_rejects.add(mark)
                self.rejects.rows.append(row)

    def counts(self, total: int) -> str:
        """How many of `total` samples were made by this worker and by others."""
        made = sum(part["shard"]["samples"] for build in self.made for part in build.done_marker["sets"].values())
        copied = sum(build.copied for build in self.made)
        words = [f"{made - copied} encoded"]
        words += [f"{copied} copied from base="] if copied else []
        words += [f"{total - made} there already or by other workers"] if total > made else []
        return ", ".join(words)
