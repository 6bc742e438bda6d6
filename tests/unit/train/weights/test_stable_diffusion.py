"""CompVis' single files: names against diffusers' own conversion, there and back to the byte, nothing run."""

import os
import pickle
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.common.errors import DataError, UserError
from train.models.conditioning import ConditionedUNet
from train.models.unet import UNet
from train.weights import diffusers, stable_diffusion
from train.weights.foreign import to_foreign
from train.weights.published import load_autoencoder, load_unet_weights, load_weights
from train.weights.shapes import unet_options

pytestmark = pytest.mark.slow

EVERY_FIRST_STAGE = pytest.mark.parametrize("first_stage", ["kl", "kl_attending", "vq", "vq_attending"], indirect=True)


def refuse_no_bijection(carried, model):
    """Each of our parameters once, each of theirs once, and changes of shape that undo one another."""
    state = model.state_dict()
    assert sorted(name for one in carried for name in one.ours) == sorted(state)
    assert len({one.theirs for one in carried}) == len(carried)
    for one in carried:
        parts = [state[name] for name in one.ours]
        again = one.form.from_foreign(one.form.to_foreign(parts))
        assert all(torch.equal(a, b) for a, b in zip(again, parts, strict=True)), one


def test_the_unets_map_is_a_bijection(unet):
    refuse_no_bijection(stable_diffusion.unet_map(unet), unet)


@EVERY_FIRST_STAGE
def test_the_first_stages_map_is_a_bijection(first_stage):
    refuse_no_bijection(stable_diffusion.autoencoder_map(first_stage), first_stage)


@pytest.mark.parametrize("unet", ["sd1", "sd2", "ldm_imagenet", "deep"], indirect=True)
def test_names_are_those_that_diffusers_converts(unet):
    """Their conversion of our file gives our own names back. It knows no attention over pixels: next test."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = diffusers.unet_config(unet_options(unet))
    theirs = convert_ldm_unet_checkpoint(stable_diffusion.single_file_state(unet, None), config)
    assert sorted(theirs) == sorted(unet.state_dict())
    assert all(torch.equal(theirs[name], value) for name, value in unet.state_dict().items())


def compvis_attention_over_pixels(x, state, prefix, heads):
    """CompVis' AttentionBlock in its own words: q, k, v of a head lie side by side; both scaled by D^(-1/4)."""
    b, c, h, w = x.shape
    y = torch.nn.functional.group_norm(x, 32, state[f"{prefix}.norm.weight"], state[f"{prefix}.norm.bias"])
    qkv = torch.nn.functional.conv1d(y.flatten(2), state[f"{prefix}.qkv.weight"], state[f"{prefix}.qkv.bias"])
    q, k, v = qkv.reshape(b * heads, 3 * c // heads, h * w).split(c // heads, dim=1)
    scale = (c // heads) ** -0.25
    weights = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(-1)
    out = torch.einsum("bts,bcs->bct", weights, v).reshape(b, c, h * w)
    out = torch.nn.functional.conv1d(out, state[f"{prefix}.proj_out.weight"], state[f"{prefix}.proj_out.bias"])
    return x + out.reshape(x.shape)


@pytest.mark.parametrize("unet", ["ldm_unconditional"], indirect=True)
def test_fused_attention_over_pixels_is_the_same_function(unet):
    state = to_foreign(stable_diffusion.unet_map(unet), unet.state_dict())
    assert state["middle_block.1.qkv.weight"].shape == (288, 96, 1)
    x = torch.randn(2, 96, 4, 4)
    expected = compvis_attention_over_pixels(x, state, "middle_block.1", heads=3)
    torch.testing.assert_close(unet.mid_block.attentions[0](x), expected, rtol=1e-5, atol=1e-5)
    # which blocks have it: input blocks 1, 2 are the first level's, without; 4, 5 the second's; 7, 8 the third's
    assert sorted({int(n.split(".")[1]) for n in state if n.startswith("input_") and "qkv" in n}) == [4, 5, 7, 8]
    assert sorted({int(n.split(".")[1]) for n in state if n.startswith("output_") and "qkv" in n}) == [0, 1, 2, 3, 4, 5]
    # and where the change of resolution stands behind it or behind the residual block
    ups = sorted(n for n in state if n.endswith(".conv.weight"))
    assert ups == ["output_blocks.2.2.conv.weight", "output_blocks.5.2.conv.weight"]


def test_first_stage_is_what_diffusers_converts(first_stage):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    state = first_stage.state_dict()
    file = {f"first_stage_model.{one.theirs}": one.form.to_foreign([state[one.ours[0]]])
            for one in stable_diffusion.autoencoder_map(first_stage)}  # fmt: skip
    assert file["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    theirs = convert_ldm_vae_checkpoint(file, {"down_block_types": [0] * 2, "up_block_types": [0] * 2})
    assert sorted(theirs) == sorted(first_stage.state_dict())
    assert all(torch.equal(theirs[name], value) for name, value in first_stage.state_dict().items())


@pytest.mark.parametrize("first_stage", ["kl_attending", "vq"], indirect=True)
def test_attention_inside_levels_by_compvis_names(first_stage):
    """The decoder's levels are numbered from the full resolution: attention is at the same number on both sides."""
    names = [one.theirs for one in stable_diffusion.autoencoder_map(first_stage)]
    attending = sorted({n.rpartition(".norm.weight")[0] for n in names if "attn" in n and n.endswith(".norm.weight")})
    inside = ["decoder.up.1.attn.0", "decoder.up.1.attn.1", "encoder.down.1.attn.0"]
    if first_stage.stored_as == "indices":
        assert "quantize.embedding.weight" in names
        inside = []
    assert attending == sorted([*inside, "decoder.mid.attn_1", "encoder.mid.attn_1"])


@EVERY_FIRST_STAGE
@pytest.mark.parametrize("unet", ["ldm_imagenet"], indirect=True)
def test_first_stages_there_and_back(unet, first_stage, tmp_path, sha256, same_weights):
    stable_diffusion.save_single_file(tmp_path / "a" / "x.safetensors", unet, first_stage)
    loaded = load_autoencoder(str(tmp_path / "a" / "x.safetensors"))
    assert type(loaded) is type(first_stage)
    assert same_weights(loaded, first_stage)
    stable_diffusion.save_single_file(tmp_path / "b" / "x.safetensors", unet, loaded)
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")


def test_save_load_save_is_the_identity(unet, first_stage, tmp_path, sha256, same_weights):
    stable_diffusion.save_single_file(tmp_path / "a" / "x.safetensors", unet, first_stage)
    loaded = stable_diffusion.load_unet(tmp_path / "a" / "x.safetensors", heads=unet.heads)
    stage = load_autoencoder(str(tmp_path / "a" / "x.safetensors"))
    assert same_weights(loaded, unet)
    assert same_weights(stage, first_stage)
    assert [p.heads for p in loaded.modules() if hasattr(p, "heads")] == [
        p.heads for p in unet.modules() if hasattr(p, "heads")
    ]
    stable_diffusion.save_single_file(tmp_path / "b" / "x.safetensors", loaded, stage)
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")


@EVERY_FIRST_STAGE
def test_a_first_stage_has_one_fingerprint_in_either_format(sd1_unet, first_stage, tmp_path):
    stable_diffusion.save_single_file(tmp_path / "x.safetensors", sd1_unet, first_stage)
    diffusers.save_autoencoder(tmp_path / "vae", first_stage)
    marks = {load_autoencoder(str(path)).fingerprint for path in (tmp_path / "x.safetensors", tmp_path)}
    assert len(marks) == 1


def test_a_first_stage_alone_with_what_it_was_trained_against(first_stage, tmp_path, same_weights):
    state = to_foreign(stable_diffusion.autoencoder_map(first_stage), first_stage.state_dict())
    torch.save({"state_dict": {**state, "loss.logvar": torch.zeros(())}}, tmp_path / "kl.ckpt")
    assert same_weights(load_autoencoder(str(tmp_path / "kl.ckpt")), first_stage)


def test_averaged_weights(unet, tmp_path, same_weights):
    state = stable_diffusion.single_file_state(unet, None)
    averaged = {"model_ema." + name.removeprefix("model.").replace(".", ""): value + 1 for name, value in state.items()}
    extra = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5), "betas": torch.ones(9)}
    torch.save({"state_dict": {**state, **averaged, **extra}, "global_step": 7}, tmp_path / "x.ckpt")
    assert same_weights(stable_diffusion.load_unet(tmp_path / "x.ckpt", heads=unet.heads), unet)
    plus_one = stable_diffusion.load_unet(tmp_path / "x.ckpt", averaged=True, heads=unet.heads).state_dict()
    for name, value in unet.state_dict().items():
        torch.testing.assert_close(plus_one[name], value + 1)
    torch.save({"state_dict": state}, tmp_path / "without.ckpt")
    with pytest.raises(UserError, match="has no EMA weights"):
        stable_diffusion.load_unet(tmp_path / "without.ckpt", averaged=True)


def test_starting_from_a_single_file(unet, tmp_path, same_weights):
    stable_diffusion.save_single_file(tmp_path / "x.safetensors", unet, None)
    target = UNet(**unet_options(unet))
    load_unet_weights(target, str(tmp_path / "x.safetensors"))
    assert same_weights(target, unet)
    if unet.context_dim != 512:
        narrow = UNet(**{**unet_options(unet), "layers_per_block": 3})
        with pytest.raises(UserError, match=r"input_blocks\.\d+\.0\.\S+ is missing"):
            load_unet_weights(narrow, str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(("averaged", "said"), [(False, "its raw weights; start_from_ema=true"), (True, "averaged")])
def test_the_start_is_raw_or_averaged_and_says_which(sd1_unet, tmp_path, averaged, said, caplog):
    state = stable_diffusion.single_file_state(sd1_unet, None)
    ema = {"model_ema." + name.removeprefix("model.").replace(".", ""): value + 1 for name, value in state.items()}
    torch.save({"state_dict": {**state, **ema}}, tmp_path / "x.ckpt")
    target = UNet(**unet_options(sd1_unet))
    with caplog.at_level("INFO"):
        load_unet_weights(target, str(tmp_path / "x.ckpt"), averaged=averaged)
    torch.testing.assert_close(target.conv_in.weight, sd1_unet.conv_in.weight + averaged)
    assert said in caplog.text
    with pytest.raises(UserError, match="start_from_ema=true is for CompVis files"):
        load_weights(ConditionedUNet(target, None), str(tmp_path), averaged=True)


PUBLISHED_HEADS = {  # model_channels, channel_mult, context_dim: heads by level, from the models' own configurations
    "cin256": (256, (1, 2, 4), 512, [8, 16, 32]),
    "cin256-v2": (192, (1, 2, 3, 5), 512, [1, 1, 1, 1]),
    "layout2img-openimages256": (128, (1, 2, 3, 4), 512, [4, 8, 12, 16]),
    "semantic_synthesis256": (128, (1, 4, 8), None, [8, 8, 8]),
    "rdm768x768": (448, (1, 2, 3, 4), 768, [14, 28, 42, 56]),
    "celebahq256": (224, (1, 2, 3, 4), None, [7, 14, 21, 28]),
    "text2img256": (192, (1, 2, 3, 5), 640, [6, 12, 18, 30]),
    "txt2img-large": (320, (1, 2, 4, 4), 1280, [8, 8, 8, 8]),
    "sd1": (320, (1, 2, 4, 4), 768, [8, 8, 8, 8]),
    "sd2": (320, (1, 2, 4, 4), 1024, [5, 10, 20, 20]),
}


@pytest.mark.parametrize("name", PUBLISHED_HEADS)
def test_heads_of_published_models(name):
    width, factors, context_dim, heads = PUBLISHED_HEADS[name]
    options = {"channels": [width * factor for factor in factors], "attention_levels": [True] * len(factors)}
    with torch.device("meta"):
        unet = UNet(**options, context_dim=context_dim, transformer_depth=int(context_dim is not None), heads=heads)
        state = to_foreign(stable_diffusion.unet_map(unet), unet.state_dict())
    assert stable_diffusion.unet_arguments(state, name)["heads"] == heads
    assert stable_diffusion.unet_arguments(state, name, heads=2)["heads"] == heads  # what was published, not a guess


def test_heads_that_no_shape_tells_must_be_given(tmp_path):
    unet = UNet(channels=(32, 64), attention_levels=(True, True), context_dim=24, heads=4)
    stable_diffusion.save_single_file(tmp_path / "x.safetensors", unet, None)
    with pytest.raises(UserError, match="its number of heads can't be inferred from its weights"):
        stable_diffusion.load_unet(tmp_path / "x.safetensors")
    assert unet_options(stable_diffusion.load_unet(tmp_path / "x.safetensors", heads=4)) == unet_options(unet)


@pytest.mark.parametrize("change", ["missing", "surplus", "shape"])
def test_a_key_that_is_off_is_named(sd1_unet, first_stage, tmp_path, change):
    stable_diffusion.save_single_file(tmp_path / "x.safetensors", sd1_unet, first_stage)
    state = load_file(tmp_path / "x.safetensors")
    for name in ("model.diffusion_model.time_embed.2.bias", "first_stage_model.decoder.up.1.block.0.conv2.bias"):
        if change == "missing":
            del state[name]
        elif change == "surplus":
            state[f"{name}.more"] = torch.zeros(1)
        else:
            state[name] = torch.zeros(3)
    save_file(state, tmp_path / "x.safetensors")
    words = {"missing": " is missing", "surplus": r"\.more is unknown", "shape": r" is \(3,\), not \(\d+,\)"}[change]
    with pytest.raises(UserError, match=rf"time_embed\.2\.bias{words}"):
        stable_diffusion.load_unet(tmp_path / "x.safetensors", heads=8)
    with pytest.raises(UserError, match=rf"decoder\.up\.1\.block\.0\.conv2\.bias{words}"):
        stable_diffusion.load_autoencoder(tmp_path / "x.safetensors")


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused(sd1_unet, tmp_path, legacy):
    mark, path = tmp_path / "ran", tmp_path / "x.ckpt"
    state = stable_diffusion.single_file_state(sd1_unet, None)
    torch.save({"state_dict": state, "more": Attack(mark)}, path, _use_new_zipfile_serialization=not legacy)
    for load in (stable_diffusion.load_unet, stable_diffusion.load_autoencoder):
        with pytest.raises(
            UserError, match=r"contains posix\.system .* no code in it is run: convert it to \.safetensors"
        ):
            load(path)
    assert not mark.exists()
    path.write_bytes(pickle.dumps(Attack(mark)))
    with pytest.raises(UserError):
        stable_diffusion.load_unet(path)
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists()  # so the attack is one


def test_a_trainers_own_objects_in_a_checkpoint_are_passed_over(sd1_unet, tmp_path, same_weights):
    """Stable Diffusion 1.x's .ckpt names its trainer's callback by class: it is read without that class."""
    path = tmp_path / "x.ckpt"
    module = type(os)("pytorch_lightning.callbacks.model_checkpoint")
    made = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = made
    parents = {name: type(os)(name) for name in ("pytorch_lightning", "pytorch_lightning.callbacks")}
    sys.modules.update({**parents, module.__name__: module})
    try:
        state = stable_diffusion.single_file_state(sd1_unet, None)
        torch.save({"state_dict": state, "callbacks": {made: {"best": made()}}}, path)
    finally:
        for name in (*parents, module.__name__):
            del sys.modules[name]
    assert same_weights(stable_diffusion.load_unet(path, heads=8), sd1_unet)


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="is not a file"):
        stable_diffusion.load_unet(tmp_path / "nowhere.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"has no model\.diffusion_model"):
        stable_diffusion.load_unet(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="has no first_stage_model"):
        stable_diffusion.load_autoencoder(tmp_path / "other.safetensors")
    for name in ("cut.safetensors", "cut.ckpt"):
        (tmp_path / name).write_bytes(b"\x10\x00")
        with pytest.raises(DataError, match="can't be read"):
            stable_diffusion.load_unet(tmp_path / name)
    torch.save([torch.zeros(1)], tmp_path / "list.ckpt")
    with pytest.raises(UserError, match="contains a list, not named tensors"):
        stable_diffusion.load_unet(tmp_path / "list.ckpt")


def test_only_safetensors_is_written(sd1_unet, tmp_path):
    with pytest.raises(UserError, match=r"must end with \.safetensors"):
        stable_diffusion.save_single_file(tmp_path / "x.ckpt", sd1_unet, None)
