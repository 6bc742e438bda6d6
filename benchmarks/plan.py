"""Cost of an epoch plan of 10^5 shards and 10^8 samples: start, seek, next step; and cost of its manifest.

    python benchmarks/plan.py output=/tmp/plan_benchmark repetitions=7

Memory is the growth of the process at its peak. Each repetition makes a new plan and seeks to random steps.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.loading.epoch_plan import EpochPlan
from data_pipeline.shards.manifest import Manifest, Shard

SHARDS, PER_SHARD = 100_000, 1000


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(make: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that `make` took, and its result."""
    began = time.perf_counter()
    made = make()
    return time.perf_counter() - began, made


def line(what: str, seconds: list[float]) -> None:
    low, middle, high = (1000 * f(seconds) for f in (min, statistics.median, max))
    print(f"{what:52s} {middle:9.2f} ms ({low:.2f} - {high:.2f})")


def plans(streams: int, own: range, repetitions: int) -> None:
    """Plans of a rank that has the streams `own`, each with 8 samples per step."""
    sizes, random = [PER_SHARD] * SHARDS, np.random.default_rng(0)
    before, far = peak_mb(), 10 * SHARDS * PER_SHARD // (8 * streams)
    starts, seeks, steps = [], [], []
    for _ in range(repetitions):
        start, plan = timed(lambda: EpochPlan(sizes, 1, 8 * streams, streams))
        first, _ = timed(lambda plan=plan: plan.step(0, own))
        starts.append(start + first)
        for step in random.integers(0, far, 3).tolist():
            seeks.append(timed(lambda plan=plan, step=step: plan.step(step, own))[0])
            steps.append(timed(lambda plan=plan, step=step: plan.step(step + 1, own))[0])
    print(f"\n{streams} streams, {len(own)} of them in this process; memory grew by {peak_mb() - before:.0f} MB")
    line("start, and the first step", starts)
    line("seek to a random step of ten epochs", seeks)
    line("the step after it", steps)


def write_manifest(root: Path) -> None:
    """Writes a manifest and its shards, which are empty files."""
    shards = tuple(Shard(f"shards/{i:06d}.tar", PER_SHARD, 0, f"{i:064x}") for i in range(SHARDS))
    Manifest("latents", shards, {"moments.npy": {}, "json": {}}).save(root)
    (root / "shards").mkdir(exist_ok=True)
    for shard in shards:
        (root / shard.name).touch()


def manifests(root: Path, repetitions: int) -> None:
    """Times loading the manifest, and comparing its shard sizes with the files."""
    before = peak_mb()
    loads, checks = [], []
    for _ in range(repetitions):
        seconds, manifest = timed(lambda: Manifest.load(root))
        loads.append(seconds)
        checks.append(timed(lambda manifest=manifest: manifest.check_shards(root))[0])
    size = (root / "manifest.json").stat().st_size / 2**20
    print(f"\nmanifest.json of {size:.0f} MB; memory grew by {peak_mb() - before:.0f} MB")
    line("load", loads)
    line("look at each shard's size", checks)


def alone(function: Callable[..., None], *arguments: Any) -> None:
    """Runs `function` in a new process, so that its peak memory is measured separately."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()


def main(output: str, repetitions: str = "7") -> None:
    print(f"{SHARDS} shards of {PER_SHARD} samples; median (min - max) of {repetitions} repetitions", flush=True)
    alone(plans, 64, range(8), int(repetitions))
    alone(plans, 1024, range(8), int(repetitions))
    alone(plans, 1024, range(1024), int(repetitions))
    alone(write_manifest, Path(output))
    alone(manifests, Path(output), int(repetitions))


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
