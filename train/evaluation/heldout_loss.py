"""The denoiser's loss on held-out latents, with fixed noise and evenly spaced times so that values are comparable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

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


class HeldoutSet(NamedTuple):
    """The held-out samples of a data set; weight: the set's share of the training samples."""

    name: str
    samples: Sequence[dict[str, Any]]
    weight: float = 1.0

    @classmethod
    def of(cls, samples: Mapping[str, Sequence[dict[str, Any]]], weights: Mapping[str, float]) -> list[HeldoutSet]:
        """One for each data set, matched by name."""
        return [cls(name, own, weights[name]) for name, own in samples.items()]


class HeldoutLoss:
    """Evaluates every sample at `times` evenly spaced times; each rank takes its share of the samples of each set."""

    def __init__(
        self,
        objective: LatentDiffusion,
        network: ConditionedUNet,
        sets: Sequence[HeldoutSet],
        ranks: Ranks,
        reporter: Reporter,
        times: int = 8,
    ) -> None:
        self.objective, self.network, self.sets, self.ranks = objective, network, sets, ranks
        self.reporter, self.times = reporter, times

    @torch.no_grad()
    def measure(self, state: TrainState) -> None:
        """Log heldout_loss, and heldout_loss_q1..q4 over the quarters of the process from data to noise. With several
        sets, these are the weighted means, and heldout_loss/NAME is logged for each."""
        sums = torch.stack([self._sums(each.samples) for each in self.sets])  # (sets, 2, QUARTERS)
        sums = mean_over_ranks(sums.to(self.ranks.device)).cpu()
        quarters = [self._weighted(sums[:, 0, q] / sums[:, 1, q]) for q in range(QUARTERS)]
        each = torch.stack([losses.sum() / counts.sum() for losses, counts in sums])
        row = {f"heldout_loss_q{q + 1}": value for q, value in enumerate(quarters)}
        if len(self.sets) > 1:
            row |= {f"heldout_loss/{one.name}": float(loss) for one, loss in zip(self.sets, each, strict=True)}
        self.reporter.log(state.step, {"heldout_loss": self._weighted(each), **row})

    def _weighted(self, values: Tensor) -> float:
        """The weighted mean of one value per set."""
        if len(self.sets) == 1:
            return float(values[0])
        weights = torch.tensor([each.weight for each in self.sets], dtype=torch.float64)
        return float((weights * values).sum() / weights.sum())

    def _sums(self, samples: Sequence[dict[str, Any]]) -> Tensor:
        """The sums of losses over this rank's share of the samples, and the numbers of samples: (2, QUARTERS)."""
        jobs = [(i, t) for i in range(len(samples)) for t in range(self.times)]
        mine = jobs[self.ranks.rank :: self.ranks.world_size]
        fractions = evenly_spaced(self.times)
        sums = torch.zeros(2, QUARTERS, dtype=torch.float64)
        for first in range(0, len(mine), BATCH):
            part = mine[first : first + BATCH]
            where = fractions[[t for _, t in part]]
            batch = self._batch(samples, part)
            loss = self.objective.validation_loss(self.network, batch, where).per_sample.double().cpu()
            quarter = (where * QUARTERS).long()
            sums[0].index_add_(0, quarter, loss)
            sums[1].index_add_(0, quarter, torch.ones_like(loss))
        return sums

    def _batch(self, all_samples: Sequence[dict[str, Any]], jobs: Sequence[tuple[int, int]]) -> Batch:
        """One stream per job, so that its noise depends on the job only."""
        samples = [all_samples[i] for i, _ in jobs]
        tensors = {name: value.to(self.ranks.device) for name, value in collated(samples).items()}
        keys, captions = tuple(s["key"] for s in samples), tuple(s["caption"] for s in samples)
        return Batch(keys, captions, tensors, tuple(i * self.times + t for i, t in jobs), 0, DataCursor())
