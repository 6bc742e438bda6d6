"""Reconstruction and KL: the objective of the first stage (Rombach et al. 2022, app. G, eq. 25), adversary apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from data_pipeline.samples import Batch
from train.models.autoencoder import AutoencoderKL
from train.objectives.terms import LossTerms
from train.randomness import StreamRandom, generator_at


class AutoencoderObjective(nn.Module):
    """L1 + gradient_weight * L1 of finite differences + kl_weight * KL per latent value.

    Until step `crop_until`, random crops of `crop` pixels (0: never), the same place within a batch: cheaper, and as
    good for a convolutional network; then whole pictures. Half of all pictures are mirrored.
    """

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        kl_weight: float = 1e-2,
        gradient_weight: float = 0.5,
        crop: int = 0,
        crop_until: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.autoencoder, self.kl_weight, self.gradient_weight = autoencoder, kl_weight, gradient_weight
        self.crop, self.crop_until, self.seed = crop, crop_until, seed

    def forward(self, batch: Batch) -> LossTerms:
        images = batch.tensors["image"]
        random = StreamRandom(self.seed, batch.step, batch.streams, len(batch) // len(batch.streams), images.device)
        images = self.augmented(images, random, batch.step)
        posterior = self.autoencoder.encode(images.to(self.autoencoder.quant_conv.weight.dtype))
        noise = random.normal("posterior", posterior.mean.shape[1:]).to(posterior.mean)
        reconstruction = self.autoencoder.decode(posterior.sample(noise)).float()
        error = (reconstruction - images).abs().mean((1, 2, 3))
        edges = gradient_l1(reconstruction, images)
        kl = posterior.kl().float() / posterior.mean[0].numel()
        per_sample = error + self.gradient_weight * edges + self.kl_weight * kl
        parts = {"loss": per_sample, "l1": error, "gradient_l1": edges, "kl": kl}
        return LossTerms(
            per_sample.mean(), {name: value.detach().mean() for name, value in parts.items()}, per_sample.detach()
        )

    def augmented(self, images: Tensor, random: StreamRandom, step: int) -> Tensor:
        """Mirrored by half and, early on, cropped: (B, 3, H, W) -> (B, 3, crop, crop)."""
        mirror = random.uniform("mirror") < 0.5
        images = torch.where(mirror.view(-1, 1, 1, 1), images.flip(-1), images)
        if self.crop and step < self.crop_until:
            # One place for the whole global batch: it must not depend on which streams this rank holds.
            draws = torch.rand(2, generator=generator_at("cpu", self.seed, step, "crop"))
            top, left = (int(d * (size - self.crop + 1)) for d, size in zip(draws, images.shape[-2:], strict=True))
            images = images[..., top : top + self.crop, left : left + self.crop]
        return images


def gradient_l1(a: Tensor, b: Tensor) -> Tensor:
    """L1 between finite differences, down and across: (B, C, H, W) twice -> (B,). It is what keeps edges sharp."""
    d = a - b
    down = (d[..., 1:, :] - d[..., :-1, :]).abs().mean((1, 2, 3))
    across = (d[..., :, 1:] - d[..., :, :-1]).abs().mean((1, 2, 3))
    return down + across
