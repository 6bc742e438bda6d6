"""A Python that has imported all, and forks: each child runs a script as `python SCRIPT ...` would. `preloaded.py FD`.

A start costs a fork instead of four to twelve CPU-seconds of imports. What no child shows: that its script imports what
it needs, and what another hash seed would do. Tests of launchers, kills and Slurm, and the demo, start real Pythons.
"""

from __future__ import annotations

import builtins
import ctypes
import gc
import importlib
import json
import os
import random
import select
import signal
import socket
import sys
import tempfile
import types
from pathlib import Path
from typing import Any, NamedTuple

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
WORLD = (
    "train.train_ldm", "train.train_autoencoder", "train.train_clip", "train.train_classifier", "train.sample_images",
    "train.evaluate_ldm", "train.export_diffusers", "train.rebuild_ema", "train.replay_metrics",
    "train.online_latents", "train.weights.published", "train.engine", "data_pipeline.precompute_latents",
    "data_pipeline.make_shards", "data_pipeline.index_shards", "data_pipeline.verify_shards",
    "data_pipeline.plan_storage", "data_pipeline.worker_pool", "train.torchvision_beside_cpu_torch", "deepspeed",
    "open_clip", "webdataset", "s3fs", "wandb", "matplotlib.pyplot", "safetensors.torch", "torch._dynamo",
)  # fmt: skip


class Request(NamedTuple):
    """What a child becomes; the environment is all that it gets, but for what imports add."""

    command: list[str]
    cwd: str
    environment: dict[str, str]


class Server:
    """Forks on request, and tells of each child's end what Popen.returncode would be."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel, self.running = channel, {}  # pid -> where its end is told
        self.woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake)
        self.own = [channel.fileno(), self.woken, wake]

    def serve(self) -> Request:
        """Returns in children alone."""
        while True:
            ready, _, _ = select.select([self.channel, self.woken], [], [])
            if self.woken in ready:
                os.read(self.woken, 4096)
                self._tell()
            if self.channel in ready:
                message, (out, err, end), _, _ = socket.recv_fds(self.channel, 1 << 20, 3) or os._exit(0)
                pid = os.fork()
                if pid == 0:
                    self._leave(out, err, end)
                    return Request(**json.loads(message))
                self.running[pid] = end
                os.close(out)
                os.close(err)
                self.channel.send(str(pid).encode())

    def _tell(self) -> None:
        while self.running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            end = self.running.pop(pid)
            os.write(end, str(os.waitstatus_to_exitcode(status)).encode())
            os.close(end)

    def _leave(self, out: int, err: int, end: int) -> None:
        """In a child: nothing of the server is kept, and it dies with it."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL.value)
        os.dup2(out, 1)
        os.dup2(err, 2)
        for descriptor in (out, err, end, *self.own, *self.running.values()):
            os.close(descriptor)


def become(request: Request, found_at: list[str], added: dict[str, str]) -> None:
    """Run the script in this process."""
    os.chdir(request.cwd)
    os.environ.clear()
    os.environ.update(added | request.environment)
    tempfile.tempdir = None  # TMPDIR may be another
    random.seed()
    script, folders = request.command[0], request.environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.argv, sys.path = request.command, [str(Path(script).resolve().parent), *filter(None, folders), *found_at]
    main: Any = types.ModuleType("__main__")
    main.__file__, main.__builtins__ = script, builtins
    sys.modules["__main__"] = main
    exec(compile(Path(script).read_bytes(), script, "exec"), main.__dict__)


def preload() -> dict[str, str]:
    """Import all; what that adds to the environment."""
    before = dict(os.environ)
    for name in WORLD:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    return {name: value for name, value in os.environ.items() if name not in before}


if __name__ == "__main__":
    channel = socket.socket(fileno=int(sys.argv[1]))
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    added = preload()
    found_at = [folder for folder in sys.path[1:] if folder not in given]
    become(Server(channel).serve(), found_at, added)
