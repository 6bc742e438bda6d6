"""slurm/pipeline.sh: the whole chain on a real Slurm, from a folder of pictures to the evaluation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from slurm_cluster import Cluster, Job

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("machine")]

ROOT = Path(__file__).parents[2]
STAGES = ("make_shards", "train_autoencoder", "train_clip", "precompute_latents", "train_ldm", "evaluate_ldm")
SHORT = ["training.log_every=1", "training.wandb_project=null"]
TINY = {
    "make_shards": ["source=folder", "size=64", "shard_size=8"],
    "train_autoencoder": [*SHORT, "training.steps=4", "training.batch_size=8", "objective.crop_until=2"],
    "train_clip": [*SHORT, "training.steps=2", "training.batch_size=8", "validation_pairs=8"],
    "precompute_latents": [],
    "train_ldm": [
        *SHORT, "--nodes=2", "engine=zero2", "unet.channels=[32,64]", "training.steps=4", "training.batch_size=8",
        "preview_every=null", "validate_every=null", "validation_samples=2",
    ],
    "evaluate_ldm": ["captions=4", "heldout_captions=2", "sampler.steps=2"],
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"thing {i}")
    return folder


def start(cluster: Cluster, *words: str, python: str = sys.executable) -> dict[str, Job]:
    """The jobs by stage, from what it prints; their logs lie in the cluster's folder."""
    log = cluster.folder / "pipeline-%j.log"
    line = ["bash", "slurm/pipeline.sh", *words[:1], f"--output={log}", *words[1:]]
    said = cluster.client(*line, cwd=ROOT, PYTHON=python)
    numbers = {stage: int(number) for stage, number, *_ in map(str.split, said.splitlines())}
    return {s: Job(cluster, n, Path(str(log).replace("%j", str(n)))) for s, n in numbers.items()}


def test_each_stage_is_given_what_the_one_before_made(cluster: Cluster, tmp_path: Path) -> None:
    """In order, with the words behind its name; instead of a Python, a script that writes down how it was called."""
    python, called = tmp_path / "python", tmp_path / "called"
    python.write_text(f'#!/bin/sh\nsleep 0.2\necho "$SLURM_JOB_NUM_NODES $*" >> {called}\n')
    python.chmod(0o755)
    named = {"make_shards": ["size=64"], "train_ldm": ["--nodes=2", "engine=zero2"], "evaluate_ldm": ["captions=4"]}
    words = [word for stage, more in named.items() for word in (stage, *more)]
    jobs = start(cluster, "output=run", *words, python=str(python))
    assert [jobs[stage].wait()["JobState"] for stage in STAGES] == ["COMPLETED"] * 6, jobs["evaluate_ldm"].output()
    encoders = "autoencoder.path=run/autoencoder clip.path=run/clip"
    calls = called.read_text().splitlines()
    assert calls[0] == "1 data_pipeline/make_shards.py output=run/shards size=64"
    assert sorted(calls[1:3]) == [
        "1 train/train_autoencoder.py input=run/shards output=run/autoencoder",
        "1 train/train_clip.py input=run/shards output=run/clip",
    ]
    assert calls[3] == f"1 data_pipeline/precompute_latents.py input=run/shards output=run/latents {encoders}"
    assert calls[4:6] == [f"2 train/train_ldm.py input=run/latents output=run/ldm {encoders} engine=zero2"] * 2
    assert calls[6:] == ["1 train/evaluate_ldm.py input=run/ldm shards=run/shards captions=4"]


@pytest.mark.exhaustive  # eight Pythons that start from nothing: a minute and a half
def test_the_chain_runs_through(cluster: Cluster, pictures: Path, tmp_path: Path) -> None:
    words = [word for stage in STAGES for word in (stage, *TINY[stage])]
    jobs = start(cluster, f"output={tmp_path / 'run'}", *words[:1], f"input={pictures}", *words[1:])
    assert tuple(jobs) == STAGES
    for stage in STAGES:
        facts = jobs[stage].wait()
        assert facts["JobState"] == "COMPLETED", f"{stage}: {facts}\n{jobs[stage].output()}"
    assert (tmp_path / "run/ldm/evaluation/evaluation.json").exists()
    assert "2 rank(s) on cpu" in jobs["train_ldm"].output()


def test_what_waits_for_a_failed_stage_is_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    """And what is there already is not made again."""
    there = [f"{name}={tmp_path / name}" for name in ("shards", "autoencoder", "clip")]
    jobs = start(cluster, f"output={tmp_path / 'run'}", *there)
    assert tuple(jobs) == STAGES[3:]
    facts = jobs["precompute_latents"].wait()
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "2:0"), jobs["precompute_latents"].output()
    for stage in STAGES[4:]:
        assert jobs[stage].wait()["JobState"] == "CANCELLED"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "output= must be given"),
        (["output=run", "size=64"], "size=64 belongs to no stage"),
        (["output=run", "train_ldm", "-p", "gpu"], "use the long form of sbatch's options"),
    ],
)
def test_mistakes_get_a_sentence(words: list[str], sentence: str) -> None:
    done = subprocess.run(["bash", "slurm/pipeline.sh", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert sentence in done.stderr
