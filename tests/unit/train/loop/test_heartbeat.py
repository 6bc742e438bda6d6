"""Whom a hung run waits for, by what the ranks say of themselves; and when the watch bites."""

from __future__ import annotations

import io
import json
import sys
import time

import pytest
import torch
from synthetic import run

from data_pipeline.common.errors import UserError
from train.distributed.ranks import Ranks
from train.engine.train_state import TrainState
from train.loop.heartbeat import HUNG, HangWatchdog, NoWatchdog, RankStatus, read_statuses, slowest

NOW = 1000.0


def status(rank, phase="step", step=7, since=900.0, written=999.0):
    return RankStatus(rank, f"node{rank}", phase, step, "", since, written)


WAITED_FOR = {
    "silent, though further on": ([status(0), status(1, step=8, written=900.0), status(2, "data")], 1),
    "behind": ([status(0), status(1, step=6), status(2, "data")], 1),
    "starving": ([status(0), status(1, since=800.0), status(2, "data", since=950.0)], 2),
    "drawing": ([status(0), status(1, "actions")], 1),
    "all in the collective: the first to get there": ([status(0), status(1, since=850.0)], 1),
    "never heard of": ([status(0), status(1, "start", step=0, since=0.0, written=0.0)], 1),
}


@pytest.mark.parametrize("case", WAITED_FOR)
def test_whom_all_wait_for(case):
    statuses, rank = WAITED_FOR[case]
    assert slowest(statuses, NOW, silence=30.0).rank == rank


def heartbeat(tmp_path, rank=0, timeout=100.0, world_size=1):
    return HangWatchdog(tmp_path, Ranks(rank, world_size, 0, torch.device("cpu")), timeout)


def test_what_a_rank_is_at_is_written(tmp_path):
    state = TrainState(10, step=3)

    class Batches:
        def shards_of(self, step):
            return [f"shards/{step:06d}.tar"]

    def use_all() -> None:
        with heartbeat(tmp_path) as heart:
            batches = heart.watched(iter(["batch"]), state, Batches())
            assert next(batches) == "batch"
            assert (heart.phase, heart.step) == ("first step", 3)
            next(batches)

    with pytest.raises(RuntimeError, match="StopIteration"):
        use_all()
    (told,) = read_statuses(tmp_path, 1)
    assert (told.phase, told.step, told.shards) == ("failed", 3, "shards/000003.tar")
    assert told.silent_for(time.time()) < 60


def failed_in(tmp_path, error, *phases):
    with heartbeat(tmp_path, rank=3) as heart:
        for phase in phases:
            heart.beat(phase, 7)
        raise error


@pytest.mark.parametrize(
    ("error", "phases", "said"),
    [
        (UserError("use B"), (), ""),
        (UserError("use B"), ("step",), "in phase step after step 7: failed\n"),  # which rank; what is said at the end
        (RuntimeError("no B"), ("step",), "in phase step after step 7: failed with RuntimeError: no B\n"),
    ],
)
def test_where_a_rank_failed_is_said_but_a_users_mistake_only_once(tmp_path, monkeypatch, error, phases, said):
    monkeypatch.setattr(sys, "__stderr__", written := io.StringIO())
    with pytest.raises(type(error)):
        failed_in(tmp_path, error, *phases)
    line = written.getvalue()
    assert (line.startswith("rank 3 on ") and line.endswith(said)) if said else line == ""


def test_a_rank_that_never_wrote_is_still_to_begin(tmp_path):
    with heartbeat(tmp_path):
        pass
    (tmp_path / "rank-00001.json").write_text('{"rank": 1, "ho')  # torn
    first, torn, missing = read_statuses(tmp_path, 3)
    assert (first.phase, torn.phase, missing.phase) == ("finished", "start", "start")
    assert missing.silent_for(NOW) == NOW


def test_a_heart_that_watches_nothing_passes_batches_on():
    assert next(NoWatchdog().watched(iter([5]), TrainState(10), [])) == 5


HANG = """
import sys, time, torch
from pathlib import Path
from train.loop.heartbeat import HangWatchdog
from train.distributed.ranks import Ranks
folder, phase, world_size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with HangWatchdog(folder, Ranks(0, world_size, 0, torch.device("cpu")), 2.0) as heart:
    heart.beat(phase, 7)
    time.sleep(float(sys.argv[4]))
"""


def hang(tmp_path, phase, world_size=1, seconds=60.0):
    script = tmp_path / "hang.py"
    script.write_text(HANG)
    return run(str(script), str(tmp_path), phase, str(world_size), str(seconds), check=False)


@pytest.mark.processes
def test_past_its_time_a_rank_ends_itself(tmp_path):
    done = hang(tmp_path, "step")
    assert done.returncode == HUNG
    assert "no progress on rank 0" in done.stderr
    assert "in phase step after step 7 (training.hang_timeout_s=2)" in done.stderr
    assert f'File "{tmp_path}/hang.py", line 9 in <module>' in done.stderr  # where it stood: in sleep


@pytest.mark.processes
def test_what_is_slow_has_more_time(tmp_path):
    assert hang(tmp_path, "save", seconds=4.0).returncode == 0


@pytest.mark.processes
def test_it_waits_for_a_rank_that_is_at_slow_work(tmp_path):
    """Rank 1 draws, and says so: by a clock an hour ahead, as rank 0 may take long to start here."""
    busy = RankStatus(1, "node1", "actions", 7, "", time.time() + 3600, time.time() + 3600)
    (tmp_path / "rank-00001.json").write_text(json.dumps({name: getattr(busy, name) for name in RankStatus.__slots__}))
    assert hang(tmp_path, "step", world_size=2, seconds=5.0).returncode == 0
