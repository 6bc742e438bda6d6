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
    """Batch of latents and their conditions -> LossTerms. Only `network` has parameters."""

    def __init__(
        self,
        network: ConditionedUNet,
        process: DiffusionProcess,
        parameterization: Parameterization,
        time_sampling: Callable[[Tensor], Tensor],
        latents: StoredLatents,
        prompt_dropout: float = 0.1,  # fraction of samples whose whole condition is replaced by its null
        loss: Callable[[Tensor, Tensor], Tensor] = L2(),  # noqa: B008  (has no state)
        weighting: Weighting = Uniform(),  # noqa: B008
        offset_noise: float = 0.0,  # std of a random shift of each channel's noise, for darker and lighter pictures
        stratified_times: bool = False,  # a global batch of B takes one time from each of B equal parts of the process
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
        x0 = self.draw_latents(batch, random)  # (B, C, h, w)
        conditioning = self.network.condition(batch.tensors, batch.captions)
        conditioning = conditioning.dropped(random.uniform("prompt") < self.prompt_dropout)
        t = self.process.at(self.time_sampling(self.times(batch, random)))  # (B,)
        return self.loss(self.network, x0, self.noise(random, x0), t, conditioning)

    def loss(
        self, network: ConditionedUNet, x0: Tensor, noise: Tensor, t: Tensor, conditioning: Conditioning
    ) -> LossTerms:
        """Weighted error of `network` at the given noise and t; per_sample is the mean over a sample's C*h*w values."""
        x_t = add_noise(self.process, x0, noise, t)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        target = self.parameterization.target(x0, noise, like(alpha, x0), like(sigma, x0))
        prediction = network(x_t, self.process.network_time(t), conditioning).float()
        error = self.error(prediction, target).mean((1, 2, 3)) * self.weighting(alpha, sigma, self.parameterization)
        return LossTerms(error.mean(), {"loss": error.mean().detach()}, error.detach(), t)

    def validation_loss(self, network: ConditionedUNet, batch: Batch, fractions: Tensor) -> LossTerms:
        """Like forward, but at given fractions (B,) of the process and without condition dropout. The noise depends
        only on its position."""
        random = self.random(batch)
        x0 = self.draw_latents(batch, random)
        conditioning = network.condition(batch.tensors, batch.captions)
        return self.loss(network, x0, self.noise(random, x0), self.process.at(fractions.to(x0.device)), conditioning)

    def random(self, batch: Batch) -> StreamRandom:
        """The random draws that belong to this batch's position in the run."""
        device = batch.tensors[self.latents.stored_as].device
        return StreamRandom(self.seed, batch.step, batch.streams, len(batch) // len(batch.streams), device)

    def draw_latents(self, batch: Batch, random: StreamRandom) -> Tensor:
        """A new sample from each stored posterior, scaled and folded for the U-Net."""
        return self.latents.draw(batch.tensors, lambda shape: random.normal("posterior", shape))

    def noise(self, random: StreamRandom, x0: Tensor) -> Tensor:
        """Standard normal noise, plus the offset noise if configured."""
        noise = random.normal("noise", x0.shape[1:])
        if self.offset_noise:
            cells = self.latents.scaling.fold**2  # channels that the fold makes of each channel
            shift = random.normal("offset", (x0.shape[1] // cells, 1, 1)).repeat_interleave(cells, 1)
            noise = noise + self.offset_noise * shift
        return noise

    def times(self, batch: Batch, random: StreamRandom) -> Tensor:
        """Uniform in [0, 1), (B,): independent, or one from each stratum of the global batch."""
        u = random.uniform("time")
        if not self.stratified_times:
            return u
        per_stream = len(batch) // len(batch.streams)
        count = per_stream * batch.of_streams
        # The stratum of a position in the global batch changes with the step; otherwise a stream would keep its times.
        strata = torch.randperm(count, generator=generator_at("cpu", self.seed, batch.step, "strata"))
        places = torch.cat([torch.arange(s * per_stream, (s + 1) * per_stream) for s in batch.streams])
        return stratified(u, strata[places].to(u.device), count)


def refuse_unfit(process: DiffusionProcess, parameterization: Parameterization) -> None:
    """UserError if the parameterization does not recover x0 everywhere on this process."""
    t = process.at(torch.linspace(0.0, 1.0, 17))
    if not parameterization.fits(process.alpha(t), process.sigma(t)):
        name, where = type(parameterization).__name__, type(process).__name__
        raise UserError(
            f"{name} can't be used with {where}: use parameterization=flow with process=rectified_flow, "
            "parameterization=velocity or sample with a variance-preserving process, and epsilon only where the "
            "process keeps some signal to its end (not zero_terminal_snr)."
        )
