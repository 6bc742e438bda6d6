"""Reads diffusers' AutoencoderTiny folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from data_pipeline.common.errors import UserError
from train.models.tiny_autoencoder import TinyAutoencoder
from train.weights.diffusers import STEMS
from train.weights.foreign import load_exactly, read_folder

CLASS = "AutoencoderTiny"
# What the model implements, and what does not change its function: latent_magnitude and latent_shift are for storing
# latents as bytes.
_FIXED = {
    "in_channels": 3, "out_channels": 3, "act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2,
    "scaling_factor": 1.0, "shift_factor": 0.0,
}  # fmt: skip
_IGNORED = {"latent_magnitude", "latent_shift", "force_upcast", "block_out_channels"}
_MAPPED = {
    "latent_channels", "encoder_block_out_channels", "decoder_block_out_channels", "num_encoder_blocks",
    "num_decoder_blocks",
}  # fmt: skip


def tiny_arguments(config: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    """Keyword arguments of TinyAutoencoder; UserError names entries that it has no option for."""
    named = {name: value for name, value in config.items() if not name.startswith("_") and name not in _IGNORED}
    odd = [f"{name}={value}" for name, value in named.items() if name not in _MAPPED and _FIXED.get(name) != value]
    widths = {*config.get("encoder_block_out_channels", [64]), *config.get("decoder_block_out_channels", [64])}
    if len(widths) > 1:
        odd.append(f"block_out_channels={sorted(widths)}")
    if odd:
        raise UserError(f"{where}: {', '.join(odd)} is not supported here: choose a model without it.")
    return {
        "latent_channels": config.get("latent_channels", 4),
        "channels": widths.pop(),
        "encoder_blocks": config.get("num_encoder_blocks", [1, 3, 3, 3]),
        "decoder_blocks": config.get("num_decoder_blocks", [3, 3, 3, 1]),
    }


def load_tiny(folder: Path, config: Mapping[str, Any]) -> TinyAutoencoder:
    """The model of a folder with this config.json, in eval mode, frozen."""
    with torch.device("meta"):
        model = TinyAutoencoder(**tiny_arguments(config, folder / "config.json"))
    load_exactly(model, read_folder(folder, STEMS), folder)
    return model.eval().requires_grad_(False)
