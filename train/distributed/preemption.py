"""A request to stop, by SIGUSR1 or SIGTERM (Slurm's warning before a time limit): save, then leave with code 75."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

EXIT_CODE = 75  # EX_TEMPFAIL: start me again
CHECK_EVERY = 10  # steps between asking the other ranks; it costs a host sync


class Preemption:
    """Remembers the signal; `agreed(step)` is the same on all ranks, so that all stop at the same step."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGUSR1, signal.SIGTERM):
            # A launcher that ignores USR1 for us hands it over as TERM; our children must inherit the ignoring.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def agreed(self, step: int, device: torch.device) -> bool:
        """Whether any rank was asked to stop; between checks, false."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.asked
        if step % CHECK_EVERY:
            return False
        flag = torch.tensor(float(self.asked), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)


class Preempted(SystemExit):
    """Raised when the state is saved and the run wants to be started again."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)
