"""Reconstruction quality of an autoencoder, and statistics of its latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from data_pipeline.images.pixels import from_uint8, to_uint8
from train.models.autoencoder import Autoencoder, DiagonalGaussian
from train.models.quantizer import counts_of, usage


def to_model(pictures: np.ndarray, autoencoder: Autoencoder) -> Sequence[torch.Tensor]:
    """(N, H, W, 3) uint8 -> batches (B, 3, H, W) in [-1, 1] on the model's device, 64 at a time."""
    images = torch.from_numpy(from_uint8(pictures)).permute(0, 3, 1, 2)
    return images.to(autoencoder.last_layer.device).split(64)


@torch.no_grad()
def reconstructed(autoencoder: Autoencoder, pictures: np.ndarray) -> np.ndarray:
    """Pictures decoded from the posterior's mean or from the nearest codes, as uint8."""
    parts = to_model(pictures, autoencoder)
    return np.concatenate([to_uint8(autoencoder.reconstruct(part).cpu().numpy()) for part in parts])


@torch.no_grad()
def latent_statistics(autoencoder: Autoencoder, pictures: np.ndarray) -> dict[str, Any]:
    """Statistics of stored latents: mean and std per channel of posterior samples; for a KL model the mean posterior
    std and KL in nats, for a VQ model the number of codes used and their perplexity."""
    stored = torch.cat([autoencoder.encode_stored(part) for part in to_model(pictures, autoencoder)])
    mean, variance = autoencoder.posterior_of(stored)
    figures = {
        "channel_mean": mean.mean((0, 2, 3)).tolist(),
        "channel_std": (mean.var((0, 2, 3)) + variance.mean((0, 2, 3))).sqrt().tolist(),
    }
    if autoencoder.stored_as == "indices":
        used, perplexity = usage(counts_of(stored, len(autoencoder.codebook)))
        return {**figures, "codes_used": int(used), "code_perplexity": float(perplexity)}
    kl = DiagonalGaussian.from_moments(stored).kl()
    return {**figures, "posterior_std": float(variance.sqrt().mean()), "kl_nats": float(kl.mean())}


def summary_line(latents: dict[str, Any]) -> str:
    """The latents' statistics in one line."""
    std = f"latents' std {np.mean(latents['channel_std']):.3f}"
    if "kl_nats" in latents:
        return f"{std}, KL {latents['kl_nats']:.0f} nats a picture"
    return f"{std}, {latents['codes_used']} codes used, perplexity {latents['code_perplexity']:.0f}"
