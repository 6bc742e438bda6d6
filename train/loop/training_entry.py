"""Shared by the entry scripts that train: joining and leaving the process group, and validation of the EMA weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from train.distributed.ranks import Ranks, closing_distributed, find_ranks
from train.engine.train_state import TrainState
from train.loop.context import TrainingContext
from train.loop.trainer import Action


def on_all_ranks(train: Callable[[Any, Ranks], None]) -> Callable[[Any], None]:
    """The `main(cfg)` of an entry script: runs `train(cfg, ranks)` within a process group."""

    def main(cfg: Any) -> None:
        ranks = find_ranks()
        with closing_distributed():
            train(cfg, ranks)

    return main


def with_averaged_weights(
    context: TrainingContext, network: nn.Module, run: Callable[[TrainState], None]
) -> Callable[[TrainState], None]:
    """`run`, after loading the EMA weights into `network`: a copy of the trained network outside the engine."""

    def loaded_first(state: TrainState) -> None:
        network.load_state_dict(context.averaged_weights())
        run(state)

    return loaded_first


def validation(
    context: TrainingContext, network: nn.Module, every: int | None, measure: Callable[[], dict[str, float]]
) -> Action:
    """Every `every` steps, rank 0 logs the figures that `measure()` returns, with the EMA weights in `network`."""

    def log(state: TrainState) -> None:
        if context.ranks.is_main:
            context.reporter.log(state.step, measure())

    return Action(every, with_averaged_weights(context, network, log))
