"""Encodes a split of image-text shards to latent data sets: the missing shards, then what belongs to the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from data_pipeline.common import storage
from data_pipeline.common.progress import Progress
from data_pipeline.common.stop_request import Stopped, speaks
from data_pipeline.common.temp_files import sweep
from data_pipeline.common.threads import BackgroundWriter, Prefetcher
from data_pipeline.encode.batch_encoder import encode_batch
from data_pipeline.encode.latent_dataset import (
    SplitToEncode,
    claim,
    finish,
    recipe_of,
    refuse_other_layout,
    refuse_pictures,
    temp_folders,
)
from data_pipeline.encode.latent_shard import LatentShardBuilder, Rejected, read_done_marker, verify_done_markers
from data_pipeline.encode.shard_reader import AlreadyDone, EncodeBatch, ShardEnd, ShardStart, Step
from data_pipeline.encode.workers import Worker
from data_pipeline.shards.rejects import Rejects

STEPS_AHEAD, CALLS_BEHIND = 4, 4  # batches that wait between decoding, encoding and writing
MARKER_THREADS = 16  # threads that look for finished shards: in a bucket each look takes some 20 ms


def encode_split(split: SplitToEncode, worker: Worker = Worker(), stop: Callable[[], bool] = lambda: False) -> None:  # noqa: B008
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
    with ThreadPoolExecutor(MARKER_THREADS) as pool:
        markers = pool.map(lambda shard: read_done_marker(paths, shard), source.shards)
        done = {shard.name: record for shard, record in zip(source.shards, markers, strict=True) if record}
    if done:
        print(f"{split.title}: {len(done)} of {len(source.shards)} shards are there already")
    encoder = SplitEncoder(split, worker, done)
    encoder.run(stop)
    done |= verify_done_markers(paths, [made.shard for made in encoder.made], done)
    finish(split, [done[shard.name] for shard in source.shards], made_of, encoder.counts)


class SplitEncoder:
    """Makes shards of a split, as one of several workers; `done` holds all notes of finished shards, by any worker.

    Three threads: one decodes pictures ahead, this one encodes, and one writes tars behind it.
    """

    def __init__(self, split: SplitToEncode, worker: Worker, done: dict[str, dict[str, Any]]) -> None:
        self.split, self.worker, self.done = split, worker, done
        self.encoders, self.paths = split.encoders, split.paths
        self.rejects = Rejects(split.source.samples, split.max_aside_fraction)
        self.seen_rejects: set[tuple[str, ...]] = set()  # rejects in other workers' notes
        self.made: list[LatentShardBuilder] = []  # what this worker has published
        for record in done.values():
            self.add_rejects_of(record)
        self.current: ShardStart | None = None  # the shard that the parts belong to
        self.build: LatentShardBuilder | None = None

    def run(self, stop: Callable[[], bool]) -> None:
        """Work until all shards have their notes. Stopped if `stop()` comes first; encoded shards are still written."""
        missing = [shard for shard in self.worker.order(self.split.source.shards) if shard.name not in self.done]
        steps = self.split.reader.steps(missing, lambda shard: read_done_marker(self.paths, shard))
        title, listed = self.split.title + str(self.worker), self.split.source.samples
        with (
            Progress(title, listed, "images", sum(record["listed"] for record in self.done.values())) as self.bar,
            Prefetcher(steps, STEPS_AHEAD) as ahead,
            BackgroundWriter(CALLS_BEHIND) as self.writer,
        ):
            for step in ahead:
                if stop():
                    if speaks():
                        print(f"{title}: stopped by a signal; start the same command again to go on", flush=True)
                    raise Stopped
                self.handle(step)

    def handle(self, step: Step) -> None:
        """Handle the reader's next step."""
        if isinstance(step, AlreadyDone):
            self.skip_done(step, counted=0)
        elif isinstance(step, ShardStart):
            self.current, self.build, self.counted = step, LatentShardBuilder(step.shard, self.encoders), 0
            if self.encoders.text is not None:
                self.encoders.text.begin(step.captions)
        elif self.current.dropped.is_set():
            pass
        elif self.worker.workers > 1 and (record := read_done_marker(self.paths, self.current.shard)):
            self.current.dropped.set()
            self.skip_done(AlreadyDone(self.current.shard, record), self.counted)
        elif isinstance(step, ShardEnd):
            self.writer.submit(self.publish, self.build)
        else:
            self.encode(step)

    def encode(self, part: EncodeBatch) -> None:
        self.build.rejected += part.rejected
        self.set_aside(part.rejected)
        if part.items:
            self.writer.submit(self.add, self.build, part, encode_batch(part.items, part.images, self.encoders))
        self.counted += len(part.items) + len(part.rejected)
        self.bar.advance(len(part.items) + len(part.rejected), aside=str(len(self.rejects.rows)))

    def add(self, build: LatentShardBuilder, part: EncodeBatch, stored: dict[str, Any]) -> None:
        if build.shard.name not in self.done:  # else another worker was faster, and its note counts
            self.set_aside(build.add(part.items, stored))

    def publish(self, build: LatentShardBuilder) -> None:
        record = self.done[build.shard.name] = build.publish(self.paths)
        if record is build.done_marker:
            self.made.append(build)

    def set_aside(self, rejected: Sequence[Rejected]) -> None:
        for _, key, reason in rejected:
            self.rejects.add(key, reason)

    def skip_done(self, made: AlreadyDone, counted: int) -> None:
        """Another worker has made a shard; `counted` of its samples were already counted here."""
        self.done[made.shard.name] = made.record
        self.add_rejects_of(made.record)
        self.bar.skip(made.record["listed"] - counted)

    def add_rejects_of(self, record: dict[str, Any]) -> None:
        """Record another worker's rejects, once each."""
        for row in record["aside"]:
            if (marks := tuple(row.values())) not in self.seen_rejects:
                self.seen_rejects.add(marks)
                self.rejects.rows.append(row)

    def counts(self, total: int) -> str:
        """How many of `total` samples were made by this worker and by others."""
        made = sum(part["shard"]["samples"] for build in self.made for part in build.done_marker["sets"].values())
        copied = sum(build.copied for build in self.made)
        words = [f"{made - copied} encoded"]
        words += [f"{copied} copied from base="] if copied else []
        words += [f"{total - made} there already or by other workers"] if total > made else []
        return ", ".join(words)
