"""Processes that run a script like `python SCRIPT ...`, forked from one with all imports done (preloaded.py)."""

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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def channel() -> socket.socket:
    """A socket to this process' server, which ends when this process ends."""
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
    """The part of Popen that tests use: pid, returncode, poll, wait, send_signal, terminate, kill."""

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


def forked(
    command: Sequence[str], ranks: int, environment: Mapping[str, str], stdout: IO[Any], stderr: IO[Any] | None = None
) -> Forked:
    """Starts a command as a fork; several ranks are forked by a forked torchrun."""
    launcher = ["tests/forked_torchrun.py", str(ranks)] if ranks > 1 else []
    return Forked([*launcher, *command], environment, stdout, stderr)


def run_forked(
    command: Sequence[str], ranks: int, environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Like subprocess.run with capture_output."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = forked(command, ranks, environment, out, err)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(list(command), code, _all_of(out), _all_of(err))


def _all_of(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()
