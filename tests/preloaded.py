"""A Python with all imports done that forks: each child runs a script like `python SCRIPT ...`. `preloaded.py FD`.

A start costs a fork instead of four to twelve CPU-seconds of imports. Children can't test that their script imports
what it needs, nor other hash seeds. Tests of launchers, kills and Slurm, and the demo, start real Pythons.
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

PR_SET_PDEATHSIG = 1  # from linux/prctl.h
WORLD = (
    "train.train_ldm", "train.train_autoencoder", "train.train_clip", "train.train_classifier", "train.sample_images",
    "train.evaluate_ldm", "train.export_diffusers", "train.rebuild_ema", "train.replay_metrics",
    "train.data.online_encoding", "train.weights.published", "train.engine.deepspeed_engine",
    "data_pipeline.precompute_latents",
    "data_pipeline.make_shards", "data_pipeline.index_shards", "data_pipeline.verify_shards",
    "data_pipeline.plan_storage", "data_pipeline.loading.worker_pool", "train.models.torchvision_patch",
    "webdataset", "s3fs", "wandb", "matplotlib.pyplot", "safetensors.torch",
    # Modules that the above import at first use:
    "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.module_inject.auto_ep_layer", "omegaconf._impl",
    "deepspeed.ops.op_builder.all_ops", "matplotlib.backends.backend_agg", "torch.profiler._cupti_monitor",
    "hydra._internal.core_plugins.basic_launcher", "data_pipeline.loading.loader", "torch.distributed.run",
)  # fmt: skip
FOUND_AT: list[str] = []  # sys.path of any script, without its own folder and PYTHONPATH
ADDED: dict[str, str] = {}  # environment variables that imports add


class Request(NamedTuple):
    """The command that a child runs; `environment` is its whole environment, except for what imports add."""

    command: list[str]
    cwd: str
    environment: dict[str, str]


class Server:
    """Forks on request; when a child ends, sends what would be its Popen.returncode."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel, self.running = channel, {}  # pid -> descriptor that receives its return code
        self.woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake)
        self.own = [channel.fileno(), self.woken, wake]

    def serve(self) -> Request:
        """Returns only in children."""
        while True:
            ready, _, _ = select.select([self.channel, self.woken], [], [])
            if self.woken in ready:
                os.read(self.woken, 4096)
                self._tell()
            if self.channel in ready:
                message, descriptors, _, _ = socket.recv_fds(self.channel, 1 << 20, 3)
                if not message:  # the client has ended
                    os._exit(0)
                out, err, end = descriptors
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
        """In a child: drops the server's signals and descriptors, and lets the child die with the server."""
        os.setpgid(0, 0)  # as from a shell: a terminal's Ctrl-C reaches it and what it starts, and no test
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL.value)
        os.dup2(out, 1)
        os.dup2(err, 2)
        for descriptor in (out, err, end, *self.own, *self.running.values()):
            os.close(descriptor)


def become(request: Request) -> None:
    """Runs the script in this process."""
    os.chdir(request.cwd)
    os.environ.clear()
    os.environ.update(ADDED | request.environment)
    tempfile.tempdir = None  # TMPDIR may differ
    random.seed()
    script, folders = request.command[0], request.environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.argv, sys.path = request.command, [str(Path(script).resolve().parent), *filter(None, folders), *FOUND_AT]
    main: Any = types.ModuleType("__main__")
    main.__file__, main.__builtins__ = script, builtins
    sys.modules["__main__"] = main
    exec(compile(Path(script).read_bytes(), script, "exec"), main.__dict__)


def preload() -> None:
    before = set(os.environ)
    FOUND_AT.extend(folder for folder in sys.path[1:] if folder not in os.environ["PYTHONPATH"].split(os.pathsep))
    from train.engine.deepspeed_engine import quiet_deepspeed
    from train.models.open_clip_alone import open_clip

    quiet_deepspeed()
    open_clip()  # both imports as in the program: after DS_ACCELERATOR is set, without transformers and timm
    for name in WORLD:
        importlib.import_module(name)
    first_uses()
    gc.collect()
    gc.freeze()
    ADDED.update((name, value) for name, value in os.environ.items() if name not in before)


def first_uses() -> None:
    """Does what is slow the first time in a process: composes a configuration, and plots."""
    from hydra import compose, initialize_config_dir

    from data_pipeline.common.entry import CONF
    from train.runs.curves import plot_curves

    with initialize_config_dir(CONF, version_base="1.3"):
        compose("train_ldm", ["input=a", "output=b"], return_hydra_config=True)
    with tempfile.TemporaryDirectory() as folder:
        plot_curves([{"step": 1, "loss": 1.0}], ["loss"], Path(folder) / "curves.png")


if __name__ == "__main__":
    sys.modules["preloaded"] = sys.modules["__main__"]  # for forked_torchrun.py
    channel = socket.socket(fileno=int(sys.argv[1]))
    preload()
    become(Server(channel).serve())
