"""How fast one process reads batches of latents from disk: this loader, plain webdataset, and read() alone.

    python benchmarks/loader.py output=/tmp/loader_benchmark repetitions=7

Shards of Stable Diffusion's 512 px layout in fp16: moments 8 x 64 x 64 and text 77 x 768, 177 KiB per sample. All
variants read the same shards in turns, with a warm page cache and one torch thread, besides the loader's own threads.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import webdataset as wds

from data_pipeline.common.progress import Progress
from data_pipeline.loading.loader import Loader, LoaderConfig
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.writer import ShardWriter

SHARDS, PER_SHARD, BATCH = 16, 256, 64
STEPS = SHARDS * PER_SHARD // BATCH
CHUNK = 2**20


def write_latents(root: Path) -> None:
    """Random fp16 values: nothing here depends on them."""
    random, shards = np.random.default_rng(0), []
    for first in range(0, SHARDS * PER_SHARD, PER_SHARD):
        writer = ShardWriter()
        for i in range(first, first + PER_SHARD):
            moments, text = (random.random(shape, np.float32).astype(np.float16) for shape in ((8, 64, 64), (77, 768)))
            writer.add(f"{i:08d}", {"moments.npy": moments, "text.npy": text, "json": {"caption": f"picture {i}"}})
        shards.append(writer.publish(root, f"shards/{len(shards):06d}.tar"))
    Manifest("latents", tuple(shards), {"moments.npy": {}, "text.npy": {}, "json": {}}).save(root)


def ours(root: Path, **how: object) -> Iterator[int]:
    """Sample counts of successive epochs of one loader, which checks shards only in the first epoch."""
    batches = iter(Loader(str(root), BATCH, LoaderConfig(8, **how)))
    while True:
        yield sum(len(batch) for batch in islice(batches, STEPS))


def first_epoch(root: Path) -> int:
    """A loader's first epoch, including its check of the shards' digests."""
    return next(ours(root))


def plain(root: Path, shards: list[str]) -> int:
    """Reads arrays as in webdataset's documentation: decodes by extension, shuffles in a buffer, collates."""
    data = wds.WebDataset([str(root / name) for name in shards], shardshuffle=len(shards), seed=0)
    batches = data.shuffle(256).decode().to_tuple("__key__", "moments.npy", "text.npy", "json").batched(BATCH)
    return sum(len(torch.as_tensor(moments)) for _, moments, _, _ in batches)


def read_whole(root: Path, shards: list[str]) -> int:
    """read() of each shard, which allocates new memory each time."""
    return sum(len((root / name).read_bytes()) for name in shards)


def read_again(root: Path, shards: list[str], buffer: bytearray) -> int:
    """Lower bound: readinto() one buffer of a batch's size, repeatedly."""
    total = 0
    for name in shards:
        with open(root / name, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def main(output: str, repetitions: str = "7") -> None:
    torch.set_num_threads(1)
    root = Path(output)
    if not (root / "manifest.json").exists():
        write_latents(root)
    manifest = Manifest.load(root)
    shards, count = [shard.name for shard in manifest.shards], manifest.samples
    gigabytes = sum(shard.bytes for shard in manifest.shards) / 1e9
    buffer = bytearray(int(BATCH * gigabytes * 1e9 / count))
    checked, unchecked, inline = ours(root), ours(root, verify=False), ours(root, prefetch=0)
    ways: dict[str, Callable[[], object]] = {
        "this loader, first epoch with digests": lambda: first_epoch(root),
        "this loader, later epochs": lambda: next(checked),
        "this loader, verify=false": lambda: next(unchecked),
        "this loader, later epochs, prefetch=0": lambda: next(inline),
        "wds.WebDataset, decode, batched": lambda: plain(root, shards),
        "read() of each shard": lambda: read_whole(root, shards),
        "readinto() one small buffer": lambda: read_again(root, shards, buffer),
    }
    for way in ways.values():  # warm up page cache, first epochs and imports
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with Progress("repeat", int(repetitions) * len(ways)) as bar:
        for _ in range(int(repetitions)):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - began)
                bar.advance()
    print(f"{count} samples, {gigabytes:.2f} GB, batch {BATCH}; median (min - max) of {repetitions}, in turns")
    print(f"{'':42s}{'samples/s':>26s}{'GB/s':>24s}")
    for name, each in seconds.items():
        rates = sorted(1 / second for second in each)
        middle = statistics.median(rates)
        samples = f"{count * middle:.0f} ({count * rates[0]:.0f} - {count * rates[-1]:.0f})"
        speeds = f"{gigabytes * middle:.2f} ({gigabytes * rates[0]:.2f} - {gigabytes * rates[-1]:.2f})"
        print(f"{name:42s}{samples:>26s}{speeds:>24s}")
    (root / "result.json").write_text(json.dumps(seconds, indent=1))


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
