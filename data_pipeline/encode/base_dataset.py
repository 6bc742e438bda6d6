"""Fields of an earlier latent data set, reused for a new one: they need not be encoded again."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.common import storage
from data_pipeline.common.errors import UserError
from data_pipeline.common.saved_names import named
from data_pipeline.encode.batch_encoder import Encoders, FirstStage, Item
from data_pipeline.encode.conditions import Condition
from data_pipeline.encode.encoders import TEXT_ENCODERS
from data_pipeline.shards import codec
from data_pipeline.shards.arrays import DTYPES, narrowed
from data_pipeline.shards.caption_members import line_of, member_of, others_of
from data_pipeline.shards.json_fields import GEOMETRY
from data_pipeline.shards.manifest import Manifest, Shard
from data_pipeline.shards.reader import read_whole
from data_pipeline.shards.samples import as_sample, captions_of
from data_pipeline.shards.tar_index import IndexEntry, read_index

# Keys that precompute adds to the source's json; and the captions, on which nothing made from the rest of the sample
# depends.
FACTS = (*GEOMETRY, "image_sha256", "caption", "captions")


class BaseSet:
    """A finished latent data set, and which of its fields `encoders` would make in the same way."""

    def __init__(self, root: str, encoders: Encoders, sizes: str) -> None:
        self.root, self.manifest = root, Manifest.load(root, "latents")
        self.shards = {shard.name: shard for shard in self.manifest.shards}
        self.same_sizes = self.manifest.info.get("sizes") == sizes
        self.reusable = [encoder for encoder in encoders.field_encoders if self._made_alike(encoder, encoders)]

    def _made_alike(self, encoder: Condition, encoders: Encoders) -> bool:
        """Whether recipe, encoders, dtype and, where pictures matter, sizes are the same."""
        uses = {"autoencoder": encoder.uses_first_stage}
        uses |= {mark: encoder.encoder == group for group, mark in TEXT_ENCODERS.items()}
        ours = encoders.fingerprints
        fields = [self.manifest.fields.get(f"{name}.npy", {}) for name in encoder.fields]
        recipes = named(self.manifest.info.get("conditions", {})).values()
        return (
            all(f.get("dtype") == encoders.dtype for f in fields if f.get("dtype") in (None, *DTYPES))
            and all(self.manifest.fingerprints.get(name) == ours.get(name) for name, used in uses.items() if used)
            and (self.same_sizes or "picture" not in encoder.made_from)
            and (isinstance(encoder, FirstStage) or encoder.config() in recipes)
        )

    @functools.cached_property
    def places(self) -> dict[str, tuple[Shard, IndexEntry]]:
        """Key -> where its sample lies, for all samples: some 500 bytes each, only made if shards are cut
        differently."""
        return {e.key: (s, e) for s in self.manifest.shards for e in read_index(self.root, s)}


class BaseShard:
    """The samples of the base that a shard of the new data set may take fields from."""

    def __init__(self) -> None:
        self.samples: dict[str, tuple[BaseSet, dict[str, Any]]] = {}
        self.captions: dict[str, tuple[BaseSet, dict[str, Any]]] = {}

    def add(self, origin: BaseSet, sample: dict[str, Any]) -> None:
        self.samples.setdefault(sample["key"], (origin, sample))
        self.captions.setdefault(sample["caption"], (origin, sample))
        fields = [name for encoder in origin.reusable if encoder.made_from == ("caption",) for name in encoder.fields]
        for caption, text in others_of(captions_of(sample)).items():
            arrays = {name: sample.get(member_of(name, caption)) for name in fields}
            if text not in self.captions and all(value is not None for value in arrays.values()):
                self.captions[text] = (origin, arrays)

    def copy_fields(self, item: Item, encoders: Encoders) -> None:
        """Give an item the fields that would come out the same: those of the same picture, and of an equal caption."""
        if item.sample["key"] in self.samples:
            origin, old = self.samples[item.sample["key"]]
            if origin.same_sizes and same_picture(old["meta"], item.sample["meta"]):
                item.sample["meta"] |= {name: old["meta"][name] for name in GEOMETRY}
                for encoder in origin.reusable:
                    if "picture" in encoder.made_from and same_meta(encoder, old, item.sample):
                        reuse(item, encoder, old, encoders.dtype)
        for caption, text in {None: item.sample["caption"], **others_of(item.captions)}.items():
            origin, old = self.captions.get(text, (None, {}))
            for encoder in origin.reusable if origin else ():
                if encoder.made_from == ("caption",):
                    reuse(item, encoder, old, encoders.dtype, caption)


def reuse(item: Item, encoder: Condition, old: Mapping[str, Any], dtype: str, caption: str | None = None) -> None:
    """Take a maker's fields from the base; for `caption`, if it is not the first."""
    names = {name: name if caption is None else member_of(name, caption) for name in encoder.fields}
    item.reused |= {ours: narrowed(old[name], dtype) for name, ours in names.items()}


def same_picture(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether the bytes are the same, and the json has nothing to move with what was cut off."""
    placed = ("boxes" in new or "hole" in new) and old["crop_top_left"] != [0, 0]
    return old.get("image_sha256") == new["image_sha256"] and not placed


def same_meta(encoder: Condition, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether the sources say the same of a sample, for a maker that depends on it."""
    if "meta" not in encoder.made_from:
        return True
    before, now = ({k: v for k, v in each["meta"].items() if k not in FACTS} for each in (old, new))
    return before == now


class Base:
    """One split of a latent data set, in all of its buckets."""

    def __init__(self, roots: Sequence[str], encoders: Encoders, sizes: str) -> None:
        self.sets = [BaseSet(root, encoders, sizes) for root in roots]

    @property
    def fingerprint(self) -> str:
        return ",".join(each.manifest.fingerprint for each in self.sets)

    def shard(self, name: str, keys: Sequence[str]) -> BaseShard:
        """The base's samples of a shard: from the shard of the same name, else from wherever they lie."""
        found = BaseShard()
        for each in self.sets:
            if each.reusable and name in each.shards:
                shard = each.shards[name]
                self._add(found, each, shard, read_index(each.root, shard))
        lacking = [key for key in keys if key not in found.samples]
        for each in self.sets if len(lacking) > len(keys) // 2 else ():
            wanted: dict[Shard, list[IndexEntry]] = {}
            for key in lacking:
                if each.reusable and key in each.places:
                    shard, entry = each.places[key]
                    wanted.setdefault(shard, []).append(entry)
            for shard, entries in wanted.items():
                self._add(found, each, shard, entries)
        return found

    @staticmethod
    def _add(found: BaseShard, origin: BaseSet, shard: Shard, entries: Sequence[IndexEntry]) -> None:
        data = read_whole(origin.root, shard)
        fields = {f"{name}.npy" for encoder in origin.reusable for name in encoder.fields} | {"json"}
        for entry in entries:
            lines = origin.manifest.fields
            places = {name: place for name, place in entry.members.items() if line_of(name, lines) in fields}
            members = {name: codec.decode(name, data[at : at + size]) for name, (at, size) in places.items()}
            found.add(origin, as_sample(entry.key, members))


def base_of(path: str, split: str, encoders: Encoders, sizes: str) -> Base:
    """The base's data sets of a split: <path>/<split>, <path>/<bucket>/<split>, or <path> itself."""
    places = [storage.join(path, split)] if split else [path]
    places += [
        storage.join(path, bucket, split) if split else storage.join(path, bucket)
        for bucket in storage.subfolders(path)
    ]
    roots = [place for place in places if storage.exists(storage.join(place, "manifest.json"))]
    if not roots:
        raise UserError(
            f"base={path} has no finished latents of {split or 'this data'}: use an output of precompute_latents.py."
        )
    base = Base(roots, encoders, sizes)
    if not any(each.reusable for each in base.sets):
        raise UserError(
            f"base={path} was made with other encoders, another dtype or other sizes, so nothing of it can be reused: "
            "remove base=."
        )
    return base
