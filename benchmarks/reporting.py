"""Cost of W&B in training: without it, with it offline, and with an endpoint that never answers.

    python benchmarks/reporting.py output=/tmp/reporting repetitions=15 steps=20 log_every=10

One process for each; they run in turns, `steps` steps at a time, so that disturbances affect all.
Times per step: wall time, and CPU time of all threads and of W&B's own process. The end is timed per process.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import torch
from training_on_noise import batches, engine

from train.distributed.ranks import find_ranks
from train.engine.ema import Ema
from train.engine.train_state import TrainState, due
from train.loop.meter import Meter
from train.runs.metrics import JsonLines, Reporters
from train.runs.wandb_reporter import WeightsAndBiases

WAYS = ("without", "offline", "swallowed")
WARM_UP = 60  # steps
ENVIRONMENT = {"WANDB_MODE": "offline", "WANDB_API_KEY": "0123456789" * 4}


def train(output: Path, way: str, channels: list[int], batch: int, log_every: int) -> None:
    """Runs training steps, as many as each line of stdin says, and answers with the seconds that they took."""
    ranks = find_ranks()
    torch.set_num_threads(1)
    trained, stream, meter = engine(channels, batch, ranks), batches(batch, ranks), Meter(batch)
    ema, state = Ema(trained.master_shards(), 0.999), TrainState(10**6)
    reporter = Reporters(JsonLines(output / "metrics.jsonl"))
    if way != "without":
        reporter.reporters += (WeightsAndBiases(output, "benchmark", {}, "benchmark"),)
    for line in sys.stdin:
        began, used, here = time.perf_counter(), cpu_seconds(), time.thread_time()
        for _ in range(int(line)):
            result = trained.train_step(stream, 0, 1)
            ema.update(trained.master_shards())
            state.step += 1
            meter.add(result)
            if due(state.step, log_every):
                reporter.log(state.step, meter.summary(trained))
        took = {"wall": time.perf_counter() - began, "cpu": cpu_seconds() - used}
        print(json.dumps({**took, "aside": took["cpu"] - (time.thread_time() - here)}), flush=True)
    reporter.close()


def cpu_seconds() -> float:
    """CPU time of this process and its children (W&B's service)."""
    times = [process.cpu_times() for process in (psutil.Process(), *psutil.Process().children(recursive=True))]
    return sum(time.user + time.system for time in times)


def never_answering() -> str:
    """Address of a local port that accepts connections and never answers."""
    server, held = socket.create_server(("127.0.0.1", 0)), []

    def take() -> None:
        while True:
            held.append(server.accept()[0])

    threading.Thread(target=take, daemon=True).start()
    return f"http://127.0.0.1:{server.getsockname()[1]}"


def start(way: str, folder: Path, how: list[str]) -> subprocess.Popen[str]:
    folder.mkdir(parents=True)
    online = {"WANDB_MODE": "online", "WANDB_BASE_URL": never_answering()} if way == "swallowed" else {}
    return subprocess.Popen(
        [sys.executable, __file__, f"output={folder}", f"way={way}", *how],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(folder / "stderr").open("w"), text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **ENVIRONMENT, **online},
    )  # fmt: skip


def ask(process: subprocess.Popen[str], steps: int) -> dict[str, float]:
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    while not (line := process.stdout.readline()).startswith("{"):
        assert line, "the process died: see the file stderr in its folder"
    return json.loads(line)


def ended(process: subprocess.Popen[str]) -> float:
    """Seconds from the last step to the end of the process."""
    began = time.perf_counter()
    process.stdin.close()
    process.wait()
    return time.perf_counter() - began


def measure(output: Path, how: list[str], repetitions: int, steps: int) -> None:
    shutil.rmtree(output, ignore_errors=True)
    processes = {way: start(way, output / way, how) for way in WAYS}
    begun = {way: ask(process, WARM_UP) for way, process in processes.items()}  # W&B starts during these
    times: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for turn in range(repetitions):
        for i in range(len(WAYS)):
            way = WAYS[(turn + i) % len(WAYS)]
            times[way].append(ask(processes[way], steps))
        print(f"turn {turn + 1} of {repetitions}", file=sys.stderr, flush=True)
    ends = {way: ended(process) for way, process in processes.items()}
    print(f"{' '.join(how)}, {repetitions} x {steps} steps")
    for way in WAYS:
        shown = "  ".join(
            f"{clock} {median(times[way], clock, steps)}, {beside(times, way, clock)}" for clock in ("wall", "cpu")
        )
        aside = sum(one["aside"] for one in times[way]) / sum(one["cpu"] for one in times[way])
        more = begun[way]["cpu"] - begun["without"]["cpu"]
        print(f"{way:10s} {shown}")
        share = f"threads and processes other than the training thread: {aside:.2%} of the CPU"
        print(f"{'':10s} {share}; {more:+.1f} s at the start; {ends[way]:.1f} s to exit")


def median(times: list[dict[str, float]], clock: str, steps: int) -> str:
    each = sorted(1e3 * one[clock] / steps for one in times)
    return f"{statistics.median(each):.1f} ms a step ({each[0]:.1f} - {each[-1]:.1f})"


def beside(times: dict[str, list[dict[str, float]]], way: str, clock: str) -> str:
    """Median of each turn's extra time relative to its turn without W&B, and its standard error from quartiles."""
    more = sorted(a[clock] / b[clock] - 1 for a, b in zip(times[way], times["without"], strict=True))
    low, _, high = statistics.quantiles(more, n=4)
    return f"{statistics.median(more):+.2%} +- {1.25 * (high - low) / 1.35 / len(more) ** 0.5:.2%}"


def main(
    output: str, way: str = "", channels: str = "128,256", batch: str = "32", repetitions: str = "15",
    steps: str = "20", log_every: str = "10",
) -> None:  # fmt: skip
    if way:
        train(Path(output), way, [int(channel) for channel in channels.split(",")], int(batch), int(log_every))
    else:
        measure(
            Path(output),
            [f"channels={channels}", f"batch={batch}", f"log_every={log_every}"],
            int(repetitions),
            int(steps),
        )


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
