"""The keyword arguments that rebuild one of our models, read from the model itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from train.models import autoencoder as first_stages
from train.models.attention import PixelAttention, SpatialTransformer
from train.models.unet import UNet


def unet_options(unet: UNet) -> dict[str, Any]:
    """UNet's keyword arguments, with heads per level; without channels_last, which does not change the function."""
    levels, last = unet.down_blocks, unet.mid_block.attentions[0]
    attentions = [level.attentions[0] if level.has_attention else last for level in levels]
    return {
        "in_channels": unet.in_channels,
        "out_channels": unet.conv_out.out_channels,
        "channels": widths(levels),
        "layers_per_block": len(levels[0].resnets),
        "context_dim": unet.context_dim,
        "vector_dim": unet.vector_dim,
        "attention_levels": [level.has_attention for level in levels],
        "self_attention_levels": [_attends_to_itself(attention) for attention in attentions],
        "heads": unet.heads,
        "transformer_depth": 0 if isinstance(last, PixelAttention) else len(last.transformer_blocks),
        "linear_projection": isinstance(last, SpatialTransformer) and last.linear_projection,
        "norm_groups": unet.conv_norm_out.num_groups,
    }


def widths(levels: Sequence[nn.Module]) -> list[int]:
    """Number of channels of each level."""
    return [level.resnets[0].conv1.out_channels for level in levels]


def _attends_to_itself(attention: nn.Module) -> bool:
    return isinstance(attention, PixelAttention) or attention.transformer_blocks[0].self_attention


def autoencoder_options(autoencoder: nn.Module) -> dict[str, Any]:
    """Keyword arguments of AutoencoderKL or, if there is a codebook, of VQModel; without channels_last."""
    encoder = autoencoder.encoder
    options = {
        "latent_channels": autoencoder.latent_channels,
        "channels": widths(encoder.down_blocks),
        "layers_per_block": len(encoder.down_blocks[0].resnets),
        "norm_groups": encoder.conv_norm_out.num_groups,
        "mid_attention": len(encoder.mid_block.attentions) > 0,
        "patch": autoencoder.patch,
    }
    attention = [len(getattr(level, "attentions", None) or ()) > 0 for level in encoder.down_blocks]
    if any(attention):
        options["attention_levels"] = attention
    if isinstance(autoencoder.quant_conv, nn.Identity):
        options["quant_conv"] = False
    if is_vq(autoencoder):
        options["codebook_size"] = autoencoder.quantize.embedding.weight.shape[0]
    return options


def is_vq(autoencoder: nn.Module) -> bool:
    """Whether it has a codebook."""
    return hasattr(autoencoder, "quantize")


def make_autoencoder(options: Mapping[str, Any]) -> nn.Module:
    """The first stage that `autoencoder_options` describes."""
    return (first_stages.VQModel if "codebook_size" in options else first_stages.AutoencoderKL)(**options)
