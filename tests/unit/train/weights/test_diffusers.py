"""Diffusers' folders: they load what we save, we load what they save, and the bytes are the same."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.common.errors import DataError, UserError
from train.models.autoencoder import AutoencoderKL
from train.models.latents import LatentScaling
from train.models.unet import UNet
from train.weights import diffusers
from train.weights.published import load_unet_weights
from train.weights.shapes import autoencoder_options, unet_options

pytestmark = pytest.mark.slow
WEIGHTS = "diffusion_pytorch_model.safetensors"


def theirs_of(folder):
    import diffusers as library

    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    return getattr(library, kind).from_pretrained(folder)


def inputs_of(unet):
    x, t = torch.randn(2, unet.in_channels, 8, 8), torch.tensor([0.0, 900.0])
    return (x, t) if unet.context_dim is None else (x, t, torch.randn(2, 4, unet.context_dim))


def test_their_unet_reads_what_we_save_and_ours_what_they_save(unet, tmp_path, relative_error, sha256, same_weights):
    diffusers.save_unet(tmp_path / "ours", unet)
    theirs, inputs = theirs_of(tmp_path / "ours"), inputs_of(unet)
    with torch.no_grad():
        assert relative_error(unet(*inputs), theirs(*inputs).sample) < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = diffusers.load_unet(tmp_path / "theirs")  # with every entry of their configuration
    assert same_weights(loaded, unet)
    diffusers.save_unet(tmp_path / "again", loaded)
    assert sha256(tmp_path / "again")[WEIGHTS] == sha256(tmp_path / "theirs")[WEIGHTS]  # to the byte


def test_save_load_save_is_the_identity(unet, tmp_path, sha256, same_weights):
    diffusers.save_unet(tmp_path / "a" / "unet", unet)
    loaded = diffusers.load_unet(tmp_path / "a")
    assert unet_options(loaded) == unet_options(unet)
    assert same_weights(loaded, unet)
    diffusers.save_unet(tmp_path / "b" / "unet", loaded)
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")
    assert not any(p.is_meta for p in loaded.parameters())
    assert all(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("safe", [True, False])
def test_shards_with_an_index(sd1_unet, tmp_path, same_weights, safe):
    diffusers.save_unet(tmp_path / "whole", sd1_unet)
    theirs_of(tmp_path / "whole").save_pretrained(tmp_path / "parts", max_shard_size="1MB", safe_serialization=safe)
    assert len(list((tmp_path / "parts").glob("*-of-*"))) > 2
    assert same_weights(diffusers.load_unet(tmp_path / "parts"), sd1_unet)


def test_an_index_can_not_lead_out_of_its_folder(sd1_unet, tmp_path):
    diffusers.save_unet(tmp_path / "unet", sd1_unet)
    (tmp_path / "unet" / WEIGHTS).rename(tmp_path / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(sd1_unet.state_dict(), "../outside.safetensors")}
    (tmp_path / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"names \.\./outside\.safetensors, which is not in the same folder"):
        diffusers.load_unet(tmp_path)


def test_the_published_configurations_are_understood():
    """Stable Diffusion's config.json, with the old entries that theirs carry."""
    common = {
        "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "freq_shift": 0,
        "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "flip_sin_to_cos": True,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "downsample_padding": 1, "in_channels": 4,
        "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32,
        "out_channels": 4, "sample_size": 64, "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }  # fmt: skip
    sd1 = diffusers.unet_arguments({**common, "attention_head_dim": 8, "cross_attention_dim": 768})
    sd2 = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
    old = {"dual_cross_attention": False, "only_cross_attention": False, "num_class_embeds": None}
    sd2 = diffusers.unet_arguments({**common, **sd2, **old, "upcast_attention": True})
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(**sd1).parameters()) == 859_520_964
        assert sum(p.numel() for p in UNet(**sd2).parameters()) == 865_910_724
    assert (sd1["heads"], sd2["heads"]) == ([8] * 4, [5, 10, 20, 20])


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("act_fn", "gelu"),
        ("class_embed_type", "timestep"),
        ("addition_embed_type", "text_time"),
        ("norm_eps", 1e-6),
        ("flip_sin_to_cos", False),
        ("conv_in_kernel", 1),
        ("layers_per_block", [1, 2, 2]),
        ("transformer_layers_per_block", [1, 2, 10]),
        ("cross_attention_dim", [768, 512, 768]),
        ("an_entry_of_tomorrow", True),
        ("up_block_types", ["UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"]),
    ],
)
def test_an_entry_without_a_counterpart_is_named(sd1_unet, tmp_path, entry, value):
    diffusers.save_unet(tmp_path, sd1_unet)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, entry: value}))
    with pytest.raises(UserError, match=f"{entry}=.* is not supported here"):
        diffusers.load_unet(tmp_path)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"vector_dim": 12}, "unet.vector_dim=null"),
        ({"self_attention_levels": (False, True)}, "unet.self_attention_levels must be null"),
        ({"context_dim": None}, "unet.transformer_depth=0 to export"),
        ({"context_dim": None, "transformer_depth": 0, "heads": 2}, "one head width, not \\[16, 32\\]"),
    ],
)
def test_a_unet_that_they_have_not(tmp_path, options, sentence):
    unet = UNet(**{"channels": (32, 64), "attention_levels": (True, True), "context_dim": 24, "heads": 4, **options})
    with pytest.raises(UserError, match=sentence):
        diffusers.save_unet(tmp_path, unet)
    assert not list(tmp_path.iterdir())


def test_all_that_is_off_is_said_at_once_and_nothing_is_loaded(sd1_unet, tmp_path):
    diffusers.save_unet(tmp_path, sd1_unet)
    state = load_file(tmp_path / WEIGHTS)
    state["stranger.weight"] = state.pop("conv_in.weight")
    state["conv_out.bias"] = torch.zeros(7)
    save_file(state, tmp_path / WEIGHTS)
    target = UNet(**unet_options(sd1_unet))
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_unet_weights(target, str(tmp_path))
    for words in ("conv_in.weight is missing", "stranger.weight is unknown", "conv_out.bias is (7,), not (4,)"):
        assert words in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_of_many_faults_twenty_are_named(sd1_unet, tmp_path):
    diffusers.save_unet(tmp_path, sd1_unet)
    save_file({"a": torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises(UserError) as caught:
        diffusers.load_unet(tmp_path)
    assert str(caught.value).count("is missing") == 20
    assert f"and {len(sd1_unet.state_dict()) - 19} more" in str(caught.value)


def test_what_is_no_such_folder(tmp_path, first_stage):
    with pytest.raises(UserError, match=r"has no unet/config\.json"):
        diffusers.load_unet(tmp_path)
    diffusers.save_autoencoder(tmp_path, first_stage)
    with pytest.raises(
        UserError, match="contains AutoencoderKL, but must contain one of UNet2DConditionModel, UNet2DModel"
    ):
        diffusers.load_unet(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(DataError, match="can't be read as safetensors"):
        diffusers.load_autoencoder(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"has no {WEIGHTS}"):
        diffusers.load_autoencoder(tmp_path)


def test_starting_weights_must_be_of_the_same_function(sd1_unet, tmp_path):
    """Another number of heads has the same shapes."""
    diffusers.save_unet(tmp_path / "unet", sd1_unet)
    other = UNet(**{**unet_options(sd1_unet), "heads": 4})
    with pytest.raises(UserError, match=r"was made with unet.heads=\[8, 8, 8\], not \[4, 4, 4\]"):
        load_unet_weights(other, str(tmp_path))


@pytest.mark.parametrize("first_stage", ["kl", "kl_attending", "vq", "vq_attending"], indirect=True)
def test_first_stage_there_and_back(tmp_path, sha256, same_weights, relative_error, first_stage):
    diffusers.save_autoencoder(tmp_path / "a" / "vae", first_stage, 0.25)
    theirs, images = theirs_of(tmp_path / "a" / "vae"), torch.rand(2, 3, 16, 16) * 2 - 1
    encoded, z = theirs.encode(images), torch.randn(2, first_stage.latent_channels, 8, 8)
    encoded = encoded.latent_dist.parameters if hasattr(encoded, "latent_dist") else encoded.latents
    assert relative_error(first_stage.encoded(images), encoded) < 1e-5
    assert relative_error(first_stage.decode(z), theirs.decode(z).sample) < 1e-5
    loaded = diffusers.load_autoencoder(tmp_path / "a")
    assert type(loaded) is type(first_stage)
    assert same_weights(loaded, first_stage)
    assert autoencoder_options(loaded) == autoencoder_options(first_stage)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert len(loaded.fingerprint) == 16
    diffusers.save_autoencoder(tmp_path / "b" / "vae", loaded, 0.25)
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")
    scaled = LatentScaling(**diffusers.load_autoencoder(tmp_path / "a").stated_scaling).to_model(torch.ones_like(z))
    torch.testing.assert_close(scaled, torch.full_like(z, 0.25))


def test_a_first_stage_without_attention(tmp_path, same_weights):
    model = AutoencoderKL(channels=(32, 64), layers_per_block=1, mid_attention=False)
    diffusers.save_autoencoder(tmp_path, model)
    assert same_weights(diffusers.load_autoencoder(tmp_path), model)
    theirs_of(tmp_path)


@pytest.mark.parametrize("first_stage", ["vq"], indirect=True)
def test_a_codebook_of_another_width_than_the_latents(tmp_path, first_stage):
    diffusers.save_autoencoder(tmp_path, first_stage)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vq_embed_dim": 8}))
    with pytest.raises(UserError, match="vq_embed_dim=8 is not supported here"):
        diffusers.load_autoencoder(tmp_path)


def test_attention_by_its_older_names(first_stage, tmp_path, same_weights):
    """As Stable Diffusion 1.5's first stage is published."""
    diffusers.save_autoencoder(tmp_path, first_stage)
    state, names = (
        load_file(tmp_path / WEIGHTS),
        {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"},
    )
    for new, old in names.items():
        state = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): v for name, v in state.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in state
    save_file(state, tmp_path / WEIGHTS)
    assert same_weights(diffusers.load_autoencoder(tmp_path), first_stage)


def test_a_patched_first_stage_is_none_of_theirs(tmp_path):
    with pytest.raises(UserError, match=r"train with autoencoder\.patch=1"):
        diffusers.save_autoencoder(tmp_path, AutoencoderKL(channels=(32, 32), layers_per_block=1, patch=2))
