"""Trained on image-text shards: the same losses as on the latents that precompute makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import metric_rows, run

from data_pipeline.common.errors import UserError
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.writer import ShardWriter
from train.data.online_encoding import OnlineLatents
from train.models.autoencoder import AutoencoderKL
from train.models.clip import CLIP
from train.weights.saved import save_model

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
    "text": {"context_length": 6, "vocab_size": 49408, "width": 6, "layers": 2, "heads": 1},
}
SETTINGS = [
    "unet.channels=[8,16]", "unet.norm_groups=4", "unet.heads=2", "unet.context_dim=6", "unet.vector_dim=5",
    "training.steps=8", "training.batch_size=16", "training.log_every=1", "training.save_every=null",
    "training.wandb_project=null", "validate_every=8", "preview_every=null",
]  # fmt: skip


def write_pictures(root: Path, sizes: list[int], seed: int) -> None:
    random, shards, number = np.random.default_rng(seed), [], 0
    for i, size in enumerate(sizes):
        writer = ShardWriter()
        for _ in range(size):
            pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            writer.add(f"{number:04d}", {"png": pixels, "txt": f"thing number {number % 7}", "json": {}})
            number += 1
        shards.append(writer.publish(root, f"shards/{i:06d}.tar"))
    Manifest("image-text", tuple(shards), {}, {"size": 16}).save(root)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards/, and the encoders autoencoder/ and clip/."""
    folder = tmp_path_factory.mktemp("online")
    write_pictures(folder / "shards/train", [10, 22, 13, 19], 0)
    write_pictures(folder / "shards/heldout", [8], 1)
    torch.manual_seed(0)
    save_model(folder / "autoencoder", "AutoencoderKL", FIRST_STAGE, AutoencoderKL(**FIRST_STAGE).state_dict(), {})
    save_model(folder / "clip", "CLIP", TEXT_ENCODER, CLIP(**TEXT_ENCODER).state_dict(), {})
    return folder


def train(folder: Path, data: str, *more: str) -> list[dict[str, float]]:
    encoders = [f"autoencoder.path={folder}/autoencoder", f"clip.path={folder}/clip"]
    output = folder / f"run-{data}-{len(more)}"
    run("train/train_ldm.py", f"input={folder}/{data}", f"output={output}", *encoders, *SETTINGS, *more)
    return metric_rows(output)


@pytest.mark.processes
@pytest.mark.timeout(400)
def test_the_same_losses_as_on_stored_latents(folder: Path) -> None:
    run(
        "data_pipeline/precompute_latents.py", f"input={folder}/shards", f"output={folder}/latents", "dtype=float32",
        f"autoencoder.path={folder}/autoencoder", f"clip.path={folder}/clip",
    )  # fmt: skip
    stored, online = train(folder, "latents"), train(folder, "shards")
    for name in ("loss", "heldout_loss", "heldout_loss_q2"):
        expected = [row[name] for row in stored if name in row]
        assert len(expected) >= 1
        np.testing.assert_allclose([row[name] for row in online if name in row], expected, rtol=1e-5)
    assert len([row for row in stored if "loss" in row]) == 8
    facts = [json.loads((folder / f"{run}/latents.json").read_text()) for run in ("run-latents-0", "run-shards-0")]
    for name in ("shapes", "fold", "conditions"):
        assert facts[0][name] == facts[1][name]
    for encoder in ("autoencoder", "text_encoder"):
        assert facts[0]["fingerprints"][encoder] == facts[1]["fingerprints"][encoder]


@pytest.mark.processes
def test_a_run_on_pictures_is_drawn_from_as_any_other(folder: Path, tmp_path: Path) -> None:
    train(folder, "shards", "conditioning=[text]", "training.save_every=8", "preview_every=8", "sampler.steps=2")
    source = folder / "run-shards-4"
    assert (source / "samples/step-00000008.png").exists()
    run("train/sample_images.py", f"input={source}", f"output={tmp_path}/drawn", "prompts=[thing]", "sampler.steps=2")
    assert list((tmp_path / "drawn").glob("*.png"))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {"conditioning": {"text": {}, "label": {}}},
            r"conditioning=\[label\] can't be computed from image-text shards",
        ),
        ({"clip": {"path": "/somewhere/none"}}, r"add clip\.path="),
        ({"clip": {"path": None}}, r"add clip\.path="),
        ({"autoencoder": {"path": "none"}}, r"add autoencoder\.path="),
    ],
)
def test_what_can_not_be_encoded_online_is_refused(changed: dict[str, Any], sentence: str) -> None:
    config = {"conditioning": {"text": {}}, "autoencoder": {"path": "a"}, "clip": {"path": "b"}} | changed
    with pytest.raises(UserError, match=sentence):
        OnlineLatents.of(config, lambda *_, **__: pytest.fail("nothing is built"), torch.device("cpu"))
