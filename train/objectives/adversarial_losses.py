"""What both players of an adversarial training minimise, as functions of the discriminator's logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.distributed.collectives import mean_over_ranks

LOSSES = ("hinge", "vanilla", "non_saturating")


def of_first_stage(kind: str, fake: Tensor) -> Tensor:
    """The mean of -D(x_hat) in hinge and in CompVis' "vanilla" loss; of -log sigmoid D(x_hat) in the non-saturating one
    (Goodfellow et al. 2014, sec. 3)."""
    return F.softplus(-fake.float()).mean() if kind == "non_saturating" else -fake.float().mean()


def of_discriminator(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """Half of hinge's two terms, or half of the two cross-entropies."""
    if kind == "hinge":
        return hinge(real, fake)
    return 0.5 * (F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean())


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of logits: half of E max(0, 1 - D(x)) + E max(0, 1 + D(x_hat)) (Lim & Ye 2017)."""
    return 0.5 * (F.relu(1.0 - real.float()).mean() + F.relu(1.0 + fake.float()).mean())


def r1_penalty(discriminator: nn.Module, images: Tensor) -> Tensor:
    """E |grad D(x)|^2 / 2 at real pictures (Mescheder et al. 2018, eq. 9), with D(x) the mean over a picture's patches.
    Costs a second backward pass of the discriminator."""
    images = images.detach().requires_grad_()
    logits = discriminator(images).float().mean((1, 2, 3))
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return 0.5 * gradient.float().square().sum((1, 2, 3)).mean()


def adaptive_weight(error: Tensor, gan: Tensor, last_layer: Tensor, delta: float, largest: float) -> Tensor:
    """lambda = |grad error| / (|grad gan| + delta) at the decoder's last layer (Esser et al. 2021, eq. 7), at most
    `largest`, detached.

    Gradients are averaged over ranks first, so lambda is independent of their number. Costs a backward pass of the
    discriminator, and an all-reduce of that one layer. 1 if gradients are disabled, as when counting FLOPs.
    """
    if not torch.is_grad_enabled():
        return torch.ones_like(error)
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float() for loss in (error, gan)]
    of_error, of_gan = mean_over_ranks(torch.stack(gradients)).flatten(1).norm(dim=1)
    return (of_error / (of_gan + delta)).clamp(max=largest)
