"""What a data set consists of: its shards with sizes and digests, its fields, and the encoders that made it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, UserError

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar: its name below the data set, how many samples and bytes, and its sha256. index: the first 16 digits of
    its .idx's sha256; "": not known, as in data sets of earlier versions."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index: str = ""

    @property
    def index_name(self) -> str:
        return self.name.removesuffix(".tar") + ".idx"


@dataclass(frozen=True, slots=True)
class Manifest:
    """kind "image-text" or "latents"; fields: extension -> dtype and shape; info: whatever a reader must know."""

    kind: str
    shards: tuple[Shard, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify the data itself: its shards, their order, and what an index takes from them."""
        taken = [self.info["index"]] if "index" in self.info else []
        content = json.dumps([self.kind, [(s.name, s.sha256) for s in self.shards], *taken])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @classmethod
    def load(cls, root: str | Path, kind: str | None = None) -> Manifest:
        """Load the manifest of the data set at `root`; UserError if it is of another kind."""
        path = storage.join(root, "manifest.json")
        content = storage.read_if_there(path)
        if content is None:
            refuse_buckets(parent(root))
            refuse_one_split(parent(root))
            raise UserError(
                f"{root} is not a data set (no manifest.json there): use a folder that make_shards.py or "
                "precompute_latents.py has finished."
            )
        try:
            saved = json.loads(content)
        except ValueError as error:
            raise DataError(f"{path} is damaged ({error}): make or copy the data set again.") from error
        if not isinstance(saved, dict) or saved.pop("format", None) != FORMAT:
            raise DataError(f"{path} has a format that this version does not read: make the data set again.")
        if kind and saved.get("kind") != kind:
            raise UserError(f"{root} holds {saved.get('kind')} shards, but {kind} shards are needed here.")
        try:
            shards = tuple(Shard(**shard) for shard in saved.pop("shards"))
            saved.pop("samples"), saved.pop("fingerprint")
            for shard in shards:
                refuse_outside(path, shard)
            return cls(shards=shards, **tables(saved))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged ({error}): make or copy the data set again.") from error

    def check_shards(self, root: str | Path) -> None:
        """Check that every shard is there at its full size; looks at each file but reads none; one listing in a
        bucket."""
        if not storage.is_s3(root):
            for shard in self.shards:
                check_size(root, shard)
            return
        folders = {shard.name.rpartition("/")[0] for shard in self.shards}
        sizes = {
            f"{folder}/{name}".lstrip("/"): size
            for folder in folders
            for name, size in storage.sizes(storage.join(root, folder)).items()
        }
        for shard in self.shards:
            refuse_other_size(root, shard, sizes.get(shard.name))

    def save(self, root: str | Path) -> None:
        """Write the manifest last and atomically: a data set with a manifest is complete."""
        content = {"format": FORMAT, "samples": self.samples, "fingerprint": self.fingerprint, **asdict(self)}
        storage.write_atomically(storage.join(root, "manifest.json"), json.dumps(content, indent=1).encode())


def tables(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tables that are saved beside the shards; TypeError if one of them is not a table."""
    for name in ("fields", "info", "fingerprints"):
        if not isinstance(saved.get(name, {}), dict):
            raise TypeError(f"{name} is not a table")
    if not all(isinstance(field, dict) for field in saved.get("fields", {}).values()):
        raise TypeError("a field is not a table")
    return saved


def refuse_outside(path: str, shard: Shard) -> None:
    """Refuse a shard whose name leads out of its data set: files with shards' names are written elsewhere."""
    if shard.name.startswith("/") or ".." in shard.name.split("/"):
        raise DataError(f"{path} names the shard {shard.name}, which is outside the data set: make or copy it again.")


def refuse_other_claims(root: str | Path, manifest: Manifest) -> None:
    """Refuse a manifest whose saved sums are not those of its shards: it was edited."""
    path = storage.join(root, "manifest.json")
    saved = json.loads(storage.read_bytes(path))
    if (saved["samples"], saved["fingerprint"]) != (manifest.samples, manifest.fingerprint):
        raise DataError(f"{path} was changed after it was written: make or copy the data set again.")


def check_size(root: str | Path, shard: Shard) -> None:
    """Refuse a shard that is missing or cut, with the remedy."""
    refuse_other_size(root, shard, storage.size_if_there(storage.join(root, shard.name)))


def refuse_other_size(root: str | Path, shard: Shard, actual: int | None) -> None:
    """Refuse a shard of `actual` bytes (None: missing) if the manifest says otherwise."""
    path = storage.join(root, shard.name)
    if actual is None:
        raise DataError(f"shard {path} is missing: copy it again, or make the data set again.")
    if actual != shard.bytes:
        raise DataError(
            f"shard {path} has {actual} bytes, but its manifest says {shard.bytes}: it was cut or changed; "
            "copy it again, or delete it together with the data set's manifest.json and run the script that made it."
        )


def parent(root: str | Path) -> str:
    """The folder above a data set."""
    above, slash, _ = str(root).rstrip("/").rpartition("/")
    return above or slash or "."


def refuse_one_split(root: str | Path) -> None:
    """UserError if `root` is itself a split, so that it holds no train/ and heldout/."""
    if not storage.exists(storage.join(root, "manifest.json")):
        return
    if str(root).rstrip("/").rpartition("/")[2] in ("train", "heldout"):
        raise UserError(f"{root} is one split of a data set: use the folder that holds both, {parent(root)}.")
    raise UserError(
        f"{root} is a data set without train/ and heldout/, which are needed here: make it again from the folder that "
        "holds both."
    )


def refuse_latents(root: str | Path) -> None:
    """UserError if `root` holds latents (a data set, its splits or its buckets), where pictures are needed."""
    buckets = [storage.join(root, name) for name in storage.subfolders(root) if is_bucket(name)]
    for path in (root, *(storage.join(folder, "train") for folder in (root, *buckets))):
        if storage.exists(storage.join(path, "manifest.json")) and Manifest.load(path).kind == "latents":
            raise UserError(
                f"{root} holds latents already: train_ldm.py takes them as input=; precompute_latents.py takes the "
                "shards of make_shards.py or index_shards.py."
            )


def is_bucket(name: str) -> bool:
    """Whether a folder is named like an aspect-ratio bucket, as 512x384."""
    return re.fullmatch(r"\d+x\d+", name) is not None


def refuse_buckets(root: str | Path) -> None:
    """UserError if `root` is the folder with all buckets of a data set, not one of them."""
    buckets = [name for name in storage.subfolders(root) if is_bucket(name)]
    if buckets:
        raise UserError(
            f"{root} holds the buckets {', '.join(buckets[:8])}: use one of them, as {storage.join(root, buckets[0])}."
        )


def refuse_no_heldout(root: str | Path) -> None:
    """UserError if a data set has train/ but no heldout/, on which training measures."""
    there = [storage.exists(storage.join(root, name, "manifest.json")) for name in ("train", "heldout")]
    if there != [True, False]:
        return
    folder, name = parent(root), str(root).rstrip("/").rpartition("/")[2]
    others = [each for each in storage.subfolders(folder) if is_bucket(each)] if is_bucket(name) else []
    if any(storage.exists(storage.join(folder, each, "heldout", "manifest.json")) for each in others):
        raise UserError(
            f"the bucket {root} has no held-out samples, on which training measures, as all held-out pictures are in "
            f"other buckets: train on all buckets together with input={folder}."
        )
    again = ", then its latents by precompute_latents.py" if Manifest.load(f"{root}/train").kind == "latents" else ""
    raise UserError(
        f"{root} has no held-out samples (heldout/), on which training measures: make the shards again by "
        f"make_shards.py with heldout_every=10 (2 to 9 if there are fewer than 10 pictures){again}."
    )


def find_splits(root: str | Path) -> dict[str, str]:
    """Name -> path of each data set in `root`: itself ("") or its subfolders (train, heldout)."""
    if storage.exists(storage.join(root, "manifest.json")):
        return {"": str(root)}
    below = {name: storage.join(root, name) for name in storage.subfolders(root)}
    found = {name: path for name, path in below.items() if storage.exists(storage.join(path, "manifest.json"))}
    if not found:
        raise UserError(f"{root} contains no data set: use a folder that make_shards.py has finished.")
    return found
