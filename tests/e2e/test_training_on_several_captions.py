"""Several captions a picture, through the entry points: list captions to shards, to latents, to a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from entered import entered
from PIL import Image
from synthetic import losses, metric_rows, run

from data_pipeline.loading.loader import read_dataset
from data_pipeline.shards.manifest import Manifest
from train.models.autoencoder import AutoencoderKL
from train.models.clip import CLIP
from train.weights.saved import save_model

pytestmark = pytest.mark.processes

FIRST_STAGE = {
    "latent_channels": 4, "channels": [8, 8], "layers_per_block": 1, "norm_groups": 4, "mid_attention": False,
}  # fmt: skip
TEXT_ENCODER = {
    "embed_dim": 5,
    "vision": {"image_size": 16, "patch_size": 8, "width": 8, "layers": 1, "head_width": 8},
    "text": {"context_length": 6, "vocab_size": 49408, "width": 6, "layers": 2, "heads": 1},
}
SETTINGS = [
    "unet.channels=[8,16]", "unet.norm_groups=4", "unet.heads=2", "unet.context_dim=6", "unet.vector_dim=5",
    "training.batch_size=16", "training.log_every=1", "training.save_every=2", "training.wandb_project=null",
    "validate_every=4", "preview_every=null", "scaling_factor=1.0",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with lists of one to three captions, made into shards/ and latents/ by autoencoder/ and clip/."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "pictures").mkdir()
    for i in range(30):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"pictures/p{i:02d}.png")
        captions = [f"thing {i}", f"one of the very many things {i % 7}", "it"][: 1 + i % 3]
        (folder / f"pictures/p{i:02d}.json").write_text(json.dumps({"caption": captions}))
    torch.manual_seed(0)
    save_model(folder / "autoencoder", "AutoencoderKL", FIRST_STAGE, AutoencoderKL(**FIRST_STAGE).state_dict(), {})
    save_model(folder / "clip", "CLIP", TEXT_ENCODER, CLIP(**TEXT_ENCODER).state_dict(), {})
    return folder


def train(folder: Path, data: str, steps: int, weights: str, check: bool = True) -> Any:
    encoders = [f"autoencoder.path={folder}/autoencoder", f"clip.path={folder}/clip"]
    options = [f"input={folder}/{data}", f"output={folder}/run-{data}", *encoders, *SETTINGS]
    return run(
        "train/train_ldm.py", *options, f"training.steps={steps}", f"conditioning.text.captions={weights}", check=check
    )


@pytest.mark.timeout(400)
def test_lists_of_captions_from_pictures_to_a_training(made: Path) -> None:
    count = ["tokenizer=clip", "tokenizer.context_length=6"]
    shards = entered("data_pipeline/make_shards", "source=folder", f"input={made}/pictures", f"output={made}/shards",
                     "size=16", *count)  # fmt: skip
    assert not shards.code, shards.error
    assert "captions: caption of 10, 0 of 20, 1 of 20, 2 of 10" in shards.said
    assert (
        "captions longer than the 6 tokens that the text encoder reads, and cut there: 20 (the longest has 9"
        in shards.said
    )
    assert Manifest.load(made / "shards/train").info["captions"].keys() == {"caption", "0", "1", "2"}
    latents = entered("data_pipeline/precompute_latents", f"input={made}/shards", f"output={made}/latents",
                      f"autoencoder.path={made}/autoencoder", f"clip.path={made}/clip", "dtype=float32")  # fmt: skip
    assert not latents.code, latents.error
    assert "precompute train: captions longer than the 6 tokens" in latents.said
    for shard, latent in zip(*(read_dataset(f"{made}/{kind}/train") for kind in ("shards", "latents")), strict=True):
        assert latent["caption"] == shard["caption"]
        assert latent["meta"].get("captions") == shard["meta"].get("captions")
    for data in ("latents", "shards"):
        train(made, data, 4, "{0: 0.3, 1: 0.7}")
    stored, online = (losses(made / f"run-{data}") for data in ("latents", "shards"))
    assert stored.keys() == online.keys() == {1, 2, 3, 4}
    for name in ("loss", "heldout_loss"):  # the same captions were drawn
        both = [
            [row[name] for row in metric_rows(made / f"run-{data}") if name in row] for data in ("latents", "shards")
        ]
        np.testing.assert_allclose(*both, rtol=1e-5)
    other = train(made, "latents", 6, "{0: 0.5, 1: 0.5}", check=False)
    assert other.returncode == 2
    assert "captions.weights.0 was 0.3 and is now 0.5" in other.stderr + other.stdout
    wrong = train(made, "latents", 6, "{tall: 1}", check=False)
    assert wrong.returncode == 2
    assert "has no caption tall, but of caption, 0, 1, 2" in " ".join((wrong.stderr + wrong.stdout).split())
