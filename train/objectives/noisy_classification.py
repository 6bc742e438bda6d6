"""Cross-entropy of classes given noised latents, for classifier guidance (Dhariwal & Nichol 2021, sec. 4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.loading.batch import Batch
from train.diffusion.process import DiffusionProcess, add_noise
from train.diffusion.randomness import StreamRandom
from train.models.classifier import NoisyClassifier, accuracy
from train.models.latents import StoredLatents
from train.objectives.terms import LossTerms


class NoisyClassification(nn.Module):
    """Batch of latents with `label` -> LossTerms. Latents are noised by the process of the U-Net's training."""

    def __init__(
        self,
        classifier: NoisyClassifier,
        process: DiffusionProcess,
        time_sampling: Callable[[Tensor], Tensor],
        latents: StoredLatents,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.classifier, self.process, self.time_sampling = classifier, process, time_sampling
        self.latents, self.seed = latents, seed

    def forward(self, batch: Batch) -> LossTerms:
        device = batch.tensors["label"].device
        random = StreamRandom(self.seed, batch.step, batch.streams, len(batch) // len(batch.streams), device)
        t = self.process.at(self.time_sampling(random.uniform("time")))
        return self.loss(self.classifier, batch, t, random)

    def loss(self, classifier: NoisyClassifier, batch: Batch, t: Tensor, random: StreamRandom) -> LossTerms:
        """The loss at given times (B,)."""
        x0 = self.latents.draw(batch.tensors, lambda shape: random.normal("posterior", shape))
        x_t = add_noise(self.process, x0, random.normal("noise", x0.shape[1:]), t)
        logits, labels = classifier(x_t, self.process.network_time(t)), batch.tensors["label"]
        error = F.cross_entropy(logits, labels, reduction="none")
        parts = {"loss": error.mean().detach(), "accuracy": accuracy(logits.detach(), labels)}
        return LossTerms(error.mean(), parts, error.detach(), t)

    @torch.no_grad()
    def accuracies(self, classifier: NoisyClassifier, batch: Batch, fractions: Tensor) -> dict[str, float]:
        """Accuracy at each of the given fractions of the process, with the same noise in each."""
        device, rows = batch.tensors["label"].device, len(batch)
        random = StreamRandom(self.seed, batch.step, batch.streams, rows // len(batch.streams), device)
        times = {float(f): self.process.at(f.expand(rows).to(device)) for f in fractions}
        return {
            f"heldout_accuracy_t{fraction:.2f}": float(self.loss(classifier, batch, t, random).parts["accuracy"])
            for fraction, t in times.items()
        }
