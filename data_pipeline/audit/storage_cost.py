"""What data sets cost, computed: the exact bytes of a tar, and the disks and networks that follow from them."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_pipeline.encode.batch_encoder import Encoders
from data_pipeline.shards import codec
from data_pipeline.shards.arrays import DTYPES
from data_pipeline.shards.caption_members import member_of
from data_pipeline.shards.tar_index import END_OF_ARCHIVE

KEY = "000000000"  # as long as keys usually are
OFFSET = 10**8  # as long as an offset within a shard
MEGA = 10**6
HEADINGS = ("stored", "per sample", "total", "shards", "samples per shard", "read per node", "read by all nodes")


def tar_bytes(members: Mapping[str, int]) -> int:
    """Bytes of one sample in a tar: each member has a header and is padded to whole blocks."""
    block = tarfile.BLOCKSIZE
    return sum(block + -(-size // block) * block for size in members.values())


def shard_bytes(sample: int, samples: int) -> int:
    """Bytes of a shard whose samples take `sample` bytes in it: with an end mark, padded to whole records."""
    record = tarfile.RECORDSIZE
    return -(-(samples * sample + END_OF_ARCHIVE) // record) * record


def index_bytes(members: Mapping[str, int]) -> int:
    """Bytes of a sample's line in the .idx."""
    return len(json.dumps([KEY, {name: [OFFSET, size] for name, size in members.items()}])) + 1


@dataclass(frozen=True, slots=True)
class StorageLayout:
    """A way to store a data set; members: extension -> bytes in each sample; shared: bytes stored once beside all
    shards, of which `looked_up` are read for each sample."""

    name: str
    members: Mapping[str, int]
    shared: int = 0
    looked_up: int = 0

    @property
    def sample(self) -> int:
        """Bytes that a sample takes in its tar."""
        return tar_bytes(self.members)

    @property
    def read(self) -> int:
        """Bytes that are read to train on a sample."""
        return self.sample + self.looked_up

    def per_shard(self, limit: int) -> int:
        """Samples that fit into a shard of `limit` bytes; at least one."""
        return max(1, (limit - END_OF_ARCHIVE) // self.sample)

    def total(self, images: int, limit: int) -> int:
        """Bytes of tars and indices, and of the shared part."""
        whole, rest = divmod(images, self.per_shard(limit))
        tars = whole * shard_bytes(self.sample, self.per_shard(limit)) + (shard_bytes(self.sample, rest) if rest else 0)
        return tars + images * index_bytes(self.members) + self.shared


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast a training run reads: images/s of a GPU, GPUs of a node, nodes."""

    images_per_s: float
    gpus_per_node: int
    nodes: int

    @property
    def node(self) -> float:
        """Images/s of a node."""
        return self.images_per_s * self.gpus_per_node

    @property
    def cluster(self) -> float:
        """Images/s of all nodes."""
        return self.node * self.nodes


@torch.no_grad()
def field_bytes(encoders: Encoders, sides: tuple[int, int]) -> dict[str, int]:
    """Bytes of each .npy that precompute would store for a picture of `sides`: by its own code, run on tensors without
    memory. The encoders are on the device `meta`."""
    sample = {"key": KEY, "caption": "a", "meta": meta_for(encoders)}
    for condition in encoders.conditions.values():
        condition.learn([sample])
    images = torch.empty(1, 3, *sides, device="meta")
    fields = {}
    for encoder in encoders.field_encoders:
        for name, value in encoder.encode([sample], images, encoders).items():
            fields[f"{name}.npy"] = array_bytes(tuple(value.shape[1:]), encoders.dtype, value.is_floating_point())
    return fields


def meta_for(encoders: Encoders) -> dict[str, Any]:
    """A json that every condition accepts."""
    keys = {condition.key for condition in encoders.conditions.values() if hasattr(condition, "key")}
    return {"boxes": [["thing", 0.0, 0.0, 1.0, 1.0]], **dict.fromkeys(keys, "thing")}


def array_bytes(shape: tuple[int, ...], dtype: str, floating: bool) -> int:
    """Bytes of a field's .npy, as the codec writes it."""
    assert dtype in DTYPES
    numbers = "int32" if not floating else codec.BFLOAT16 if dtype == "bfloat16" else dtype
    return len(codec.encode("npy", np.zeros(shape, numbers)))


def for_captions(members: Mapping[str, int], of_caption: Sequence[str], captions: int) -> dict[str, int]:
    """The members of a sample with several captions: those in `of_caption` are stored once per caption."""
    others = {
        f"{member_of(extension.removesuffix('.npy'), str(number))}.npy": members[extension]
        for number in range(1, captions)
        for extension in of_caption
    }
    return {**members, **others}


def json_of(caption_bytes: int, more: int, sides: tuple[int, int], captions: int = 1) -> int:
    """Bytes of the json beside a latent: precompute's own entries, the captions, and `more` bytes from the source."""
    content = {
        "caption": "a" * caption_bytes,
        "crop_top_left": [0, 0],
        "image_sha256": "0" * 16,
        "original_size": list(sides),
        "target_size": list(sides),
    }
    several = {"captions": {str(number): "a" * caption_bytes for number in range(captions)}} if captions > 1 else {}
    return len(codec.encode("json", content | several)) + more


def deduplicated(
    name: str, members: Mapping[str, int], text: Sequence[str], images: int, unique: float, captions: int = 1
) -> StorageLayout:
    """A layout that stores text states once per distinct caption, and in each sample the numbers of its rows."""
    rows = round(images * captions * unique)
    kept = {extension: size for extension, size in members.items() if extension not in text}
    number = {"row.npy": array_bytes((captions,) if captions > 1 else (), "float32", floating=False)}
    states = sum(members[extension] for extension in text)
    return StorageLayout(name, kept | number, rows * states, states)


def words(number: float, unit: str = "B") -> str:
    """12.3 GB, in powers of ten."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g} {prefix}{unit}" if number < 100 else f"{number:.0f} {prefix}{unit}"
        number /= 1000
    return f"{number:,.3g} P{unit}"


def duration(seconds: float) -> str:
    """3.2 days, 5.1 h, 12.0 min or 3.0 s."""
    for one, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * one:
            return f"{seconds / one:.1f} {unit}"
    return f"{seconds:.1f} s"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the plan: `images` stored in a layout, in shards of `limit` bytes, and trained on."""

    layout: StorageLayout
    images: int
    limit: int
    rates: Rates

    @property
    def figures(self) -> dict[str, Any]:
        """Bytes, and bytes/s."""
        per_shard = self.layout.per_shard(self.limit)
        return {
            "layout": self.layout.name,
            "members": dict(self.layout.members),
            "bytes_per_sample": self.layout.sample,
            "bytes": self.layout.total(self.images, self.limit),
            "shards": -(-self.images // per_shard),
            "samples_per_shard": per_shard,
            "bytes_per_s_of_a_node": self.rates.node * self.layout.read,
            "bytes_per_s_of_all": self.rates.cluster * self.layout.read,
        }

    @property
    def cells(self) -> tuple[str, ...]:
        """The same figures as text, in the order of HEADINGS."""
        figures = self.figures
        return (
            self.layout.name,
            words(figures["bytes_per_sample"]),
            words(figures["bytes"]),
            f"{figures['shards']:,}",
            f"{figures['samples_per_shard']:,}",
            words(figures["bytes_per_s_of_a_node"], "B/s"),
            words(figures["bytes_per_s_of_all"], "B/s"),
        )
