"""A request to stop, by Ctrl-C, SIGTERM or SIGUSR1 (Slurm's warning before a time limit): save, then exit with 75."""

from __future__ import annotations

import torch
import torch.distributed as dist

from data_pipeline.common.stop_request import Stopped, StopRequest
from train.distributed.collectives import barrier

CHECK_EVERY = 10  # steps between checks with the other ranks; a check costs a host sync


class Preemption(StopRequest):
    """Remembers the signal; `agreed` gives the same answer on all ranks, so that all stop at the same step.

    Until the first step has been done, Ctrl-C ends the process at once: to start may take minutes (a store's listing,
    compilation), and nothing is lost.
    """

    def __init__(self) -> None:
        super().__init__()
        self.has_begun = False

    def begun(self) -> None:
        """From now on, Ctrl-C saves. Called by all ranks after a step; they meet at the first one, because a rank that
        leaves at once, while the others want to save, would make them fail."""
        if not self.has_begun:
            self.has_begun = True
            barrier()
            self.hear_interrupts()

    def agreed(self, step: int, device: torch.device) -> bool:
        """Whether any rank was asked to stop; false at steps without a check."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.requested
        if step % CHECK_EVERY:
            return False
        flag = torch.tensor(float(self.requested), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)


class Preempted(Stopped):
    """Raised once the state is saved, to exit so that the run is started again."""
