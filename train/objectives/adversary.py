"""The adversarial loss of a first stage (Rombach et al. 2022, app. G, eq. 25; Esser et al. 2021, eq. 6 and 7)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from data_pipeline.common.errors import UserError
from train.models.discriminator import PatchDiscriminator
from train.objectives.adversarial_losses import LOSSES, adaptive_weight, of_discriminator, of_first_stage, r1_penalty

DELTA, LARGEST = 1e-6, 1e4  # for the adaptive weight: Esser et al.'s delta, and the upper bound in their code
NAMES = ("gan", "discriminator", "adaptive_weight")
TURNS = ("together", "alternate")
Turn = Literal["both", "first_stage", "discriminator"]


class AdversaryTerms(NamedTuple):
    """The term to add to the first stage's loss, including the discriminator's own loss; and named parts, detached."""

    total: Tensor
    parts: dict[str, Tensor]


class Adversary(nn.Module):
    """A discriminator that is used from step `start` on; its weight in the first stage's loss rises over `ramp` steps.

    One module, one engine, one backward pass: the first stage's term uses the discriminator with its parameters
    detached, and the discriminator's own term uses detached reconstructions, so each network gets the same gradient as
    from two backward passes. With two DeepSpeed engines, each would get the other's gradients. Gradient clipping would
    use the norm over both networks: turn it off.

    turns="alternate": from `start` on, one step is the first stage's and the next one the discriminator's.
    """

    def __init__(
        self,
        discriminator: PatchDiscriminator,
        weight: float = 0.5,
        start: int = 0,
        ramp: int = 0,
        loss: str = "hinge",
        turns: str = "together",
        adaptive_delta: float = DELTA,
        adaptive_max: float = LARGEST,
        r1_weight: float = 0.0,
        r1_every: int = 16,
    ) -> None:
        super().__init__()
        _refuse_other_than("loss", loss, LOSSES)
        _refuse_other_than("turns", turns, TURNS)
        if r1_weight and discriminator.norm == "batch":
            raise UserError(
                "objective.adversary.r1_weight needs the gradient of one picture's logits, which batch norm mixes with "
                "those of others: use objective.adversary.discriminator.norm=group."
            )
        self.discriminator, self.weight, self.start, self.ramp = discriminator, weight, start, ramp
        self.loss, self.turns, self.r1_weight, self.r1_every = loss, turns, r1_weight, r1_every
        self.adaptive_delta, self.adaptive_max = adaptive_delta, adaptive_max

    def turn(self, step: int) -> Turn:
        """Who learns in this step."""
        if self.turns == "together":
            return "both"
        return "discriminator" if step > self.start and (step - self.start) % 2 else "first_stage"

    def forward(
        self, images: Tensor, reconstruction: Tensor, error: Tensor, last_layer: Tensor, step: int
    ) -> AdversaryTerms:
        """images, reconstruction: (B, 3, H, W); error: the scalar loss that trains the parameter `last_layer`."""
        turn, parts = self.turn(step), self._zeros(error)
        if step < self.start:
            return AdversaryTerms(no_gradient(self.discriminator), parts)
        dtype = next(self.discriminator.parameters()).dtype
        images, reconstruction = images.to(dtype), reconstruction.to(dtype)
        total: Tensor | float = 0.0
        if turn != "discriminator":
            gan = of_first_stage(self.loss, self._seen_by_the_first_stage(reconstruction))
            adaptive = adaptive_weight(error, gan, last_layer, self.adaptive_delta, self.adaptive_max)
            total = self._ramped(step) * adaptive * gan
            parts |= {"gan": gan.detach(), "adaptive_weight": adaptive}
        if turn != "first_stage":
            own, penalties = self._own(images, reconstruction.detach(), step)
            total, parts = total + own, parts | penalties
        else:
            total = total + no_gradient(self.discriminator)
        # Of players in turn, twice, as the other steps log zeros: the mean over an even number of steps is right.
        return AdversaryTerms(total, parts if turn == "both" else {name: 2 * value for name, value in parts.items()})

    def _own(self, images: Tensor, reconstruction: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss, and its parts."""
        own = of_discriminator(self.loss, self.discriminator(images), self.discriminator(reconstruction))
        parts = {"discriminator": own.detach()}
        if self._penalised(step):
            penalty = self.r1_every * r1_penalty(self.discriminator, images)
            own, parts = own + self.r1_weight * penalty, parts | {"r1": penalty.detach()}
        return own, parts

    def _penalised(self, step: int) -> bool:
        """Every r1_every-th of the discriminator's steps, with a weight as many times as large (Karras et al. 2020,
        sec. 3.1)."""
        own_step = (step - self.start) // (1 if self.turns == "together" else 2)
        return self.r1_weight > 0 and own_step % self.r1_every == 0 and torch.is_grad_enabled()

    def _ramped(self, step: int) -> float:
        return self.weight * min(1.0, (step - self.start + 1) / self.ramp) if self.ramp else self.weight

    def _seen_by_the_first_stage(self, reconstruction: Tensor) -> Tensor:
        """Logits whose gradient reaches the reconstruction but not the discriminator."""
        detached = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        return functional_call(self.discriminator, detached, (reconstruction,))

    def _zeros(self, like: Tensor) -> dict[str, Tensor]:
        return {name: torch.zeros_like(like) for name in (*NAMES, *["r1"] * (self.r1_weight > 0))}


def no_gradient(module: nn.Module) -> Tensor:
    """Zero, with zero gradients: ZeRO expects a gradient for every parameter at every step."""
    return sum((0.0 * p).sum() for p in module.parameters())


def _refuse_other_than(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"objective.adversary.{name}={value} is not valid: use {', '.join(allowed)}.")
