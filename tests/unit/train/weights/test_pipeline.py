"""A whole model handed over: its scheduler, its scaling, and whether what was written is what it was."""

import os

import pytest
import torch
import yaml
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file
from torch import nn

from data_pipeline.common.entry import CONF
from data_pipeline.common.errors import UserError
from data_pipeline.common.storage import HOST
from train.export_diffusers import refuse_trained_conditioners, written_aside
from train.models.autoencoder import AutoencoderKL
from train.models.latents import LatentScaling
from train.models.unet import UNet
from train.weights import diffusers
from train.weights.pipeline import Pipeline, reads_back, scheduler_config, with_one_factor

CHANNELWISE = LatentScaling([0.3, -0.2, 0.1, 0.0], [1.5, 0.7, 1.0, 2.0])


def named(group, name):
    with open(f"{CONF}/{group}/{name}.yaml") as file:
        return yaml.safe_load(file)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "zero_terminal_snr"])
def test_their_scheduler_has_our_process(name):
    from diffusers import DDIMScheduler

    config = scheduler_config(named("process", name), named("parameterization", "velocity"))
    theirs, ours = DDIMScheduler.from_config(config), instantiate(named("process", name))
    assert theirs.config.prediction_type == "v_prediction"
    t = torch.arange(1000)
    torch.testing.assert_close(theirs.alphas_cumprod.sqrt(), ours.alpha(t.float()).float(), rtol=1e-4, atol=1e-5)
    assert theirs.final_alpha_cumprod == 1.0


def test_rectified_flow_is_their_flow_matching():
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = scheduler_config({**named("process", "rectified_flow"), "shift": 3.0}, named("parameterization", "flow"))
    theirs, ours = FlowMatchEulerDiscreteScheduler.from_config(config), instantiate(named("process", "rectified_flow"))
    assert theirs.config.shift == 3.0
    torch.testing.assert_close(theirs.timesteps, ours.network_time(theirs.sigmas), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("process", "parameterization", "words"),
    [
        ("continuous_vp", "velocity", "velocity on continuous_vp"),
        ("rectified_flow", "sample", "sample on rectified_flow"),
    ],
)
def test_a_process_that_they_have_not(process, parameterization, words):
    with pytest.raises(UserError, match=f"no scheduler for {words}"):
        scheduler_config(named("process", process), named("parameterization", parameterization))


def test_scaling_by_channel_goes_into_a_kl_first_stage(first_stage):
    scaled, factor, facts = with_one_factor(first_stage, CHANNELWISE)
    assert (factor, facts) == (0.18215, {})
    x, images = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 16, 16)
    ours = first_stage.decode(CHANNELWISE.from_model(x))
    torch.testing.assert_close(scaled.decode(x / factor), ours, rtol=1e-4, atol=1e-5)
    posterior, theirs = first_stage.encode(images), scaled.encode(images)
    torch.testing.assert_close(theirs.mean * factor, CHANNELWISE.to_model(posterior.mean))
    noise = torch.randn_like(posterior.mean)
    torch.testing.assert_close(theirs.sample(noise) * factor, CHANNELWISE.to_model(posterior.sample(noise)))
    assert not torch.equal(scaled.quant_conv.weight, first_stage.quant_conv.weight)  # it is a copy


def test_stable_diffusions_own_scaling_leaves_its_first_stage_alone(first_stage):
    scaling = LatentScaling([0.0] * 4, [1 / 0.18215] * 4)
    assert with_one_factor(first_stage, scaling) == (first_stage, 0.18215, {})


@pytest.mark.parametrize("first_stage", ["vq"], indirect=True)
def test_scaling_of_codes_is_named(first_stage, sd1_unet, tmp_path):
    same, factor, facts = with_one_factor(first_stage, LatentScaling([0.5, 0.0, 0.0], [2.0, 1.0, 4.0]))
    assert same is first_stage
    assert (factor, facts) == (1.0, {"latents_mean": [0.5, 0.0, 0.0], "latents_std": [2.0, 1.0, 4.0]})
    assert with_one_factor(first_stage, LatentScaling([0.0], [4.0])) == (first_stage, 0.25, {})
    diffusers.save_autoencoder(tmp_path, first_stage, factor, **facts)
    assert diffusers.load_autoencoder(tmp_path).fingerprint  # read again with these entries


@pytest.fixture
def pipeline(sd1_unet, first_stage):
    scheduler = scheduler_config(named("process", "scaled_linear"), named("parameterization", "epsilon"))
    return Pipeline.of(sd1_unet, first_stage, None, CHANNELWISE, scheduler)


def test_folder_and_file_read_back(pipeline, tmp_path):
    pipeline.save_folder(tmp_path / "folder")
    pipeline.save_single_file(tmp_path / "x.safetensors")
    for path in (tmp_path / "folder", tmp_path / "x.safetensors"):
        reads_back(pipeline, path, (4, 8, 8))
    assert not pipeline.drawn_by_theirs  # it has no text encoder
    assert not (tmp_path / "folder/model_index.json").exists()


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_another_weight_is_noticed(pipeline, tmp_path, part):
    pipeline.save_folder(tmp_path)
    file = tmp_path / part / "diffusion_pytorch_model.safetensors"
    name = "conv_out.weight" if part == "unet" else "decoder.conv_out.weight"
    save_file({key: value * (1.001 if key == name else 1) for key, value in load_file(file).items()}, file)
    with pytest.raises(RuntimeError, match="read back differs by"):
        reads_back(pipeline, tmp_path, (4, 8, 8))


def test_trained_conditioners_are_not_left_behind_in_silence():
    conditioner = nn.Module()
    conditioner.parts = nn.ModuleDict({"text": nn.Identity()})
    refuse_trained_conditioners(conditioner)
    conditioner.parts["label"] = nn.Embedding(3, 4)
    with pytest.raises(UserError, match="conditioning=label has weights trained with the U-Net"):
        refuse_trained_conditioners(conditioner)


def test_groups_that_compvis_has_not(first_stage, tmp_path):
    unet = UNet(channels=(16, 32), attention_levels=(True, False), context_dim=24, heads=2, norm_groups=8)
    scheduler = scheduler_config(named("process", "linear"), named("parameterization", "sample"))
    pipeline = Pipeline.of(unet, first_stage, None, CHANNELWISE, scheduler)
    pipeline.refuse_unfit(single_file=False)
    for refusing in (
        lambda: pipeline.refuse_unfit(True),
        lambda: pipeline.save_single_file(tmp_path / "x.safetensors"),
    ):
        with pytest.raises(UserError, match="CompVis' models have 32 norm groups, not 8"):
            refusing()
    assert not list(tmp_path.iterdir())


def test_what_diffusers_has_not_is_refused_before_anything_is_written(pipeline, sd1_unet):
    patched = AutoencoderKL(channels=(32, 32), layers_per_block=1, patch=2)
    with pytest.raises(UserError, match=r"autoencoder\.patch=1"):
        Pipeline.of(sd1_unet, patched, None, CHANNELWISE, pipeline.scheduler).refuse_unfit(single_file=False)
    unet = UNet(channels=(32, 64), attention_levels=(True, False), context_dim=24, vector_dim=5)
    with pytest.raises(UserError, match=r"unet\.vector_dim=null"):
        Pipeline.of(unet, None, None, CHANNELWISE, pipeline.scheduler).refuse_unfit(single_file=False)


def test_an_export_is_there_whole_or_not_at_all(tmp_path):
    """Also after an error; and where a killed export had this process' number, as in a container."""
    left = tmp_path / f"out.tmp.{HOST}.{os.getpid()}"
    left.mkdir()
    (left / "half").write_text("x")
    with pytest.raises(FileNotFoundError), written_aside(tmp_path / "out") as folder:
        (folder / "no folder" / "unet").write_text("x")
    assert list(tmp_path.iterdir()) == []
    with written_aside(tmp_path / "out") as folder:
        (folder / "unet").write_text("x")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/unet"]
