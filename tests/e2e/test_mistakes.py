"""A mistake gets one sentence with the remedy, before anything is written; exit code 2, or 3 for damaged data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from synthetic import DEMO_LATENTS, NO_ENCODERS, TINY_LATENTS, TINY_UNET, run, write_splits

from data_pipeline.shards.manifest import Manifest
from train.models.autoencoder import AutoencoderKL
from train.weights.saved import save_model

pytestmark = pytest.mark.processes

SMALL = {"latent_channels": 4, "channels": [8, 8], "layers_per_block": 1, "norm_groups": 4, "mid_attention": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """latents/ (tiny), cut/ (its first shard cut short), demo_shaped/, and an autoencoder that made none of them."""
    folder = tmp_path_factory.mktemp("mistakes")
    write_splits(folder / "latents", TINY_LATENTS)
    write_splits(folder / "demo_shaped", DEMO_LATENTS, samples=16)
    shard = write_splits(folder / "cut", TINY_LATENTS) / "train/shards/000001.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    Manifest("image-text", ()).save(folder / "pictures/train")
    (folder / "other").mkdir()
    (folder / "other/run_id").write_text("train_clip 0a1b2c3d\n")
    torch.manual_seed(0)
    save_model(folder / "stranger", "AutoencoderKL", SMALL, AutoencoderKL(**SMALL).state_dict(), {})
    return folder


LDM = ["train/train_ldm.py", "output={folder}/run", "training.steps=2", *TINY_UNET, *NO_ENCODERS]
MISTAKES = {
    "no input": (["train/train_ldm.py", "output={folder}/run"], 2, "input must be given"),
    "wrong path": ([*LDM, "input={folder}/nowhere"], 2, "nowhere/train is not a data set"),
    "batch and streams": ([*LDM, "input={folder}/latents", "training.batch_size=12"], 2, "data.streams=8"),
    "accumulation": ([*LDM, "input={folder}/latents", "training.accumulation=3"], 2, "multiple of 3"),
    "unet of another width": ([*LDM, "input={folder}/demo_shaped"], 2, "set unet.context_dim=192"),
    "cut shard": ([*LDM, "input={folder}/cut"], 3, "000001.tar has 3000 bytes, but its manifest says"),
    "latents of another autoencoder": (
        [*LDM, "input={folder}/latents", "autoencoder.path={folder}/stranger"],
        2,
        "the latents were made with autoencoder none",
    ),
    "no such dtype": ([*LDM, "input={folder}/latents", "engine.dtype=fp8"], 2, "use one of auto, fp32, bf16, fp16"),
    "bf16 without masters": ([*LDM, "input={folder}/latents", "engine=zero0", "engine.dtype=bf16"], 2, "engine=zero1"),
    "flow on a curved process": ([*LDM, "input={folder}/latents", "process=scaled_linear"], 2, "Flow can't be used"),
    "a run of another kind": ([*LDM, "input={folder}/latents", "output={folder}/other"], 2, "is a run of train_clip"),
    "no such schedule": ([*LDM, "input={folder}/latents", "optimizer.schedule.kind=step"], 2, "constant, cosine"),
    "guidance.scale=abc": (
        ["train/sample_images.py", "input={folder}/run", "prompts=[a]", "guidance.scale=abc"],
        2,
        "guidance.scale=abc is not valid: use a number that is finite, or null",
    ),
    "no run to sample": (["train/sample_images.py", "input={folder}/run", "prompts=[a]"], 2, "use the output= of"),
    "no run to evaluate": (
        ["train/evaluate_ldm.py", "input={folder}/run", "shards={folder}/nowhere"],
        2,
        "/run is not a run (no config.yaml there)",
    ),
    "latents where pictures are needed": (
        ["train/train_autoencoder.py", "input={folder}/latents", "output={folder}/run"],
        2,
        "image-text shards are needed",
    ),
    "no such condition": (
        ["data_pipeline/precompute_latents.py", "input={folder}/latents", "output={folder}/run", "conditions=[txt]"],
        2,
        "conditions=txt does not exist: use hole, image_embedding, label, layout, low_resolution, text or text_t5",
    ),
    "no such conditioning": ([*LDM, "input={folder}/latents", "conditioning=[txt]"], 2, "joint_text, label, layout,"),
    "no such option": ([*LDM, "input={folder}/latents", "training.stps=3"], 2, "is it training.steps"),
    "no such key at the top": ([*LDM, "input={folder}/latents", "+foo=1"], 2, "there is no option foo (see --help)"),
    "a seed that is none": ([*LDM, "input={folder}/latents", "seed=abc"], 2, "seed=abc is not valid: use a whole"),
    "one beta": ([*LDM, "input={folder}/latents", "optimizer.betas=[0.9]"], 2, "optimizer.betas=[0.9] is not valid"),
    "a dropout of 2": ([*LDM, "input={folder}/latents", "objective.prompt_dropout=2"], 2, "a number from 0 to 1"),
    "a batch of thousands of epochs": (
        [*LDM, "input={folder}/latents", "training.batch_size=100000"],
        2,
        "(64 samples) more than 10 times a step: lower it",
    ),
    "latents into their pictures": (
        ["data_pipeline/precompute_latents.py", "input={folder}/latents", "output={folder}/latents/",
         "autoencoder.path=a", "clip.path=b"],
        2,
        "is the same folder as input=: choose another one for the latents",
    ),
    "shards into their pictures": (
        ["data_pipeline/make_shards.py", "source=folder", "input={folder}", "output={folder}"],
        2,
        "is the same folder as input=: choose another one for the shards",
    ),
    "fine-tuning of nothing": (
        [*LDM, "input={folder}/latents", "experiment=sd15_finetune"], 2, "fine-tunes a trained model: add start_from",
    ),
    "a start that is no place": ([*LDM, "input={folder}/latents", "start_from={folder}/no"], 2, "no does not exist"),
    "the unet of nothing": (
        ["train/train_ldm.py", "output={folder}/run", "input={folder}/latents", "unet=from_start", *NO_ENCODERS],
        2,
        "as unet=from_start uses its U-Net",
    ),
    "no such encoder": (
        ["data_pipeline/precompute_latents.py", "input={folder}/pictures", "output={folder}/run",
         "autoencoder.path={folder}/nowhere", "clip.path={folder}/nowhere"],
        2,
        "use the output= of a finished train_autoencoder.py run",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_sentence_and_nothing_written(folder: Path, mistake: str) -> None:
    (script, *arguments), code, sentence = MISTAKES[mistake]
    done = run(script, *(argument.format(folder=folder) for argument in arguments), check=False)
    said = done.stderr.strip().splitlines()
    assert done.returncode == code, done.stderr
    assert said[-1].startswith("error: "), done.stderr
    assert sentence in said[-1]
    assert "Traceback" not in done.stderr
    assert "outlasts" not in done.stderr  # no warning about a run that does not begin
    assert not (folder / "run").exists()
