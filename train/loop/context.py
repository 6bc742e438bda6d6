"""The parts of a run: assembled once by fit.py, used by the loop and its actions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor, nn

from train.checkpointing.checkpoints import Checkpoints
from train.distributed.preemption import Preemption
from train.distributed.ranks import Ranks
from train.engine.deepspeed_engine import Engine
from train.engine.ema import Ema
from train.engine.train_state import TrainState
from train.loop.heartbeat import NoWatchdog
from train.runs.metrics import Reporter


class TrainedModel(NamedTuple):
    """The model to train: the parameters of `objective`, which computes the loss. The EMA weights of the
    parameters whose names start with `prefix` are the result, completed by `frozen` ones, which are not trained;
    `name` starts each message."""

    name: str
    objective: nn.Module
    prefix: str
    frozen: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class TrainingContext:
    """The parts of a run: the same objects until its end, even after rollbacks. Training changes their contents."""

    model: TrainedModel
    engine: Engine
    ema: Ema
    state: TrainState
    checkpoints: Checkpoints
    reporter: Reporter
    watchdog: NoWatchdog
    preemption: Preemption = field(default_factory=Preemption)  # catches TERM and USR1 from now on

    @property
    def ranks(self) -> Ranks:
        return self.engine.ranks

    def averaged_weights(self) -> dict[str, Tensor]:
        """The network's full EMA weights by its own names, in fp32, on the CPU of every rank. Collective."""
        return {**self.model.frozen, **self.engine.full_state_dict(self.ema.shards, prefix=self.model.prefix)}

    def save(self) -> None:
        """Save a checkpoint of the present state; it is written while training goes on."""
        self.watchdog.beat("save", self.state.step)
        self.checkpoints.save(self.engine, self.ema, self.state)

    def roll_back(self, before: int) -> bool:
        """Go back to the newest intact checkpoint of a step up to `before`; false if there is none."""
        self.watchdog.beat("start", self.state.step)  # reading a checkpoint may take long
        return self.checkpoints.roll_back(self.engine, self.ema, self.state, before)

    def say(self, sentence: str) -> None:
        """Print a sentence, on rank 0 only."""
        if self.ranks.is_main:
            print(f"{self.model.name}: {sentence}", flush=True)
