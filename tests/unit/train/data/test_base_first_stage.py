"""What a first stage takes over from another one: weights and options from every form, and its refusals."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from entered import entered
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from data_pipeline.common.entry import CONF
from data_pipeline.common.errors import UserError
from train.data.base_first_stage import FROM_START, BaseFirstStage
from train.models.autoencoder import AutoencoderKL, VQModel
from train.weights import diffusers
from train.weights.foreign import to_foreign, write_tensors
from train.weights.saved import load_autoencoder, save_model, saved_fingerprint
from train.weights.stable_diffusion import FIRST_STAGE, autoencoder_map

OPTIONS = {"channels": [32, 32], "layers_per_block": 1, "attention_levels": [False, True]}
ASKED = {"_target_": FROM_START, "channels_last": True}


@pytest.fixture(params=["run", "diffusers", "file"])
def start(request, tmp_path):
    """(path, the model that is there) of a KL model, or as a file of a VQ model."""
    model = VQModel(codebook_size=20, **OPTIONS) if request.param == "file" else AutoencoderKL(**OPTIONS)
    if request.param == "run":
        save_model(tmp_path, "AutoencoderKL", OPTIONS, model.state_dict(), {})
        return str(tmp_path), model
    if request.param == "diffusers":
        diffusers.save_autoencoder(tmp_path / "vae", model, 0.5)
        return str(tmp_path), model
    theirs = to_foreign(autoencoder_map(model), model.state_dict())
    write_tensors(tmp_path / "model.safetensors", {FIRST_STAGE + name: value for name, value in theirs.items()})
    return str(tmp_path / "model.safetensors"), model


def test_options_and_weights_are_taken_over(start):
    path, trained = start
    base = BaseFirstStage.at(path)
    options = base.configuration(ASKED)
    assert options["_target_"] == f"train.models.autoencoder.{type(trained).__name__}"
    assert options["channels_last"] is True
    other = type(trained)(**{name: value for name, value in options.items() if name != "_target_"})
    base.load_into(other)
    assert all(torch.equal(other.state_dict()[name], value) for name, value in trained.state_dict().items())
    assert base.configuration({"_target_": "x", "patch": 2}) == {"_target_": "x", "patch": 2}
    assert base.identity == BaseFirstStage.at(path).identity
    with torch.no_grad():
        trained.decoder.conv_out.bias += 1.0
    assert dataclasses.replace(base, weights=trained.state_dict()).identity != base.identity


def test_another_architecture_is_one_sentence(tmp_path):
    save_model(tmp_path, "AutoencoderKL", OPTIONS, AutoencoderKL(**OPTIONS).state_dict(), {})
    base = BaseFirstStage.at(str(tmp_path))
    wide = AutoencoderKL(**{**OPTIONS, "channels": [32, 64], "attention_levels": None}, quant_conv=False)
    asked = r"attention_levels=None, quant_conv=False, channels=\[32, 64\]"
    has = r"attention_levels=\[False, True\], quant_conv=True, channels=\[32, 32\]"
    with pytest.raises(UserError, match=f"has a first stage with {has}, but autoencoder= has {asked}: use autoenc"):
        base.load_into(wide)
    with pytest.raises(UserError, match=r"class=AutoencoderKL.* autoencoder= has class=VQModel.*codebook_size=8192"):
        base.load_into(VQModel(latent_channels=4, **OPTIONS))


def test_what_is_no_first_stage_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"start_from=.*nowhere does not exist"):
        BaseFirstStage.at(str(tmp_path / "nowhere"))
    (tmp_path / "run_id").write_text("train_autoencoder x")
    with pytest.raises(UserError, match="contains no first stage: use a finished train_autoencoder"):
        BaseFirstStage.at(str(tmp_path))


MISTAKES = {
    "autoencoder=from_start": ("train/train_autoencoder", "start_from must be given, as autoencoder=from_start uses"),
    "objective.train=decoder": (
        "train/train_autoencoder",
        "start_from must be given, as objective.train=decoder keeps",
    ),
    "start_from=nowhere": ("train/train_autoencoder", "start_from=nowhere does not exist"),
}


@pytest.mark.parametrize("option", MISTAKES)
def test_a_sentence_before_anything_is_read(option, tmp_path):
    script, sentence = MISTAKES[option]
    done = entered(script, "input=nowhere", f"output={tmp_path}/run", option)
    assert (done.code, sentence in done.error) == (2, True), done.error
    assert not (tmp_path / "run").exists()


def test_from_start_is_for_training_first_stages_only():
    """What any other script builds from conf/autoencoder/from_start.yaml."""
    with pytest.raises(
        InstantiationException, match=r"is only for train_autoencoder\.py, with start_from=: use autoencoder=trained"
    ):
        instantiate(yaml.safe_load((Path(CONF) / "autoencoder/from_start.yaml").read_text()))


def test_a_tuned_decoder_has_the_fingerprint_of_its_latents(tmp_path):
    """And keeps the scaling that a published folder states; so does a decoder that is tuned once more."""
    diffusers.save_autoencoder(tmp_path / "vae", AutoencoderKL(**OPTIONS), 0.5)
    first = BaseFirstStage.at(str(tmp_path / "vae"))
    for name in ("tuned", "again"):
        mark = save_model(tmp_path / name, "AutoencoderKL", OPTIONS, dict(first.weights), first.kept_by_decoder())
        tuned = load_autoencoder(str(tmp_path / name))
        assert mark != tuned.fingerprint == first.made_latents_of == saved_fingerprint(str(tmp_path / name))
        assert tuned.stated_scaling == first.stated_scaling == {"mean": [0.0] * 4, "std": [2.0] * 4}
        first = BaseFirstStage.at(str(tmp_path / name))
    save_model(tmp_path / "all", "AutoencoderKL", OPTIONS, dict(first.weights), {})
    assert load_autoencoder(str(tmp_path / "all")).stated_scaling is None
