"""slurm/train_ldm.sbatch with the real train_ldm.py: two nodes, one task each, gloo, and a very small U-Net."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import synthetic
from slurm_cluster import Cluster, Job
from synthetic import TINY_LATENTS, write_latents

from data_pipeline.shards.manifest import Manifest

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("machine")]

ROOT = Path(__file__).parents[2]
STEPS = 60
LONG_STEPS = 200  # for what comes while it runs
TINY = (
    "unet.channels=[8,16] unet.norm_groups=4 unet.heads=2 unet.context_dim=6 unet.vector_dim=5 "
    f"training.steps={STEPS} training.batch_size=8 training.log_every=1 training.save_every=20 "
    "training.wandb_project=null preview_every=null validate_every=null validation_samples=2 "
    "autoencoder.path=none clip.path=none engine=zero2"
).split()
STAGED = ("store.cache=$LOCAL_DISK/shards", "store.cache_gb=1")  # sbatch is not started by a shell: no quotes
LONG = (f"training.steps={LONG_STEPS}", "training.save_every=10")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ldm")
    for split, samples in (("train", 64), ("heldout", 4)):
        write_latents(folder / "latents" / split, samples, TINY_LATENTS, shard_size=samples)
    return folder


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, folder: Path) -> dict[str, Job]:
    """All at once, as two cores are busy with importing anyway."""
    given = (f"input={folder / 'latents'}", *TINY)
    return {
        "stopped": submitted(cluster, *given, *STAGED, f"output={folder / 'stopped'}"),
        "nothing": submitted(cluster, nodes=1),
    }


def submitted(cluster: Cluster, *arguments: str, nodes: int = 2) -> Job:
    line = (f"--nodes={nodes}", "slurm/train_ldm.sbatch", *arguments)
    return cluster.submit(ROOT, *line, PYTHON=sys.executable, SITE=cluster.site)


def rows(run: Path) -> list[dict[str, Any]]:
    metrics = run / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(run) if "loss" in row}


def rank_of(job: Job, run: Path, number: int) -> psutil.Process:
    """The Python process of a job's rank; processes may end while they are looked at. Another test run's Slurm may have
    a job of that number: the run's folder tells them apart."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            mine = environment.get("SLURM_JOB_ID") == str(job.number) and environment.get("RANK") == str(number)
            if mine and f"output={run}" in process.cmdline() and "bash" not in process.cmdline():
                return process
    raise AssertionError(f"no rank {number}\n{job.output()}")


def test_a_warned_run_goes_on_and_is_the_same(jobs: dict[str, Job], cluster: Cluster, folder: Path) -> None:
    """Two nodes: a warning saves, requeues and resumes; beside an undisturbed run elsewhere, which reads the shards
    where they are, not from copies on each node's own disk."""
    job, run = jobs["stopped"], folder / "stopped"
    job.wait_for(lambda facts: len(rows(run)) >= 3)
    before = len(rows(run))
    cluster.client("scancel", "--batch", "--signal=USR1", str(job.number))
    undisturbed = folder / "undisturbed"
    synthetic.run("train/train_ldm.py", f"input={folder / 'latents'}", f"output={undisturbed}", *TINY, ranks=2)
    facts = job.wait()
    assert (facts["JobState"], facts["Restarts"], facts["NodeList"]) == ("COMPLETED", "1", "node[1-2]"), job.output()
    assert "2 rank(s) on cpu, batch 8 = 4 x 1 x 2" in job.output()
    assert "back into the queue (restart 1 of at most 20)" in job.output()
    (resumed,) = re.findall(r"resumed from step (\d+)", job.output())
    assert int(resumed) >= before, job.output()  # saved when it was warned
    assert [row["step"] for row in rows(run) if "loss" in row] == list(range(1, STEPS + 1))  # a second writer doubles
    assert (run / "checkpoints" / "latest").read_text() == f"step-{STEPS:08d}"
    assert losses(run) == pytest.approx(losses(undisturbed), rel=1e-5)
    shards = {
        shard.sha256 for split in ("train", "heldout") for shard in Manifest.load(folder / "latents" / split).shards
    }
    for disk in (cluster.folder / "disk-node1", cluster.folder / "disk-node2"):
        assert {path.stem for path in (disk / "shards").glob("*.tar")} == shards
    logs = [(cluster.folder / f"logs/{job.number}/rank-{rank}.log").read_text() for rank in range(2)]
    assert ["2 rank(s) on cpu" in log for log in logs] == [True, False]
    assert not list(cluster.folder.glob(f"disk-*/ldt-*-{job.number}"))


@pytest.mark.exhaustive  # a killed rank is in test_launch.py, going on from a checkpoint above
def test_a_killed_rank_is_started_again(cluster: Cluster, folder: Path) -> None:
    run = folder / "killed"
    job = submitted(cluster, f"input={folder / 'latents'}", f"output={run}", *TINY, *LONG)
    job.wait_for(lambda facts: len(rows(run)) >= 12)
    rank_of(job, run, 1).kill()
    facts = job.wait()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), job.output()
    assert "a rank failed; back into the queue (restart 1 of at most 20)" in job.output()
    assert sorted(losses(run)) == list(range(1, LONG_STEPS + 1))


@pytest.mark.exhaustive  # a failed node is in test_launch.py, going on from a checkpoint above
def test_a_failed_node_is_survived(cluster: Cluster, jobs: dict[str, Job], folder: Path) -> None:
    """Slurm takes all jobs of the node along: the others must be through."""
    for other in jobs.values():
        other.wait()
    run = folder / "node-fails"
    job = submitted(cluster, f"input={folder / 'latents'}", f"output={run}", *TINY, *LONG)
    job.wait_for(lambda facts: len(rows(run)) >= 12)
    cluster.client("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    job.wait_for(lambda facts: facts["JobState"] != "RUNNING")
    cluster.bring_back("node2")
    facts = job.wait()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), job.output()
    assert "resumed from step" in job.output()
    assert sorted(losses(run)) == list(range(1, LONG_STEPS + 1))


@pytest.mark.exhaustive  # test_launch.py has a script that leaves with this code
def test_a_refused_override_fails_with_its_sentence(cluster: Cluster, folder: Path) -> None:
    given = (f"input={folder / 'latents'}", *TINY, f"output={folder / 'refused'}", "training.batch_size=7")
    job = submitted(cluster, *given)
    facts = job.wait()
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0")
    assert "error: batch_size=7 can't be shared by 2 ranks" in job.output()
    assert "Traceback" not in job.output()


def test_without_arguments_it_says_what_must_be_given(jobs: dict[str, Job]) -> None:
    facts = jobs["nothing"].wait()
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0")
    assert "input, output must be given" in jobs["nothing"].output()
