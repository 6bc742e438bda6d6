"""From conditions to pictures: the sampling code that previews, sample_images and evaluate_ldm share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.common.errors import UserError
from data_pipeline.images.pixels import to_uint8
from train.data.latent_facts import LatentFacts
from train.diffusion.denoiser import Denoiser, NetworkDenoiser
from train.diffusion.guidance import ClassifierFreeGuidance, ClassifierGuidance
from train.diffusion.parameterization import Parameterization
from train.diffusion.process import DiffusionProcess
from train.diffusion.randomness import generator_at
from train.diffusion.samplers import uniform_times
from train.models.classifier import NoisyClassifier
from train.models.conditioning import ConditionedUNet, Conditioning
from train.models.latents import LatentScaling
from train.objectives.latent_diffusion import LatentDiffusion


class NotFinite(UserError):
    """Drawing ended in NaN or infinity, because of the weights or too strong a guidance."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """A sampling function with its number of steps and their spacing."""

    function: Callable[..., Tensor]
    steps: int = 30
    times: Callable[[DiffusionProcess, int], Tensor] = uniform_times

    @property
    def name(self) -> str:
        """The sampler's name, as in sampler=."""
        function = getattr(self.function, "func", self.function)
        return getattr(function, "__name__", type(function).__name__).removeprefix("sample_")


@dataclass(frozen=True, slots=True)
class Guidance:
    """Classifier-free guidance: scale 1 turns it off; rescale and interval as in diffusion/guidance.py."""

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not rises_within_1(self.interval):
            raise UserError(
                f"guidance.interval={self.interval} is not valid: use two increasing fractions of the process, from 0 "
                "(data) to 1 (noise), such as guidance.interval=[0.1,0.8]."
            )
        if not isinstance(self.rescale, int | float) or not 0 <= self.rescale <= 1:
            raise UserError(f"guidance.rescale={self.rescale} must be a number from 0 to 1.")

    def of(self, denoise: Denoiser, process: DiffusionProcess) -> Denoiser:
        """The guided denoiser."""
        return ClassifierFreeGuidance(denoise, self.scale, self.rescale, self.interval, process)


def rises_within_1(interval: Any) -> bool:
    """Whether `interval` is two numbers, 0 <= low < high <= 1."""
    if not isinstance(interval, list | tuple) or not all(isinstance(value, int | float) for value in interval):
        return False
    return len(interval) == 2 and 0 <= interval[0] < interval[1] <= 1


def how_drawn(step: int | str, sampler: Sampler, guidance: Guidance, seed: int) -> str:
    """The title of a grid. step: that of the training."""
    trained = f"step {step}" if isinstance(step, int) else step
    return f"{trained}, {sampler.name} with {sampler.steps} steps, guidance {guidance.scale:g}, seed {seed}"


@dataclass(frozen=True, slots=True)
class ClassifierGuide:
    """Guidance by a classifier of noised latents towards labels (N,), one per picture."""

    classifier: NoisyClassifier
    labels: Tensor
    scale: float = 1.0

    def of(self, denoise: Denoiser, process: DiffusionProcess, first: int, count: int) -> Denoiser:
        """The guided denoiser for pictures `first` to `first + count`."""

        def log_prob(x_t: Tensor, t: Tensor) -> Tensor:
            labels = self.labels[first : first + count].to(x_t.device)
            return self.classifier.log_prob(x_t, process.network_time(t), labels)

        return ClassifierGuidance(denoise, log_prob, self.scale, process)


@dataclass(frozen=True, slots=True)
class ConditionBatch:
    """Conditions of N pictures: stored fields by name, each (N, ...), and captions. negative: the conditions to steer
    away from, one per picture; None: the null."""

    fields: Mapping[str, Tensor]
    captions: Sequence[str]
    negative: ConditionBatch | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def part(self, first: int, count: int, device: torch.device) -> ConditionBatch:
        """The conditions of `count` pictures from `first` on."""
        rows = slice(first, first + count)
        negative = None if self.negative is None else self.negative.part(first, count, device)
        return ConditionBatch(
            {n: v[rows].to(device) for n, v in self.fields.items()}, list(self.captions[rows]), negative
        )


@dataclass(frozen=True, slots=True)
class Generator:
    """The fixed parts of sampling. latent_shape: (C, h, w) of x_t; decode maps raw latents to pictures."""

    network: ConditionedUNet
    process: DiffusionProcess
    parameterization: Parameterization
    scaling: LatentScaling
    decode: Callable[[Tensor], Tensor]
    latent_shape: tuple[int, int, int]
    device: torch.device

    @torch.no_grad()
    def draw(
        self,
        conditions: ConditionBatch,
        sampler: Sampler,
        guidance: Guidance,
        seed: int,
        batch_size: int = 64,
        on_batch: Callable[[int], None] = lambda n: None,
        classifier_guide: ClassifierGuide | None = None,
    ) -> np.ndarray:
        """N conditions -> (N, H, W, 3) uint8. Picture i depends on seed and i, but not on the batch size."""
        pictures = []
        for first in range(0, len(conditions), batch_size):
            part = conditions.part(first, batch_size, self.device)
            conditioning = self.network.condition(part.fields, part.captions)
            if (away := part.negative) is not None:
                conditioning = self.network.condition_against(conditioning, away.fields, away.captions)
            denoise = guidance.of(NetworkDenoiser(self.network, self.process, self.parameterization), self.process)
            if classifier_guide is not None:
                denoise = classifier_guide.of(denoise, self.process, first, len(part))
            pictures.append(self._draw_batch(denoise, conditioning, sampler, seed, range(first, first + len(part))))
            on_batch(len(part))
        return np.concatenate(pictures)

    @torch.no_grad()
    def with_conditioning_images(
        self, conditions: ConditionBatch, drawn: np.ndarray, batch_size: int = 64
    ) -> np.ndarray:
        """Pictures (N, H, W, 3) for a grid, each with the picture that it enlarges or fills in, if any, on its left."""
        size, given = drawn.shape[1:3], []
        for first in range(0, len(conditions), batch_size):
            fields = conditions.part(first, batch_size, self.device).fields
            if "masked_latents" in fields:
                given.append(self.decode(fields["masked_latents"].float()))
            elif "low_resolution" in fields:
                given.append(F.interpolate(fields["low_resolution"].float(), size))
        pictures = [to_uint8(part.float().cpu().numpy()) for part in given]
        return np.concatenate([np.concatenate(pictures), drawn], axis=2) if pictures else drawn

    def _draw_batch(
        self, denoise: Denoiser, conditioning: Conditioning, sampler: Sampler, seed: int, numbers: Sequence[int]
    ) -> np.ndarray:
        def noise(step: int | str) -> Tensor:
            draws = [torch.randn(self.latent_shape, generator=generator_at("cpu", seed, i, step)) for i in numbers]
            return torch.stack(draws).to(self.device)

        times = sampler.times(self.process, sampler.steps).to(self.device)
        x = self.process.sigma(times[0]) * noise("start")
        x = sampler.function(lambda x, t: denoise(x, t, conditioning), x, times, self.process, noise)
        pictures = self.decode(self.scaling.from_model(x)).float().cpu()
        for number, picture in zip(numbers, pictures, strict=True):
            if not torch.isfinite(picture).all():
                raise NotFinite(
                    f"picture {number} is not finite after {sampler.steps} steps: lower guidance.scale, change the "
                    "sampler, or use another step= of the run."
                )
        return to_uint8(pictures.numpy())


def generator_of(
    network: ConditionedUNet,
    objective: LatentDiffusion,
    facts: LatentFacts,
    autoencoder: nn.Module,
    device: torch.device,
) -> Generator:
    """A generator for a `network` trained with `objective` on latents with these facts."""
    return Generator(
        network,
        objective.process,
        objective.parameterization,
        facts.scaling,
        autoencoder.to(device).decode,
        facts.unet_shape,
        device,
    )
