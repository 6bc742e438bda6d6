"""A first stage whose decoder is trained further: latents made before stay valid, and pictures get better."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from entered import entered
from PIL import Image
from synthetic import metric_rows, run

from data_pipeline.shards.manifest import Manifest
from train.models.autoencoder import ENCODER, AutoencoderKL
from train.weights.saved import load_autoencoder, save_model

pytestmark = pytest.mark.processes

FIRST_STAGE = {"channels": [8, 16, 16], "layers_per_block": 1, "norm_groups": 4, "mid_attention": False}
FEW = ["training.batch_size=8", "training.log_every=1", "validate_every=null", "training.wandb_project=null"]
LDM = ["experiment=unconditional", "unet.channels=[8,16]", "unet.norm_groups=4", "unet.heads=2", "unet.in_channels=4",
       "unet.out_channels=4", "fold=1", "preview_every=2", "preview_samples=2", "sampler.steps=2"]  # fmt: skip
ADVERSARY = ["objective/adversary=patchgan", "objective.adversary.start=1",
             "objective.adversary.discriminator.layers=2", "objective.adversary.discriminator.channels=32"]  # fmt: skip
DRAW = ["samples_per_prompt=2", "sampler.steps=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards/ of 24 drawings, autoencoder/ with random weights, latents/ of it."""
    folder = tmp_path_factory.mktemp("tuning")
    assert entered("data_pipeline/make_shards", "source=openmoji_demo", "source.limit=24", f"output={folder}/shards",
                   "shard_size=8", "size=32").code == 0  # fmt: skip
    torch.manual_seed(0)
    save_model(folder / "autoencoder", "AutoencoderKL", FIRST_STAGE, AutoencoderKL(**FIRST_STAGE).state_dict(), {})
    assert precomputed(folder, "autoencoder") == 0
    return folder


def precomputed(folder: Path, first_stage: str) -> int:
    return entered("data_pipeline/precompute_latents", f"input={folder}/shards", f"output={folder}/latents",
                   f"autoencoder.path={folder}/{first_stage}", "conditions=[]").code  # fmt: skip


def tuned(folder: Path, name: str, *options: str) -> Path:
    run("train/train_autoencoder.py", f"input={folder}/shards", f"output={folder}/{name}", *FEW,
        f"start_from={folder}/autoencoder", "autoencoder=from_start", "objective.train=decoder", "objective.crop=16",
        *options)  # fmt: skip
    return folder / name


def test_latents_stay_valid(folder: Path) -> None:
    path = tuned(folder, "tuned", "training.steps=3")
    first, better = (load_autoencoder(str(folder / name)) for name in ("autoencoder", "tuned"))
    weights = first.state_dict()
    for name, value in better.state_dict().items():
        assert torch.equal(value, weights[name]) == name.startswith(ENCODER), name
    about = json.loads((path / "config.json").read_text())
    made_by = Manifest.load(f"{folder}/latents/train", "latents").fingerprints["autoencoder"]
    assert about["fingerprint"] != about["encoder_of"] == better.fingerprint == made_by

    assert precomputed(folder, "tuned") == 0  # nothing to do: they are its latents
    ldm = [f"input={folder}/latents", f"output={folder}/ldm", "clip.path=none", *FEW, *LDM, "training.steps=2"]
    run("train/train_ldm.py", *ldm, f"autoencoder.path={folder}/autoencoder", f"preview_decoder={path}")
    drawn = {}
    for name, options in {
        "plain": [], "decoder": [f"decoder={path}"], "path": [f"autoencoder_path={path}"]
    }.items():  # fmt: skip
        done = entered("train/sample_images", f"input={folder}/ldm", f"output={folder}/{name}", *DRAW, *options)
        assert done.code == 0, done.error
        files = sorted(file for file in (folder / name).glob("*.png") if file.stem[:4].isdigit())
        drawn[name] = np.stack([np.array(Image.open(file)) for file in files])
    assert np.array_equal(drawn["decoder"], drawn["path"])
    assert not np.array_equal(drawn["decoder"], drawn["plain"])

    other = AutoencoderKL(**FIRST_STAGE)
    save_model(folder / "other", "AutoencoderKL", FIRST_STAGE, other.state_dict(), {})
    for option, sentence in (("decoder", "has another encoder"), ("autoencoder_path", "the latents were made with")):
        done = entered(
            "train/sample_images", f"input={folder}/ldm", f"output={folder}/no", *DRAW, f"{option}={folder}/other"
        )
        assert (done.code, sentence in done.error) == (2, True), done.error


@pytest.mark.exhaustive
@pytest.mark.parametrize("options", [["engine=zero0"], ["engine=zero2", "engine.dtype=bf16"], ["engine=zero3"]])
def test_the_encoder_is_kept_bit_for_bit_and_runs_resume(folder: Path, options: list[str]) -> None:
    name = "-".join(options)
    options = [*options, "training.save_every=2"] + (ADVERSARY if "engine=zero3" not in options else [])
    whole = tuned(folder, f"whole-{name}", "training.steps=4", *options)
    tuned(folder, f"parts-{name}", "training.steps=2", *options)
    parts = tuned(folder, f"parts-{name}", "training.steps=4", "training.resume=must", *options)
    rows = [[row["loss"] for row in metric_rows(of) if "loss" in row] for of in (whole, parts)]
    assert rows[0] == rows[1]
    models = [load_autoencoder(str(of)).state_dict() for of in (folder / "autoencoder", whole, parts)]
    for key, value in models[0].items():
        assert torch.equal(models[1][key], models[2][key])
        assert torch.equal(models[1][key], value) == key.startswith(ENCODER), key
