"""How well an autoencoder gives pictures back, and the statistics of its latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from data_pipeline.images.pixels import from_uint8, to_uint8
from train.models.autoencoder import Autoencoder, DiagonalGaussian
from train.models.quantizer import usage


def to_model(pictures: np.ndarray, autoencoder: Autoencoder) -> Sequence[torch.Tensor]:
    """(N, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1] beside the model, 64 at a time."""
    images = torch.from_numpy(from_uint8(pictures)).permute(0, 3, 1, 2)
    return images.to(autoencoder.last_layer.device).split(64)


@torch.no_grad()
def reconstructed(autoencoder: Autoencoder, pictures: np.ndarray) -> np.ndarray:
    """What decoding the posterior's mean, or the nearest codes, gives back, as uint8."""
    parts = to_model(pictures, autoencoder)
    return np.concatenate([to_uint8(autoencoder.reconstruct(part).cpu().numpy()) for part in parts])


@torch.no_grad()
def latent_statistics(autoencoder: Autoencoder, pictures: np.ndarray) -> dict[str, Any]:
    """Of latents as they are stored: mean and std of each channel of posterior draws; a KL model's mean posterior std
    and KL in nats, or how many codes a VQ model uses, and their perplexity."""
    stored = torch.cat([autoencoder.encode_stored(part) for part in to_model(pictures, autoencoder)])
    mean, variance = autoencoder.posterior_of(stored)
    figures = {
        "channel_mean": mean.mean((0, 2, 3)).tolist(),
        "channel_std": (mean.var((0, 2, 3)) + variance.mean((0, 2, 3))).sqrt().tolist(),
    }
    if autoencoder.stored_as == "indices":
        used, perplexity = usage(stored, len(autoencoder.codebook))
        return {**figures, "codes_used": int(used), "code_perplexity": float(perplexity)}
    kl = DiagonalGaussian.from_moments(stored).kl()
    return {**figures, "posterior_std": float(variance.sqrt().mean()), "kl_nats": float(kl.mean())}


def said_of(latents: dict[str, Any]) -> str:
    """The latents' statistics in a line."""
    std = f"latents' std {np.mean(latents['channel_std']):.3f}"
    if "kl_nats" in latents:
        return f"{std}, KL {latents['kl_nats']:.0f} nats a picture"
    return f"{std}, {latents['codes_used']} codes used, perplexity {latents['code_perplexity']:.0f}"
