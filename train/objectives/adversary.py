"""The adversarial loss of a first stage (Rombach et al. 2022, app. G, eq. 25; Esser et al. 2021, eq. 6 and 7)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from train.distributed.collectives import mean_over_ranks
from train.models.discriminator import PatchDiscriminator

DELTA, HIGHEST = 1e-6, 1e4  # for the adaptive weight: Esser et al.'s delta, and the upper bound in their code


class AdversaryTerms(NamedTuple):
    """The term to add to the first stage's loss, including the discriminator's own loss; and named parts, detached."""

    total: Tensor
    parts: dict[str, Tensor]


class Adversary(nn.Module):
    """A discriminator that is used from step `start` on.

    One module, one engine, one backward pass: the first stage's term uses the discriminator with its parameters
    detached, and the discriminator's own term uses detached reconstructions, so each network gets the same gradient as
    from two backward passes. With two DeepSpeed engines, each would get the other's gradients. Gradient clipping would
    use the norm over both networks: turn it off.
    """

    def __init__(self, discriminator: PatchDiscriminator, weight: float = 0.5, start: int = 0) -> None:
        super().__init__()
        self.discriminator, self.weight, self.start = discriminator, weight, start

    def forward(
        self, images: Tensor, reconstruction: Tensor, error: Tensor, last_layer: Tensor, step: int
    ) -> AdversaryTerms:
        """images, reconstruction: (B, 3, H, W); error: the scalar loss that trains the parameter `last_layer`."""
        if step < self.start:
            return self._absent(error)
        dtype = next(self.discriminator.parameters()).dtype
        images, reconstruction = images.to(dtype), reconstruction.to(dtype)
        gan = -self._seen_by_the_first_stage(reconstruction).float().mean()
        adaptive = adaptive_weight(error, gan, last_layer)
        own = hinge(self.discriminator(images), self.discriminator(reconstruction.detach()))
        parts = {"gan": gan.detach(), "discriminator": own.detach(), "adaptive_weight": adaptive}
        return AdversaryTerms(self.weight * adaptive * gan + own, parts)

    def _seen_by_the_first_stage(self, reconstruction: Tensor) -> Tensor:
        """Logits whose gradient reaches the reconstruction but not the discriminator."""
        detached = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        return functional_call(self.discriminator, detached, (reconstruction,))

    def _absent(self, like: Tensor) -> AdversaryTerms:
        """Zeros, with zero gradients: ZeRO expects a gradient for every parameter at every step."""
        zeros = {name: torch.zeros_like(like) for name in ("gan", "discriminator", "adaptive_weight")}
        return AdversaryTerms(sum((0.0 * p).sum() for p in self.discriminator.parameters()), zeros)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of logits: half of E max(0, 1 - D(x)) + E max(0, 1 + D(x_hat)) (Lim & Ye 2017)."""
    return 0.5 * (F.relu(1.0 - real.float()).mean() + F.relu(1.0 + fake.float()).mean())


def adaptive_weight(error: Tensor, gan: Tensor, last_layer: Tensor) -> Tensor:
    """lambda = |grad error| / (|grad gan| + delta) at the decoder's last layer (Esser et al. 2021, eq. 7), detached.

    Gradients are averaged over ranks first, so lambda is independent of their number. Costs a backward pass of the
    discriminator, and an all-reduce of that one layer. 1 if gradients are disabled, as when counting FLOPs.
    """
    if not torch.is_grad_enabled():
        return torch.ones_like(error)
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float() for loss in (error, gan)]
    of_error, of_gan = mean_over_ranks(torch.stack(gradients)).flatten(1).norm(dim=1)
    return (of_error / (of_gan + DELTA)).clamp(max=HIGHEST)
