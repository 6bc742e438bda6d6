"""torchrun that forks its ranks instead of starting Python for each: `forked_torchrun.py RANKS SCRIPT ...`.

With LAUNCHER=ours in the environment, train/distributed/launch.py starts it.

It is itself forked. The agent (rendezvous, monitoring, termination, reports) is torch's own; only Popen is replaced.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from typing import Any

import preloaded
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

from train.distributed import launch


class ForkedRank(subprocess.Popen):
    """`python -u SCRIPT ...` as a fork of this process, in a new session."""

    def __init__(self, args: tuple[str, ...], env: dict[str, str]) -> None:
        self.request = preloaded.Request(list(args[2:]), os.getcwd(), env)
        super().__init__(args)

    def _execute_child(self, *_: Any) -> None:
        self.pid = os.fork()
        self._child_created = True
        if self.pid == 0:
            os.setsid()
            os.closerange(3, 1 << 16)  # also those of the agent's store: the ranks open their own connections
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os._exit(_code_of(self.request))


def _code_of(request: preloaded.Request) -> int:
    try:
        preloaded.become(request)
    except SystemExit as asked:
        return asked.code if isinstance(asked.code, int) else int(asked.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


SubprocessHandler._popen = lambda self, args, env: ForkedRank(args, env)
meeting = ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
command = [f"--nproc_per_node={sys.argv[1]}", *meeting, *sys.argv[2:]]
if os.environ.get("LAUNCHER") == "ours":
    raise SystemExit(launch.main(command))
run.main(command)
