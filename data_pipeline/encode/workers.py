"""How workers on any number of machines share the shards of one output, without a coordinator.

Worker k of n makes shards k, k + n, k + 2n ... and then any shards still missing, in an order of its own, until every
shard has its note. Workers hold no locks that could outlive them; two that make the same shard write the same bytes,
and a worker that sees another's note first drops the shard.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from data_pipeline.common.errors import UserError

T = TypeVar("T")


class Worker(NamedTuple):
    """Number `number` (from 0) of `workers`."""

    number: int = 0
    workers: int = 1

    def order(self, shards: Sequence[T]) -> list[T]:
        """All shards: its own share first, then the others', in an order that two workers seldom have in common."""
        own = list(shards[self.number :: self.workers])
        others = [shard for i, shard in enumerate(shards) if i % self.workers != self.number]
        random.Random(self.number).shuffle(others)
        return own + others

    def __str__(self) -> str:
        return f" (worker {self.number} of {self.workers})" if self.workers > 1 else ""


def worker_of(number: int | None, workers: int | None, environment: Mapping[str, str]) -> Worker:
    """The configured worker; else from the variables of torchrun or Slurm: each process of each array task is one."""
    if number is None and workers is None:
        return worker_by_environment(environment)
    workers = 1 if workers is None else workers
    if number is None or not 0 <= number < workers:
        raise UserError(f"worker={number} workers={workers} is not valid: set both, with worker from 0 to workers - 1.")
    return Worker(number, workers)


def worker_by_environment(environment: Mapping[str, str]) -> Worker:
    """RANK of WORLD_SIZE (or what srun says of its own tasks), times the tasks of a Slurm array."""

    def number(name: str, otherwise: int) -> int:
        return int(environment.get(name) or otherwise)

    rank, ranks = number("RANK", 0), number("WORLD_SIZE", 1)
    if "RANK" not in environment and "SLURM_STEP_ID" in environment:  # a batch script itself is not in a step
        rank, ranks = number("SLURM_PROCID", 0), number("SLURM_NTASKS", 1)
    tasks = number("SLURM_ARRAY_TASK_COUNT", 1)
    # --array=1-16:5 numbers four tasks 1, 6, 11, 16; with --array=0,7 two tasks may get one share: only speed suffers
    first, step = number("SLURM_ARRAY_TASK_MIN", 0), number("SLURM_ARRAY_TASK_STEP", 1)
    task = (number("SLURM_ARRAY_TASK_ID", first) - first) // max(step, 1) % tasks
    return Worker(task * ranks + rank, tasks * ranks)
