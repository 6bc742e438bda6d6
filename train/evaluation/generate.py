"""From text states to pictures: the one path that previews, sample_images and evaluate_ldm draw by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.samples import TextStates
from train.diffusion.denoiser import NetworkDenoiser
from train.diffusion.guidance import ClassifierFreeGuidance
from train.diffusion.parameterization import Parameterization
from train.diffusion.process import DiffusionProcess
from train.diffusion.samplers import uniform_times
from train.evaluation.report import to_uint8
from train.models.conditioning import conditioned
from train.models.latents import LatentScaling
from train.objectives.latent_diffusion import text_conditioning
from train.randomness import generator_at


@dataclass(frozen=True, slots=True)
class Sampler:
    """A sampling function with its number of steps."""

    function: Callable[..., Tensor]
    steps: int = 30


@dataclass(frozen=True, slots=True)
class Generator:
    """Everything fixed about drawing. latent_shape is the U-Net's (C, h, w); decode maps raw latents to pictures."""

    unet: nn.Module
    process: DiffusionProcess
    parameterization: Parameterization
    scaling: LatentScaling
    decode: Callable[[Tensor], Tensor]
    null: TextStates
    latent_shape: tuple[int, int, int]
    device: torch.device

    @torch.no_grad()
    def draw(
        self,
        text: TextStates,
        sampler: Sampler,
        guidance: float,
        seed: int,
        batch_size: int = 64,
        on_batch: Callable[[int], None] = lambda n: None,
    ) -> np.ndarray:
        """Text states of N prompts -> (N, H, W, 3) uint8. Picture i depends on seed and i, not on the batch size."""
        pictures = []
        for first in range(0, len(text.tokens), batch_size):
            part = TextStates(text.tokens[first : first + batch_size], text.pooled[first : first + batch_size])
            pictures.append(self._draw_batch(part, sampler, guidance, seed, first))
            on_batch(len(part.tokens))
        return np.concatenate(pictures)

    def _draw_batch(self, text: TextStates, sampler: Sampler, guidance: float, seed: int, first: int) -> np.ndarray:
        numbers = range(first, first + len(text.tokens))

        def noise(step: int | str) -> Tensor:
            draws = [torch.randn(self.latent_shape, generator=generator_at("cpu", seed, i, step)) for i in numbers]
            return torch.stack(draws).to(self.device)

        text = TextStates(text.tokens.to(self.device), text.pooled.to(self.device))
        conditioning = text_conditioning(text, self.null, self.unet.vector_dim is not None)
        denoiser = NetworkDenoiser(lambda x, t, c: conditioned(self.unet, x, t, c), self.process, self.parameterization)
        guided = ClassifierFreeGuidance(denoiser, guidance)
        times = uniform_times(self.process, sampler.steps).to(self.device)
        x = self.process.sigma(times[0]) * noise("start")
        x = sampler.function(lambda x, t: guided(x, t, conditioning), x, times, self.process, noise)
        return to_uint8(self.decode(self.scaling.from_model(x)).float().cpu().numpy())
