"""Encodes a split of image-text shards to latent data sets: the missing shards, then what belongs to the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from data_pipeline.common import storage
from data_pipeline.common.progress import Progress
from data_pipeline.common.stop_request import Stopped
from data_pipeline.common.temp_files import sweep
from data_pipeline.common.threads import Ahead, Behind
from data_pipeline.encode.batch_encoder import encode_batch
from data_pipeline.encode.latent_dataset import (
    Split,
    claim,
    finish,
    folders,
    identity,
    refuse_other_layout,
    refuse_pictures,
)
from data_pipeline.encode.latent_shard import Build, Rejected, confirmed, finished_record
from data_pipeline.encode.shard_reader import Begun, FoundMade, Over, Part, Step
from data_pipeline.encode.workers import Worker
from data_pipeline.shards.rejects import Aside

STEPS_AHEAD, CALLS_BEHIND = 4, 4  # batches that wait between decoding, encoding and writing
NOTES_AT_ONCE = 16  # threads that look for finished shards: in a bucket each look takes some 20 ms


def encode_split(split: Split, worker: Worker = Worker(), stop: Callable[[], bool] = lambda: False) -> None:  # noqa: B008
    """Encode the missing shards, then write constants and manifests. Raises Stopped if asked to stop before that."""
    source, places = split.source, split.places
    made_of = identity(source, split.encoders, split.reader.sizes, split.reader.base)
    refuse_other_layout(places)
    refuse_pictures(places)
    claim(places.notes, made_of)
    if storage.exists(places.last):
        print(f"{split.title}: {places.notes} is finished already")
        return
    swept = sum(sweep(folder) for folder in folders(split))
    if swept:
        print(f"{split.title}: deleted {swept} temporary files that killed workers left")
    with ThreadPoolExecutor(NOTES_AT_ONCE) as pool:
        found = pool.map(lambda shard: finished_record(places, shard), source.shards)
        done = {shard.name: record for shard, record in zip(source.shards, found, strict=True) if record}
    if done:
        print(f"{split.title}: {len(done)} of {len(source.shards)} shards are there already")
    maker = Maker(split, worker, done)
    maker.run(stop)
    done |= confirmed(places, [made.shard for made in maker.made], done)
    finish(split, [done[shard.name] for shard in source.shards], made_of, maker.counts)


class Maker:
    """Makes shards of a split, as one of several workers; `done` holds all notes of finished shards, by any worker.

    Three threads: one decodes pictures ahead, this one encodes, and one writes tars behind it.
    """

    def __init__(self, split: Split, worker: Worker, done: dict[str, dict[str, Any]]) -> None:
        self.split, self.worker, self.done = split, worker, done
        self.encoders, self.places = split.encoders, split.places
        self.aside = Aside(split.source.samples, split.max_aside_fraction)
        self.noted: set[tuple[str, ...]] = set()  # rejects in other workers' notes
        self.made: list[Build] = []  # what this worker has published
        for record in done.values():
            self.note_aside(record)
        self.begun: Begun | None = None  # the shard that the parts belong to
        self.build: Build | None = None

    def run(self, stop: Callable[[], bool]) -> None:
        """Work until all shards have their notes. Stopped if `stop()` comes first; encoded shards are still written."""
        missing = [shard for shard in self.worker.order(self.split.source.shards) if shard.name not in self.done]
        steps = self.split.reader.steps(missing, lambda shard: finished_record(self.places, shard))
        title, listed = self.split.title + str(self.worker), self.split.source.samples
        with (
            Progress(title, listed, "images", sum(record["listed"] for record in self.done.values())) as self.bar,
            Ahead(steps, STEPS_AHEAD) as ahead,
            Behind(CALLS_BEHIND) as self.behind,
        ):
            for step in ahead:
                if stop():
                    print(f"{title}: asked to stop; started again, it makes the shards that are missing", flush=True)
                    raise Stopped
                self.take(step)

    def take(self, step: Step) -> None:
        """Handle the reader's next step."""
        if isinstance(step, FoundMade):
            self.found(step, counted=0)
        elif isinstance(step, Begun):
            self.begun, self.build, self.counted = step, Build(step.shard, self.encoders), 0
            if self.encoders.text is not None:
                self.encoders.text.begin(step.captions)
        elif self.begun.dropped.is_set():
            pass
        elif self.worker.workers > 1 and (record := finished_record(self.places, self.begun.shard)):
            self.begun.dropped.set()
            self.found(FoundMade(self.begun.shard, record), self.counted)
        elif isinstance(step, Over):
            self.behind.do(self.publish, self.build)
        else:
            self.encode(step)

    def encode(self, part: Part) -> None:
        self.build.rejected += part.rejected
        self.set_aside(part.rejected)
        if part.items:
            self.behind.do(self.add, self.build, part, encode_batch(part.items, part.images, self.encoders))
        self.counted += len(part.items) + len(part.rejected)
        self.bar.advance(len(part.items) + len(part.rejected), aside=str(len(self.aside.rows)))

    def add(self, build: Build, part: Part, stored: dict[str, Any]) -> None:
        if build.shard.name not in self.done:  # else another worker was faster, and its note counts
            self.set_aside(build.add(part.items, stored))

    def publish(self, build: Build) -> None:
        record = self.done[build.shard.name] = build.publish(self.places)
        if record is build.noted:
            self.made.append(build)

    def set_aside(self, rejected: Sequence[Rejected]) -> None:
        for _, key, reason in rejected:
            self.aside.add(key, reason)

    def found(self, made: FoundMade, counted: int) -> None:
        """Another worker has made a shard; `counted` of its samples were already counted here."""
        self.done[made.shard.name] = made.record
        self.note_aside(made.record)
        self.bar.skip(made.record["listed"] - counted)

    def note_aside(self, record: dict[str, Any]) -> None:
        """Record another worker's rejects, once each."""
        for row in record["aside"]:
            if (marks := tuple(row.values())) not in self.noted:
                self.noted.add(marks)
                self.aside.rows.append(row)

    def counts(self, total: int) -> str:
        """How many of `total` samples were made by this worker and by others."""
        made = sum(part["shard"]["samples"] for build in self.made for part in build.noted["sets"].values())
        copied = sum(build.copied for build in self.made)
        words = [f"{made - copied} encoded"]
        words += [f"{copied} copied from base="] if copied else []
        words += [f"{total - made} there already or by other workers"] if total > made else []
        return ", ".join(words)
