"""Ctrl-C in every entry, sent to its process group as a terminal does: saved, one sentence, goes on bit for bit."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from forked import Forked
from synthetic import started

pytestmark = pytest.mark.processes

# Entry -> its options, and the file of `folder` that it waits for: a pipe to which nobody writes.
WAITING = {
    "data_pipeline/make_shards.py": (
        "source=folder input={folder}/pictures output={folder}/out", "out/train/manifest.json",
    ),
    "data_pipeline/index_shards.py": ("input={folder} output={folder}/out", "out/manifest.json"),
    "data_pipeline/verify_shards.py": ("input={folder} output={folder}/out", "train/manifest.json"),
    "data_pipeline/plan_storage.py": ("autoencoder=trained autoencoder.path={folder}", "config.json"),
    "data_pipeline/precompute_latents.py": (
        "input={folder} output={folder}/out autoencoder.path={folder} clip.path=none", "config.json",
    ),
    "train/train_autoencoder.py": ("input={folder} output={folder}/out", "train/manifest.json"),
    "train/train_clip.py": ("input={folder} output={folder}/out", "train/manifest.json"),
    "train/train_classifier.py": ("input={folder} output={folder}/out", "train/manifest.json"),
    "train/train_ldm.py": ("input={folder} output={folder}/out autoencoder.path=none", "train/manifest.json"),
    "train/sample_images.py": ("input={folder} prompts_file={folder}/prompts", "prompts"),
    "train/evaluate_ldm.py": ("input={folder} shards={folder}", "config.yaml"),
    "train/export_diffusers.py": ("input={folder} output={folder}/out", "config.yaml"),
    "train/rebuild_ema.py": ("input={folder} sigma_rel=0.1", "config.yaml"),
    "train/replay_metrics.py": ("input={folder}", "metrics.jsonl"),
    "train/quickstart.py": ("output={folder}", "finished/make_shards.json"),
}  # fmt: skip
GIVEN = (
    "run_id", "config.yaml", "metrics.jsonl", "x.tar", "heldout/manifest.json", "pictures/x.png", "pictures/x.txt",
)  # fmt: skip
AGAIN = "stopped by Ctrl-C; start the same command again to continue"


def interrupt(process: Forked) -> None:
    """As the terminal does: to all processes of its group."""
    os.killpg(process.pid, signal.SIGINT)


def opened(pipe: Path, process: Forked, log: Path) -> int:
    """The pipe's other end, once the process has opened it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads yet
            time.sleep(0.01)
    raise AssertionError(log.read_text())


@pytest.mark.parametrize("script", WAITING)
def test_an_entry_that_has_begun_nothing_ends_at_once(tmp_path: Path, script: str) -> None:
    """It reads what it is given, for as long as a slow store takes."""
    options, waits_for = WAITING[script]
    folder = tmp_path / "folder"
    for name in {*GIVEN, waits_for}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / waits_for).unlink()
    os.mkfifo(folder / waits_for)
    before = sorted(folder.rglob("*"))
    log = tmp_path / "log"
    process = started(log, script, *options.format(folder=folder).split())
    end = opened(folder / waits_for, process, log)
    interrupt(process)
    assert process.wait(30) == 75
    os.close(end)
    assert log.read_text() == f"{Path(script).stem}: {AGAIN}\n"
    assert sorted(folder.rglob("*")) == before
