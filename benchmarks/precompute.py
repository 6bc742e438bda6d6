"""Gain of decoding and writing while encoding: precompute with its three threads, and with one thread, in turns.

    python benchmarks/precompute.py output=/tmp/precompute_benchmark repetitions=7

Two encoders: a small autoencoder on this CPU (one thread), and one that only waits `wait_ms` per picture and copies, as
this process does while a GPU encodes. Pictures are 256 x 256 lossless PNG; the page cache is warm.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.common.threads import Prefetcher, ordered_map
from data_pipeline.encode import shard_reader, split_encoder
from data_pipeline.encode.batch_encoder import Encoders
from data_pipeline.encode.latent_dataset import SplitToEncode
from data_pipeline.encode.latent_shard import OutputPaths
from data_pipeline.images.aspect_buckets import sizes_of
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.writer import ShardWriter
from train.models.autoencoder import AutoencoderKL

PICTURES, SHARD, SIZE = 192, 32, 256


class PrefetcherInline:
    """`Prefetcher` without a thread."""

    def __init__(self, items: Iterable[Any], depth: int) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def __enter__(self) -> PrefetcherInline:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class Waiting:
    """Moments from averaged pixels, after a wait during which the CPU is idle."""

    stored_as, factor, fingerprint = "moments", 8, "waiting"

    def __init__(self, wait_ms: float) -> None:
        self.wait = wait_ms / 1000

    def encode_stored(self, images: Tensor) -> Tensor:
        time.sleep(self.wait * len(images))
        return torch.nn.functional.avg_pool2d(images, 8).repeat(1, 2, 1, 1)

    def posterior_of(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(stored.chunk(2, 1))


def write_pictures(root: Path) -> None:
    """Smooth noise, which PNG compresses as well as drawings."""
    random, shards = np.random.default_rng(0), []
    for first in range(0, PICTURES, SHARD):
        writer = ShardWriter()
        for i in range(first, first + SHARD):
            small = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            writer.add(f"{i:06d}", {"png": np.array(small.resize((SIZE, SIZE))), "txt": "noise", "json": {}})
        shards.append(writer.publish(root, f"shards/{len(shards):06d}.tar"))
    Manifest("image-text", tuple(shards), {}, {"size": SIZE}).save(root)


def images_per_second(root: Path, image: Any, threads: bool) -> float:
    """Throughput of one run into an empty folder."""
    output = root / "latents"
    shutil.rmtree(output, ignore_errors=True)
    shard_reader.Prefetcher = split_encoder.Prefetcher = Prefetcher if threads else PrefetcherInline
    encoders = Encoders(image, None, {}, torch.device("cpu"), 16)
    reader = shard_reader.ShardReader(str(root / "pictures"), encoders, sizes_of(SIZE, None, 64, 8))
    in_turn = ordered_map if threads else lambda pool, function, items, ahead: map(function, items)
    shard_reader.ordered_map = split_encoder.ordered_map = in_turn
    split = SplitToEncode("", Manifest.load(root / "pictures"), OutputPaths(str(output)), reader)
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        split_encoder.encode_split(split)
    return PICTURES / (time.perf_counter() - began)


def main(output: str, repetitions: str = "7", wait_ms: str = "4") -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    root = Path(output)
    if not (root / "pictures/manifest.json").exists():
        write_pictures(root / "pictures")
    model = AutoencoderKL(channels=[16, 16], layers_per_block=1, norm_groups=8, mid_attention=False, patch=4).eval()
    print(f"{'encoder':32s} {'threads':8s} median images/s (min - max) of {repetitions}, in turns")
    for name, image in (
        (f"waits {wait_ms} ms per picture", Waiting(float(wait_ms))),
        ("small autoencoder, this CPU", model),
    ):
        rates: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(int(repetitions)):
            for threads in rates:
                rates[threads].append(images_per_second(root, image, threads))
        for threads, each in rates.items():
            spread = f"({min(each):.0f} - {max(each):.0f})"
            print(f"{name:32s} {'three' if threads else 'one':8s} {statistics.median(each):.0f} {spread}")


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
