"""The optimizer, and its learning rate as a function of the number of applied steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Annotated

import torch
from torch import nn

from data_pipeline.common.option_checks import NotNegative, OneOf, Share, Within, refuse_wrong

SCHEDULES = ("constant", "cosine", "linear", "linear_tail", "inverse_sqrt")
Decay = Annotated[float, Within(0, 1, below=True)]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Factor on the base learning rate: linear warm-up, then flat ("constant"), a half cosine to 0 ("cosine"),
    linear to 0 ("linear"), flat and then linear to 0 over the last `tail` of the run ("linear_tail";
    warmup-stable-decay, Hu et al. 2024), or sqrt(start / step) from step `start` on ("inverse_sqrt", as in Karras et
    al. 2024, eq. 67).
    """

    kind: Annotated[str, OneOf(SCHEDULES)] = "constant"
    warmup: Annotated[int, Within(0)] = 0
    tail: Share = 0.5
    start: Annotated[int, Within(1)] = 10_000

    def __post_init__(self) -> None:
        refuse_wrong(self, "optimizer.schedule")

    def factor(self, step: int, total: int) -> float:
        """The factor at applied step `step` of `total`, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.kind == "cosine":
            return 0.5 * (1 + cos(pi * (step - self.warmup) / max(total - self.warmup, 1)))
        if self.kind == "linear":
            return (total - step) / max(total - self.warmup, 1)
        if self.kind == "inverse_sqrt":
            return (max(step, self.start) / self.start) ** -0.5
        if self.kind == "linear_tail":
            return min(1.0, (total - step) / max(self.tail * total, 1))
        return 1.0


@dataclass(frozen=True, slots=True)
class AdamW:
    """torch's fused AdamW (Loshchilov & Hutter 2019). Biases, norms and other vectors have no weight decay, nor what a
    module names in no_weight_decay(), as open_clip's models do with their position and class embeddings."""

    lr: NotNegative
    schedule: Schedule
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: NotNegative = 1e-8
    weight_decay: NotNegative = 0.01

    def __post_init__(self) -> None:
        refuse_wrong(self, "optimizer")

    def build(self, module: nn.Module, device: torch.device) -> torch.optim.Optimizer:
        """The optimizer of the module's trainable parameters. `module.players`: prefixes of parameters that learn in
        turn; each player gets its own groups."""
        exempt = without_decay(module)
        players = getattr(module, "players", ())
        groups = [
            {"params": params, "weight_decay": decay} | ({} if player is None else {"player": player, "idle": False})
            for player, trainable in _by_player(module, players).items()
            for params, decay in (
                ([p for name, p in trainable.items() if decays(name, p, exempt)], self.weight_decay),
                ([p for name, p in trainable.items() if not decays(name, p, exempt)], 0.0),
            )
            if params
        ]
        made = AdamWInTurns if players else torch.optim.AdamW
        return made(groups, lr=self.lr, betas=tuple(self.betas), eps=self.eps, fused=True)

    def lr_at(self, step: int, total: int) -> float:
        """The learning rate at applied step `step`."""
        return self.lr * self.schedule.factor(step, total)


def without_decay(module: nn.Module) -> set[str]:
    """Names of the parameters that the module's parts name in timm's and open_clip's no_weight_decay()."""
    parts = [(prefix, part) for prefix, part in module.named_modules() if hasattr(part, "no_weight_decay")]
    return {f"{prefix}.{name}" if prefix else name for prefix, part in parts for name in part.no_weight_decay()}


class AdamWInTurns(torch.optim.AdamW):
    """torch's AdamW that leaves out idle groups: with a zero gradient, momentum would go on moving their weights."""

    def step(self, closure: None = None) -> None:
        """One update of the groups that are not idle."""
        everyone = self.param_groups
        self.param_groups = [group for group in everyone if not group["idle"]]
        try:
            super().step(closure)
        finally:
            self.param_groups = everyone


def decays(name: str, parameter: nn.Parameter, exempt: set[str]) -> bool:
    """Whether a parameter has weight decay."""
    return parameter.dim() > 1 and name not in exempt


def _by_player(module: nn.Module, players: Sequence[str]) -> dict[str | None, dict[str, nn.Parameter]]:
    """Trainable parameters by name and player: the longest prefix that fits; all under None if there are no players."""
    found: dict[str | None, dict[str, nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            player = max((each for each in players if name.startswith(each)), key=len, default=None)
            found.setdefault(player, {})[name] = parameter
    return found


def set_idle(groups: Iterable[dict], idle: str | None) -> None:
    """Mark the groups of the player that sits out the next update; None: nobody does."""
    for group in groups:
        if "player" in group:
            group["idle"] = group["player"] == idle


def set_lr(groups: Iterable[dict], lr: float) -> None:
    """Set the same learning rate in all parameter groups."""
    for group in groups:
        group["lr"] = lr
