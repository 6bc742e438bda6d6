"""The objective of latent diffusion: E || target - prediction ||^2 over stored latents (Rombach et al. 2022, eq. 3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError
from data_pipeline.samples import Batch, TextStates
from train.diffusion.parameterization import Parameterization
from train.diffusion.process import DiffusionProcess, add_noise, like
from train.models.autoencoder import DiagonalGaussian
from train.models.conditioning import Conditioning, conditioned
from train.models.latents import LatentScaling
from train.objectives.terms import LossTerms
from train.randomness import StreamRandom


class LatentDiffusion(nn.Module):
    """Batch of latents and text states -> LossTerms. Only `unet` has parameters."""

    def __init__(
        self,
        unet: nn.Module,
        process: DiffusionProcess,
        parameterization: Parameterization,
        time_sampling: Callable[[Tensor], Tensor],
        scaling: LatentScaling,
        null: TextStates,  # tokens (T, D), pooled (P,): the encoder's states of the empty prompt
        prompt_dropout: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        refuse_unfit(process, parameterization)
        self.unet, self.process, self.parameterization, self.scaling = unet, process, parameterization, scaling
        self.time_sampling, self.null, self.prompt_dropout, self.seed = time_sampling, null, prompt_dropout, seed

    def forward(self, batch: Batch) -> LossTerms:
        random = self.random(batch)
        x0 = self.draw_latents(batch, random)  # (B, C, h, w) from stored moments
        conditioning = self.conditioning(batch).dropped(random.uniform("prompt") < self.prompt_dropout)
        t = self.process.at(self.time_sampling(random.uniform("time")))  # (B,)
        noise = random.normal("noise", x0.shape[1:])
        return self.loss(self.unet, x0, noise, t, conditioning)

    def loss(self, unet: nn.Module, x0: Tensor, noise: Tensor, t: Tensor, conditioning: Conditioning) -> LossTerms:
        """Mean squared error of `unet` at given draws; per_sample is the mean over a picture's C*h*w values."""
        x_t = add_noise(self.process, x0, noise, t)
        alpha, sigma = like(self.process.alpha(t), x0), like(self.process.sigma(t), x0)
        target = self.parameterization.target(x0, noise, alpha, sigma)
        prediction = conditioned(unet, x_t, self.process.network_time(t), conditioning).float()
        error = (prediction - target).square().mean((1, 2, 3))
        return LossTerms(error.mean(), {"loss": error.mean().detach()}, error.detach(), t)

    def validation_loss(self, unet: nn.Module, batch: Batch, fractions: Tensor) -> LossTerms:
        """As forward, but at given fractions (B,) of the process, nothing dropped; noise fixed by its place."""
        random = self.random(batch)
        x0 = self.draw_latents(batch, random)
        noise = random.normal("noise", x0.shape[1:])
        return self.loss(unet, x0, noise, self.process.at(fractions.to(x0.device)), self.conditioning(batch))

    def random(self, batch: Batch) -> StreamRandom:
        """The draws that belong to this batch's place in the run."""
        device = batch.tensors["moments"].device
        return StreamRandom(self.seed, batch.step, batch.streams, len(batch) // len(batch.streams), device)

    def draw_latents(self, batch: Batch, random: StreamRandom) -> Tensor:
        """A fresh draw from each stored posterior, scaled and folded for the U-Net."""
        posterior = DiagonalGaussian.from_moments(batch.tensors["moments"])
        return self.scaling.to_model(posterior.sample(random.normal("posterior", posterior.mean.shape[1:])))

    def conditioning(self, batch: Batch) -> Conditioning:
        """The batch's stored text states, with the null of the same encoder."""
        text = TextStates(batch.tensors["text"], batch.tensors["pooled"])
        return text_conditioning(text, self.null, self.unet.vector_dim is not None)


def refuse_unfit(process: DiffusionProcess, parameterization: Parameterization) -> None:
    """A parameterization whose x0 would not be x0 on this process, anywhere from end to end."""
    t = process.at(torch.linspace(0.0, 1.0, 17))
    if not parameterization.fits(process.alpha(t), process.sigma(t)):
        name, where = type(parameterization).__name__, type(process).__name__
        raise UserError(
            f"{name} does not belong to {where}: use parameterization=flow with process=rectified_flow, and "
            "parameterization=velocity or epsilon with a variance-preserving process."
        )


def text_conditioning(text: TextStates, null: TextStates, with_vector: bool) -> Conditioning:
    """Text states (B, ...) and those of the empty prompt as a Conditioning; training and sampling both come by here."""
    device = text.tokens.device
    if not with_vector:
        return Conditioning(text.tokens, None, null.tokens.to(device), None)
    return Conditioning(text.tokens, text.pooled, null.tokens.to(device), null.pooled.to(device))
