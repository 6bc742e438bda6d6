"""Exports a whole trained model as a diffusers folder or a CompVis single file, and checks that it reads back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.common.errors import UserError
from data_pipeline.common.saved_names import named
from train.models.latents import LatentScaling
from train.models.unet import UNet
from train.weights import diffusers, open_clip, stable_diffusion
from train.weights.scheduler import BETA_SCHEDULES, PREDICTION_TYPES
from train.weights.shapes import autoencoder_options, is_vq, unet_options


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The parts to export. autoencoder, text: None if the model has none; scheduler: diffusers' configuration.

    scaling_factor: x0 = z * scaling_factor, unless vae_facts give a mean and std for each channel.
    """

    unet: UNet
    autoencoder: nn.Module | None
    text: open_clip.TextEncoder | None
    scheduler: Mapping[str, Any]
    scaling_factor: float
    vae_facts: Mapping[str, Any]
    with_sizes: bool = False  # whether the U-Net's vector condition is the pooled text followed by the six sizes

    @classmethod
    def of(
        cls,
        unet: UNet,
        autoencoder: nn.Module | None,
        text: nn.Module | None,
        scaling: LatentScaling,
        scheduler: Mapping[str, Any],
        with_sizes: bool = False,
    ) -> Pipeline:
        """Scaled as in diffusers by one factor; the rest of our scaling goes into the first stage's weights."""
        text = None if text is None else open_clip.tower_of(text)
        factor, facts = diffusers.SCALING_FACTOR, {}
        if autoencoder is not None:
            autoencoder, factor, facts = with_one_factor(autoencoder, scaling)
        return cls(unet, autoencoder, text, scheduler, factor, facts, with_sizes)

    @property
    def drawn_by_theirs(self) -> bool:
        """Whether diffusers' StableDiffusionPipeline can sample with it; so latents may not be folded."""
        unet, first_stage = self.unet, self.autoencoder
        if first_stage is None or is_vq(first_stage) or self.text is None or unet.vector_dim is not None:
            return False
        channels = {unet.in_channels, unet.conv_out.out_channels, first_stage.latent_channels}
        fits = len(channels) == 1 and unet.context_dim == self.text.context_dim
        return fits and self.scheduler["_class_name"] == "DDIMScheduler"

    def refuse_unfit(self, single_file: bool) -> None:
        """One UserError, before anything is written, for all that diffusers or a single file can't represent."""
        checks = [lambda: diffusers.unet_config(unet_options(self.unet), self.with_sizes)]
        if single_file:
            checks.append(lambda: stable_diffusion.unet_map(self.unet))
        if self.autoencoder is not None:
            checks.append(lambda: diffusers.autoencoder_config(autoencoder_options(self.autoencoder)))
            if single_file:
                checks.append(lambda: stable_diffusion.autoencoder_map(self.autoencoder))
        reasons = [reason for check in checks if (reason := _reason_against(check))]
        if reasons:
            raise UserError("; ".join(dict.fromkeys(reasons)))

    @property
    def text_in_single_file(self) -> bool:
        return self.text is not None and open_clip.fits_single_file(self.text)

    def save_folder(self, folder: Path) -> None:
        """Writes unet, vae, scheduler, text_encoder, tokenizer; model_index.json if diffusers' pipeline can sample."""
        diffusers.save_unet(folder / "unet", self.unet, self.with_sizes)
        diffusers.write_config(folder / "scheduler" / "scheduler_config.json", self.scheduler)
        if self.autoencoder is not None:
            diffusers.save_autoencoder(folder / "vae", self.autoencoder, self.scaling_factor, **self.vae_facts)
        if self.text is not None:
            open_clip.save_text_encoder(folder, self.text)
        if self.drawn_by_theirs:
            diffusers.write_config(folder / "model_index.json", _MODEL_INDEX)

    def save_single_file(self, path: Path) -> None:
        """Writes the U-Net, the first stage and, if its heads have the width that readers assume, the text encoder."""
        more = open_clip.single_file_state(self.text) if self.text_in_single_file else {}
        stable_diffusion.save_single_file(path, self.unet, self.autoencoder, more)


def _reason_against(check: Callable[[], Any]) -> str | None:
    try:
        check()
    except UserError as error:
        return str(error)
    return None


_MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
}


def scheduler_config(process: Mapping[str, Any], parameterization: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' scheduler_config.json for the process and parameterization in a run's configuration."""
    process, parameterization = named(process), named(parameterization)
    kind, predicts = (part.get("name", part.get("_target_")) for part in (process, parameterization))
    if (kind, predicts) == ("rectified_flow", "flow"):
        shift = {"shift": process.get("shift", 1.0)}
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, **shift}
    if kind != "discrete_vp" or predicts not in PREDICTION_TYPES:
        raise UserError(
            f"diffusers has no scheduler for {predicts} on {kind}: export a model with a process that diffusers has."
        )
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": process.get("steps", 1000),
        "beta_start": process.get("beta_start", 0.00085),
        "beta_end": process.get("beta_end", 0.012),
        "beta_schedule": BETA_SCHEDULES[process.get("schedule", "scaled_linear")],
        "rescale_betas_zero_snr": process.get("zero_terminal_snr", False),
        "prediction_type": PREDICTION_TYPES[predicts],
        "timestep_spacing": "trailing",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": True,
    }


def with_one_factor(autoencoder: nn.Module, scaling: LatentScaling) -> tuple[nn.Module, float, dict[str, Any]]:
    """A first stage whose latents times one factor are our x0; the factor; and additional entries of its config.json.

    Our mean and std per channel are folded exactly into the 1x1 convolutions before and after a KL autoencoder's
    latents. What is left is Stable Diffusion's factor, which readers of single files assume. A codebook makes that
    impossible: mean and std are then stored under diffusers' names, for the reader to apply.
    """
    channels = autoencoder.latent_channels
    mean, std = scaling.mean.flatten().expand(channels), scaling.std.flatten().expand(channels)
    factor = float(f"{1 / float(std[0]):.7g}")
    one_factor = not mean.any() and torch.equal(std, std[:1].expand_as(std))
    if one_factor and (is_vq(autoencoder) or factor == diffusers.SCALING_FACTOR):
        return autoencoder, factor, {}
    if is_vq(autoencoder):
        return autoencoder, 1.0, {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
    gain = 1 / (std * diffusers.SCALING_FACTOR)
    return _rescaled(copy.deepcopy(autoencoder), mean, gain), diffusers.SCALING_FACTOR, {}


@torch.no_grad()
def _rescaled(autoencoder: nn.Module, mean: Tensor, gain: Tensor) -> nn.Module:
    """Changes latents z to (z - mean) * gain, in the posterior's mean and log-variance; inverted before the decoder."""
    into, out, channels = autoencoder.quant_conv, autoencoder.post_quant_conv, len(mean)
    if isinstance(into, nn.Identity):  # SD3's and FLUX' form has no place for a scale
        into, out = autoencoder.quant_conv, autoencoder.post_quant_conv = _unit_conv(2 * channels), _unit_conv(channels)
    mean, gain = mean.to(into.weight), gain.to(into.weight)
    into.bias[:channels] = (into.bias[:channels] - mean) * gain
    into.bias[channels:] += 2 * gain.log()
    into.weight[:channels] *= gain.view(-1, 1, 1, 1)
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight /= gain.view(1, -1, 1, 1)
    return autoencoder


def _unit_conv(channels: int) -> nn.Conv2d:
    """A 1x1 convolution that changes nothing."""
    conv = nn.Conv2d(channels, channels, 1)
    nn.init.dirac_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


def reads_back(pipeline: Pipeline, path: Path, shape: tuple[int, int, int], caption: str = "a red heart") -> None:
    """Reads the saved folder or file and compares a forward pass of each part; shape: (C, h, w) of x_t."""
    read = stable_diffusion if path.is_file() else diffusers
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    context_dim = pipeline.unet.context_dim
    context = None if context_dim is None else torch.ones(2, 3, context_dim).cumsum(1) / 3
    t, width = torch.tensor([1.0, 700.0]), pipeline.unet.vector_dim
    given = [context] if width is None else [context, torch.ones(2, width).cumsum(1) / width]
    if path.is_file():  # it does not store the number of heads
        unet = UNet(**unet_options(pipeline.unet))
        unet.load_state_dict(stable_diffusion.unet_state(unet, stable_diffusion.read_unet(path), path))
    else:
        unet = diffusers.load_unet(path)
    _refuse_difference("the U-Net", path, *(_run(net, noise, t, *given) for net in (unet, pipeline.unet)))
    if pipeline.autoencoder is not None:
        z = noise[:, :1].expand(-1, pipeline.autoencoder.latent_channels, -1, -1)[..., :8, :8]
        stages = read.load_autoencoder(path), pipeline.autoencoder
        _refuse_difference("the first stage", path, *(_run(stage.decode, z) for stage in stages))
    if pipeline.text_in_single_file or (pipeline.text is not None and not path.is_file()):
        texts = open_clip.load_text_encoder(path), pipeline.text
        _refuse_difference("the text encoder", path, *(text.encode_text([caption]).tokens for text in texts))


@torch.no_grad()
def _run(module: Any, *inputs: Tensor | None) -> Tensor:
    return module(*inputs)


def _refuse_difference(what: str, path: Path, got: Tensor, expected: Tensor) -> None:
    error = float((got - expected).norm() / expected.norm())
    if not error < 1e-5:
        raise RuntimeError(f"{path}: {what} read back differs by {error:.1e} from the one that was saved")
