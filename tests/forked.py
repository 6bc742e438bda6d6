"""Processes that run a script as `python SCRIPT ...` would, forked from one that has imported all (preloaded.py)."""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def channel() -> socket.socket:
    """To this process' server, which ends when this process does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/preloaded.py"), str(theirs.fileno())], cwd=ROOT, env=environment,
        pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
    )  # fmt: skip
    theirs.close()
    atexit.register(lambda: (ours.close(), server.wait()))
    return ours


class Forked:
    """What is used of Popen: pid, returncode, poll, wait, send_signal, terminate, kill."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], stdout: IO[Any], stderr: IO[Any] | None = None
    ) -> None:
        self.command, self.returncode = list(command), None
        self.end, theirs = os.pipe()
        message = {"command": self.command, "cwd": str(ROOT), "environment": dict(environment)}
        out, err = stdout.fileno(), (stderr or stdout).fileno()
        socket.send_fds(channel(), [json.dumps(message).encode()], [out, err, theirs])
        os.close(theirs)
        self.pid = int(channel().recv(64) or "0")
        assert self.pid, "the process that forks has ended: see its stderr"

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired(self.command, timeout)
        return self.returncode

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self.end], [], [], timeout)[0]:
            self.returncode = int(os.read(self.end, 64) or "-9")
            os.close(self.end)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_forked(
    command: Sequence[str], environment: Mapping[str, str], ranks: int, timeout: float
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run with capture_output; of several ranks one that fails takes the others down."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if ranks > 1 else None
        places = [_place(rank, ranks, store) for rank in range(ranks)]
        processes = [Forked(command, {**environment, **place}, out, err) for place in places]
        try:
            code = _first_failure(processes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
        said = [_all_of(file) for file in (out, err)]
    return subprocess.CompletedProcess(list(command), code, *said)


def _place(rank: int, ranks: int, store: TCPStore | None) -> dict[str, str]:
    """What torchrun would set of its own store; nothing for one rank."""
    if store is None:
        return {}
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    return {name: str(value) for name, value in {**names, **meeting}.items()}


def _first_failure(processes: Sequence[Forked], deadline: float) -> int:
    """The code of the first that fails, or 0 when all are through."""
    while running := [process for process in processes if process.poll() is None]:
        failed = [process.returncode for process in processes if process.returncode]
        if failed:
            return failed[0]
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(running[0].command, deadline)
        select.select([process.end for process in running], [], [], 1)
    return next((process.returncode for process in processes if process.returncode), 0)


def _all_of(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()
