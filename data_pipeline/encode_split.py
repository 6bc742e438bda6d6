"""A split of image-text shards to latent data sets: the shards that are missing, then what is of the whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from safetensors.torch import save

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, UserError
from data_pipeline.common.progress import Progress
from data_pipeline.common.saved_names import named
from data_pipeline.common.stop_request import Stopped
from data_pipeline.common.temp_files import sweep
from data_pipeline.common.threads import Ahead, Behind
from data_pipeline.encode_batch import Encoders, combined_statistics, encode_batch
from data_pipeline.encode_shard import Begun, Build, FoundMade, Over, Part, Rejected, ShardReader, Step
from data_pipeline.images.aspect_buckets import Sizes
from data_pipeline.reuse import Base
from data_pipeline.shard_notes import Places, confirmed, finished_record
from data_pipeline.shards.manifest import Manifest, Shard
from data_pipeline.shards.rejects import Aside, accounting, summary
from data_pipeline.work_share import Worker

STEPS_AHEAD, CALLS_BEHIND = 4, 4  # batches that wait between decoding, encoding and writing
NOTES_AT_ONCE = 16  # threads that look for finished shards: in a bucket each look takes some 20 ms


class Split(NamedTuple):
    """A split to encode: its name, what it is made of, where it goes, and what reads and encodes it."""

    name: str
    source: Manifest
    places: Places
    reader: ShardReader
    max_aside_fraction: float = 0.05

    @property
    def encoders(self) -> Encoders:
        return self.reader.encoders

    @property
    def title(self) -> str:
        return f"precompute {self.name or 'samples'}"


def identity(
    source: Manifest, encoders: Encoders, sizes: Sizes | None = None, base: Base | None = None
) -> dict[str, str]:
    """What a latent data set is made of, by name."""
    made_of = {
        "images": source.fingerprint,
        "autoencoder": encoders.image.fingerprint,
        "dtype": encoders.dtype,
        "conditions": json.dumps(conditions_config(encoders), sort_keys=True),
    }
    if encoders.text is not None:
        made_of["text_encoder"] = encoders.text.fingerprint
    if sizes and sizes.sides and (sizes.split or sizes.sides[0] != (source.info.get("size"),) * 2):
        made_of["sizes"] = sizes.described
    if encoders.text is not None and encoders.text.keep:
        made_of["captions"] = "encoded one by one"
    if base is not None:
        made_of["base"] = base.fingerprint
    return made_of | ({"flips": "encoded"} if encoders.flips else {})


def conditions_config(encoders: Encoders) -> dict[str, Any]:
    """What builds the conditions again, for sampling."""
    return {name: condition.config() for name, condition in encoders.conditions.items()}


def claim(root: str, made_of: dict[str, str]) -> None:
    """Note what `root` is being made of, before the first shard; refuse to go on with other encoders or pictures."""
    path = storage.join(root, "precompute.json")
    if not storage.write_first(path, json.dumps(made_of, indent=1).encode()):
        before = noted_in(path)
        differing = [name for name in {**made_of, **before} if before.get(name) != made_of.get(name)]
        if differing:
            what = "; ".join(f"{name} was {before.get(name)} and is {made_of.get(name)}" for name in differing)
            raise UserError(f"{root} was begun with others: {what}. Give those, or choose another output=.")


def noted_in(path: str) -> dict[str, str]:
    """What a precompute.json says; what an earlier version noted, with conditions by Python's paths, as of now."""
    note = storage.read_bytes(path)
    try:
        made_of = dict(json.loads(note).items())
        if "conditions" in made_of:
            made_of["conditions"] = json.dumps(named(json.loads(made_of["conditions"])), sort_keys=True)
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}): remove that folder, or choose another output=.") from error
    return made_of


def refuse_other_layout(places: Places) -> None:
    """An output that holds a set for each bucket, where one set is wanted, or the other way round."""
    other = places._replace(bucketed=not places.bucketed)
    if storage.exists(storage.join(other.notes, "precompute.json")):
        how = "buckets" if other.bucketed else "one size"
        raise UserError(f"{places.output} was begun with {how}: give those sizes, or choose another output=.")


def refuse_pictures(places: Places) -> None:
    """An output that is itself a data set of pictures would be taken for finished."""
    if storage.exists(storage.join(places.root(), "manifest.json")) and Manifest.load(places.root()).kind != "latents":
        raise UserError(f"output={places.output} holds image-text shards: choose another folder for the latents.")


def encode_split(split: Split, worker: Worker = Worker(), stop: Callable[[], bool] = lambda: False) -> None:  # noqa: B008
    """Encode the shards that are missing, then write constants and manifests. Stopped: asked to, before all is done."""
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


def folders(split: Split) -> list[str]:
    """Where temporary files of this split may lie."""
    places = split.places
    roots = {places.notes, places.root()}
    if places.bucketed:
        roots |= {places.root(name) for name in storage.subfolders(places.output)}
    below = {shard.name.rpartition("/")[0] for shard in split.source.shards} | {"aside"}
    return sorted(roots | {storage.join(root, folder) for root in roots for folder in below if folder})


class Maker:
    """Makes shards of a split, as one of several workers; `done` gets the notes of those that it or others made.

    Three threads: pictures are decoded ahead of this one, which encodes, and tars are written behind it.
    """

    def __init__(self, split: Split, worker: Worker, done: dict[str, dict[str, Any]]) -> None:
        self.split, self.worker, self.done = split, worker, done
        self.encoders, self.places = split.encoders, split.places
        self.aside = Aside(split.source.samples, split.max_aside_fraction)
        self.noted: set[tuple[str, ...]] = set()  # what others' notes set aside
        self.made: list[Build] = []  # what this worker has published
        for record in done.values():
            self.note_aside(record)
        self.begun: Begun | None = None  # the shard that parts come of
        self.build: Build | None = None

    def run(self, stop: Callable[[], bool]) -> None:
        """Until all shards have their notes. Stopped where `stop()` comes first; what is encoded by then is written."""
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
        """What the reader has for us."""
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
        if build.shard.name not in self.done:  # else another was quicker, and its note counts
            self.set_aside(build.add(part.items, stored))

    def publish(self, build: Build) -> None:
        record = self.done[build.shard.name] = build.publish(self.places)
        if record is build.noted:
            self.made.append(build)

    def set_aside(self, rejected: Sequence[Rejected]) -> None:
        for _, key, reason in rejected:
            self.aside.add(key, reason)

    def found(self, made: FoundMade, counted: int) -> None:
        """Another worker has made a shard, `counted` samples of which had been taken here."""
        self.done[made.shard.name] = made.record
        self.note_aside(made.record)
        self.bar.skip(made.record["listed"] - counted)

    def note_aside(self, record: dict[str, Any]) -> None:
        """What another has set aside, once each."""
        for row in record["aside"]:
            if (marks := tuple(row.values())) not in self.noted:
                self.noted.add(marks)
                self.aside.rows.append(row)

    def counts(self, total: int) -> str:
        """How many of `total` samples were made by whom."""
        made = sum(part["shard"]["samples"] for build in self.made for part in build.noted["sets"].values())
        copied = sum(build.copied for build in self.made)
        words = [f"{made - copied} encoded"]
        words += [f"{copied} copied from base="] if copied else []
        words += [f"{total - made} there already or by other workers"] if total > made else []
        return ", ".join(words)


def finish(
    split: Split, records: Sequence[dict[str, Any]], made_of: dict[str, str], counted: Callable[[int], str]
) -> None:
    """What is of the whole: constants, what was set aside, a manifest a data set. Whoever does it, the same bytes."""
    source, places, encoders = split.source, split.places, split.encoders
    aside = Aside(source.samples, split.max_aside_fraction)
    for row in (row for record in records for row in record["aside"]):
        aside.add(**row)
    buckets = sorted({bucket for record in records for bucket in record["sets"]})
    parts = {bucket: [r["sets"][bucket] for r in records if bucket in r["sets"]] for bucket in buckets}
    if not buckets:
        raise DataError(f"not one sample of {split.reader.path} can be encoded: see {places.notes}/shards.")
    processed = sum(part["shard"]["samples"] for each in parts.values() for part in each)
    info = {
        **{name: fact for name, fact in source.info.items() if name != "made_with"},
        "accounting": accounting(processed, {}, summary(aside.rows), source.samples),  # of this stage, in all buckets
        "pixel_range": [-1.0, 1.0],
        "crop": "centre",
        "sizes": split.reader.sizes.described,
        "conditions": conditions_config(encoders),
        "latents": combined_statistics([part["latents"] for each in parts.values() for part in each]),
    }
    aside.save(places.notes, "precompute")
    for bucket in buckets:
        root, shards = places.root(bucket), tuple(Shard(**part["shard"]) for part in parts[bucket])
        write_constants(root, encoders)
        Manifest("latents", shards, one_shape(root, parts[bucket]), info, made_of).save(root)
    counts = {bucket: sum(part["shard"]["samples"] for part in parts[bucket]) for bucket in buckets}
    if places.bucketed:
        storage.write_atomically(places.last, json.dumps(counts, indent=1).encode())
        print(f"{split.title}: " + ", ".join(f"{count} of {bucket}" for bucket, count in counts.items()))
    root = places.root("*" if places.bucketed else "")
    print(f"{split.title}: {counted(processed)}, {len(aside.rows)} set aside; in {root}")


def one_shape(root: str, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fields of all shards, which must be the same."""
    first = parts[0]
    for part in parts:
        if part["fields"] != first["fields"]:
            raise DataError(
                f"pictures of {part['shard']['name']} and {first['shard']['name']} in {root} are not of one size: "
                "give size= or buckets=auto, and another output=."
            )
    return first["fields"]


@torch.no_grad()
def write_constants(root: str, encoders: Encoders) -> None:
    """null.safetensors: the encoders' own values where there is no condition; codebook.safetensors of a VQ model."""
    null: dict[str, torch.Tensor] = {}
    for condition in encoders.conditions.values():
        null |= {name: value.float().cpu().contiguous() for name, value in condition.null(encoders).items()}
    storage.write_atomically(storage.join(root, "null.safetensors"), save(null))
    if encoders.image.stored_as == "indices":
        codebook = encoders.image.codebook.detach().float().cpu().contiguous()
        storage.write_atomically(storage.join(root, "codebook.safetensors"), save({"codebook": codebook}))
