"""What a data set will cost, before it is made: bytes, shards, bandwidth and hours, as a table."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig

from data_pipeline import storage
from data_pipeline.entry import entry
from data_pipeline.errors import UserError

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
BLOCK, RECORD = 512, 10_240  # of a tar: headers and padding, and what its end is padded to


@dataclass(frozen=True, slots=True)
class Shapes:
    """Of what a sample holds: stored_as moments (2C, h, w), indices (h, w) or pixels; text (T, D), pooled (P,)."""

    stored_as: str
    latents: tuple[int, ...]
    text: tuple[int, int]
    pooled: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Line:
    """A way to store a data set."""

    what: str
    bytes_per_sample: float
    samples: int
    shard_size: int

    @property
    def bytes(self) -> float:
        """Of all shards, with the end of each and its index."""
        return self.samples * self.bytes_per_sample + self.shards * (2 * BLOCK + RECORD / 2)

    @property
    def shards(self) -> int:
        return math.ceil(self.samples / self.shard_size)


@entry("plan_storage")
def main(cfg: DictConfig) -> None:
    if cfg.dtype not in BYTES:
        raise UserError(f"dtype={cfg.dtype} is unknown: take one of {', '.join(BYTES)}.")
    images = int(float(cfg.images))
    if images < 1 or cfg.shard_size < 1:
        raise UserError(f"images={cfg.images}, shard_size={cfg.shard_size}: take 1 or more of each.")
    shapes = shapes_of(cfg)
    lines = plan(shapes, images, cfg.shard_size, cfg.dtype, cfg.captions_per_distinct, picture_bytes(cfg))
    rates = {"images_per_s": cfg.images_per_s_per_gpu, "gpus_per_node": cfg.gpus_per_node, "nodes": cfg.nodes}
    table = [row_of(line, rates, cfg.encoded_per_s_per_gpu) for line in lines]
    say(cfg, shapes, table)
    if cfg.output is not None:
        storage.write_atomically(cfg.output, json.dumps({"shapes": str(shapes), "table": table}, indent=1).encode())


def shapes_of(cfg: DictConfig) -> Shapes:
    """Derived from the models themselves, built without memory for their weights."""
    import torch

    with torch.device("meta"):
        autoencoder = instantiate(cfg.autoencoder, _convert_="all")
    if cfg.size % autoencoder.factor:
        raise UserError(
            f"size={cfg.size} is no multiple of the first stage's {autoencoder.factor}: choose one that is."
        )
    side = cfg.size // autoencoder.factor
    channels = autoencoder.latent_channels
    latents = {"moments": (2 * channels, side, side), "indices": (side, side), "pixels": (3, side, side)}
    return Shapes(autoencoder.stored_as, latents[autoencoder.stored_as], (cfg.tokens, cfg.text_dim), (cfg.pooled_dim,))


def plan(
    shapes: Shapes, images: int, shard_size: int, dtype: str, captions_per_distinct: float, picture: float
) -> list[Line]:
    """Pictures, latents with text stored a sample, with each different caption's stored once, and without text."""
    latents = [array_bytes(shapes.latents, "int32" if shapes.stored_as == "indices" else dtype)]
    text = [array_bytes(shapes.text, dtype), array_bytes(shapes.pooled, dtype)]
    json_bytes, caption = 110, 60
    whole, alone = member_sum([*latents, *text, json_bytes]), member_sum([*latents, json_bytes])
    return [
        Line("pictures and captions", member_sum([picture, caption, json_bytes]), images, shard_size),
        Line(f"{shapes.stored_as}, text for each", whole, images, shard_size),
        Line(
            f"{shapes.stored_as}, text once a caption",
            alone + (whole - alone) / captions_per_distinct,
            images,
            shard_size,
        ),
        Line(f"{shapes.stored_as}, text online", alone, images, shard_size),
    ]


def array_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Of a .npy: its header and its values."""
    header = io.BytesIO()
    kind = {"float16": "<f2", "bfloat16": "|V2", "float32": "<f4", "int32": "<i4"}[dtype]
    np.lib.format.write_array_header_1_0(header, {"descr": kind, "fortran_order": False, "shape": shape})
    return header.tell() + math.prod(shape) * np.dtype(kind).itemsize


def member_sum(sizes: list[float]) -> float:
    """In a tar: a header each, and padding to whole blocks."""
    return sum(BLOCK + math.ceil(size / BLOCK) * BLOCK for size in sizes)


def picture_bytes(cfg: DictConfig) -> float:
    """Of one stored picture, by the given bits a pixel."""
    return cfg.size**2 * cfg.bits_per_pixel / 8


def row_of(line: Line, rates: Mapping[str, Any], encoded_per_s: float) -> dict[str, Any]:
    """A line with what reading it asks of a node and of the store."""
    per_node = rates["images_per_s"] * rates["gpus_per_node"]
    gpus = rates["gpus_per_node"] * rates["nodes"]
    return {
        "what": line.what,
        "bytes_per_sample": round(line.bytes_per_sample),
        "terabytes": line.bytes / 1e12,
        "shards": line.shards,
        "megabytes_per_s_per_node": line.bytes_per_sample * per_node / 1e6,
        "gigabytes_per_s": line.bytes_per_sample * per_node * rates["nodes"] / 1e9,
        "hours_per_epoch": line.samples / (rates["images_per_s"] * gpus) / 3600,
        "hours_to_precompute": line.samples / (encoded_per_s * gpus) / 3600,
    }


def say(cfg: DictConfig, shapes: Shapes, table: list[dict[str, Any]]) -> None:
    """The table, and what it was reckoned from."""
    print(
        f"{float(cfg.images):,.0f} pictures of {cfg.size}x{cfg.size}: {shapes.stored_as} "
        f"{'x'.join(map(str, shapes.latents))}, text {shapes.text[0]}x{shapes.text[1]}, {cfg.dtype}, "
        f"{cfg.shard_size} a shard"
    )
    print(f"{'stored':<34} {'B/sample':>9} {'TB':>9} {'shards':>8} {'MB/s node':>10} {'GB/s all':>9}")
    for row in table:
        print(
            f"{row['what']:<34} {row['bytes_per_sample']:>9,} {row['terabytes']:>9.3f} {row['shards']:>8,} "
            f"{row['megabytes_per_s_per_node']:>10.1f} {row['gigabytes_per_s']:>9.2f}"
        )
    print(
        f"at {cfg.images_per_s_per_gpu:g} pictures/s a GPU on {cfg.nodes} nodes of {cfg.gpus_per_node}: "
        f"{table[0]['hours_per_epoch']:.1f} h an epoch; precomputing at {cfg.encoded_per_s_per_gpu:g}: "
        f"{table[0]['hours_to_precompute']:.1f} h"
    )
    print(
        f"assumed: {cfg.bits_per_pixel:g} bits a pixel of a stored picture, {cfg.captions_per_distinct:g} pictures a "
        "different caption; the rest follows from the models' shapes and tar's layout"
    )


if __name__ == "__main__":
    main()
