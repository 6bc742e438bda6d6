"""Reads and writes CompVis' single files: `model.diffusion_model.*`, `first_stage_model.*`, averages in `model_ema.*`.

They contain no configuration: it is inferred from names and shapes, except for the number of heads, which no shape
shows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.common.errors import UserError
from train.models.unet import UNet
from train.weights.diffusers import autoencoder_config, frozen_autoencoder, unet_config
from train.weights.foreign import (
    Form,
    TensorMapping,
    from_foreign,
    load_exactly,
    read_tensors,
    tensor_shapes,
    to_foreign,
    write_tensors,
)
from train.weights.published_heads import published_heads
from train.weights.shapes import autoencoder_options, make_autoencoder, unet_options

NORM_GROUPS = 32  # fixed in CompVis' models
UNET, FIRST_STAGE, AVERAGED = "model.diffusion_model.", "first_stage_model.", "model_ema.diffusion_model"

_UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_PIXEL_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_map(unet: UNet) -> list[TensorMapping]:
    """Every parameter of our U-Net and CompVis' name for it, without prefix. Works on the meta device."""
    if unet.vector_dim is not None:
        raise UserError("CompVis' files of Stable Diffusion hold no text and size vector: leave single_file= out.")
    options = unet_options(unet)
    one_head = [1] * len(options["channels"])  # any number of heads can be written, as files do not show it
    _refuse_no_counterpart(unet_config({**options, "heads": one_head}))
    per_level = len(unet.down_blocks[0].resnets) + 1
    carried = []
    for name in unet.state_dict():
        if re.search(r"attentions\.\d+\.to_[kv]\.", name):
            continue  # fused with to_q
        if re.search(r"attentions\.\d+\.to_q\.", name):
            carried.append(_fused(unet, name, per_level))
        elif re.search(r"attentions\.\d+\.to_out\.0\.weight", name):
            carried.append(TensorMapping((name,), _unet_name(unet, name, per_level), _AS_CONV1D))
        else:
            carried.append(TensorMapping((name,), _unet_name(unet, name, per_level)))
    return carried


def _refuse_no_counterpart(config: Mapping[str, Any]) -> None:
    """UserError for what CompVis' files can't represent but diffusers can; unet_config has refused the rest."""
    if config["norm_num_groups"] != NORM_GROUPS:
        raise UserError(
            f"CompVis' models have {NORM_GROUPS} norm groups, not {config['norm_num_groups']}: set norm_groups."
        )


def _unet_name(unet: UNet, name: str, per_level: int) -> str:
    """CompVis numbers blocks consecutively: a residual block with its attention is one, so is a resampling layer."""
    module, _, leaf = name.rpartition(".")
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{leaf}"
    side, level, kind, number, rest = re.fullmatch(
        r"(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", module
    ).groups()
    if kind == "resnets":
        rest = _UNET_RESNET[rest]
    elif kind == "attentions":
        rest = {"group_norm": "norm", "to_out.0": "proj_out"}.get(rest, rest)
    part = {"resnets": 0, "attentions": 1}.get(kind)
    if side == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}.{rest}.{leaf}"
    first = int(level) * per_level
    if side == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{first + per_level}.0.op.{leaf}"
        return f"input_blocks.{1 + first + int(number)}.{part}.{rest}.{leaf}"
    if kind == "upsamplers":  # after the last residual block and its attention, if any
        part = 2 if unet.up_blocks[int(level)].has_attention else 1
        return f"output_blocks.{first + per_level - 1}.{part}.conv.{leaf}"
    return f"output_blocks.{first + int(number)}.{part}.{rest}.{leaf}"


def _fused(unet: UNet, name: str, per_level: int) -> TensorMapping:
    """to_q, to_k, to_v as one 1-d convolution: for each head its q, k and v."""
    heads = unet.get_submodule(name.partition(".to_q")[0]).heads

    def fuse(parts: Sequence[Tensor]) -> Tensor:
        joined = torch.cat([x.unflatten(0, (heads, -1)) for x in parts], 1).flatten(0, 1)  # (C, ..) x3 -> (3C, ..)
        return joined[..., None] if joined.dim() == 2 else joined

    def split(joined: Tensor) -> Sequence[Tensor]:
        joined = joined[..., 0] if joined.dim() == 3 else joined
        return [x.flatten(0, 1) for x in joined.unflatten(0, (heads, -1)).chunk(3, 1)]

    ours = tuple(name.replace(".to_q.", f".to_{part}.") for part in "qkv")
    return TensorMapping(ours, _unet_name(unet, name, per_level).replace(".to_q.", ".qkv."), Form(fuse, split))


_AS_CONV1D = Form(lambda ours: ours[0][..., None], lambda theirs: [theirs[..., 0]])
_AS_CONV2D = Form(lambda ours: ours[0][..., None, None], lambda theirs: [theirs[..., 0, 0]])


def autoencoder_map(autoencoder: nn.Module) -> list[TensorMapping]:
    """Every parameter of our first stage (KL or VQ) and CompVis' name for it, without prefix."""
    _refuse_no_counterpart(autoencoder_config(autoencoder_options(autoencoder)))
    levels = len(autoencoder.encoder.down_blocks)
    carried = []
    for name in autoencoder.state_dict():
        linear = re.search(r"attentions\.\d+\.to_(q|k|v|out\.0)\.weight", name)
        form = {"form": _AS_CONV2D} if linear else {}
        carried.append(TensorMapping((name,), _autoencoder_name(name, levels), **form))
    return carried


def _autoencoder_name(name: str, levels: int) -> str:
    """CompVis counts decoder levels from the full resolution, we count from the latents."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    for ours, theirs in _PIXEL_ATTENTION.items():
        name = re.sub(rf"(attentions\.\d+)\.{re.escape(ours)}\.", rf"\1.{theirs}.", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", name).replace("down_blocks", "down")
    for ours, theirs in (("resnets", "block"), ("attentions", "attn")):
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")


def read_unet(path: str | Path, averaged: bool = False) -> dict[str, Tensor]:
    """A file's U-Net tensors under CompVis' names. averaged: the EMA weights that training checkpoints also hold."""
    state = read_tensors(Path(path), lambda name: name.startswith((UNET, AVERAGED)))
    names = [name for name in state if name.startswith(UNET)]
    if not names:
        raise UserError(f"{path} has no {UNET}*: use a file of Stable Diffusion or latent diffusion.")
    if not averaged:
        return {name.removeprefix(UNET): state[name] for name in names}
    places = {name: AVERAGED + name.removeprefix(UNET).replace(".", "") for name in names}
    if not all(place in state for place in places.values()):
        raise UserError(f"{path} has no EMA weights of the whole U-Net: use its raw ones (start_from_ema=false).")
    return {name.removeprefix(UNET): state[place] for name, place in places.items()}


def has_averaged(path: str | Path) -> bool:
    """Whether a file also holds EMA weights of the U-Net."""
    return any(name.startswith(AVERAGED) for name in tensor_shapes(Path(path))[0])


def unet_shapes(path: str | Path) -> dict[str, Tensor]:
    """As `read_unet`, on the meta device; for a .safetensors file, only the header is read."""
    state, _ = tensor_shapes(Path(path))
    found = {name.removeprefix(UNET): value for name, value in state.items() if name.startswith(UNET)}
    if not found:
        raise UserError(f"{path} has no {UNET}*: use a file of Stable Diffusion or latent diffusion.")
    return found


def unet_state(unet: UNet, state: Mapping[str, Tensor], where: str | Path) -> dict[str, Tensor]:
    """CompVis' tensors under our names; one UserError names all that don't fit."""
    return from_foreign(unet_map(unet), state, unet.state_dict(), where)


def load_unet(path: str | Path, averaged: bool = False, heads: int | Sequence[int] | None = None) -> UNet:
    """A single file's U-Net. heads: one number, or one per level, if it is not one of the published models."""
    state = read_unet(path, averaged)
    with torch.device("meta"):
        unet = UNet(**unet_arguments(state, path, heads))
    load_exactly(unet, unet_state(unet, state, path), path)
    return unet


def unet_arguments(
    state: Mapping[str, Tensor], where: str | Path, heads: int | Sequence[int] | None = None
) -> dict[str, Any]:
    """Our keyword arguments, inferred from a U-Net's names and shapes. heads: of a U-Net that is not a published
    one."""
    if not {"input_blocks.0.0.weight", "input_blocks.1.0.out_layers.3.weight", "out.2.weight"} <= state.keys():
        raise UserError(f"{where} has no complete U-Net in CompVis' format: use another file.")
    if "label_emb.0.0.weight" in state:
        raise UserError(
            f"{where} has a vector condition (label_emb) as SDXL's, which single files can't be loaded with: use a "
            "diffusers folder, or a file without it."
        )
    channels, attention, layers, count = [], [], 0, 0
    for i in range(1, 1 + max(int(name.split(".")[1]) for name in state if name.startswith("input_blocks."))):
        if f"input_blocks.{i}.0.out_layers.3.weight" not in state:  # a resampling layer
            count = 0
            continue
        if count == 0:
            channels.append(state[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0])
            attention.append(f"input_blocks.{i}.1.norm.weight" in state)
        count += 1
        layers = max(layers, count)
    blocks = {name.split(".")[3] for name in state if name.startswith("middle_block.1.transformer_blocks.")}
    context = state.get("middle_block.1.transformer_blocks.0.attn2.to_k.weight")
    projection = state.get("middle_block.1.proj_in.weight")
    context_dim = None if context is None else context.shape[1]
    return {
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "out_channels": state["out.2.weight"].shape[0],
        "channels": channels,
        "layers_per_block": layers,
        "context_dim": context_dim,
        "attention_levels": attention,
        "heads": _heads(channels, context_dim, heads, where),
        "transformer_depth": len(blocks),
        "linear_projection": projection is not None and projection.dim() == 2,
    }


def _heads(
    channels: Sequence[int], context_dim: int | None, heads: int | Sequence[int] | None, where: str | Path
) -> int | list[int]:
    """Those of the published U-Net with these widths, else `heads`; UserError if neither is known."""
    known = published_heads(channels, context_dim)
    if known is None and heads is None:
        raise UserError(
            f"{where} is not a published U-Net (channels {list(channels)}, context {context_dim}), and its number of "
            "heads can't be inferred from its weights: add unet.heads=..., one number or one per level."
        )
    return known or (heads if isinstance(heads, int) else list(heads))


def load_autoencoder(path: str | Path) -> nn.Module:
    """A single file's first stage: AutoencoderKL or VQModel in eval mode, frozen, with its `fingerprint`.

    The file may contain only the first stage; its training losses (`loss.*`) are left out.
    """
    state = read_tensors(Path(path), lambda name: not name.startswith((UNET, "cond_stage_model.")))
    within = {name.removeprefix(FIRST_STAGE): value for name, value in state.items() if name.startswith(FIRST_STAGE)}
    state = within or {n: v for n, v in state.items() if n.startswith(("encoder.", "decoder.", "quant", "post_quant"))}
    if "encoder.conv_in.weight" not in state:
        raise UserError(f"{path} has no {FIRST_STAGE}*: use a file of Stable Diffusion or latent diffusion.")
    options = autoencoder_arguments(state)
    with torch.device("meta"):
        shape = make_autoencoder(options)
    return frozen_autoencoder(options, from_foreign(autoencoder_map(shape), state, shape.state_dict(), path), path)


def autoencoder_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Our keyword arguments, inferred from a first stage's names and shapes, in shapes.autoencoder_options' order."""
    blocks = [re.fullmatch(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight", name) for name in state]
    places = [(int(m[1]), int(m[2])) for m in blocks if m]
    levels, layers = 1 + max(level for level, _ in places), 1 + max(number for _, number in places)
    attention = [f"encoder.down.{level}.attn.0.norm.weight" in state for level in range(levels)]
    codebook = state.get("quantize.embedding.weight")
    return {
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "channels": [state[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)],
        "layers_per_block": layers,
        "norm_groups": NORM_GROUPS,
        "mid_attention": "encoder.mid.attn_1.norm.weight" in state,
        "patch": 1,
        **({"attention_levels": attention} if any(attention) else {}),
        **({} if "post_quant_conv.weight" in state else {"quant_conv": False}),
        **({"codebook_size": codebook.shape[0]} if codebook is not None else {}),
    }


def single_file_state(
    unet: UNet, autoencoder: nn.Module | None, more: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """All weights under CompVis' names, with prefixes. more: tensors already so named, such as a text encoder's."""
    state = {UNET + name: value for name, value in to_foreign(unet_map(unet), unet.state_dict()).items()}
    if autoencoder is not None:
        carried = to_foreign(autoencoder_map(autoencoder), autoencoder.state_dict())
        state |= {FIRST_STAGE + name: value for name, value in carried.items()}
    return {**state, **(more or {})}


def save_single_file(
    path: str | Path, unet: UNet, autoencoder: nn.Module | None, more: Mapping[str, Tensor] | None = None
) -> None:
    """Writes one .safetensors file like CompVis'."""
    if Path(path).suffix != ".safetensors":
        raise UserError(f"single_file={path} must end with .safetensors, the only format that is written.")
    write_tensors(Path(path), single_file_state(unet, autoencoder, more))
