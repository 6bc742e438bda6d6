"""The denoiser's loss on held-out latents, with fixed noise and evenly spaced times so that values are comparable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from data_pipeline.loading.batch import Batch, DataCursor
from data_pipeline.shards.samples import collated
from train.diffusion.time_sampling import evenly_spaced
from train.distributed.collectives import mean_over_ranks
from train.distributed.ranks import Ranks
from train.engine.train_state import TrainState
from train.models.conditioning import ConditionedUNet
from train.objectives.latent_diffusion import LatentDiffusion
from train.runs.metrics import Reporter

QUARTERS = 4
BATCH = 64


class HeldoutLoss:
    """Every sample at `times` evenly spaced times; each rank takes its share of the samples."""

    def __init__(
        self,
        objective: LatentDiffusion,
        network: ConditionedUNet,
        samples: Sequence[dict[str, Any]],
        ranks: Ranks,
        reporter: Reporter,
        times: int = 8,
    ) -> None:
        self.objective, self.network, self.samples, self.ranks = objective, network, samples, ranks
        self.reporter, self.times = reporter, times

    @torch.no_grad()
    def measure(self, state: TrainState) -> None:
        """Log heldout_loss, and heldout_loss_q1..q4 over the quarters of the process from data to noise."""
        jobs = [(i, t) for i in range(len(self.samples)) for t in range(self.times)]
        mine = jobs[self.ranks.rank :: self.ranks.world_size]
        fractions = evenly_spaced(self.times)
        sums = torch.zeros(2, QUARTERS, dtype=torch.float64)  # losses, counts
        for first in range(0, len(mine), BATCH):
            part = mine[first : first + BATCH]
            where = fractions[[t for _, t in part]]
            loss = self.objective.validation_loss(self.network, self._batch(part), where).per_sample.double().cpu()
            quarter = (where * QUARTERS).long()
            sums[0].index_add_(0, quarter, loss)
            sums[1].index_add_(0, quarter, torch.ones_like(loss))
        sums = mean_over_ranks(sums.to(self.ranks.device)).cpu()
        row = {f"heldout_loss_q{q + 1}": float(sums[0, q] / sums[1, q]) for q in range(QUARTERS)}
        self.reporter.log(state.step, {"heldout_loss": float(sums[0].sum() / sums[1].sum()), **row})

    def _batch(self, jobs: Sequence[tuple[int, int]]) -> Batch:
        """One stream per job, so that its noise depends on the job only."""
        samples = [self.samples[i] for i, _ in jobs]
        tensors = {name: value.to(self.ranks.device) for name, value in collated(samples).items()}
        keys, captions = tuple(s["key"] for s in samples), tuple(s["caption"] for s in samples)
        return Batch(keys, captions, tensors, tuple(i * self.times + t for i, t in jobs), 0, DataCursor())
