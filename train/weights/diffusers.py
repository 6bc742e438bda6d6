"""Reads and writes diffusers folders: <folder>/{unet,vae}/{config.json, diffusion_pytorch_model.safetensors}.

Our parameters have diffusers' names and shapes, so only the configurations are mapped: `UNet` is its
UNet2DConditionModel, or UNet2DModel where transformer_depth is 0; the first stages are its AutoencoderKL and VQModel.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.common.errors import UserError
from data_pipeline.common.storage import write_atomically
from train.models.size_features import SizeFeatures
from train.models.unet import UNet
from train.weights.foreign import load_exactly, read_folder, read_json, write_tensors
from train.weights.saved import fingerprint
from train.weights.shapes import autoencoder_options, make_autoencoder, unet_options

UNET_CLASSES, VAE_CLASSES = ("UNet2DConditionModel", "UNet2DModel"), ("AutoencoderKL", "VQModel")
STEMS = ("diffusion_pytorch_model", "diffusion_pytorch_model.fp16")
SCALING_FACTOR = 0.18215  # Stable Diffusion's, and diffusers' default

# Entries for which our U-Net and first stages have no option, with the values that they implement.
_UNET_FIXED = {
    "act_fn": "silu", "center_input_sample": False, "conv_in_kernel": 3, "conv_out_kernel": 3, "downsample_padding": 1,
    "downsample_type": "conv", "upsample_type": "conv", "dropout": 0.0, "dual_cross_attention": False,
    "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_scale_factor": 1, "norm_eps": 1e-5,
    "only_cross_attention": False, "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "default", "time_embedding_type": "positional", "attention_type": "default",
    "class_embeddings_concat": False, "add_attention": True,
}  # fmt: skip
_VAE_FIXED = {
    "act_fn": "silu", "in_channels": 3, "out_channels": 3, "norm_type": "group", "lookup_from_codebook": False,
}  # fmt: skip
# Entries that don't change the model's function; addition_embed_type_num_heads matters only with addition_embed_type.
_IGNORED = {
    "sample_size", "upcast_attention", "force_upcast", "addition_embed_type_num_heads", "num_train_timesteps",
    "scaling_factor", "shift_factor", "latents_mean", "latents_std",
}  # fmt: skip


def unet_config(options: Mapping[str, Any], with_sizes: bool = False) -> dict[str, Any]:
    """diffusers' config.json for a U-Net with our keyword arguments (as from shapes.unet_options). with_sizes: whether
    its vector condition is SDXL's: a pooled text state followed by the six sizes."""
    if options["vector_dim"] is not None and not with_sizes:
        raise UserError(
            "diffusers' U-Nets have no vector condition, except text and sizes: train with unet.vector_dim=null, or "
            "with conditioning=[text,size], to export."
        )
    if options["vector_dim"] is not None and options["transformer_depth"] == 0:
        raise UserError("diffusers' UNet2DModel has no sizes: train with unet.transformer_depth=1 to export.")
    if not all(options["self_attention_levels"]):
        raise UserError("diffusers' U-Nets can't leave self-attention out: unet.self_attention_levels must be null.")
    config = {
        "in_channels": options["in_channels"],
        "out_channels": options["out_channels"],
        "block_out_channels": list(options["channels"]),
        "layers_per_block": options["layers_per_block"],
        "norm_num_groups": options["norm_groups"],
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }
    return {**config, **(_pixel_config if options["transformer_depth"] == 0 else _transformer_config)(options)}


def _transformer_config(options: Mapping[str, Any]) -> dict[str, Any]:
    if options["context_dim"] is None:
        raise UserError(
            "diffusers has no U-Net with transformers but no context: train with unet.transformer_depth=0 to export."
        )
    heads = list(options["heads"])
    return {
        "_class_name": "UNet2DConditionModel",
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        **_block_types(options["attention_levels"], "CrossAttn"),
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,  # diffusers' name for the number of heads
        "cross_attention_dim": options["context_dim"],
        "transformer_layers_per_block": options["transformer_depth"],
        "use_linear_projection": options["linear_projection"],
        **(_text_time(options["vector_dim"]) if options["vector_dim"] is not None else {}),
    }


def _text_time(vector_dim: int) -> dict[str, Any]:
    """The fields of SDXL's vector condition: pooled text, then the sinusoids of six sizes (time_ids)."""
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SizeFeatures.WIDTH,
        "projection_class_embeddings_input_dim": vector_dim,
    }


def _pixel_config(options: Mapping[str, Any]) -> dict[str, Any]:
    attending = [
        *options["attention_levels"][:-1],
        True,
    ]  # the middle block always has attention, with the last level's heads
    sized = zip(options["channels"], options["heads"], attending, strict=True)
    head_dims = {width // heads for width, heads, attends in sized if attends}
    single = all(heads == 1 for heads, attends in zip(options["heads"], attending, strict=True) if attends)
    if len(head_dims) > 1 and not single:
        raise UserError(
            f"diffusers' UNet2DModel has one head width, not {sorted(head_dims)}: change unet.heads accordingly."
        )
    return {
        "_class_name": "UNet2DModel",
        "mid_block_type": "UNetMidBlock2D",
        **_block_types(options["attention_levels"], "Attn"),
        "attention_head_dim": None if single else head_dims.pop(),
    }


def _block_types(attention: Sequence[bool], kind: str) -> dict[str, list[str]]:
    marks = [kind if attends else "" for attends in attention]
    return {
        "down_block_types": [f"{mark}DownBlock2D" for mark in marks],
        "up_block_types": [f"{mark}UpBlock2D" for mark in reversed(marks)],
    }


def unet_arguments(config: Mapping[str, Any], where: str | Path = "config.json") -> dict[str, Any]:
    """Our keyword arguments for diffusers' configuration; UserError names entries that our U-Net has no option for."""
    config = {name: _one_for_all(value) if name in _ONE_FOR_ALL else value for name, value in config.items()}
    odd = [f"{name}={config[name]}" for name in _ONE_FOR_ALL if isinstance(config.get(name), list)]
    if odd:
        raise UserError(f"{where}: {', '.join(odd)} is not supported here: choose a model without it.")
    plain = config.get("_class_name") == "UNet2DModel"
    with_sizes = config.get("addition_embed_type") == "text_time"
    channels = list(config["block_out_channels"])
    attention = ["Attn" in kind for kind in config["down_block_types"]]
    options = {
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "channels": channels,
        "layers_per_block": config.get("layers_per_block", 2),
        "context_dim": None if plain else config.get("cross_attention_dim", 1280),
        "vector_dim": config.get("projection_class_embeddings_input_dim") if with_sizes else None,
        "attention_levels": attention,
        "self_attention_levels": [True] * len(channels),
        "heads": _heads(config.get("attention_head_dim", 8), channels, plain),
        "transformer_depth": 0 if plain else config.get("transformer_layers_per_block", 1),
        "linear_projection": bool(config.get("use_linear_projection", False)),
        "norm_groups": config.get("norm_num_groups", 32),
    }
    _refuse_unmapped(config, unet_config(options, with_sizes), _UNET_FIXED, where)
    return options


_ONE_FOR_ALL = ("layers_per_block", "cross_attention_dim", "transformer_layers_per_block")  # one value here


def _one_for_all(value: Any) -> Any:
    """A list of one value per level, reduced to that value if all are equal."""
    return value[0] if isinstance(value, list) and all(one == value[0] for one in value) else value


def _heads(given: int | Sequence[int] | None, channels: Sequence[int], plain: bool) -> list[int]:
    """Heads per level. attention_head_dim is a head's width in UNet2DModel, the head count in UNet2DConditionModel."""
    if plain:
        return [1 if given is None or width % given else width // given for width in channels]
    return [given] * len(channels) if isinstance(given, int) else list(given)


def autoencoder_config(options: Mapping[str, Any], scaling_factor: float = SCALING_FACTOR) -> dict[str, Any]:
    """diffusers' config.json for a first stage with our keyword arguments (as from shapes.autoencoder_options)."""
    if options["patch"] != 1:
        raise UserError("diffusers' first stages have no pixel-unshuffle: train with autoencoder.patch=1 to export.")
    attention = options.get("attention_levels") or [False] * len(options["channels"])
    marks = ["Attn" if attends else "" for attends in attention]
    config = {
        "_class_name": "VQModel" if "codebook_size" in options else "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": options["latent_channels"],
        "block_out_channels": list(options["channels"]),
        "down_block_types": [f"{mark}DownEncoderBlock2D" for mark in marks],
        "up_block_types": [f"{mark}UpDecoderBlock2D" for mark in reversed(marks)],
        "layers_per_block": options["layers_per_block"],
        "norm_num_groups": options["norm_groups"],
        "mid_block_add_attention": options["mid_attention"],
        "scaling_factor": scaling_factor,
    }
    if not options.get("quant_conv", True):
        config |= {"use_quant_conv": False, "use_post_quant_conv": False}
    if "codebook_size" in options:
        config |= {"num_vq_embeddings": options["codebook_size"], "vq_embed_dim": options["latent_channels"]}
    return config


def autoencoder_arguments(config: Mapping[str, Any], where: str | Path = "config.json") -> dict[str, Any]:
    """Our keyword arguments for diffusers' configuration; UserError names entries without an option here."""
    vq = config.get("_class_name") == "VQModel"
    attention = ["Attn" in kind for kind in config["down_block_types"]]
    options = {
        "latent_channels": config.get("latent_channels", 3 if vq else 4),
        "channels": list(config["block_out_channels"]),
        "layers_per_block": config.get("layers_per_block", 1),
        "norm_groups": config.get("norm_num_groups", 32),
        "mid_attention": config.get("mid_block_add_attention", True),
        "patch": 1,
        **({"attention_levels": attention} if any(attention) else {}),
        **({} if config.get("use_quant_conv", True) else {"quant_conv": False}),
        **({"codebook_size": config.get("num_vq_embeddings", 256)} if vq else {}),
    }
    ours = autoencoder_config(options)
    ours |= {"use_quant_conv": "quant_conv" not in options, "use_post_quant_conv": "quant_conv" not in options}
    width = {"vq_embed_dim": config.get("vq_embed_dim") or options["latent_channels"]} if vq else {}
    _refuse_unmapped({**config, **width}, ours, _VAE_FIXED, where)
    return options


def _refuse_unmapped(
    config: Mapping[str, Any], mapped: Mapping[str, Any], fixed: Mapping[str, Any], where: str | Path
) -> None:
    """UserError unless each entry equals what we would write, has the fixed value, or is off."""

    def same(name: str, value: Any) -> bool:
        value = list(value) if isinstance(value, tuple) else value
        if name == "attention_head_dim":  # may be one number, or an equal one for each level
            return True
        expected = {**fixed, **mapped}.get(name)
        return value == expected or (name not in fixed and name not in mapped and value in (None, False))

    odd = [name for name, value in config.items() if not name.startswith("_") and name not in _IGNORED]
    odd = [f"{name}={config[name]}" for name in odd if not same(name, config[name])]
    if odd:
        raise UserError(f"{where}: {', '.join(odd)} is not supported here: choose a model without it.")


def component(path: str | Path, names: Sequence[str], classes: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """The folder of one model, <path>/<name> or <path> itself, and its config.json."""
    for folder in (*(Path(path) / name for name in names), Path(path)):
        if (folder / "config.json").is_file():
            config = read_json(folder / "config.json")
            if config.get("_class_name") in classes:
                return folder, config
            if "fingerprint" in config:
                raise UserError(
                    f"{folder} was trained by this project and is not a diffusers folder: add autoencoder=trained."
                )
            if config.get("_class_name") == "AutoencoderTiny":
                raise UserError(
                    f"{folder} contains AutoencoderTiny, which only decodes previews here: use decoder=, or the "
                    "autoencoder that it was made from."
                )
            raise UserError(
                f"{folder} contains {config.get('_class_name')}, but must contain one of {', '.join(classes)}."
            )
    raise UserError(f"{path} has no {names[0]}/config.json: use a folder that diffusers saved.")


def read_unet_state(path: str | Path) -> dict[str, Tensor]:
    """The U-Net's tensors under our names, unchanged."""
    return _read_state(component(path, ("unet",), UNET_CLASSES)[0])


def _read_state(folder: Path) -> dict[str, Tensor]:
    return {_present_name(name): value for name, value in read_folder(folder, STEMS).items()}


def _present_name(name: str) -> str:
    """The present name of a parameter: pixel attention had other names when most published first stages were saved."""
    name = re.sub(r"^add_embedding\.", "vector_embedding.", name)
    older = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{older[m[2]]}.", name)


def load_unet(path: str | Path) -> UNet:
    """The U-Net of a diffusers folder."""
    folder, config = component(path, ("unet",), UNET_CLASSES)
    with torch.device("meta"):
        unet = UNet(**unet_arguments(config, folder / "config.json"))
    load_exactly(unet, _read_state(folder), folder)
    return unet


def load_autoencoder(path: str | Path) -> nn.Module:
    """The first stage of a diffusers folder: AutoencoderKL or VQModel in eval mode, frozen, with its `fingerprint`."""
    folder, config = component(path, ("vae", "vqvae"), VAE_CLASSES)
    scaling = stated_scaling(config, folder / "config.json")
    autoencoder = frozen_autoencoder(autoencoder_arguments(config, folder / "config.json"), _read_state(folder), folder)
    autoencoder.stated_scaling = scaling
    return autoencoder


def frozen_autoencoder(options: Mapping[str, Any], state: Mapping[str, Tensor], where: str | Path) -> nn.Module:
    """A first stage from our keyword arguments and these weights. Its fingerprint covers both, independent of the file
    format."""
    autoencoder = make_autoencoder(options)
    load_exactly(autoencoder, state, where)
    autoencoder.fingerprint = fingerprint(dict(options), autoencoder.state_dict())
    return autoencoder.eval().requires_grad_(False)


def stated_scaling(config: Mapping[str, Any], where: str | Path) -> dict[str, list[float]] | None:
    """Mean and std per channel with which x0 = (z - mean) / std, as diffusers' configuration states them; None if it
    has no scaling_factor. UserError for a shift without a scale."""
    factor, shift = config.get("scaling_factor"), config.get("shift_factor")
    means, stds = config.get("latents_mean"), config.get("latents_std")
    if factor is None:
        if shift is None and means is None and stds is None:
            return None
        raise UserError(
            f"{where} has a shift of the latents but no scaling_factor: add the one that its model card states."
        )
    channels = config.get("latent_channels", 4)
    means, stds = means or [shift or 0.0] * channels, stds or [1.0] * channels
    if len(means) != channels or len(stds) != channels:
        raise UserError(f"{where}: latents_mean and latents_std must have {channels} values, one per latent channel.")
    return {"mean": [float(mean) for mean in means], "std": [float(std) / factor for std in stds]}


def save_unet(folder: Path, unet: UNet, with_sizes: bool = False) -> None:
    """Writes <folder>/config.json and weights for UNet2DConditionModel or UNet2DModel. with_sizes: as in
    unet_config."""
    config = unet_config(unet_options(unet), with_sizes)
    state = {re.sub(r"^vector_embedding\.", "add_embedding.", name): v for name, v in unet.state_dict().items()}
    _save(folder, config, state)


def save_autoencoder(folder: Path, autoencoder: nn.Module, scaling_factor: float = SCALING_FACTOR, **more: Any) -> None:
    """Writes <folder>/config.json and weights, for AutoencoderKL or VQModel; more: extra entries of config.json."""
    config = {**autoencoder_config(autoencoder_options(autoencoder), scaling_factor), **more}
    _save(folder, config, autoencoder.state_dict())


def _save(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    write_tensors(folder / f"{STEMS[0]}.safetensors", state)
    write_config(folder / "config.json", config)


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Writes JSON with sorted keys, like diffusers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
