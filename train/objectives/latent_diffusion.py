"""The objective of latent diffusion: E || target - prediction ||^2 over stored latents (Rombach et al. 2022, eq. 3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from data_pipeline.common.errors import UserError
from data_pipeline.loading.batch import Batch
from train.diffusion.losses import L2, Uniform
from train.diffusion.parameterization import Parameterization
from train.diffusion.process import DiffusionProcess, add_noise, like
from train.diffusion.randomness import StreamRandom, generator_at
from train.diffusion.time_sampling import stratified
from train.models.conditioning import ConditionedUNet, Conditioning
from train.models.latents import StoredLatents
from train.objectives.terms import LossTerms

Weighting = Callable[[Tensor, Tensor, Parameterization], Tensor]  # alpha (B,), sigma (B,) -> (B,)


class LatentDiffusion(nn.Module):
    """Batch of latents and of what they are conditioned on -> LossTerms. Only `network` has parameters."""

    def __init__(
        self,
        network: ConditionedUNet,
        process: DiffusionProcess,
        parameterization: Parameterization,
        time_sampling: Callable[[Tensor], Tensor],
        latents: StoredLatents,
        prompt_dropout: float = 0.1,  # share of samples whose whole condition is replaced by its null
        loss: Callable[[Tensor, Tensor], Tensor] = L2(),  # noqa: B008  (has no state)
        weighting: Weighting = Uniform(),  # noqa: B008
        offset_noise: float = 0.0,  # std of a shift of each channel's noise, for darker and lighter pictures
        stratified_times: bool = False,  # one time from each of B equal parts of the process in a global batch of B
        seed: int = 0,
    ) -> None:
        super().__init__()
        refuse_unfit(process, parameterization)
        self.network, self.process, self.parameterization, self.latents = network, process, parameterization, latents
        self.time_sampling, self.prompt_dropout, self.seed = time_sampling, prompt_dropout, seed
        self.error, self.weighting = loss, weighting
        self.offset_noise, self.stratified_times = offset_noise, stratified_times

    def forward(self, batch: Batch) -> LossTerms:
        random = self.random(batch)
        x0 = self.draw_latents(batch, random)  # (B, C, h, w) from what is stored
        conditioning = self.network.condition(batch.tensors, batch.captions)
        conditioning = conditioning.dropped(random.uniform("prompt") < self.prompt_dropout)
        t = self.process.at(self.time_sampling(self.times(batch, random)))  # (B,)
        return self.loss(self.network, x0, self.noise(random, x0), t, conditioning)

    def loss(
        self, network: ConditionedUNet, x0: Tensor, noise: Tensor, t: Tensor, conditioning: Conditioning
    ) -> LossTerms:
        """Weighted error of `network` at given draws; per_sample is the mean over a picture's C*h*w values."""
        x_t = add_noise(self.process, x0, noise, t)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        target = self.parameterization.target(x0, noise, like(alpha, x0), like(sigma, x0))
        prediction = network(x_t, self.process.network_time(t), conditioning).float()
        error = self.error(prediction, target).mean((1, 2, 3)) * self.weighting(alpha, sigma, self.parameterization)
        return LossTerms(error.mean(), {"loss": error.mean().detach()}, error.detach(), t)

    def validation_loss(self, network: ConditionedUNet, batch: Batch, fractions: Tensor) -> LossTerms:
        """As forward, but at given fractions (B,) of the process, nothing dropped; noise fixed by its place."""
        random = self.random(batch)
        x0 = self.draw_latents(batch, random)
        conditioning = network.condition(batch.tensors, batch.captions)
        return self.loss(network, x0, self.noise(random, x0), self.process.at(fractions.to(x0.device)), conditioning)

    def random(self, batch: Batch) -> StreamRandom:
        """The draws that belong to this batch's place in the run."""
        device = batch.tensors[self.latents.stored_as].device
        return StreamRandom(self.seed, batch.step, batch.streams, len(batch) // len(batch.streams), device)

    def draw_latents(self, batch: Batch, random: StreamRandom) -> Tensor:
        """A fresh draw from each stored posterior, scaled and folded for the U-Net."""
        return self.latents.draw(batch.tensors, lambda shape: random.normal("posterior", shape))

    def noise(self, random: StreamRandom, x0: Tensor) -> Tensor:
        """Standard normal, plus the offset where it is asked for."""
        noise = random.normal("noise", x0.shape[1:])
        if self.offset_noise:
            cells = self.latents.scaling.fold**2  # of a channel, which the fold has put into channels of their own
            shift = random.normal("offset", (x0.shape[1] // cells, 1, 1)).repeat_interleave(cells, 1)
            noise = noise + self.offset_noise * shift
        return noise

    def times(self, batch: Batch, random: StreamRandom) -> Tensor:
        """Uniform in [0, 1), (B,): each by itself, or one from each stratum of the global batch."""
        u = random.uniform("time")
        if not self.stratified_times:
            return u
        per_stream = len(batch) // len(batch.streams)
        count = per_stream * batch.of_streams
        # Which stratum a place of the global batch has changes with the step, else a stream would keep to its times.
        strata = torch.randperm(count, generator=generator_at("cpu", self.seed, batch.step, "strata"))
        places = torch.cat([torch.arange(s * per_stream, (s + 1) * per_stream) for s in batch.streams])
        return stratified(u, strata[places].to(u.device), count)


def refuse_unfit(process: DiffusionProcess, parameterization: Parameterization) -> None:
    """A parameterization whose x0 would not be x0 on this process, anywhere from end to end."""
    t = process.at(torch.linspace(0.0, 1.0, 17))
    if not parameterization.fits(process.alpha(t), process.sigma(t)):
        name, where = type(parameterization).__name__, type(process).__name__
        raise UserError(
            f"{name} does not belong to {where}: use parameterization=flow with process=rectified_flow, "
            "parameterization=velocity or sample with a variance-preserving process, and epsilon only where the "
            "process keeps some signal to its end (not zero_terminal_snr)."
        )
