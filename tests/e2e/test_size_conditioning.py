"""Micro-conditioning as a user types it: latents, a training that is gone on with, pictures by size, an export."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image
from safetensors.torch import load_file
from synthetic import losses, metric_rows, run

import train.models.torchvision_patch  # noqa: F401  (before diffusers imports torchvision)
from data_pipeline.loading.batch import DataCursor
from data_pipeline.loading.loader import LoaderConfig, read_dataset
from data_pipeline.shards.data_sets import DataSet, DataSets
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.writer import ShardWriter
from train.data.ldm_inputs import latents_of
from train.models.autoencoder import AutoencoderKL
from train.models.clip import CLIP
from train.weights.saved import save_model

pytestmark = pytest.mark.processes

FIRST_STAGE = {
    "latent_channels": 4,
    "channels": [8, 8],
    "layers_per_block": 1,
    "norm_groups": 4,
    "mid_attention": False,
}
TEXT_ENCODER = {
    "embed_dim": 5,
    "vision": {"image_size": 16, "patch_size": 8, "width": 8, "layers": 1, "head_width": 8},
    "text": {"context_length": 6, "vocab_size": 49408, "width": 8, "layers": 2, "heads": 1},
}
UNET = ["unet.channels=[8,16]", "unet.norm_groups=4", "unet.heads=2", "unet.context_dim=8", "unet.in_channels=4",
        "unet.out_channels=4", "fold=1", "process=scaled_linear", "parameterization=epsilon"]  # fmt: skip
SHORT = ["training.batch_size=16", "training.log_every=1", "training.wandb_project=null", "validate_every=6",
         "preview_every=6", "preview_samples=2", "sampler.steps=2", "guidance.scale=2", "optimizer.lr=0.01",
         "optimizer.schedule.warmup=1", "optimizer.schedule.kind=constant"]  # fmt: skip
WITH_SIZES = ["conditioning=[text,size]", "unet.vector_dim=1541"]


def write_pictures(root: Path, count: int) -> None:
    """Pictures of several shapes; of every third, whoever made the shards tells a larger original, as img2dataset."""
    random, writer = np.random.default_rng(count), ShardWriter()
    for i in range(count):
        pixels = random.integers(0, 256, (16 + 4 * (i % 3), 16 + 8 * (i % 2), 3), dtype=np.uint8)
        meta = {"original_height": 300 + i, "original_width": 400} if i % 3 == 0 else {}
        writer.add(f"{i:04d}", {"png": pixels, "txt": f"thing number {i % 7}", "json": meta})
    shard = writer.publish(root, "shards/000000.tar")
    Manifest("image-text", (shard,), {}, {"size": 16}).save(root)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards/, encoders, latents/ of today and old/, as an earlier version left them; runs sized/ and plain/."""
    folder = tmp_path_factory.mktemp("sizes")
    write_pictures(folder / "shards/train", 40)
    write_pictures(folder / "shards/heldout", 4)
    torch.manual_seed(0)
    save_model(folder / "autoencoder", "AutoencoderKL", FIRST_STAGE, AutoencoderKL(**FIRST_STAGE).state_dict(), {})
    save_model(folder / "clip", "CLIP", TEXT_ENCODER, CLIP(**TEXT_ENCODER).state_dict(), {})
    run("data_pipeline/precompute_latents.py", f"input={folder}/shards", f"output={folder}/latents", *encoders(folder))
    run_of(folder, "plain", "training.steps=6", "unet.vector_dim=null")
    run_of(folder, "sized", "training.steps=3", "training.save_every=3", *WITH_SIZES)
    return folder


def encoders(folder: Path) -> list[str]:
    return [f"autoencoder.path={folder}/autoencoder", f"clip.path={folder}/clip"]


def run_of(folder: Path, name: str, *more: str) -> str:
    output = [f"input={folder}/latents", f"output={folder}/{name}", *encoders(folder), *UNET, *SHORT]
    return run("train/train_ldm.py", *output, *more).stdout


def drawn(folder: Path, source: str, *asked: str) -> np.ndarray:
    output = f"{folder}/drawn-{len(list(folder.glob('drawn-*')))}"
    run("train/sample_images.py", f"input={folder}/{source}", f"output={output}", "prompts=thing", *asked)
    (path,) = Path(output).glob("0*.png")
    return np.array(Image.open(path)).astype(int)


def sizes_of(latents: Path) -> dict[str, list[float]]:
    names = ("original_size", "crop_top_left", "target_size")
    return {s["key"]: [v for name in names for v in s["meta"][name]] for s in read_dataset(f"{latents}/train")}


def mean_of(name: Path) -> list[float]:
    return json.loads((name / "latents.json").read_text())["conditions"]["size"]["mean"]


def test_a_run_sees_each_samples_numbers_and_records_their_means(folder: Path) -> None:
    """From latents whose manifest has no means, too; and a run without sizes is told nothing of them."""
    sizes = sizes_of(folder / "latents")
    assert len({tuple(size) for size in sizes.values()}) > 10
    every = np.mean(list(sizes.values()), 0).tolist()
    assert mean_of(folder / "sized") == every
    assert "size" not in json.loads((folder / "plain/latents.json").read_text())["conditions"]
    data = Manifest.load(f"{folder}/latents/train")
    assert data.info["size_conditioning"] == {"count": 40, "mean": every}
    data.info.pop("size_conditioning")
    config = {"input": f"{folder}/latents", "fold": 1, "scaling_factor": None, "preview_every": None}
    make_loader = partial(LoaderConfig().loader, f"{folder}/latents/train", seed=0)
    given = (
        DataSets((DataSet("", f"{folder}/latents/train", data),)),
        make_loader,
        read_dataset,
        instantiate,
        torch.device("cpu"),
    )
    latents = latents_of({**config, "conditioning": {"text": {}, "size": {}}}, *given)
    assert latents.facts.conditions["size"]["mean"] == every
    batches = iter(latents.make_loader(batch_size=16, start=DataCursor()))
    for batch in (next(batches) for _ in range(4)):
        assert batch.tensors["size"].tolist() == [sizes[key] for key in batch.keys]
    (sample,) = latents.read_samples(root=f"{folder}/latents/train", limit=1)
    assert sample["size"].tolist() == sizes[sample["key"]]
    plain = latents_of({**config, "conditioning": {"text": {}}}, *given)
    assert "size" not in next(iter(plain.make_loader(batch_size=16))).tensors


def test_it_goes_on_bit_for_bit(folder: Path) -> None:
    run_of(folder, "whole", "training.steps=6", *WITH_SIZES)
    assert "resumed from step 3 of 6" in run_of(folder, "sized", "training.steps=6", *WITH_SIZES)
    assert losses(folder / "sized") == losses(folder / "whole")
    ours, theirs = (
        load_file(folder / f"{name}/checkpoints/step-00000006/ema.safetensors") for name in ("sized", "whole")
    )
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    previews = [(folder / f"{name}/samples/step-00000006.png").read_bytes() for name in ("sized", "whole")]
    assert previews[0] == previews[1]


def test_drawn_at_the_means_unless_asked_otherwise(folder: Path) -> None:
    mean = [f"{value!r}" for value in mean_of(folder / "sized")]
    pairs = dict(zip(("original", "crop", "target"), zip(mean[::2], mean[1::2], strict=True), strict=True))
    default = drawn(folder, "sized")
    assert np.array_equal(
        default, drawn(folder, "sized", *(f"size.{name}=[{a},{b}]" for name, (a, b) in pairs.items()))
    )
    large = drawn(folder, "sized", "size.original=[900,900]")
    assert np.abs(large - default).max() > 0
    away = drawn(folder, "sized", "size.original=[900,900]", "negative_size.original=[20,20]")
    assert np.abs(away - large).max() > 0


def test_evaluated_at_the_means(folder: Path) -> None:
    mean, grids = mean_of(folder / "sized"), []
    for name, size in {"mean": [], "given": [f"size.original=[{mean[0]},{mean[1]}]"]}.items():
        run("train/evaluate_ldm.py", f"input={folder}/sized", f"shards={folder}/shards", "captions=2",
            "heldout_captions=2", f"output={folder}/{name}", *size)  # fmt: skip
        grids.append((folder / name / "blind.png").read_bytes())
    assert grids[0] == grids[1]


def test_a_run_without_sizes_lends_its_weights_to_one_with(folder: Path) -> None:
    """It begins where the other ended, and learns sizes from there."""
    still = ["training.steps=1", "validate_every=1", "preview_every=null", "optimizer.lr=0"]
    run_of(folder, "after", *WITH_SIZES, *still, f"start_from={folder}/plain")
    ended, began = ([row["heldout_loss"] for row in metric_rows(folder / name) if "heldout_loss" in row][-1]
                    for name in ("plain", "after"))  # fmt: skip
    assert began == pytest.approx(ended, rel=1e-5)


def test_exported_as_diffusers_has_it(folder: Path) -> None:
    from diffusers import UNet2DConditionModel

    said = run("train/export_diffusers.py", f"input={folder}/sized", f"output={folder}/exported").stdout
    assert "time_ids (B, 6)" in said
    unet = UNet2DConditionModel.from_pretrained(folder / "exported", subfolder="unet")
    assert unet.config.projection_class_embeddings_input_dim == 5 + 6 * 256


MISTAKES = {
    "the width is named": ([*WITH_SIZES[:1], "unet.vector_dim=null"], "set unet.vector_dim=1541"),
    "online": ([*WITH_SIZES, "input={folder}/shards"], "conditioning=[size] can't be computed from"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(folder: Path, mistake: str) -> None:
    options, sentence = MISTAKES[mistake]
    given = [f"input={folder}/latents", f"output={folder}/never", *encoders(folder), *UNET, *SHORT, *options]
    done = run("train/train_ldm.py", *(option.format(folder=folder) for option in given), check=False)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert not (folder / "never").exists()
