"""A rank that throws, starves or stands still takes all down within a minute; who, where and why is said.

Real processes under torch's agent, which gives a rank that hears no TERM half a minute: this file takes about one.
"""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from failing_loader import BAD_STEP
from forked import Forked
from synthetic import NO_ENCODERS, ROOT, TINY_UNET, losses, run
from synthetic import started as started_process

pytestmark = pytest.mark.processes

HANG_TIMEOUT_S = 4
SETTINGS = [
    *TINY_UNET, *NO_ENCODERS, "training.batch_size=16", "training.log_every=1", "engine=zero2", "validate_every=null",
    "data._target_=failing_loader.FailingLoaderConfig", f"training.hang_timeout_s={HANG_TIMEOUT_S}",
]  # fmt: skip


@dataclass
class Started:
    """Two ranks under torchrun, and what they said."""

    process: Forked
    output: Path
    log: Path

    def everyone(self) -> list[psutil.Process]:
        """torchrun, its ranks, and what they started."""
        if not psutil.pid_exists(self.process.pid):
            return []
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def rank(self, number: int) -> psutil.Process:
        return sorted(psutil.Process(self.process.pid).children(), key=lambda p: p.pid)[number]

    def said(self) -> str:
        return self.log.read_text()


@pytest.fixture(scope="module")
def runs(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Started]]:
    """All at once: most of their time they wait."""
    folder = tmp_path_factory.mktemp("failures")
    started = {}
    for name in ("crash", "damaged", "starve", "stop"):
        steps = 1_000_000 if name == "stop" else 20
        given = [f"input={latents}", f"output={folder / name}", f"training.steps={steps}", f"+data.does={name}"]
        arguments = ["train/train_ldm.py", *SETTINGS, *given]
        process = started_process(folder / f"{name}.log", *arguments, ranks=2, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
        started[name] = Started(process, folder / name, folder / f"{name}.log")
    yield started
    for one in started.values():
        for process in one.everyone():
            process.kill()
        one.process.wait()


def ended_within_a_minute(started: Started) -> bool:
    """After the bad step: none of its processes is left."""
    deadline = time.monotonic() + 120
    while len(losses(started.output)) < BAD_STEP - 1 and time.monotonic() < deadline:
        assert started.process.poll() is None or losses(started.output), started.said()
        time.sleep(0.05)
    everyone = started.everyone()
    assert started.process.wait(60) != 0
    return not psutil.wait_procs(everyone, timeout=5)[1]


def test_a_rank_that_throws(runs: dict[str, Started]) -> None:
    started = runs["crash"]
    assert ended_within_a_minute(started), started.said()
    assert re.search(
        rf"rank 1 on \S+, in phase data after step {BAD_STEP}, at shards shards/.*: failed with RuntimeError: "
        "something broke", started.said(),
    ), started.said()  # fmt: skip
    assert "Traceback" in started.said()
    assert re.search(r"exitcode +: 1 \(", started.said())


def test_a_rank_with_damaged_data_leaves_with_3(runs: dict[str, Started]) -> None:
    started = runs["damaged"]
    assert ended_within_a_minute(started), started.said()
    assert "rank 1" in started.said()
    assert "error: sample 000001 of shard shards/000000.tar: cut" in started.said()
    assert re.search(r"rank +: 1 \(local_rank: 1\)\n +exitcode +: 3 \(", started.said()), started.said()


def test_a_rank_that_starves(runs: dict[str, Started]) -> None:
    started = runs["starve"]
    assert ended_within_a_minute(started), started.said()
    assert re.search(
        rf"all wait for rank 1 on \S+, in phase data after step {BAD_STEP}, at shards shards/\S+", started.said()
    ), started.said()
    assert "failing_loader.py" in started.said()  # the stack
    assert re.search(r"exitcode +: 76 \(", started.said())


def test_a_rank_that_stands_still(runs: dict[str, Started]) -> None:
    started = runs["stop"]
    deadline = time.monotonic() + 120
    while len(losses(started.output)) < 20 and time.monotonic() < deadline:
        time.sleep(0.05)
    started.rank(1).send_signal(signal.SIGSTOP)
    stopped = json.loads((started.output / "heartbeats/rank-00001.json").read_text())
    assert ended_within_a_minute(started), started.said()
    blame = re.search(
        r"no progress on rank 0 for \d+ s .*; all wait for rank 1 on \S+, in phase (\w+) after step (\d+).*, "
        r"silent for \d+ s\.", started.said(),
    )  # fmt: skip
    assert blame, started.said()
    assert int(blame[2]) >= stopped["step"] > 0


def test_an_option_that_there_is_not_is_the_users_mistake() -> None:
    """Hydra itself would leave with 1, as a crash does, and a job would be started again for it."""
    done = run("train/train_ldm.py", "nosuch=1", check=False)
    assert done.returncode == 2
    assert "there is no option nosuch" in done.stderr
