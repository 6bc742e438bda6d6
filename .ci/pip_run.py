"""Runs pip, shows what a reader wants to know of its hundreds of lines, and explains a failure in one sentence."""

from __future__ import annotations

import os
import pty
import re
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

FETCHES = re.compile(
    r"^(?:Downloading|Using cached|Processing) (?P<wheel>\S+)(?: \((?P<size>[\d.]+) (?P<unit>[kMG]B)\))?$"
)
INSTALLS = re.compile(r"^Installing collected packages: (.*)")
CUDA = re.compile(r"^Collecting (nvidia-|cuda-)")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
BIG_MB = 20  # larger downloads get their own line, as they take a while

# What pip says, and what to say instead. The first match counts.
FAILURES = (
    (
        r"No space left on device|Disk quota exceeded|Errno (28|122)\b",
        "the disk or quota is full: free space for {venv} and for pip's temporary folder (TMPDIR= names another)",
    ),
    (
        r"name resolution|Name or service not known|NewConnectionError|ConnectTimeout|ConnectionError|Max retries|"
        r"Connection (refused|reset|broken)|connection broken|Network is unreachable|Read timed out|ProxyError|"
        r"SSLError|CERTIFICATE_VERIFY|HTTP error|IncompleteRead|HTTPError",
        "pip's package index could not be reached: check the network and pip's settings (pip config list, "
        "PIP_INDEX_URL, HTTPS_PROXY)",
    ),
    (
        r"ResolutionImpossible|conflicting dependencies",
        "the required versions conflict: {last}; check for constraints of your own (pip config list, PIP_CONSTRAINT)",
    ),
    (
        r"THESE PACKAGES DO NOT MATCH THE HASHES",
        "a downloaded file is damaged: empty pip's cache (pip cache purge)",
    ),
    (
        r"command '\S*(g\+\+|gcc|cc|c\+\+|clang)\S*' failed|[Uu]nable to find .*compiler|: '?(gcc|g\+\+|cc|c\+\+)'?$",
        "a package has no wheel for this Python and needs a C++ compiler: install one (apt install g++), or use "
        "Python 3.11 (PYTHON=python3.11), which has wheels",
    ),
    (
        r"No matching distribution|Could not find a version",
        "pip's package index does not have what this Python needs: {last}; use another Python (PYTHON=python3.11), "
        "or check pip's settings (pip config list)",
    ),
    (r"Permission denied|Read-only file system|Errno 13\b", "{venv} can't be written: {last}"),
)


class Refused(Exception):
    """Set-up can't continue; the message is one sentence with the remedy."""


def run_pip(venv: Path, arguments: Sequence[str], cwd: str, lock: int) -> None:
    """All of pip's lines go to <venv>/pip.log; on a terminal its latest line or progress bar is shown below ours."""
    command = [str(venv / "bin" / "python"), "-m", "pip", *arguments]
    view = View(sys.stdout, sys.stdout.isatty())
    said: list[str] = []
    with (venv / "pip.log").open("w") as log, started(command, cwd, view.live, lock) as (process, lines):
        for line, whole in lines:
            if whole:
                said.append(line)
                print(line, file=log, flush=True)
            view.show(line, whole)
        code = process.wait()
    view.end()
    if code:
        raise Refused(f"{why(said, code, venv)}, and start again ({venv / 'pip.log'} has pip's output).")


def why(said: Sequence[str], code: int, venv: Path) -> str:
    errors = [line.partition(":")[2].strip() for line in said if re.match(r"(ERROR|error):", line)]
    last = errors[0].rstrip(".") if errors else f"exit code {code}"
    for pattern, sentence in FAILURES:
        if any(re.search(pattern, line) for line in said):
            return sentence.format(venv=venv, last=last)
    if code == -9:
        return "pip was killed, perhaps because memory ran out: free some"
    return f"pip failed: {last}"


@contextmanager
def started(
    command: Sequence[str], cwd: str, on_terminal: bool, lock: int
) -> Iterator[tuple[subprocess.Popen[bytes], Iterator[tuple[str, bool]]]]:
    """Start pip; returns it and its output. On a terminal pip gets one, too, as it would draw no bars otherwise."""
    ours, its = pty.openpty() if on_terminal else os.pipe()
    columns = str(shutil.get_terminal_size().columns)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": columns, "PIP_NO_COLOR": "1"}
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=its, stderr=its, pass_fds=[lock]
    )
    os.close(its)
    try:
        yield process, lines_of(ours)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        os.close(ours)


def lines_of(descriptor: int, every_s: float = 1.0) -> Iterator[tuple[str, bool]]:
    """(line, True) for each complete line; in between, and each second, (the incomplete last line, False)."""
    rest = ""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            if selector.select(every_s):
                try:
                    read = os.read(descriptor, 65536)
                except OSError:  # a terminal whose other end is closed
                    read = b""
                if not read:
                    break
                *ended, rest = (rest + read.decode(errors="replace")).replace("\r\n", "\n").split("\n")
                yield from ((as_seen(line), True) for line in ended)
            yield as_seen(rest), False
    if rest:
        yield as_seen(rest), True


def as_seen(line: str) -> str:
    """What the screen shows of a line that was overwritten."""
    return ESCAPES.sub("", line).rstrip("\r").rpartition("\r")[2].strip()


class View:
    """Shows a line for each large download, none for warnings and errors; on a terminal also pip's current action, in
    place."""

    def __init__(self, out: IO[str], live: bool) -> None:
        self.out, self.live = out, live
        self.now, self.wheel, self.since, self.cuda = "", "", time.monotonic(), False

    def show(self, line: str, whole: bool) -> None:
        if whole:
            self._whole(line)
        if "━" in line:
            self.now = f"{self.wheel} {line}"
        elif line and whole and not line.startswith("WARNING:"):
            self.now = line
        if self.live:
            seconds = int(time.monotonic() - self.since)
            width = shutil.get_terminal_size().columns - 10
            self.out.write(f"\r\x1b[2K{seconds:5d} s  {self.now[:width]}")
            self.out.flush()

    def _whole(self, line: str) -> None:
        if fetched := FETCHES.match(line):
            self.wheel = Path(fetched["wheel"]).name.partition("-")[0]
        if fetched and large(fetched):
            self._keep(f"downloading {Path(fetched['wheel']).name} ({fetched['size']} {fetched['unit']})")
        elif fetched and Path(fetched["wheel"]).name.startswith("torch-"):
            self._keep(f"using {fetched['wheel']}")
        elif CUDA.match(line) and not self.cuda:
            self.cuda = True
            self._keep("this torch is a CUDA build: about 3 GB to download, 6 GB on disk")
        elif installs := INSTALLS.match(line):
            self._keep(f"installing {len(installs[1].split(', '))} packages")

    def _keep(self, text: str) -> None:
        self.out.write("\r\x1b[2K" * self.live + f"  {text}\n")
        self.out.flush()

    def end(self) -> None:
        if self.live:
            self.out.write("\r\x1b[2K")
            self.out.flush()


def large(fetched: re.Match[str]) -> bool:
    megabytes = {None: 0.0, "kB": 1e-3, "MB": 1.0, "GB": 1e3}[fetched["unit"]]
    return float(fetched["size"] or 0) * megabytes >= BIG_MB
