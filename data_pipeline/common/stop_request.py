"""A request to stop: SIGTERM, or SIGUSR1 (Slurm's warning before a time limit)."""

from __future__ import annotations

import signal
from types import FrameType

EXIT_CODE = 75  # EX_TEMPFAIL: start me again; slurm/task.sh reads it


class Stopped(SystemExit):
    """Raised when a process was asked to stop and wants to be restarted."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class StopRequest:
    """Remembers SIGTERM or SIGUSR1: Slurm's warning before a time limit."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            # A launcher that ignores USR1 for us passes it on as TERM; our children must inherit the ignoring.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
