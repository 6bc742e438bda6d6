"""slurm/*.sh and *.sbatch on a real Slurm, with a stand-in for the training script: all that Slurm does, no torch."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import PATIENCE_S, Cluster, Job

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("machine")]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GPUS = ("--gpus-per-node=2",)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with our slurm/ and the stand-in where the training script would be."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    for script in ("train/train_ldm.py", "data_pipeline/precompute_latents.py"):
        (folder / script).parent.mkdir()
        shutil.copy(HERE / "stand_in.py", folder / script)
    return folder


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, checkout: Path) -> dict[str, Job]:
    """All at once: to go back into the queue takes seven seconds, whoever waits."""

    def submit(do: str, *options: str, name: str = "", script: str = "train_ldm", **environment: str) -> Job:
        output = checkout / (name or do)
        output.mkdir()
        line = [*options, f"slurm/{script}.sbatch", f"output={output.name}", f"do={do}", "prompts=['a b', c]"]
        return cluster.submit(checkout, *line, PYTHON=sys.executable, **environment)

    return {
        "warned": submit("stop", "--nodes=2", name="warned"),
        "young": submit("sleep", name="young", script="precompute_latents"),
        "again": submit("again", "--nodes=2", MAX_RESTARTS="1"),
        "meet": submit("meet", "--nodes=2"),
        "fail": submit("fail", "--nodes=2"),
        "stop": submit("stop", "--nodes=2"),
        "crash": submit("crash", "--nodes=2", MAX_CRASHES="2"),
        "further": submit("further", "--nodes=2", MAX_CRASHES="2"),
        "gpus": submit("nothing", "--nodes=2", *GPUS, "--ntasks-per-node=2", "--cpus-per-task=1", name="gpus"),
        "few cpus": submit("nothing", "--nodes=2", *GPUS, "--cpus-per-task=1", name="few-cpus"),
        "array": submit(
            "nothing", *GPUS, "--ntasks-per-node=2", "--cpus-per-task=2", name="array", script="precompute_latents"
        ),
    }


def starts(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """What each rank wrote down at each of its starts."""
    files = sorted(folder.glob("rank-*.jsonl"))
    return {int(f.stem.removeprefix("rank-")): [json.loads(line) for line in f.read_text().splitlines()] for f in files}


def test_ranks_meet_across_nodes(jobs: dict[str, Job], checkout: Path) -> None:
    job = jobs["meet"]
    facts = job.wait()
    assert facts["JobState"] == "COMPLETED", job.output()
    ranks = starts(checkout / "meet")
    assert {rank: [start["host"] for start in said] for rank, said in ranks.items()} == {0: ["node1"], 1: ["node2"]}
    for (said,) in ranks.values():
        assert said["WORLD_SIZE"] == "2"
        assert said["LOCAL_RANK"] == "0"
        assert said["MASTER_ADDR"] == "node1"
        assert said["MASTER_PORT"] == str(20000 + job.number)
        assert said["cwd"] == str(checkout)
        assert said["arguments"] == ["output=meet", "do=meet", "prompts=['a b', c]"]
    assert facts["Requeue"] == "1"


def test_one_task_per_gpu(jobs: dict[str, Job], checkout: Path) -> None:
    assert jobs["gpus"].wait()["JobState"] == "COMPLETED", jobs["gpus"].output()
    ranks = {rank: said for rank, (said,) in starts(checkout / "gpus").items()}
    assert [(said["host"], said["LOCAL_RANK"]) for _, said in sorted(ranks.items())] == [
        ("node1", "0"),
        ("node1", "1"),
        ("node2", "0"),
        ("node2", "1"),
    ]
    assert {said["WORLD_SIZE"] for said in ranks.values()} == {"4"}
    assert {said["CUDA_VISIBLE_DEVICES"] for said in ranks.values()} == {"0,1"}
    assert {said["OMP_NUM_THREADS"] for said in ranks.values()} == {"1"}


def test_too_few_cpus_for_the_gpus_get_a_sentence(jobs: dict[str, Job]) -> None:
    assert jobs["few cpus"].wait()["JobState"] == "FAILED"
    assert "add --ntasks-per-node=2 --cpus-per-task=" in jobs["few cpus"].output()


def test_precompute_is_a_process_a_gpu(jobs: dict[str, Job], checkout: Path) -> None:
    assert jobs["array"].wait()["JobState"] == "COMPLETED", jobs["array"].output()
    ranks = {
        rank: (said["WORLD_SIZE"], said["OMP_NUM_THREADS"]) for rank, (said,) in starts(checkout / "array").items()
    }
    assert ranks == {0: ("2", "2"), 1: ("2", "2")}


def test_a_failed_rank_takes_the_others_down(jobs: dict[str, Job]) -> None:
    """And a data error is not tried again, though rank 0 is killed for it with a code of its own."""
    facts = jobs["fail"].wait()
    assert (facts["JobState"], facts["Restarts"], facts["ExitCode"]) == ("FAILED", "0", "3:0"), jobs["fail"].output()
    assert "ended with code 3: the message is above" in jobs["fail"].output()


def test_crashes_in_a_row_are_capped(jobs: dict[str, Job]) -> None:
    job = jobs["crash"]
    facts = job.wait()
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "1"), job.output()
    assert "a rank failed; back into the queue" in job.output()
    assert "crashed 2 times in a row without getting further than 0 finished shards (MAX_CRASHES=2)" in job.output()


def test_a_killed_rank_is_started_again_while_it_gets_further(jobs: dict[str, Job], checkout: Path) -> None:
    job = jobs["further"]
    facts = job.wait()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "2"), job.output()
    assert job.output().count("a rank failed; back into the queue") == 2
    assert not (checkout / f".slurm/crashes-{job.number}").exists()


def test_requeues_are_capped(jobs: dict[str, Job], checkout: Path) -> None:
    job = jobs["again"]
    facts = job.wait()
    assert (facts["JobState"], facts["Restarts"], facts["ExitCode"]) == ("FAILED", "1", "75:0")
    assert [len(said) for said in starts(checkout / "again").values()] == [2, 2]
    assert {path.name for path in (checkout / "again").glob("closed-*")} == {"closed-0", "closed-1"}
    output = job.output()
    assert "back into the queue (restart 1 of at most 1)" in output  # --open-mode=append kept it
    assert "stopped after 1 restarts (MAX_RESTARTS=1)" in output


def test_a_warning_stops_and_requeues(cluster: Cluster, jobs: dict[str, Job], checkout: Path) -> None:
    job, output = jobs["warned"], checkout / "warned"
    job.wait_for(lambda facts: len(list(output.glob("ready-*"))) == 2)
    cluster.client("scancel", "--batch", "--signal=USR1", str(job.number))
    young = jobs["young"]
    young.wait_for(lambda facts: len(starts(checkout / "young")) == 1)
    cluster.client("scancel", "--batch", "--signal=USR1", str(young.number))
    for warned in (job, young):
        facts = warned.wait()
        assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), warned.output()
    assert sorted(path.name for path in output.glob("child-*")) == ["child-lives"]


def test_cancelled_is_not_requeued(cluster: Cluster, jobs: dict[str, Job], checkout: Path) -> None:
    job, output = jobs["stop"], checkout / "stop"
    job.wait_for(lambda facts: len(list(output.glob("ready-*"))) == 2)
    cluster.client("scancel", str(job.number))
    job.wait()
    time.sleep(1)
    facts = job.facts()
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
    assert list(output.glob("child-*"))  # it was told, and had time to save


def test_one_task_of_an_array_is_requeued_alone(cluster: Cluster, jobs: dict[str, Job], checkout: Path) -> None:
    """The last one, whose own job number is the array's."""
    for job in jobs.values():
        job.wait()
    output = checkout / "one-of-array"
    output.mkdir()
    line = ("--array=0-2", "--cpus-per-task=1", "slurm/precompute_latents.sbatch", "output=one-of-array")
    array = cluster.submit(checkout, *line, "do=one of array", PYTHON=sys.executable)

    def started() -> list[str]:
        return sorted(said["array_task"] for said in starts(output).get(0, []))

    wait_until(lambda: started() == ["0", "1", "2"] and (output / "ready-0").exists())
    cluster.client("scancel", "--batch", "--signal=USR1", f"{array.number}_2")
    wait_until(lambda: started() == ["0", "1", "2", "2"])
    (output / "go").touch()
    wait_until(lambda: not cluster.client("squeue", "--noheader", f"--jobs={array.number}").strip())
    assert started() == ["0", "1", "2", "2"]
    assert array.output().count("back into the queue") == 1


def test_one_process_on_two_nodes_is_refused(cluster: Cluster, checkout: Path) -> None:
    job = cluster.submit(checkout, "--nodes=2", "slurm/evaluate_ldm.sbatch", "output=alone", PYTHON=sys.executable)
    assert job.wait()["JobState"] == "FAILED"
    assert "train/evaluate_ldm.py runs as one process: use --nodes=1." in job.output()


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s"
        time.sleep(0.2)


def test_from_elsewhere_gets_a_sentence(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(tmp_path, str(ROOT / "slurm" / "train_ldm.sbatch"))
    assert job.wait()["JobState"] == "FAILED"
    assert "submit this script from the root of the repository" in job.output()


def test_a_job_of_higher_priority_sends_it_back_into_the_queue(cluster: Cluster, jobs: dict[str, Job], checkout: Path):
    """Slurm's TERM, and time to save: whoever has saved is requeued, and goes on afterwards."""
    for job in jobs.values():
        job.wait()
    low, high = checkout / "low", checkout / "high"
    low.mkdir()
    high.mkdir()
    line = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=8")
    job = cluster.submit(checkout, *line, "slurm/train_ldm.sbatch", "output=low", "do=stop", PYTHON=sys.executable)
    job.wait_for(lambda facts: len(list(low.glob("ready-*"))) == 2)
    urgent = ("--partition=urgent", "slurm/train_ldm.sbatch", "output=high", "do=nothing")
    other = cluster.submit(checkout, *line, *urgent, PYTHON=sys.executable)
    assert other.wait()["JobState"] == "COMPLETED", other.output()
    facts = job.wait()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), job.output()
    assert list(low.glob("child-lives"))


def test_on_a_node_that_fails_it_is_started_again(cluster: Cluster, jobs: dict[str, Job], checkout: Path) -> None:
    for job in jobs.values():
        job.wait()
    output = checkout / "node-fails"
    output.mkdir()
    line = ("--nodes=2", "slurm/train_ldm.sbatch", "output=node-fails", "do=sleep")
    job = cluster.submit(checkout, *line, PYTHON=sys.executable)
    job.wait_for(lambda facts: len(starts(output)) == 2)
    cluster.client("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    job.wait_for(lambda facts: facts["JobState"] != "RUNNING")
    cluster.bring_back("node2")
    facts = job.wait()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), job.output()
    assert "a rank failed" not in job.output()


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_task_passes_signals_on(checkout: Path, name: str) -> None:
    """Where Slurm tracks processes by cgroup, only the shell that it started gets the signal; the program gets TERM."""
    output = checkout / f"task-{name}"
    output.mkdir()
    note = output / "note"
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}
    ours = {"PYTHON": sys.executable, "START_ME_AGAIN": "75", "USER_ERROR": "2", "DATA_ERROR": "3", "NOTE": str(note)}
    line = ["bash", "slurm/task.sh", "train/train_ldm.py", f"output={output}", "do=stop"]
    with subprocess.Popen(line, cwd=checkout, env={**os.environ, **slurm, **ours}, start_new_session=True) as task:
        for _ in range(600):
            if (output / "ready-0").exists():
                break
            time.sleep(0.1)
        task.send_signal(getattr(signal, f"SIG{name}"))
        try:
            assert task.wait(PATIENCE_S) == 0
        finally:
            if task.returncode is None:
                os.killpg(task.pid, signal.SIGKILL)
    assert (output / "child-lives").exists()
    assert note.read_text() == "75\n"
