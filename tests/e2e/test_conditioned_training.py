"""Every kind of condition through the whole chain, as a user types it: shards, latents, a few steps, pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from synthetic import metric_rows, run

pytestmark = pytest.mark.processes

SMALL = ["unet.channels=[16,32]", "unet.heads=2", "unet.norm_groups=8", "training.steps=3", "training.batch_size=8",
         "preview_samples=4", "preview_every=3", "validate_every=3", "sampler.steps=2", "training.wandb_project=null",
         "training.log_every=1"]  # fmt: skip
EXPERIMENTS = {
    "class_label": ["labels=[hearts,shapes]", "samples_per_prompt=2"],
    "super_resolution_text": ["prompts=red heart", "images={folder}/small.png"],
    "inpainting": ["prompts=red heart", "images={folder}/small.png", "holes=[0.25,0.25,0.75,0.75]"],
    "image_variations": ["images=[{folder}/small.png,{folder}/small.png]"],
    "joint_text": ["prompts=[red heart,blue circle]", "negative_prompt=flag"],
    "unconditional": ["samples_per_prompt=2"],
}
IN_BF16 = {"LDT_CPU_BF16": "1"}  # by engine.dtype=auto, as on a CPU that has it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 96 drawings, a first stage and a CLIP after a few steps, and latents with every condition."""
    folder = tmp_path_factory.mktemp("conditions")
    groups = [f"~source.things.{name}" for name in ("flags", "faces", "animals", "plants", "food", "things")]
    run("data_pipeline/make_shards.py", "source=openmoji_demo", *groups, f"output={folder}/shards")
    few = ["training.steps=4", "training.batch_size=16", "validate_every=4", "training.log_every=2"]
    run("train/train_autoencoder.py", f"input={folder}/shards", f"output={folder}/autoencoder", *few,
        "autoencoder.channels=[16,16]")  # fmt: skip
    run("train/train_clip.py", f"input={folder}/shards", f"output={folder}/clip", *few, "clip.text.width=32",
        "clip.text.layers=1", "clip.vision.layers=1", variables=IN_BF16)  # fmt: skip
    run("data_pipeline/precompute_latents.py", f"input={folder}/shards", f"output={folder}/latents", *encoders(folder),
        "conditions=[text,label,image_embedding,low_resolution,hole]")  # fmt: skip
    red = np.full((16, 16, 3), (220, 30, 40), np.uint8)
    Image.fromarray(red).save(folder / "small.png")
    return folder


def encoders(folder: Path) -> list[str]:
    return [f"autoencoder.path={folder}/autoencoder", f"clip.path={folder}/clip"]


def train(folder: Path, name: str, *more: str) -> Path:
    run("train/train_ldm.py", f"input={folder}/latents", f"output={folder}/{name}", *encoders(folder),
        f"experiment={name}", *SMALL, *more)  # fmt: skip
    return folder / name


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_trained_and_drawn(folder: Path, name: str) -> None:
    width = [] if name in ("super_resolution", "unconditional") else ["unet.context_dim=32"]
    vector = ["unet.vector_dim=128"] if name in ("super_resolution_text", "inpainting") else []
    trained = train(folder, name, *width, *vector)
    assert len(list((trained / "samples").glob("*.png"))) == 1
    asked = [option.format(folder=folder) for option in EXPERIMENTS[name]]
    assert "2 steps" in run("train/sample_images.py", f"input={trained}", *asked).stdout  # as its own sample grids
    drawn = sorted((trained / "drawn").glob("0*.png"))
    assert drawn
    assert all(Image.open(path).size == (64, 64) for path in drawn)
    both = 2 if name in ("super_resolution", "super_resolution_text", "inpainting") else 1  # the given, then the drawn
    assert Image.open(trained / "drawn/grid.png").width == 8 + len(drawn) * (64 * both + 8)
    if name == "class_label":
        evaluate = ["train/evaluate_ldm.py", f"input={trained}", f"shards={folder}/shards", "captions=4"]
        assert "nearest picture in the right class" in run(*evaluate, "heldout_captions=4", "sampler.steps=2").stdout
        assert 0 <= json.loads((trained / "evaluation/evaluation.json").read_text())["nearest_is_of_class"] <= 1
        wrong = run("train/sample_images.py", f"input={trained}", "prompts=red heart", check=False)
        assert "this run is conditioned on labels: add labels=" in wrong.stderr
        wrong = run("train/sample_images.py", f"input={trained}", "labels=hearts", "negative_prompt=a", check=False)
        assert "not conditioned on prompts: leave negative_prompt= out" in wrong.stderr
        wrong = run("train/sample_images.py", f"input={trained}", "labels=cars", check=False)
        assert "class cars is unknown: use one of hearts, shapes" in wrong.stderr
    if name == "joint_text":
        guidance_acts(trained)


def guidance_acts(trained: Path) -> None:
    """A negative prompt is another picture; guidance in an interval without a step is none; a bad one is a sentence."""
    options = {
        "unguided": ["guidance.scale=1"],
        "guided": ["guidance.scale=400"],
        "away": ["guidance.scale=400", "negative_prompt=a yellow flag"],
        "never": ["guidance.scale=400", "guidance.interval=[0.1,0.2]"],
    }
    for name, chosen in options.items():
        drawing = [f"input={trained}", f"output={trained}/{name}", "prompts=red heart", "sampler.steps=2"]
        run("train/sample_images.py", *drawing, *chosen)
    picture = {name: (trained / name / "0000-red-heart.png").read_bytes() for name in options}
    assert picture["never"] == picture["unguided"]
    assert len(set(picture.values())) == 3
    wrong = run("train/sample_images.py", f"input={trained}", "prompts=a", "guidance.interval=[0.8,0.2]", check=False)
    assert "error: guidance.interval=[0.8, 0.2] is not valid" in wrong.stderr


def test_layouts_from_pairs_to_pictures(folder: Path) -> None:
    pairs = ["source=openmoji_pairs", "source.count=60", "source.of.limit=6", "shard_size=8"]
    run("data_pipeline/make_shards.py", *pairs, f"output={folder}/pairs")
    run("data_pipeline/precompute_latents.py", f"input={folder}/pairs", f"output={folder}/laid_out",
        f"autoencoder.path={folder}/autoencoder", "conditions=[layout]")  # fmt: skip
    run("train/train_ldm.py", f"input={folder}/laid_out", f"output={folder}/layout", "experiment=layout",
        f"autoencoder.path={folder}/autoencoder", *SMALL, "unet.context_dim=32")  # fmt: skip
    layout = "layouts=[[[brazil,0,0,0.5,0.5],[canada,0.5,0.5,1,1]]]"
    run("train/sample_images.py", f"input={folder}/layout", layout, "sampler.steps=2")
    assert (folder / "layout/drawn/0000-brazil-and-canada.png").exists()
    wrong = run("train/sample_images.py", f"input={folder}/layout", "layouts=[brazil,0,0,1,1]", check=False)
    assert "error: layouts: " in wrong.stderr
    wrong = run("train/evaluate_ldm.py", f"input={folder}/layout", f"shards={folder}/shards", check=False)
    assert "no picture has the conditions of this run" in wrong.stderr


def test_a_classifier_guides_an_unconditional_run(folder: Path) -> None:
    """Both on latents scaled by one factor."""
    factor = "scaling_factor=0.5"
    trained = train(folder, "unconditional", f"output={folder}/guided", "training.steps=2", factor).parent / "guided"
    few = ["training.steps=4", "training.batch_size=16", "validate_every=4", "training.log_every=2", factor]
    done = run("train/train_classifier.py", f"input={folder}/latents", f"output={folder}/classifier", *few,
               "classifier.channels=[16,32]", fresh=True, variables=IN_BF16)  # fmt: skip
    assert "accuracy on" in done.stdout
    assert "dtype: bf16 (auto: " in done.stdout
    guide = [f"classifier.path={folder}/classifier", "labels=hearts", "sampler.steps=3"]
    pictures = []
    for scale in (0, 50):
        output = f"{folder}/by_{scale}"
        run("train/sample_images.py", f"input={trained}", *guide, f"classifier.scale={scale}", f"output={output}")
        pictures.append(np.array(Image.open(f"{output}/0000-hearts.png")).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() > 0
    other = ["process=scaled_linear", f"output={folder}/other_classifier", "classifier.channels=[16,32]"]
    run("train/train_classifier.py", f"input={folder}/latents", *few, *other)
    wrong = run("train/sample_images.py", f"input={trained}", *guide, f"classifier.path={folder}/other_classifier",
                check=False)  # fmt: skip
    assert "was trained with process" in wrong.stderr


def test_pixels_without_a_first_stage(folder: Path) -> None:
    run("data_pipeline/precompute_latents.py", f"input={folder}/shards", f"output={folder}/pixels",
        "autoencoder=identity", f"clip.path={folder}/clip")  # fmt: skip
    run("train/train_ldm.py", f"input={folder}/pixels", f"output={folder}/pixel_run", "experiment=pixel_space",
        f"clip.path={folder}/clip", *SMALL, "unet.context_dim=32")  # fmt: skip
    run("train/sample_images.py", f"input={folder}/pixel_run", "prompts=red heart", "sampler.steps=2")
    assert Image.open(folder / "pixel_run/drawn/0000-red-heart.png").size == (64, 64)


def test_an_export_of_pixels_says_what_x0_is(folder: Path) -> None:
    """There is no first stage in it that could."""
    run("data_pipeline/precompute_latents.py", f"input={folder}/shards", f"output={folder}/only_pixels",
        "autoencoder=identity", "conditions=[]")  # fmt: skip
    run("train/train_ldm.py", f"input={folder}/only_pixels", f"output={folder}/exportable", "experiment=pixel_space",
        "conditioning=[]", *SMALL, "unet.context_dim=null", "unet.vector_dim=null",
        "unet.self_attention_levels=null", "unet.transformer_depth=0", "preview_every=null")  # fmt: skip
    said = run("train/export_diffusers.py", f"input={folder}/exportable", f"output={folder}/exported").stdout
    about, facts = (json.loads((folder / path).read_text()) for path in ("exported/x0.json", "exportable/latents.json"))
    assert about == {name: facts[name] for name in ("mean", "std", "fold")}
    assert about["fold"] == 8
    assert f"x0 = (pixels - [{about['mean'][0]:.4g}" in said
    assert "then pixel_unshuffle by 8" in said


def test_a_training_starts_from_another_run(folder: Path) -> None:
    """The first loss of one that starts from another's weights, conditioner included, is the other's held-out loss."""
    width = "unet.context_dim=32"
    first = train(folder, "class_label", f"output={folder}/first", "training.steps=4", width).parent / "first"
    again = train(folder, "class_label", f"output={folder}/again", f"start_from={first}", "optimizer.lr=0", width,
                  "training.steps=1", "validate_every=1", "preview_every=null").parent / "again"  # fmt: skip
    losses = [[row["heldout_loss"] for row in metric_rows(run) if "heldout_loss" in row][-1] for run in (first, again)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    published = run("train/train_ldm.py", f"input={folder}/latents", f"output={folder}/never", *encoders(folder),
                    "experiment=unconditional", f"start_from={folder}/clip", check=False)  # fmt: skip
    assert "scaling_factor=0.18215" in published.stderr
    assert not (folder / "never").exists()


@pytest.mark.parametrize("name", ["class_label", pytest.param("joint_text", marks=pytest.mark.exhaustive)])
def test_conditioners_trained_jointly_learn_the_same_at_stage_3(folder: Path, name: str) -> None:
    """What they give leaves a module that DeepSpeed partitions: hooks must find it, or gradients would be lost."""
    found = {}
    for engine in ("zero0", "zero3"):
        options = [f"output={folder}/{name}_{engine}", f"engine={engine}", "unet.context_dim=32", "preview_every=null"]
        trained = train(folder, name, *options).parent / f"{name}_{engine}"
        found[engine] = load_file(trained / "checkpoints/step-00000003/ema.safetensors")
    assert any(name.startswith("conditioner.") for name in found["zero0"])
    for name, expected in found["zero0"].items():
        np.testing.assert_allclose(found["zero3"][name], expected, atol=2e-5, err_msg=name)
