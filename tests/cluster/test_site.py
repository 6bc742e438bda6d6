"""slurm/site.sh, submit.sh, salloc, and jobs that submit themselves again, on a real Slurm with a stand-in script."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from slurm_cluster import PATIENCE_S, Cluster, Job

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("machine")]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EDITS = """
export SBATCH_ACCOUNT=${SBATCH_ACCOUNT:-birds} SBATCH_TIMELIMIT=${SBATCH_TIMELIMIT:-0:20:00}
LOCAL_DISK=$PWD/disk-$(hostname)
prepare_job() { export OF_PREPARE_JOB=yes; [[ ! ${FAILS:-} ]]; }
CONTAINER=(env OF_CONTAINER=yes)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with our slurm/, site.sh edited, and the stand-in where the training scripts would be."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("logs"))
    with (folder / "slurm/site.sh").open("a") as site:
        site.write(EDITS)
    (folder / "train").mkdir()
    shutil.copy(HERE / "stand_in.py", folder / "train/train_ldm.py")
    return folder


def submit(cluster: Cluster, checkout: Path, do: str, *options: str, name: str = "", **environment: str) -> Job:
    output = checkout / (name or do)
    output.mkdir()
    given = {"PYTHON": sys.executable, "TRITON_CACHE_DIR": "", **environment}
    return cluster.submit_stage(checkout, "train_ldm", *options, f"output={output.name}", f"do={do}", **given)


def said(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """What each rank wrote down at each of its starts."""
    files = sorted(folder.glob("rank-*.jsonl"))
    return {int(f.stem.removeprefix("rank-")): [json.loads(line) for line in f.read_text().splitlines()] for f in files}


def successor(job: Job) -> Job:
    (number,) = re.findall(r"goes on as job (\d+)", job.output())
    return job.cluster.job(int(number))


def test_all_that_a_site_decides(cluster: Cluster, checkout: Path) -> None:
    abandoned = checkout / "disk-node1/ldt-0-1"  # of a job that was killed
    abandoned.mkdir(parents=True)
    (abandoned / "file").touch()
    job = submit(cluster, checkout, "talk", "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=2", "--time=30")
    facts = job.wait()
    assert facts["JobState"] == "COMPLETED", job.output()
    assert (facts["Account"], facts["TimeLimit"]) == ("birds", "00:30:00")  # of site.sh; of the command line
    ranks = {rank: start for rank, (start,) in said(checkout / "talk").items()}
    disks = {rank: checkout / f"disk-{start['host']}" for rank, start in ranks.items()}
    assert [disks[rank].name for rank in range(4)] == ["disk-node1"] * 2 + ["disk-node2"] * 2
    for rank, start in ranks.items():
        folder = disks[rank] / f"ldt-0-{job.number}"
        assert (start["TMPDIR"], start["TRITON_CACHE_DIR"]) == (str(folder), str(folder / "triton"))
        assert start["LOCAL_DISK"] == str(disks[rank])
        assert (start["OF_PREPARE_JOB"], start["OF_CONTAINER"]) == ("yes", "yes")
        assert start["OMP_NUM_THREADS"] == "2"
    assert [list(disk.iterdir()) for disk in set(disks.values())] == [[], []]


def test_each_rank_has_a_log_beside_the_joint_one(cluster: Cluster, checkout: Path) -> None:
    job = submit(cluster, checkout, "talk", "--nodes=2", name="logs")
    assert job.wait()["JobState"] == "COMPLETED", job.output()
    logs = checkout / f"slurm/logs/{job.number}"
    for rank in range(2):
        lines = {f"rank {rank} says this", f"rank {rank} complains"}
        assert set((logs / f"rank-{rank}.log").read_text().splitlines()) == lines
        assert lines <= set(job.output().splitlines())


def test_in_an_allocation_the_same_script_is_started_by_hand(cluster: Cluster, checkout: Path) -> None:
    """From a machine that is no node, as often as one likes."""
    (checkout / "by-hand").mkdir()
    script = "bash slurm/train_ldm.sbatch output=by-hand"
    twice = f"cd {checkout} && salloc --nodes=2 --gpus-per-node=1 bash -c '{script} do=meet && {script} do=again'"
    line = cluster.machines["control"].command("bash", "-c", f"{twice} 2>&1")  # its hosts file is needed, too
    given = {**cluster.environment, "PYTHON": sys.executable}
    done = subprocess.run(line, env=given, capture_output=True, text=True, timeout=PATIENCE_S)
    assert [[start["host"] for start in starts] for starts in said(checkout / "by-hand").values()] == [
        ["node1", "node1"],
        ["node2", "node2"],
    ]
    assert "submit the same line again to continue" in done.stdout, done.stdout
    assert done.returncode == 75


@pytest.mark.exhaustive
def test_interrupted_by_hand_the_ranks_save_and_leave(cluster: Cluster, checkout: Path) -> None:
    output = checkout / "interrupted"
    output.mkdir()
    script = f"cd {checkout} && exec salloc --nodes=2 bash slurm/train_ldm.sbatch output=interrupted do=stop 2>&1"
    line = cluster.machines["control"].command("bash", "-c", script)
    given = {**cluster.environment, "PYTHON": sys.executable}
    with subprocess.Popen(line, env=given, stdout=subprocess.PIPE, text=True) as allocated:
        wait_until(lambda: len(list(output.glob("ready-*"))) == 2)
        (by_hand,) = [p for p in psutil.Process(allocated.pid).children(recursive=True) if is_script(p)]
        by_hand.send_signal(signal.SIGINT)
        said, _ = allocated.communicate(timeout=PATIENCE_S)
    assert allocated.returncode == 75, said
    assert list(output.glob("child-lives"))


def is_script(process: psutil.Process) -> bool:
    return process.cmdline()[:2] == ["bash", "slurm/train_ldm.sbatch"] and process.parent().name() == "salloc"


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s"
        time.sleep(0.2)


def test_a_job_submits_itself_again_and_what_waits_for_it_goes_on_waiting(cluster: Cluster, checkout: Path) -> None:
    job = submit(cluster, checkout, "once again", "--nodes=2", name="once", REQUEUE="self")
    after = ("--kill-on-invalid-dep=yes", f"--dependency=afterok:{job.number}")
    waiting = submit(cluster, checkout, "nothing", *after, name="after")
    assert job.wait()["JobState"] == "COMPLETED", job.output()
    later = successor(job)
    facts = later.wait()
    assert facts["JobState"] == "COMPLETED", later.output()
    assert facts["NumNodes"] == "2"
    assert [len(starts) for starts in said(checkout / "once").values()] == [2, 2]
    assert "asked to be started again; goes on as job" in job.output()
    assert "restart 1:" in later.output()
    last = waiting.wait()
    assert last["JobState"] == "COMPLETED", waiting.output()
    assert last["StartTime"] >= facts["EndTime"]


@pytest.mark.exhaustive
def test_what_waits_for_an_array_waits_for_tasks_that_submit_themselves_again(cluster: Cluster, checkout: Path) -> None:
    array = submit(cluster, checkout, "once again", "--array=0-1", "--cpus-per-task=1", name="array", REQUEUE="self")
    after = ("--kill-on-invalid-dep=yes", f"--dependency=afterok:{array.number}")
    waiting = submit(cluster, checkout, "nothing", *after, name="after-array")
    last = waiting.wait()
    assert last["JobState"] == "COMPLETED", waiting.output()
    logs = [log.read_text() for log in cluster.folder.glob("job-*.log")]
    numbers = [int(n) for log in logs if "output=array " in log for n in re.findall(r"goes on as job (\d+)", log)]
    assert len(numbers) == 2, logs
    assert sorted(start["array_task"] for start in said(checkout / "array")[0]) == ["0", "0", "1", "1"]
    assert all(last["StartTime"] >= cluster.job(number).facts()["EndTime"] for number in numbers)


def test_a_chain_of_jobs_is_capped(cluster: Cluster, checkout: Path) -> None:
    job = submit(cluster, checkout, "crash", "--nodes=2", name="chain", REQUEUE="self", MAX_CRASHES="2")
    job.wait()
    later = successor(job)
    assert later.wait()["JobState"] == "FAILED"
    assert "crashed 2 times in a row without getting further than 0 finished shards" in later.output()


def test_mistakes_get_a_sentence(cluster: Cluster, checkout: Path) -> None:
    plain = cluster.submit(checkout, "slurm/train_ldm.sbatch", "output=plain", "do=nothing", REQUEUE="self")
    wrong = submit(cluster, checkout, "nothing", name="wrong", REQUEUE="always")
    fails = submit(cluster, checkout, "nothing", name="fails", FAILS="yes")
    disk = cluster.folder / "edited.sh"
    disk.write_text((checkout / "slurm/site.sh").read_text() + "LOCAL_DISK=/proc/nowhere\n")
    lost = submit(cluster, checkout, "nothing", name="lost", SITE=str(disk))
    moved = cluster.submit(checkout, "slurm/train_ldm.sbatch", "output=plain", "do=nothing", SITE="elsewhere.sh")
    for job, sentence in (
        (plain, "submit it by bash slurm/submit.sh train_ldm ... in place of sbatch"),
        (wrong, "REQUEUE=always must be requeue, self or no"),
        (fails, "prepare_job of slurm/site.sh failed"),
        (lost, "LOCAL_DISK=/proc/nowhere on node1 can't hold /proc/nowhere/ldt-0-"),
        (moved, "SITE=elsewhere.sh is not there"),
    ):
        assert (job.wait()["JobState"], job.facts()["ExitCode"]) == ("FAILED", "2:0")
        assert sentence in job.output()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "name a stage first: evaluate_ldm make_shards"),
        (["train"], "name a stage first"),
        (["train_ldm", "-p", "gpu"], "write options of sbatch out"),
    ],
)
def test_wrong_words_to_submit_get_a_sentence(words: list[str], sentence: str) -> None:
    done = subprocess.run(["bash", "slurm/submit.sh", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert sentence in done.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("partition", "do", "policy"),
    [
        ("cancels", "stop", "self"),  # it saves within GraceTime
        ("cancels_at_once", "sleep", "self"),  # it is killed
        ("cancels", "stop", "requeue"),
    ],
)
def test_where_preemption_cancels_it_goes_on(cluster: Cluster, checkout: Path, partition: str, do: str, policy: str):
    whole = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=8")
    name = f"{partition}-{policy}"
    job = submit(cluster, checkout, do, *whole, f"--partition={partition}", name=name, REQUEUE=policy)
    job.wait_for(lambda facts: len(list((checkout / name).glob("ready-*"))) == 2)
    other = submit(cluster, checkout, "nothing", *whole, "--partition=urgent", name=f"{name}-urgent")
    assert other.wait()["JobState"] == "COMPLETED", other.output()
    facts = job.wait()
    if policy == "self":
        job = successor(job)
        facts = job.wait()
    assert facts["JobState"] == "COMPLETED", job.output()
    assert [len(starts) for starts in said(checkout / name).values()] == [2, 2]


@pytest.mark.exhaustive
def test_a_cancelled_job_does_not_submit_itself_again(cluster: Cluster, checkout: Path) -> None:
    job = submit(cluster, checkout, "stop", "--nodes=2", name="cancelled", REQUEUE="self")
    job.wait_for(lambda facts: len(list((checkout / "cancelled").glob("ready-*"))) == 2)
    cluster.client("scancel", str(job.number))
    assert job.wait()["JobState"] == "CANCELLED"
    assert "goes on as job" not in job.output()
