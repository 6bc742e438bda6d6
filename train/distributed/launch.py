"""torchrun for a terminal: `python -m train.distributed.launch --nproc_per_node=2 train/train_ldm.py input=...`.

It is torchrun, with torchrun's options and three differences. After Ctrl-C or TERM it waits until the ranks have saved,
and a second Ctrl-C ends all of them at once; torchrun kills them after 30 seconds. The exit code is that of the ranks
(2, 3, 75, 76; torchrun: always 1). The launcher prints no traceback or table of its own after a rank's message.
"""

from __future__ import annotations

from data_pipeline.common.stop_request import EXIT_CODE, INTERRUPTED, held_back, leave_on_interrupt, say

if __name__ == "__main__":
    leave_on_interrupt("launch")  # until torchrun starts the ranks; torch takes seconds to import

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

SAVING_S = 3600  # ranks that were asked to stop are killed after this time


def main(arguments: list[str]) -> int:
    """Launch as torchrun does; returns the exit code of the first rank that failed, EXIT_CODE after a signal, or 0."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING_S))
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    api._terminate_process_handler = StopOnce()
    SubprocessHandler._popen = held_back_in_ranks(SubprocessHandler._popen)
    try:
        run.main(arguments)
    except api.SignalException:
        return EXIT_CODE
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode < 0:
            print(f"error: rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


def held_back_in_ranks(start: Callable[..., subprocess.Popen]) -> Callable[..., subprocess.Popen]:
    """Starts a rank that holds SIGINT back until it can answer it (InterruptWatch), after half a second of imports."""

    def started(*arguments: Any) -> subprocess.Popen:
        with held_back([signal.SIGINT]):
            return start(*arguments)

    return started


class StopOnce:
    """torchrun's signal handler, which stops it and the ranks; a second Ctrl-C kills them."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked = True
            raise api.SignalException(f"signal {number}", sigval=signal.Signals(number))
        if number == signal.SIGINT:
            say("ended by a second Ctrl-C; start the same command again to continue from what was saved")
            for rank in psutil.Process().children(recursive=True):
                rank.kill()
            os._exit(INTERRUPTED)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
