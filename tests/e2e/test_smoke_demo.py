"""`make demo`: the whole chain on real pictures, by the commands that it prints; DEMO=tiny, and exhaustively smoke."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import wandb
import webdataset as wds
from PIL import Image
from synthetic import ROOT, metric_rows, run

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module", params=["tiny", pytest.param("smoke", marks=pytest.mark.exhaustive)])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def home(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HOME and TMPDIR while the demo runs: nothing may be left in them."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def demo(name: str, tmp_path_factory: pytest.TempPathFactory, home: Path) -> tuple[Path, str]:
    """Its folder, and what it printed."""
    output = tmp_path_factory.mktemp(name) / "demo"
    (home / "tmp").mkdir()
    done = make_demo(name, output, home)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return output, done.stdout


def make_demo(name: str, output: Path, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HOME": str(home), "TMPDIR": str(home / "tmp")}
    options = [f"DEMO={name}", f"OUTPUT={output}", f"RUN={sys.executable}"]
    return subprocess.run(
        ["make", "--no-print-directory", "demo", *options], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=560,
    )  # fmt: skip


def test_it_prints_its_figures_and_where_everything_lies(demo: tuple[Path, str]) -> None:
    output, printed = demo
    for words in ("recall of training captions", "shuffled", "held-out PSNR", "held-out loss", "retrieval", "▁"):
        assert words in printed
    for line in printed.splitlines()[-6:]:
        assert Path(line.split()[-1]).exists(), line
    summary = json.loads((output / "summary.json").read_text())
    assert summary["peak_memory_gb"] < 4
    assert 0 <= summary["training_recall_top1"] <= summary["training_recall_top5"] <= 1


def test_every_stage_learns(demo: tuple[Path, str]) -> None:
    """A few steps don't draw, but each loss must fall and the autoencoder must beat a grey picture by far."""
    output, _ = demo
    for stage, factor in (("autoencoder", 0.6), ("clip", 0.8), ("ldm", 0.7)):
        losses = [row["loss"] for row in metric_rows(output / stage) if "loss" in row]
        assert losses[-1] < factor * losses[0], stage
    assert json.loads((output / "autoencoder/config.json").read_text())["heldout_psnr_db"] > 11  # grey: 8
    assert json.loads((output / "clip/config.json").read_text())["train_retrieval_top5"] > 0.5
    heldout = [row["heldout_loss"] for row in metric_rows(output / "ldm") if "heldout_loss" in row]
    assert heldout[-1] < heldout[0]


def test_the_pictures_are_pictures(demo: tuple[Path, str]) -> None:
    output, _ = demo
    for name in ("drawn.png", "blind.png", "beside_real.png", "heldout.png"):
        assert min(Image.open(output / "ldm/evaluation" / name).size) > 64
    single = np.array(Image.open(output / "ldm/drawn/0000-red-heart.png"))
    assert single.shape == (64, 64, 3)
    assert single.std() > 5
    assert len(list((output / "ldm/samples").glob("step-*.png"))) == 2


def test_webdataset_reads_the_shards_as_they_are(demo: tuple[Path, str]) -> None:
    output, _ = demo
    urls = sorted(str(path) for path in (output / "latents/train/shards").glob("*.tar"))
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode())
    assert len(samples) == json.loads((output / "latents/train/manifest.json").read_text())["samples"]
    assert samples[0]["moments.npy"].shape == (8, 16, 16)
    assert samples[0]["text.npy"].shape == (16, 192)
    assert samples[0]["json"]["caption"]


def test_wandb_has_the_run_offline(demo: tuple[Path, str]) -> None:
    output, _ = demo
    assert wandb.__version__
    (folder,) = (output / "ldm/wandb").glob("offline-run-*")
    assert next(folder.glob("run-*.wandb")).stat().st_size > 10_000
    assert len(list(folder.glob("files/media/images/*.png"))) == 2


def test_nothing_is_left_in_home_or_tmp(demo: tuple[Path, str], home: Path) -> None:
    left = [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()]
    assert left == []


def test_a_second_run_does_nothing(name: str, demo: tuple[Path, str], home: Path) -> None:
    output, _ = demo
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.name != "summary.json"}
    again = make_demo(name, output, home)
    assert again.stdout.count("already finished") == 7
    after = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.name != "summary.json"}
    assert {p: t for p, t in after.items() if p.is_file()} == {p: t for p, t in before.items() if p.is_file()}


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_the_same_run_is_drawn_from_by_either_sampler(demo: tuple[Path, str], tmp_path: Path, sampler: str) -> None:
    output, _ = demo
    options = [f"input={output / 'ldm'}", "prompts=[red heart]", f"sampler={sampler}", "sampler.steps=4"]
    run("train/sample_images.py", *options, f"output={tmp_path}")
    assert (tmp_path / "grid.png").exists()


def test_other_encoders_are_refused_by_precompute(demo: tuple[Path, str], tmp_path: Path) -> None:
    """The same output, begun with one autoencoder, is not gone on with by another."""
    output, _ = demo
    other = tmp_path / "other"
    arguments = [f"input={output / 'shards'}", f"output={output / 'latents'}", f"clip.path={output / 'clip'}"]
    run(
        "train/train_autoencoder.py", f"input={output / 'shards'}", f"output={other}", "training.steps=2",
        "training.batch_size=8", "validate_every=null",
    )  # fmt: skip
    done = run("data_pipeline/precompute_latents.py", *arguments, f"autoencoder.path={other}", check=False)
    assert done.returncode == 2
    assert "autoencoder was" in done.stderr


@pytest.mark.exhaustive
def test_parameterizations_other_than_flow_train_and_draw(demo: tuple[Path, str], tmp_path: Path) -> None:
    """Velocity on Stable Diffusion's schedule, through the same entries."""
    output, _ = demo
    encoders = [f"autoencoder.path={output / 'autoencoder'}", f"clip.path={output / 'clip'}"]
    run(
        "train/train_ldm.py", f"input={output / 'latents'}", f"output={tmp_path / 'v'}", *encoders,
        "process=scaled_linear", "parameterization=velocity", "unet.channels=[32,64]",
        "training.steps=4", "training.wandb_project=null", "validate_every=null", "preview_every=4",
    )  # fmt: skip
    for sampler in ("ddim", "euler"):
        run("train/sample_images.py", f"input={tmp_path / 'v'}", "prompts=red heart", f"sampler={sampler}")
    assert (tmp_path / "v/drawn/grid.png").exists()
