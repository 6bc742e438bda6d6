"""A trained run handed over to diffusers: their classes load it, and their pipeline draws our picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import run, write_splits

import train.models.torchvision_patch  # noqa: F401  (before diffusers imports torchvision)
from data_pipeline.common.saved_objects import build
from data_pipeline.shards.manifest import Manifest
from train.diffusion.randomness import generator_at
from train.diffusion.samplers import sample_ddim, trailing_times
from train.models.autoencoder import AutoencoderKL
from train.models.clip import CLIP
from train.sampling.generator import ConditionBatch, Guidance, Sampler
from train.sampling.trained_run import TrainedRun, open_run
from train.weights.saved import save_model

pytestmark = pytest.mark.processes

FIRST_STAGE = {"latent_channels": 4, "channels": [32, 32], "layers_per_block": 1, "norm_groups": 32}
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 128, "layers": 2, "heads": 2}
CLIP_OPTIONS = {
    "embed_dim": 5, "text": TEXT,
    "vision": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
}  # fmt: skip
UNET = ["unet.channels=[32,64]", "unet.norm_groups=32", "unet.heads=2", "unet.context_dim=128", "unet.vector_dim=null",
        "unet.in_channels=4", "unet.out_channels=4", "fold=1"]  # fmt: skip
QUIET = ["training.steps=3", "training.batch_size=8", "preview_every=null", "validate_every=null",
         "training.wandb_project=null"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """autoencoder/ and clip/ with random weights, latents/ that name them, and ldm/, a run on those."""
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    state = AutoencoderKL(**FIRST_STAGE).state_dict()
    marks = {"autoencoder": save_model(folder / "autoencoder", "AutoencoderKL", FIRST_STAGE, state, {})}
    marks["text_encoder"] = save_model(folder / "clip", "CLIP", CLIP_OPTIONS, CLIP(**CLIP_OPTIONS).state_dict(), {})
    write_splits(folder / "latents", {"moments.npy": (8, 8, 8), "text.npy": (8, 128), "pooled.npy": (5,)}, 16)
    statistics = {"mean": [0.3, -0.2, 0.1, 0.0], "std": [1.5, 0.7, 1.0, 2.0]}
    for split in ("train", "heldout"):
        manifest = Manifest.load(str(folder / "latents" / split), "latents")
        info = {**manifest.info, "latents": statistics}
        dataclasses.replace(manifest, fingerprints=marks, info=info).save(folder / "latents" / split)
    train_ldm(folder, "ldm", "process=scaled_linear", "parameterization=velocity")
    return folder


def train_ldm(folder: Path, name: str, *more: str) -> None:
    encoders = [f"autoencoder.path={folder}/autoencoder", f"clip.path={folder}/clip"]
    run("train/train_ldm.py", f"input={folder}/latents", f"output={folder}/{name}", *encoders, *UNET, *QUIET, *more)


@pytest.fixture(scope="module")
def exported(folder: Path) -> Path:
    """exported/, exported.safetensors, and what was said."""
    done = run("train/export_diffusers.py", f"input={folder}/ldm", f"output={folder}/exported",
               f"single_file={folder}/exported.safetensors", fresh=True)  # fmt: skip
    assert done.stdout.count("each part was read back and gives the same output") == 2
    assert "StableDiffusionPipeline.from_pretrained" in done.stdout
    return folder / "exported"


@pytest.fixture(scope="module")
def trained(folder: Path) -> TrainedRun:
    return open_run(str(folder / "ldm"), "latest")


@torch.no_grad()
def test_their_classes_load_each_part(exported: Path, trained: TrainedRun) -> None:
    from diffusers import AutoencoderKL as TheirKL
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([5.0, 800.0]), torch.randn(2, 8, 128)
    unet = UNet2DConditionModel.from_pretrained(exported, subfolder="unet")
    torch.testing.assert_close(unet(x, t, context).sample, trained.generator.network.unet(x, t, context))
    vae = TheirKL.from_pretrained(exported, subfolder="vae")
    assert vae.config.scaling_factor == 0.18215
    z = trained.facts.scaling.from_model(x)  # a mean and std for each channel here, one factor there
    torch.testing.assert_close(vae.decode(x / 0.18215).sample, trained.image.decode(z), rtol=1e-4, atol=1e-5)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    posterior, encoded = trained.image.encode(images), vae.encode(images).latent_dist
    torch.testing.assert_close(encoded.mean * 0.18215, trained.facts.scaling.to_model(posterior.mean))
    std = torch.tensor(trained.facts.std).view(1, -1, 1, 1)
    torch.testing.assert_close(encoded.std * 0.18215, (0.5 * posterior.logvar).exp() / std)
    text = CLIPTextModel.from_pretrained(exported, subfolder="text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(exported, subfolder="tokenizer")
    ids = tokenizer(["red heart", ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    expected = trained.text.encode_text(["red heart", ""]).tokens
    torch.testing.assert_close(text(ids).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


def test_their_pipeline_draws_our_picture(exported: Path, trained: TrainedRun) -> None:
    """Same start, DDIM over the same timesteps, guided away from the same null."""
    from diffusers import StableDiffusionPipeline

    text = trained.text.encode_text(["red heart", ""])
    trained.facts.null["text"].copy_(text.tokens[1])  # the data's is made up; a real one is the empty prompt's
    asked = ConditionBatch({"text": text.tokens[:1], "pooled": text.pooled[:1]}, ["red heart"])
    ours = trained.generator.draw(asked, Sampler(sample_ddim, 5, trailing_times), Guidance(scale=3.0), seed=7)
    noise = torch.randn(1, 4, 8, 8, generator=generator_at("cpu", 7, 0, "start"))
    pipeline = StableDiffusionPipeline.from_pretrained(exported)
    pipeline.set_progress_bar_config(disable=True)
    sigma = trained.generator.process.sigma(torch.tensor(999.0))
    theirs = pipeline(
        "red heart", latents=sigma * noise, num_inference_steps=5, guidance_scale=3.0, height=16, width=16
    )
    difference = np.abs(ours[0].astype(int) - np.array(theirs.images[0]).astype(int))
    assert ours[0].std() > 5
    assert difference.max() <= 2
    assert difference.mean() < 0.1


def test_the_single_file_holds_the_same(exported: Path, trained: TrainedRun) -> None:
    from train.weights.published import load_autoencoder, load_text_encoder, load_unet_weights

    file = str(exported.with_suffix(".safetensors"))
    unet = build(trained.config["unet"], "unet", "unet")
    load_unet_weights(unet, file)
    for name, value in trained.generator.network.unet.state_dict().items():
        assert torch.equal(unet.state_dict()[name], value), name
    assert load_autoencoder(file).fingerprint == load_autoencoder(str(exported)).fingerprint
    assert load_text_encoder(file).fingerprint == load_text_encoder(str(exported)).fingerprint


def test_a_training_starts_from_a_run(folder: Path, trained: TrainedRun) -> None:
    """With a learning rate of nothing, what it is after a step is what it started from."""
    still = ["training.steps=1", "optimizer.lr=0", "training.ema_decay=0"]
    train_ldm(folder, "started", f"start_from={folder}/ldm", *still)
    started = open_run(str(folder / "started"), "latest").generator.network.unet
    for name, value in trained.generator.network.unet.state_dict().items():
        assert torch.equal(started.state_dict()[name], value), name


MISTAKES = {
    "a full folder": (["ldm", "output={folder}/latents"], "already exists: choose a new or empty folder"),
    "a pickle": (["ldm", "single_file={folder}/x.ckpt"], "must end with .safetensors"),
    "no run": (["latents"], "is not a run"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_sentence_and_nothing_written(folder: Path, mistake: str) -> None:
    (name, *options), sentence = MISTAKES[mistake]
    options = [option.format(folder=folder) for option in options] or [f"output={folder}/nothing"]
    if not any(option.startswith("output=") for option in options):
        options.append(f"output={folder}/nothing")
    done = run("train/export_diffusers.py", f"input={folder}/{name}", *options, check=False)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (folder / "nothing").exists()
