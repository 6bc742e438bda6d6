"""What a training takes over from another run: U-Net, trained conditioners, the scale of latents, and its refusals."""

import hashlib
import json
import re
from functools import partial

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import save_file

from data_pipeline.common.entry import CONF
from data_pipeline.common.errors import UserError
from train.data.base_model import PRESETS, TARGET, refuse_other_noise, unet_to_train
from train.data.ldm_inputs import with_base_model_scaling
from train.diffusion.parameterization import Epsilon, Flow, Velocity
from train.diffusion.process import DiscreteVP, RectifiedFlow
from train.models.conditioning import ConditionedUNet, Conditioners, StoredText
from train.models.size_features import SizeFeatures
from train.models.token_conditioners import ClassLabel
from train.models.unet import UNet
from train.weights import diffusers, stable_diffusion
from train.weights.published import load_unet_weights, load_weights

UNET = {"in_channels": 4, "out_channels": 4, "channels": [8, 8], "layers_per_block": 1, "context_dim": 24,
        "vector_dim": None, "attention_levels": [False, True], "heads": 2, "norm_groups": 4}  # fmt: skip
PARTS = {"label": partial(ClassLabel, dim=24), "text": StoredText, "size": SizeFeatures}


@pytest.fixture
def labelled(make_facts):
    """labelled(classes=..., ...): facts of a data set with labels and text."""
    return lambda classes=("a", "b"), **changed: make_facts(
        shapes={"label": []}, conditions={"label": {"classes": list(classes)}}, **changed
    )


def network(facts, *parts, **changed):
    return ConditionedUNet(UNet(**{**UNET, **changed}), Conditioners(facts, {name: PARTS[name] for name in parts}))


@pytest.fixture
def a_run(tmp_path):
    """a_run(facts, *conditioning): a run's folder with random weights, and the network that they are of."""

    def make(facts, *conditioning, **changed):
        trained = network(facts, *conditioning, **changed)
        step = tmp_path / "checkpoints/step-00000001"
        step.mkdir(parents=True)
        save_file(trained.state_dict(), step / "ema.safetensors")
        data = (step / "ema.safetensors").read_bytes()
        about = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (step / "manifest.json").write_text(json.dumps({"ema.safetensors": about}))
        config = {"unet": UNET, "conditioning": {name: {} for name in conditioning}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        facts.save(tmp_path)
        return tmp_path, trained

    return make


def options(run, *conditioning, factor=None):
    return OmegaConf.create(
        {"start_from": str(run), "scaling_factor": factor, "conditioning": {name: {} for name in conditioning}}
    )


def test_u_net_and_conditioner_are_taken_over(a_run, labelled):
    run, trained = a_run(labelled(), "label")
    other = network(labelled(), "label")
    load_weights(other, str(run))
    taken = other.state_dict()
    for name, value in trained.state_dict().items():
        assert torch.equal(taken[name], value), name


def test_a_run_without_trained_conditioners_gives_its_u_net(a_run, labelled):
    run, trained = a_run(labelled(), "text")
    other = network(labelled(), "label")
    table = other.conditioner.parts["label"].embedding.weight.clone()
    load_weights(other, str(run))
    assert torch.equal(other.unet.conv_in.weight, trained.unet.conv_in.weight)
    assert torch.equal(other.conditioner.parts["label"].embedding.weight, table)


def test_a_class_table_of_another_length_is_one_error(a_run, labelled):
    run, _ = a_run(labelled("abc"), "label")
    with pytest.raises(UserError, match=r"conditioner\.parts\.label\.embedding\.weight"):
        load_weights(network(labelled("ab"), "label"), str(run))


@pytest.mark.parametrize("classes", ["ba", "ac", "abc"])
def test_other_classes_of_the_same_numbers_are_refused(a_run, labelled, classes):
    run, _ = a_run(labelled("ab"), "label")
    with_base_model_scaling(options(run, "label"), labelled("ab"))
    with_base_model_scaling(options(run, "text"), labelled(classes))  # not conditioned on here
    with pytest.raises(UserError, match=r"was trained with other classes of label .* conditions\.label\.classes="):
        with_base_model_scaling(options(run, "label"), labelled(classes))


def test_the_scale_is_the_runs_own(a_run, labelled):
    run, _ = a_run(labelled(mean=[0.0] * 4, std=[4.0] * 4), "label")
    now = with_base_model_scaling(options(run, "label"), labelled())
    assert (now.mean, now.std) == ([0.0] * 4, [4.0] * 4)
    same = labelled(mean=[0.0] * 4, std=[1 / 0.25] * 4)  # as scaling_factor=0.25 makes them
    assert with_base_model_scaling(options(run, "label", factor=0.25), same).std == [4.0] * 4
    with pytest.raises(
        UserError, match=r"another scaling of the latents than scaling_factor=0\.5: set scaling_factor=null"
    ):
        with_base_model_scaling(options(run, "label", factor=0.5), labelled(mean=[0.0] * 4, std=[2.0] * 4))


def test_a_published_model_needs_its_factor(tmp_path, labelled):
    with pytest.raises(UserError, match=r"add scaling_factor=0\.18215"):
        with_base_model_scaling(options(tmp_path, "text"), labelled())


def test_another_fold_is_refused(a_run, labelled):
    run, _ = a_run(labelled(), "label")
    with pytest.raises(UserError, match="fold 1, but these latents use 2"):
        with_base_model_scaling(options(run, "label"), labelled(fold=2))


def scheduler(folder, **config):
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))


SD1 = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NOISE = {  # what diffusers' file says; our process and parameterization; the options offered, or None
    "sd1": (SD1, DiscreteVP(), Epsilon(), None),
    "sd2 as sd1": ({**SD1, "prediction_type": "v_prediction"}, DiscreteVP(), Epsilon(), "parameterization=velocity;"),
    "sd1 as sd2": (SD1, DiscreteVP(), Velocity(), "add parameterization=epsilon;"),
    "zero snr": ({**SD1, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, DiscreteVP(), Velocity(),
                 "add process=zero_terminal_snr;"),
    "to zero snr": ({**SD1, "prediction_type": "v_prediction"}, DiscreteVP(zero_terminal_snr=True), Velocity(),
                    "add process=scaled_linear;"),
    "ddpm, by its defaults": ({"_class_name": "DDPMScheduler"}, DiscreteVP(), Epsilon(), "add process=linear;"),
    "ddpm": ({"_class_name": "DDPMScheduler"}, DiscreteVP(1e-4, 0.02, schedule="linear"), Epsilon(), None),
    "other betas": ({**SD1, "beta_end": 0.03}, DiscreteVP(), Epsilon(), "process=scaled_linear process.beta_end=0.03;"),
    "cosine": ({"beta_schedule": "squaredcos_cap_v2"}, DiscreteVP(schedule="linear"), Epsilon(), "process=cosine;"),
    "flow": ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, RectifiedFlow(), Flow(), None),
    "flow as sd1": ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, DiscreteVP(), Epsilon(),
                    "add process=rectified_flow parameterization=flow;"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOISE)
def test_a_model_of_another_noise_is_refused_with_its_options(tmp_path, case):
    config, process, parameterization, options = NOISE[case]
    scheduler(tmp_path, **config)
    (tmp_path / "unet").mkdir()
    for path in (tmp_path, tmp_path / "unet"):
        if options is None:
            refuse_other_noise(str(path), process, parameterization)
        else:
            with pytest.raises(UserError, match=re.escape(options)):
                refuse_other_noise(str(path), process, parameterization)


def test_a_single_file_tells_its_noise_by_what_lies_beside_it(tmp_path):
    file = tmp_path / "v2.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    refuse_other_noise(str(file), DiscreteVP(), Epsilon())
    save_file({"a": torch.zeros(1)}, file, {"modelspec.predict_key": "v"})
    with pytest.raises(UserError, match="predicts velocity"):
        refuse_other_noise(str(file), DiscreteVP(), Epsilon())
    save_file({"a": torch.zeros(1)}, file)
    params = {"parameterization": "v", "linear_start": 0.00085, "linear_end": 0.0120, "timesteps": 1000}
    file.with_suffix(".yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    with pytest.raises(UserError, match=r"predicts velocity .*v2\.yaml"):
        refuse_other_noise(str(file), DiscreteVP(), Epsilon())
    refuse_other_noise(str(file), DiscreteVP(), Velocity())


def test_offered_processes_are_those_of_conf():
    for name, betas in PRESETS.items():
        with open(f"{CONF}/process/{name}.yaml") as file:
            saved = yaml.safe_load(file)
        assert (saved["beta_start"], saved["beta_end"]) == betas


@pytest.mark.parametrize("form", ["folder", "file"])
def test_the_u_net_of_the_start_is_taken_or_offered(tmp_path, form):
    """Its weights then fit; another one is refused in a sentence that names what differs, not hundreds of tensors."""
    unet = UNet(**{**UNET, "channels": [32, 64], "norm_groups": 32, "layers_per_block": 2, "heads": 2})
    start = tmp_path / "unet.safetensors" if form == "file" else tmp_path
    if form == "file":
        stable_diffusion.save_single_file(start, unet, None)
    else:
        diffusers.save_unet(tmp_path / "unet", unet)
    asked = {"_target_": TARGET, "from_start": True, "context_dim": None, "channels_last": True}
    taken = unet_to_train({**asked, "heads": 2 if form == "file" else None}, str(start), fine_tune=True)
    again = UNet(**{name: value for name, value in taken.items() if name != "_target_"})
    load_unet_weights(again, str(start))
    assert torch.equal(again.conv_in.weight, unet.conv_in.weight)
    assert unet_to_train(taken, str(start), fine_tune=False) == taken
    other = {**taken, "channels": [64, 64], "context_dim": 32}
    with pytest.raises(UserError, match=r"channels=\[32, 64\], context_dim=24, but unet= has .*use unet=from_start"):
        unet_to_train(other, str(start), fine_tune=False)


# A model that knows no sizes, for a training with them: it gives the same until it is trained, and can learn.

WITH_POOLED = {"vector_dim": 12}
WIDE = {"norm_groups": 32, "channels": [64, 64]}  # what single files hold


@pytest.mark.parametrize("published", ["run", "run with labels", "run with pooled text", "diffusers", "single file"])
def test_sizes_are_added_to_a_model_without(a_run, make_facts, tmp_path, published):
    facts = make_facts(shapes={"label": [], "size": [6]}, conditions={"label": {"classes": ["a", "b"]}})
    labelled, pooled = published == "run with labels", published == "run with pooled text"
    parts = ["text", *(["label"] if labelled else [])]
    if published.startswith("run"):
        path, trained = a_run(facts, *parts, **(WITH_POOLED if pooled else {}))
    else:
        path, trained = tmp_path / "published", network(facts, *parts, **WIDE)
        if published == "diffusers":
            diffusers.save_unet(path / "unet", trained.unet)
        else:
            path = path.with_suffix(".safetensors")
            stable_diffusion.save_single_file(path, trained.unet, None)
    wide = {} if published.startswith("run") else WIDE
    other = network(facts, *parts, "size", vector_dim=12 + 6 * 256, **wide)
    load_weights(other, str(path))
    text = {"text": torch.randn(2, 5, 24), "pooled": torch.randn(2, 12), "label": torch.tensor([0, 1])}
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 800.0])

    def out(network, **more):
        return network(x, t, network.condition({**text, **more}, ("a", "b")))

    torch.testing.assert_close(out(other, size=torch.rand(2, 6) * 900), out(trained), rtol=1e-5, atol=1e-5)
    out(other, size=torch.rand(2, 6) * 900).square().mean().backward()
    assert float(other.unet.vector_embedding.linear_1.weight.grad[:, 12:].abs().sum()) > 0 or not pooled
    assert float(other.unet.vector_embedding.linear_2.weight.grad.abs().sum()) > 0


def test_the_u_net_of_the_start_is_taken_with_a_vector_for_sizes(tmp_path):
    diffusers.save_unet(tmp_path / "unet", UNet(**{**UNET, **WIDE}))
    asked = {"_target_": TARGET, "from_start": True, "heads": None, "vector_dim": 1548, "channels_last": True}
    taken = unet_to_train(asked, str(tmp_path), fine_tune=False, learns_sizes=True)
    assert (taken["vector_dim"], taken["channels"]) == (1548, [64, 64])
    assert unet_to_train(taken, str(tmp_path), fine_tune=False, learns_sizes=True) == taken
    with pytest.raises(UserError, match="vector_dim=None, but unet= has vector_dim=1548"):
        unet_to_train(taken, str(tmp_path), fine_tune=False)


def test_another_width_of_the_text_is_still_refused(a_run, make_facts):
    facts = make_facts(shapes={"size": [6]})
    run, _ = a_run(facts, "text", vector_dim=9)
    with pytest.raises(UserError, match=r"vector_embedding\.linear_1\.weight"):
        load_weights(network(facts, "text", "size", vector_dim=12 + 6 * 256), str(run))
