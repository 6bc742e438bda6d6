"""What this package's weights of a first stage equal in the configurations of CompVis' latent-diffusion.

Here everything is a mean per value. CompVis' loss of KL models sums over a picture's values instead (and over a
latent's, for KL), so it is as many times ours as a picture has values; that of VQ models has means, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from train.objectives.autoencoder import AutoencoderObjective


def values_per_picture(objective: AutoencoderObjective, size: Sequence[int]) -> int:
    """How many times CompVis' loss is ours, for pictures of (height, width): 1 for a VQ model."""
    return 1 if objective.quantizes else 3 * size[0] * size[1]


def in_compvis_units(objective: AutoencoderObjective, size: Sequence[int]) -> dict[str, Any]:
    """Weights by the names of CompVis' configurations, for pictures of (height, width)."""
    times, adversary = values_per_picture(objective, size), objective.adversary
    found: dict[str, Any] = {}
    if objective.quantizes:
        found |= {"codebook_weight": 1.0, "beta": objective.commitment_weight, "legacy": objective.vq_loss == "legacy"}
    else:
        latent_values = objective.autoencoder.latent_channels * size[0] * size[1] / objective.autoencoder.factor**2
        found["kl_weight"] = objective.kl_weight * times / latent_values
    if adversary is not None:
        found |= {"disc_weight": adversary.weight, "disc_start": adversary.start}
        found |= {"d_weight_max": adversary.adaptive_max * times, "d_weight_delta": adversary.adaptive_delta}
    return {name: value if isinstance(value, bool | int) else float(f"{value:.6g}") for name, value in found.items()}


def optimizer_in_compvis_units(lr: float, eps: float, times: int, batch_size: int) -> dict[str, float]:
    """CompVis' rate is per sample of the global batch; Adam's eps is compared with gradients of their loss."""
    rate, eps = lr / batch_size, eps * times
    return {"base_learning_rate": float(f"{rate:.6g}"), "adam_eps": float(f"{eps:.6g}")}
