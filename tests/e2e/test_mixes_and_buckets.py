"""train_ldm on a mix of data sets and on a folder of aspect-ratio buckets, as a user types it."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from synthetic import NO_ENCODERS, TINY_LATENTS, TINY_UNET, losses, metric_rows, run, started, write_latents

from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.writer import ShardWriter

pytestmark = pytest.mark.processes

STEPS = 16
EACH_STEP = ["training.batch_size=16", f"training.steps={STEPS}", "training.log_every=1", "training.save_every=4"]
MIX = [*TINY_UNET, *NO_ENCODERS, *EACH_STEP, "validate_every=8"]
BUCKETS = [
    "autoencoder=identity", "conditioning=[]", "fold=1", "unet.in_channels=3", "unet.out_channels=3",
    "unet.channels=[8,16]", "unet.norm_groups=4", "unet.heads=2", "unet.context_dim=null", "unet.transformer_depth=0",
    "unet.vector_dim=null", *EACH_STEP, "training.wandb_project=null", "validate_every=8", "preview_every=16",
    "preview_samples=3", "sampler.steps=2",
]  # fmt: skip
SIZES = {"32x32": 50, "32x16": 21, "16x32": 5}  # the last has fewer samples than there are streams


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a/ and b/, latents of one shape; pictures/ of three shapes, and buckets/, what precompute makes of them."""
    folder = tmp_path_factory.mktemp("mixes")
    for name, samples, heldout in (("a", 64, 8), ("b", 40, 9), ("c", 16, 9)):
        write_latents(folder / name / "train", samples, TINY_LATENTS)
        write_latents(folder / name / "heldout", heldout, TINY_LATENTS)
    random = np.random.default_rng(0)
    for split, most in (("train", 50), ("heldout", 10)):
        writer = ShardWriter()
        for name, count in SIZES.items():
            height, width = map(int, name.split("x"))
            for i in range(min(count, most)):
                pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
                writer.add(f"{split}{name}-{i}", {"png": pixels, "txt": f"a thing {i}", "json": {}})
        shard = writer.publish(folder / "pictures" / split, "shards/000000.tar")
        Manifest("image-text", (shard,)).save(folder / "pictures" / split)
    run("data_pipeline/precompute_latents.py", f"input={folder}/pictures", f"output={folder}/buckets",
        "autoencoder=identity", "conditions=[low_resolution]", f"buckets=[{','.join(SIZES)}]")  # fmt: skip
    return folder


def mixed(folder: Path, **weights: object) -> str:
    entries = (f"{{path: {folder}/{n}, weight: {w}}}" if w else f"{folder}/{n}" for n, w in weights.items())
    return f"input=[{', '.join(entries)}]"


def killed_and_resumed(output: Path, *arguments: str) -> None:
    """SIGKILL after the first checkpoint, wherever that is; then started again."""
    process = started(output.with_suffix(".log"), "train/train_ldm.py", *arguments, f"output={output}")
    try:
        while process.poll() is None and max(losses(output), default=0) < 6:
            time.sleep(0.01)
    finally:
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            one.kill()
        process.wait()
    assert max(losses(output)) < STEPS
    assert "resumed from step 4" in run("train/train_ldm.py", *arguments, f"output={output}").stdout


def refuse_other_results(output: Path, straight: Path) -> None:
    assert losses(output) == losses(straight)
    last = f"checkpoints/step-{STEPS:08d}"
    for name in ("ema.safetensors", "part-00000.safetensors"):
        assert (output / last / name).read_bytes() == (straight / last / name).read_bytes()


def test_a_mix_is_killed_and_resumed_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    arguments = [*MIX, mixed(folder, a=3, b=1)]
    done = run("train/train_ldm.py", *arguments, f"output={tmp_path}/straight")
    assert "mix of 2 data sets: a has 64 samples, 75.000%" in done.stdout
    killed_and_resumed(tmp_path / "run", *arguments)
    refuse_other_results(tmp_path / "run", tmp_path / "straight")
    rows = metric_rows(tmp_path / "run")
    logged, heldout = ([row for row in rows if name in row][-1] for name in ("epochs/a", "heldout_loss/a"))
    assert (logged["epochs/a"], logged["epochs/b"]) == (STEPS * 12 / 64, STEPS * 4 / 40)
    of_sets = 0.75 * heldout["heldout_loss/a"] + 0.25 * heldout["heldout_loss/b"]
    assert heldout["heldout_loss"] == pytest.approx(of_sets)
    assert heldout["heldout_loss/a"] != heldout["heldout_loss/b"]
    other = run("train/train_ldm.py", *MIX, mixed(folder, a=1, c=1), f"output={tmp_path}/run", check=False)
    assert other.returncode == 2
    said = "data set b is gone; data set c is new; weights was [3, 1] and is now [1, 1]. Restore these settings"
    assert other.stderr.count("can't resume from") == other.stderr.count(said) == 1


def test_buckets_are_trained_on_killed_resumed_drawn_and_evaluated(folder: Path, tmp_path: Path) -> None:
    arguments = [*BUCKETS, f"input={folder}/buckets"]
    straight = tmp_path / "straight"
    done = run("train/train_ldm.py", *arguments, f"output={straight}")
    assert "16x32 has 5 samples, 6.579% of all that steps take (less than a batch" in done.stdout
    killed_and_resumed(tmp_path / "run", *arguments)
    refuse_other_results(tmp_path / "run", straight)
    rows = metric_rows(straight)
    steps = {name: sum(f"loss/{name}" in row and f"step_s/{name}" in row for row in rows) for name in SIZES}
    assert sum(steps.values()) == STEPS
    assert all(row["tflops_per_s"] > 0 for row in rows if "loss" in row)
    for name, count in SIZES.items():
        assert abs(steps[name] - STEPS * count / 76) < 1
        assert [row[f"epochs/{name}"] for row in rows if "loss" in row][-1] == steps[name] * 16 / count
        assert any(f"heldout_loss/{name}" in row for row in rows)
    assert (straight / "samples/step-00000016.png").exists()
    assert (straight / "curves.png").exists()
    for asked, size in ((), (32, 32)), (("bucket=16x32",), (32, 16)):
        run("train/sample_images.py", f"input={straight}", f"output={tmp_path}/drawn", *asked)
        assert Image.open(next((tmp_path / "drawn").glob("0000*.png"))).size == size
    wrong = run("train/sample_images.py", f"input={straight}", "bucket=9x9", check=False)
    assert "bucket=9x9 is none that this run was trained on: take one of 16x32, 32x16, 32x32" in wrong.stderr
    evaluate = ["train/evaluate_ldm.py", f"input={straight}", f"shards={folder}/pictures", "captions=4"]
    assert "nearest of 21 pictures" in run(*evaluate, "heldout_captions=2", "bucket=32x16").stdout


def drawn_of(folder: Path, source: Path, *asked: str) -> bytes:
    output = folder / f"drawn-{len(list(folder.glob('drawn-*')))}"
    run("train/sample_images.py", f"input={source}", f"output={output}", *asked)
    (path,) = output.glob("0000*.png")
    return path.read_bytes()


def test_each_bucket_draws_at_its_own_mean_size_and_enlarges_its_own_pictures(folder: Path, tmp_path: Path) -> None:
    """conditioning=[low_resolution,size] on buckets."""
    conditioned = [
        "conditioning=[low_resolution,size]",
        "unet.in_channels=6",
        "unet.vector_dim=1536",
        "optimizer.lr=0.01",
    ]
    said = run("train/train_ldm.py", *BUCKETS, f"input={folder}/buckets", f"output={tmp_path}/run", *conditioned).stdout
    assert "sizes conditioned on, mean of bucket 32x16: original 32x16, crop 0x0, target 32x16" in said
    facts = json.loads((tmp_path / "run/latents.json").read_text())
    assert facts["conditions"]["size"]["mean"] == [32, 32, 0, 0, 32, 32]  # that of the most samples
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "small.png")
    small = f"images=[{tmp_path}/small.png]"
    sizes = ["size.original=[16,32]", "size.crop=[0,0]", "size.target=[16,32]"]
    default, same, other = (
        drawn_of(tmp_path, tmp_path / "run", small, "bucket=16x32", *asked)
        for asked in ([], sizes, ["size.original=[32,32]"])
    )
    assert default == same
    assert default != other
    evaluate = ["train/evaluate_ldm.py", f"input={tmp_path}/run", f"shards={folder}/pictures", "captions=2"]
    run(*evaluate, "heldout_captions=2", "bucket=16x32")


MISTAKES = {
    "a path that is none": ("[{folder}/a, {folder}/nowhere]", "nowhere/train is not a data set"),
    "weight 0": ("[{{path: {folder}/a, weight: 0}}, {folder}/b]", "weight=0 of"),
    "a negative weight": ("[{{path: {folder}/a, weight: -1}}, {folder}/b]", "use a number above 0"),
    "a weight for some": ("[{{path: {folder}/a, weight: 2}}, {folder}/b]", "/b has no weight, but the others have"),
    "a word for a weight": ("[{{path: {folder}/a, weight: much}}]", "weight=much of"),
    "an unknown key": ("[{{path: {folder}/a, wieght: 2}}]", "has wieght: an entry has path and weight only"),
    "no path": ("[{{weight: 2}}]", "is not a data set: write its path and weight"),
    "an empty list": ("[]", "use a folder, or a list"),
    "twice the same": ("[{folder}/a, {folder}/a/]", "twice: name it once, and give it a larger weight"),
    "other encoders": ("[{folder}/a, {folder}/other]", "the autoencoder is none in the first and xyz in the second"),
    "other shapes": ("[{folder}/a, {folder}/wide]", "moments.npy is float32 [8, 8, 8] in the first and float32 [8, 16"),
    "another dtype": ("[{folder}/a, {folder}/half]", "text.npy is float32 [4, 6] in the first and float16 [4, 6] in"),
    "pictures and latents": ("[{folder}/a, {folder}/pictures]", "the kind is latents in the first and image-text in"),
    "buckets in a mix": ("[{folder}/a, {folder}/buckets]", "holds aspect-ratio buckets, which can't be mixed"),
    "a bucket that is gone": ("{folder}/gone", "lacks the bucket 32x16, which"),
    "buckets not finished": ("{folder}/begun", "contains buckets that are not finished: start precompute_latents.py"),
}


def altered(folder: Path, name: str, **changes: object) -> None:
    """A copy of a/ whose manifests say something else."""
    shutil.copytree(folder / "a", folder / name)
    for split in ("train", "heldout"):
        path = folder / name / split / "manifest.json"
        said = json.loads(path.read_text())
        for table, changed in changes.items():
            said[table] |= changed
        path.write_text(json.dumps(said))


@pytest.fixture(scope="module")
def mistaken(folder: Path) -> Path:
    altered(folder, "other", fingerprints={"autoencoder": "xyz"})
    altered(folder, "wide", fields={"moments.npy": {"dtype": "float32", "shape": [8, 16, 8]}})
    altered(folder, "half", fields={"text.npy": {"dtype": "float16", "shape": [4, 6]}})
    shutil.copytree(folder / "buckets", folder / "gone")
    shutil.rmtree(folder / "gone/32x16")
    shutil.copytree(folder / "buckets", folder / "begun")
    (folder / "begun/work/train/buckets.json").unlink()
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_a_sentence(mistaken: Path, mistake: str) -> None:
    given, sentence = MISTAKES[mistake]
    arguments = [*MIX, f"input={given.format(folder=mistaken)}", f"output={mistaken}/run"]
    done = run("train/train_ldm.py", *arguments, check=False)
    said = done.stderr.strip().splitlines()
    assert done.returncode == (3 if mistake == "a bucket that is gone" else 2), done.stderr
    assert sentence in said[-1], done.stderr
    assert said[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert not (mistaken / "run").exists()


def test_a_mix_of_pictures_trains_a_first_stage(folder: Path, tmp_path: Path) -> None:
    """train_autoencoder and train_clip share the code that reads input=."""
    for name in ("one", "two"):
        for split in ("train", "heldout"):
            writer, random = ShardWriter(), np.random.default_rng(len(name + split))
            for i in range(24):
                writer.add(
                    f"{i}", {"png": random.integers(0, 256, (16, 16, 3), dtype=np.uint8), "txt": "a", "json": {}}
                )
            root = tmp_path / name / split
            Manifest("image-text", (writer.publish(root, "shards/000000.tar"),), {}, {"size": 16}).save(root)
    given = f"input=[{{path: {tmp_path}/one, weight: 0.25}}, {{path: {tmp_path}/two, weight: 0.75}}]"
    run("train/train_autoencoder.py", given, f"output={tmp_path}/run", "autoencoder.channels=[8,8]",
        "autoencoder.norm_groups=4", "objective.crop_until=0", "training.steps=4", "training.batch_size=16",
        "training.log_every=2", "training.wandb_project=null", "validate_every=4")  # fmt: skip
    row = [row for row in metric_rows(tmp_path / "run") if "epochs/one" in row][-1]
    assert (row["epochs/one"], row["epochs/two"]) == (16 / 24, 48 / 24)
