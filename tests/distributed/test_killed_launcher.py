"""torchrun killed by KILL, which it can't pass on: its ranks are told by Linux, agree on a step, and leave."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil
import pytest
from synthetic import ROOT, command, environment

pytestmark = pytest.mark.processes

RANK = """
import os, pathlib, sys, time
from train.distributed.preemption import Preemption
from train.distributed.ranks import find_ranks
ranks, folder = find_ranks(), pathlib.Path(sys.argv[1])
preemption, step = Preemption(), 0
(folder / f"pid-{ranks.rank}.tmp").write_text(str(os.getpid()))
(folder / f"pid-{ranks.rank}.tmp").rename(folder / f"pid-{ranks.rank}")
while not preemption.agreed(step, ranks.device):
    step += 1
    time.sleep(0.001)
(folder / f"left-{ranks.rank}").write_text(str(step))
"""


def test_ranks_leave_when_their_launcher_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    environ = {**environment(), "PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("wb") as log:
        torchrun = subprocess.Popen(command(str(script), str(tmp_path), ranks=2), env=environ, stdout=log, stderr=log)
    started = [tmp_path / f"pid-{rank}" for rank in (0, 1)]
    deadline = time.monotonic() + 120
    while not all(path.exists() for path in started):
        assert torchrun.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.05)
    ranks = [psutil.Process(int(path.read_text())) for path in started]
    torchrun.kill()
    torchrun.wait()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    for orphan in alive:
        orphan.kill()
    assert not alive
    steps = [int((tmp_path / f"left-{rank}").read_text()) for rank in (0, 1)]
    assert steps[0] == steps[1] > 0
