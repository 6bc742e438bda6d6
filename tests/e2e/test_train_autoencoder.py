"""VQ and adversarial training of first stages, and the sentence for what can't be trained. Real processes: minutes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from synthetic import metric_rows, run

from train.models.autoencoder import VQModel
from train.weights.foreign import read_tensors
from train.weights.perceptual import package_file
from train.weights.saved import load_autoencoder

pytestmark = pytest.mark.processes

SHORT = [
    "training.batch_size=16", "training.log_every=1", "validate_every=null", "optimizer.schedule.kind=constant",
    "optimizer.lr=1e-3", "autoencoder.channels=[16,16]",
]  # fmt: skip
ADVERSARY = [
    "objective/adversary=patchgan", "objective.adversary.start=10", "objective.adversary.discriminator.channels=32",
]  # fmt: skip
PERCEPTUAL = ["objective/perceptual=lpips", "objective.perceptual.weights=package"]
DTYPES = ["fp32", pytest.param("bf16", marks=pytest.mark.exhaustive)]  # a minute on a CPU without bf16


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first_stages") / "shards"
    run("data_pipeline/make_shards.py", "source=openmoji_demo", "source.limit=48", f"output={folder}", "shard_size=8")
    return folder


def train(shards: Path, output: Path, *options: str, ranks: int = 2, check: bool = True) -> list[dict]:
    arguments = [f"input={shards}", f"output={output}", *SHORT, *options]
    run("train/train_autoencoder.py", *arguments, ranks=ranks, check=check)
    return [row for row in metric_rows(output) if "loss" in row]


@pytest.mark.parametrize("dtype", DTYPES)
def test_adversarial_training_at_two_ranks(shards: Path, tmp_path: Path, dtype: str) -> None:
    rows = train(shards, tmp_path / "run", *ADVERSARY, "training.steps=30", f"engine.dtype={dtype}")
    assert len(rows) == 30
    assert all(np.isfinite(row["loss"]) and np.isfinite(row["discriminator"]) for row in rows)
    assert not any(row["discriminator"] or row["gan"] for row in rows[:10])
    assert sum(row["discriminator"] > 0 for row in rows) > 10  # at times it is sure of all patches: hinge's zero
    assert [row["adaptive_weight"] > 0 for row in rows] == [False] * 10 + [True] * 20
    assert rows[-1]["l1"] < 0.9 * rows[0]["l1"]
    weights = load_file(tmp_path / "run/weights.safetensors")
    assert {name.partition(".")[0] for name in weights} == {"encoder", "decoder", "quant_conv", "post_quant_conv"}
    assert load_autoencoder(str(tmp_path / "run")).factor == 4


def test_the_number_of_ranks_does_not_matter(shards: Path, tmp_path: Path) -> None:
    """Right after the adversary's start: what it amplifies later are roundings."""
    options = [*ADVERSARY, *PERCEPTUAL, "objective.adversary.start=2", "training.steps=5"]
    reference = train(shards, tmp_path / "one", *options, "engine=zero0", ranks=1)
    rows = train(shards, tmp_path / "two", *options, "engine=zero2")
    for name in ("loss", "perceptual", "gan", "discriminator", "adaptive_weight"):
        expected = [row[name] for row in reference]
        np.testing.assert_allclose([row[name] for row in rows], expected, rtol=2e-3, err_msg=name)
    recorded = yaml.safe_load((tmp_path / "two/config.yaml").read_text())
    assert recorded["objective"]["perceptual_space"] == "ST-LPIPS VGG16"
    for file in (tmp_path / "two/checkpoints").rglob("*.safetensors"):
        with safe_open(file, "pt") as checkpoint:
            assert not [name for name in checkpoint.keys() if "perceptual" in name]  # noqa: SIM118


@pytest.mark.exhaustive
def test_other_perceptual_weights_are_another_run(shards: Path, tmp_path: Path) -> None:
    train(shards, tmp_path / "run", *PERCEPTUAL, "training.steps=2", ranks=1)
    state = read_tensors(package_file())
    torch.save(state | {"lin0.model.1.weight": 2 * state["lin0.model.1.weight"]}, tmp_path / "other.pth")
    options = [*SHORT, *PERCEPTUAL[:1], f"objective.perceptual.weights={tmp_path / 'other.pth'}", "training.steps=4"]
    paths = [f"input={shards}", f"output={tmp_path / 'run'}"]
    done = run("train/train_autoencoder.py", *paths, *options, "training.resume=must", check=False)
    assert done.returncode == 2
    assert re.search("error: .*perceptual", done.stderr), done.stderr


def test_partitioned_codebook(shards: Path, tmp_path: Path) -> None:
    """Of more values than ZeRO 3 leaves whole on each rank."""
    options = ["autoencoder=vq_f4_demo", "autoencoder.codebook_size=4096", "training.steps=5"]
    reference = train(shards, tmp_path / "whole", *options, "engine=zero1")
    rows = train(shards, tmp_path / "parts", *options, "engine=zero3")
    for name in ("loss", "quantization", "revival"):
        expected = [row[name] for row in reference]
        np.testing.assert_allclose([row[name] for row in rows], expected, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_resumed_bit_for_bit(shards: Path, tmp_path: Path, dtype: str) -> None:
    options = [*ADVERSARY, "autoencoder=vq_f4_demo", "objective.adversary.start=3", "training.save_every=6"]
    options += [f"engine.dtype={dtype}"]
    whole = train(shards, tmp_path / "whole", *options, "training.steps=12")
    train(shards, tmp_path / "parts", *options, "training.steps=6")
    parts = train(shards, tmp_path / "parts", *options, "training.steps=12", "training.resume=must")
    assert [row["loss"] for row in parts] == [row["loss"] for row in whole]
    marks = [json.loads((tmp_path / part / "config.json").read_text())["fingerprint"] for part in ("whole", "parts")]
    assert marks[0] == marks[1]
    about = json.loads((tmp_path / "parts/config.json").read_text())
    assert about["class"] == "VQModel"
    model = load_autoencoder(str(tmp_path / "parts"))
    assert isinstance(model, VQModel)
    assert model.reconstruct(torch.zeros(1, 3, 64, 64)).shape == (1, 3, 64, 64)


MISTAKES = {
    "no first stage": (["autoencoder=identity"], "Identity has no weights to train"),
    "a trained first stage": (
        ["autoencoder=trained", "autoencoder.path=x"],
        "load_autoencoder has no weights to train",
    ),
    "VQ with a KL weight": (["autoencoder=vq_f4_demo", "objective.kl_weight=1e-4"], "set objective.kl_weight=null"),
    "partitions": (["objective/adversary=patchgan", "engine=zero3"], "needs whole parameters.* use engine=zero2"),
    "weights": (["objective/perceptual=lpips"], "objective.perceptual.weights must be given"),
    "crops": (["objective/adversary=patchgan", "objective.crop=16"], "crop=16 is too small for the discriminator"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_sentence_before_anything_is_loaded(tmp_path: Path, mistake: str) -> None:
    options, sentence = MISTAKES[mistake]
    # The shards, which are nowhere, are not looked for.
    done = run("train/train_autoencoder.py", "input=nowhere", f"output={tmp_path / 'run'}", *options, check=False)
    assert done.returncode == 2
    assert re.match(f"error: .*{sentence}", done.stderr.strip().splitlines()[-1]), done.stderr
    assert not (tmp_path / "run").exists()


RECIPES = ["ldm_kl_f4", "ldm_kl_f8", "ldm_kl_f16", "ldm_kl_f32", "ldm_vq_f4", "ldm_vq_f8", "ldm_vq_f16", "sd_kl_f8"]
# Narrow networks, the discriminator from the second step on; pictures of 64 pixels.
NARROW = [
    "autoencoder.norm_groups=4", "objective.adversary.discriminator.channels=8", "objective.adversary.start=1",
    "training.steps=3", "training.batch_size=8", "training.micro_batch=null", "data.streams=8", "validate_every=null",
    "training.log_every=1", "validation_pictures=4", "training.save_every=2",
]  # fmt: skip
WIDTHS = {"f4": [8, 8, 16], "f8": [8, 8, 16, 16], "f16": [8, 8, 8, 16, 16], "f32": [8, 8, 8, 8, 16, 16]}
# In CompVis' units: what their configurations say.
PUBLISHED = {
    "kl": {"kl_weight": 1e-6, "disc_weight": 0.5, "d_weight_delta": 1e-4},
    "vq": {"codebook_weight": 1.0, "beta": 0.25, "legacy": True, "d_weight_delta": 1e-4, "d_weight_max": 1e4},
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "ldm_vq_f16" else [pytest.mark.exhaustive]) for n in RECIPES]
)
def test_published_recipes_take_three_steps(shards: Path, tmp_path: Path, name: str) -> None:
    _, kind, factor = name.split("_")
    options = [
        f"experiment={name}",
        *PERCEPTUAL[1:],
        *NARROW,
        f"autoencoder.channels={WIDTHS[factor]}".replace(" ", ""),
    ]
    output = tmp_path / "run"
    done = run("train/train_autoencoder.py", f"input={shards}", f"output={output}", *options)
    rows = [row for row in metric_rows(output) if "loss" in row]
    assert len(rows) == 3
    assert all(np.isfinite(row["loss"]) and row["perceptual"] > 0 for row in rows)
    assert [row["adaptive_weight"] > 0 for row in rows] == [False, True, True]
    assert "revival" not in rows[0]
    recorded = yaml.safe_load((output / "config.yaml").read_text())
    units = recorded["in_compvis_units"]
    assert {n: units[n] for n in PUBLISHED[kind]} == pytest.approx(PUBLISHED[kind])
    assert units["base_learning_rate"] == 4.5e-6
    assert recorded["optimizer"]["lr"] == pytest.approx(4.5e-6 * 8)
    assert recorded["optimizer"]["betas"] == [0.5, 0.9]
    assert "in CompVis' units, for pictures of 64x64: " in done.stdout


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "options",
    [
        ["objective/adversary=patchgan_batch_norm", "objective.adversary.turns=alternate", "autoencoder=vq_f4_demo"],
        ["objective/adversary=patchgan_batch_norm", "objective.log_variance=learned", "objective.adversary.ramp=8"],
        ["objective/adversary=patchgan", "objective.adversary.r1_weight=0.1", "objective.adversary.r1_every=2"],
    ],
    ids=["in turn", "variance", "r1"],
)
@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_options_resumed_bit_for_bit(shards: Path, tmp_path: Path, options: list[str], engine: str) -> None:
    """Stopped after an odd number of steps against the discriminator."""
    options = [*options, "objective.adversary.start=2", "training.save_every=5", f"engine={engine}"]
    options += ["objective.adversary.discriminator.channels=32"]
    whole = train(shards, tmp_path / "whole", *options, "training.steps=9")
    train(shards, tmp_path / "parts", *options, "training.steps=5")
    parts = train(shards, tmp_path / "parts", *options, "training.steps=9", "training.resume=must")
    for name in ("loss", "gan", "discriminator", "adaptive_weight"):
        assert [row[name] for row in parts] == [row[name] for row in whole], name
    marks = [json.loads((tmp_path / part / "config.json").read_text())["fingerprint"] for part in ("whole", "parts")]
    assert marks[0] == marks[1]
