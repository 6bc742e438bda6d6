"""Autoencoders beyond Stable Diffusion 1's: 16 channels with a shift and without quant_conv, and tiny ones."""

import json

import pytest
import torch

from data_pipeline.common.errors import UserError
from train.data.ldm_inputs import with_base_model_scaling
from train.models.autoencoder import AutoencoderKL
from train.models.latents import LatentScaling, OneFactor
from train.models.tiny_autoencoder import TinyAutoencoder
from train.sampling.decoders import load_decoder, with_decoder
from train.sampling.generator import Generator
from train.weights import diffusers, stable_diffusion
from train.weights.foreign import to_foreign, write_tensors
from train.weights.pipeline import with_one_factor
from train.weights.shapes import autoencoder_options

pytestmark = pytest.mark.slow
SD3 = {"scaling_factor": 1.5305, "shift_factor": 0.0609}


@pytest.fixture
def sd3_folder(tmp_path):
    """An AutoencoderKL of Stable Diffusion 3's and FLUX' form as diffusers saves it, but narrow; and diffusers' own."""
    from diffusers import AutoencoderKL as Theirs

    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    theirs = Theirs(
        block_out_channels=[32, 64], layers_per_block=1, latent_channels=16, use_quant_conv=False,
        use_post_quant_conv=False, sample_size=32, **blocks, **SD3,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae", theirs.eval()


def test_one_of_16_channels_with_a_shift(sd3_folder, tmp_path, relative_error, same_weights):
    folder, theirs = sd3_folder
    ours = diffusers.load_autoencoder(folder)
    images, z = torch.randn(2, 3, 16, 16), torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        moments = theirs.encode(images).latent_dist
        assert relative_error(ours.encode(images).mean, moments.mean) < 1e-5
        assert relative_error(ours.decode(z), theirs.decode(z).sample) < 1e-5
    x0 = LatentScaling(**ours.stated_scaling).to_model(z)
    torch.testing.assert_close(x0, (z - SD3["shift_factor"]) * SD3["scaling_factor"])
    diffusers.save_autoencoder(tmp_path / "again", ours, **SD3)
    assert same_weights(diffusers.load_autoencoder(tmp_path / "again"), ours)
    write_tensors(tmp_path / "ae.safetensors", to_foreign(stable_diffusion.autoencoder_map(ours), ours.state_dict()))
    single = stable_diffusion.load_autoencoder(tmp_path / "ae.safetensors")  # as FLUX' ae.safetensors
    assert same_weights(single, ours)
    assert autoencoder_options(single) == autoencoder_options(ours)
    assert single.fingerprint == ours.fingerprint


def test_its_scale_and_shift_are_folded_for_export(sd3_folder, relative_error):
    """diffusers' StableDiffusionPipeline applies one factor and no shift: the exported first stage needs no more."""
    ours = diffusers.load_autoencoder(sd3_folder[0])
    scaling = LatentScaling(**ours.stated_scaling)
    folded, factor, facts = with_one_factor(ours, scaling)
    x0, images = torch.randn(2, 16, 8, 8), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert relative_error(folded.decode(x0 / factor), ours.decode(scaling.from_model(x0))) < 1e-5
        assert relative_error(folded.encode(images).mean * factor, scaling.to_model(ours.encode(images).mean)) < 1e-5
        ratio = (folded.encode(images).logvar - ours.encode(images).logvar) / 2
    torch.testing.assert_close(ratio.exp() * factor, torch.full_like(ratio, SD3["scaling_factor"]))
    assert facts == {}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scaling_factor": None}, "has a shift of the latents but no scaling_factor"),
        ({"latents_mean": [0.0] * 3, "shift_factor": None}, "latents_mean and latents_std must have 16 values"),
        ({"use_post_quant_conv": True}, "use_post_quant_conv=True is not supported"),
        ({"down_block_types": ["DownEncoderBlock2D", "X"]}, "down_block_types"),
        ({"_class_name": "AutoencoderTiny"}, "only decodes previews here: use decoder="),
        ({"_class_name": "AutoencoderDC"}, "contains AutoencoderDC, but must contain one of AutoencoderKL"),
    ],
)
def test_what_is_not_known_is_refused(sd3_folder, changed, message):
    config = json.loads((sd3_folder[0] / "config.json").read_text())
    (sd3_folder[0] / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(UserError, match=message):
        diffusers.load_autoencoder(sd3_folder[0])


def test_the_stated_scaling_goes_with_a_published_start(make_facts, tmp_path):
    stated = {"mean": [0.0609] * 4, "std": [1 / 1.5305] * 4}
    config = {"start_from": str(tmp_path), "scaling_factor": None, "shift_factor": None, "conditioning": {}}
    facts = with_base_model_scaling(config, make_facts(stated=stated))
    assert (facts.mean, facts.std) == (stated["mean"], stated["std"])
    given = {**config, "scaling_factor": 1.5305, "shift_factor": 0.0609}
    same = make_facts(stated=stated).checked(OneFactor.of(given))
    assert with_base_model_scaling(given, same) == same
    with pytest.raises(UserError, match=r"scaling_factor=0.18215 shift_factor=0 is not what the first stage"):
        with_base_model_scaling({**config, "scaling_factor": 0.18215}, make_facts(stated=stated))
    with pytest.raises(UserError, match=r"add scaling_factor=0.18215"):
        with_base_model_scaling(config, make_facts())
    with pytest.raises(UserError, match=r"shift_factor=0.0609 needs scaling_factor"):
        OneFactor.of({"scaling_factor": None, "shift_factor": 0.0609})


@pytest.fixture
def tiny_folder(tmp_path):
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    theirs = AutoencoderTiny(
        encoder_block_out_channels=[8] * 3, decoder_block_out_channels=[8] * 3, num_encoder_blocks=[1, 2, 2],
        num_decoder_blocks=[2, 2, 1], latent_channels=4,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny", theirs.eval()


def test_a_tiny_one_is_diffusers(tiny_folder, relative_error):
    folder, theirs = tiny_folder
    ours = load_decoder(str(folder))
    assert isinstance(ours, TinyAutoencoder)
    images, x0 = torch.rand(2, 3, 16, 16) * 2 - 1, 2 * torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        assert relative_error(ours.encode(images), theirs.encode(images).latents) < 1e-5
        assert relative_error(ours.decode(x0), theirs.decode(x0).sample) < 1e-5
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "upsample_fn": "bilinear"}))
    with pytest.raises(UserError, match="upsample_fn=bilinear is not supported here"):
        load_decoder(str(folder))


def a_generator(autoencoder):
    return Generator(None, None, None, None, autoencoder.decode, (4, 4, 4), torch.device("cpu"))


def test_another_decoder_of_the_same_latents(tiny_folder, make_facts, tmp_path):
    """A tiny one gets x0 as its family scales it; a tuned one needs the encoder bit for bit; others are refused."""
    torch.manual_seed(3)
    own = AutoencoderKL(channels=(32, 32, 64), layers_per_block=1)
    diffusers.save_autoencoder(tmp_path / "own" / "vae", own, 0.18215)
    own, facts = diffusers.load_autoencoder(tmp_path / "own"), make_facts()
    z = torch.randn(1, 4, 4, 4)
    tiny = with_decoder(a_generator(own), str(tiny_folder[0]), own, facts)
    with torch.no_grad():
        torch.testing.assert_close(tiny.decode(z), load_decoder(str(tiny_folder[0])).decode(z * 0.18215))
    tuned = diffusers.load_autoencoder(tmp_path / "own")
    tuned.decoder.conv_out.bias += 0.5
    diffusers.save_autoencoder(tmp_path / "tuned" / "vae", tuned)
    with torch.no_grad():
        torch.testing.assert_close(
            with_decoder(a_generator(own), str(tmp_path / "tuned"), own, facts).decode(z), own.decode(z) + 0.5
        )
    tuned.encoder.conv_out.bias += 0.5
    diffusers.save_autoencoder(tmp_path / "other" / "vae", tuned)
    with pytest.raises(UserError, match="has another encoder than the autoencoder of this run's latents"):
        with_decoder(a_generator(own), str(tmp_path / "other"), own, facts)
    wide = AutoencoderKL(channels=(32, 64), layers_per_block=1)
    diffusers.save_autoencoder(tmp_path / "wide" / "vae", wide)
    with pytest.raises(UserError, match=r"decodes 4 channels at f=2, but this run's latents have 4 at f=4"):
        with_decoder(a_generator(own), str(tmp_path / "wide"), own, facts)
    own.stated_scaling = None
    with pytest.raises(UserError, match="scaled by one factor, but neither"):
        with_decoder(a_generator(own), str(tiny_folder[0]), own, facts)
    with pytest.raises(UserError, match="does not exist"):
        with_decoder(a_generator(own), str(tmp_path / "nowhere"), own, facts)
