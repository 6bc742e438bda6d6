"""Ctrl-C in every entry, sent to its process group as a terminal does: saved, one sentence, goes on bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from forked import Forked
from PIL import Image
from synthetic import NO_ENCODERS, TINY_UNET, losses, run, started

from data_pipeline.common.stop_request import SAME_S
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.writer import ShardWriter

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
TESTS = Path(__file__).parents[1]
AS_PIXELS = ["autoencoder=identity", "conditions=[]"]
SHORT = ["training.batch_size=16", "training.steps=40", "training.log_every=1", "validate_every=null"]
OF_MODEL = {
    "autoencoder": ["autoencoder.channels=[16,16]"],
    "clip": ["clip.text.width=32", "clip.text.layers=1", "clip.vision.width=32", "clip.vision.layers=1"],
    "classifier": ["classifier.channels=[16,32]", "fold=8"],
}


def contents(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


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


@pytest.mark.parametrize(
    ("presses", "code", "workers"), [(1, 75, 0), (2, 130, 0), pytest.param(1, 75, 2, marks=pytest.mark.exhaustive)]
)
def test_a_training_within_a_step(tiny_latents: Path, tmp_path: Path, presses: int, code: int, workers: int) -> None:
    """Once: the step is finished and saved. Twice: the step is not waited for, and nothing is saved."""
    asked = [f"input={tiny_latents}", f"output={tmp_path}/run", *TINY_UNET, *NO_ENCODERS, "training.steps=5"]
    asked += ["training.batch_size=16", "training.log_every=1", "validate_every=null", f"data.num_workers={workers}"]
    asked += ["time_sampling.path=held_parts.times"]
    hold, log = tmp_path / "hold", tmp_path / "log"
    os.mkfifo(hold)
    process = started(log, "train/train_ldm.py", *asked, HOLD=str(hold), PYTHONPATH=str(TESTS))
    end = opened(hold, process, log)
    interrupt(process)
    if presses == 2:
        time.sleep(2 * SAME_S)
        interrupt(process)
        assert process.wait(30) == code
    os.close(end)
    assert process.wait(60) == code
    said, output = log.read_text(), tmp_path / "run"
    assert "Traceback" not in said
    assert said.count("again to continue") == 1
    saved = [path.name for path in (output / "checkpoints").glob("step-*")]
    assert saved == ["step-00000002"] * (presses == 1)  # the first of the three calls counted operations
    if presses == 1:
        again = run("train/train_ldm.py", *asked, variables={"PYTHONPATH": str(TESTS)})
        assert "resumed from step 2 of 5" in again.stdout
        assert sorted(losses(output)) == [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ with 6 shards of 16 random pictures, heldout/ with one."""
    root, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 6), ("heldout", 1)):
        shards = []
        for number in range(count):
            writer = ShardWriter()
            for i in range(16):
                picture = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                meta = {"group": ("hearts", "flags")[i % 2]}
                writer.add(f"{number:02d}{i:04d}", {"png": picture, "txt": f"thing {i}", "json": meta})
            shards.append(writer.publish(root / split, f"shards/{number:06d}.tar"))
        Manifest("image-text", tuple(shards), {"png": {"dtype": "uint8"}}, {"size": 64}).save(root / split)
    return root


@pytest.mark.parametrize(("presses", "code"), [(1, 75), (2, 130)])
def test_precompute_within_a_batch(pictures: Path, tmp_path: Path, presses: int, code: int) -> None:
    """Once: what is encoded is written. Twice: the batch is not waited for. Nothing is half written."""
    hold, log = tmp_path / "hold", tmp_path / "log"
    os.mkfifo(hold)
    asked = [f"input={pictures}", *AS_PIXELS, "autoencoder._target_=held_parts.Pixels"]
    here, script = f"output={tmp_path}/latents", "data_pipeline/precompute_latents.py"
    process = started(log, script, *asked, here, HOLD=str(hold), PYTHONPATH=str(TESTS))
    end = opened(hold, process, log)
    interrupt(process)
    if presses == 2:
        time.sleep(2 * SAME_S)
        interrupt(process)
        assert process.wait(30) == code
    os.close(end)
    assert process.wait(60) == code
    assert "Traceback" not in log.read_text()
    assert log.read_text().count("again to continue") == 1
    again = run(script, *asked, here, variables={"PYTHONPATH": str(TESTS)})
    assert "of 6 shards are there already" in again.stdout
    run(script, *asked, f"output={tmp_path}/undisturbed", variables={"PYTHONPATH": str(TESTS)})
    assert contents(tmp_path / "latents") == contents(tmp_path / "undisturbed")


def test_make_shards_starts_over_and_writes_the_same(tmp_path: Path) -> None:
    folder, log = tmp_path / "pictures", tmp_path / "log"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "x.png")
    (folder / "list.csv").write_text("file,caption\n" + "x.png,a red square\n" * 600)
    asked = ["source=table", f"input={folder}", "size=64", "shard_size=20"]
    process = started(log, "data_pipeline/make_shards.py", *asked, f"output={tmp_path}/shards")
    deadline = time.monotonic() + 60
    while (
        not (tmp_path / "shards/train/shards/000001.idx").exists()
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.005)
    interrupt(process)
    assert process.wait(30) == 75
    assert log.read_text() == f"make_shards: {AGAIN}\n"
    assert not list(tmp_path.glob("shards/*/manifest.json"))
    for name in ("shards", "undisturbed"):
        run("data_pipeline/make_shards.py", *asked, f"output={tmp_path}/{name}")
    assert contents(tmp_path / "shards") == contents(tmp_path / "undisturbed")


@pytest.mark.exhaustive
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", OF_MODEL)
def test_a_training_goes_on_bit_for_bit(pictures: Path, tmp_path: Path, name: str, ranks: int) -> None:
    """Losses, and the fingerprint of the weights. Two ranks under train/distributed/launch.py."""
    data, script, log = pictures, f"train/train_{name}.py", tmp_path / "log"
    if name == "classifier":
        data = tmp_path / "latents"
        labelled = [*AS_PIXELS[:1], "conditions=[label]", f"output={data}"]
        run("data_pipeline/precompute_latents.py", f"input={pictures}", *labelled)
    asked = [f"input={data}", *SHORT, *OF_MODEL[name]]
    process = started(log, script, *asked, f"output={tmp_path}/run", ranks=ranks, LAUNCHER="ours")
    deadline = time.monotonic() + 120
    while len(losses(tmp_path / "run")) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, log.read_text()
    interrupt(process)
    assert process.wait(60) == 75, log.read_text()
    said = log.read_text()
    assert "Traceback" not in said
    assert said.count("again to continue") == 1
    done = run(script, *asked, f"output={tmp_path}/run", ranks=ranks)
    assert "resumed from step " in done.stdout
    run(script, *asked, f"output={tmp_path}/undisturbed", ranks=ranks)
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")
    marks = [
        json.loads((tmp_path / each / "config.json").read_text())["fingerprint"] for each in ("run", "undisturbed")
    ]
    assert marks[0] == marks[1]
