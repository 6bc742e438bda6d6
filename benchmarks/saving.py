"""Cost of checkpoints and EMA in training: asynchronous and synchronous saves in turns, two ranks, ZeRO-2.

    python benchmarks/saving.py output=/tmp/saving channels=256,512 batch=32 repetitions=7

channels: those of the demo's U-Net (128,256: 16 M parameters; 256,512: 64 M). The script starts its own ranks.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from training_on_noise import batches, engine

from train.checkpointing.checkpoints import CheckpointConfig, Checkpoints
from train.distributed.collectives import barrier, gathered_objects
from train.distributed.ranks import Ranks, closing_distributed, find_ranks
from train.engine.ema import Ema
from train.engine.train_state import TrainState

STEPS = 4  # at least, between saves


class Training:
    """One engine, and its measured times. Seconds are those of the slowest rank."""

    def __init__(self, output: Path, channels: list[int], batch: int, ranks: Ranks) -> None:
        self.ranks, self.batch = ranks, batch
        self.engine, self.stream = engine(channels, batch, ranks), batches(batch, ranks)
        self.ema, self.state = Ema(self.engine.master_shards(), 0.999), TrainState(10**6)
        self.checkpoints = {
            how: Checkpoints(output / str(how) / "checkpoints", ranks, {}, "network.", CheckpointConfig(1, None, how))
            for how in (True, False)  # asynchronous or synchronous
        }
        for checkpoints in self.checkpoints.values():
            checkpoints.resume("auto", self.engine, self.ema, self.state)
        self.times: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}  # of the rank's own thread, independent of other load on the machine

    def timed(self, what: str, do: Callable[[], object]) -> None:
        began, used = time.perf_counter(), time.thread_time()
        do()
        seconds, used = time.perf_counter() - began, time.thread_time() - used
        self.times.setdefault(what, []).append(max(gathered_objects(seconds)))
        self.cpu.setdefault(what, []).append(used)

    def step(self, what: str) -> None:
        """A training step like the trainer's, each part timed. The barrier excludes waiting between ranks."""
        barrier()
        self.timed(what, lambda: self.engine.train_step(self.stream, 0, 1))
        self.timed("EMA", lambda: self.ema.update(self.engine.master_shards()))
        self.state.step += 1

    def save(self, asynchronous: bool) -> None:
        """One asynchronous or synchronous save, and steps until it is written."""
        checkpoints, how = self.checkpoints[asynchronous], "asynchronous" if asynchronous else "synchronous"
        barrier()
        began = time.perf_counter()
        self.timed(f"{how} save", lambda: checkpoints.save(self.engine, self.ema, self.state))
        while any(gathered_objects(checkpoints.save_thread is not None and checkpoints.save_thread.is_alive())):
            self.step("step while a save is written")
        checkpoints.finish()
        self.times.setdefault(f"{how} save, until it is published", []).append(time.perf_counter() - began)
        for _ in range(STEPS):
            self.step("step")


def measure(output: Path, channels: list[int], batch: int, repetitions: int) -> None:
    ranks = find_ranks()
    with closing_distributed():
        training = Training(output, channels, batch, ranks)
        for _ in range(2):
            training.step("warm-up")
        for turn in range(repetitions):
            for asynchronous in (True, False) if turn % 2 else (False, True):
                training.save(asynchronous)
            if ranks.is_main:
                print(f"turn {turn + 1} of {repetitions}", file=sys.stderr, flush=True)
        if ranks.is_main:
            size = sum(p.numel() for p in training.engine.module.parameters())
            print(f"{size / 1e6:.1f} M parameters, {ranks.world_size} ranks, batch {batch}")
            show(training.times, training.cpu)


def show(times: dict[str, list[float]], cpu: dict[str, list[float]]) -> None:
    """Prints median (minimum - maximum), and the two ratios that have a limit."""
    for what, seconds in times.items():
        middle = statistics.median(seconds)
        print(f"{what:44s}{1e3 * middle:9.1f} ms ({1e3 * min(seconds):.1f} - {1e3 * max(seconds):.1f})")
    stall = [a / b for a, b in zip(times["asynchronous save"], times["synchronous save"], strict=True)]
    print(f"stall / synchronous save: {spread(stall)}")
    for clock, taken in (("wall", times), ("CPU", cpu)):
        print(f"EMA / step by {clock} time: {statistics.median(taken['EMA']) / statistics.median(taken['step']):.2%}")


def spread(shares: list[float]) -> str:
    return f"{statistics.median(shares):.2%} ({min(shares):.2%} - {max(shares):.2%})"


def main(output: str, channels: str = "128,256", batch: str = "32", repetitions: str = "7", ranks: str = "2") -> None:
    if "RANK" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        raise SystemExit(subprocess.run([*launcher, *sys.argv], env=environment, check=False).returncode)
    folder = Path(output)
    if os.environ["RANK"] == "0":
        shutil.rmtree(folder, ignore_errors=True)
    measure(folder, [int(channel) for channel in channels.split(",")], int(batch), int(repetitions))


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
