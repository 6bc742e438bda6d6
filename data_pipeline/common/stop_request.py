"""A request to stop: Ctrl-C (SIGINT), SIGTERM, or SIGUSR1 (Slurm's warning before a time limit)."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import NoReturn, Self

EXIT_CODE = 75  # EX_TEMPFAIL: start me again; slurm/task.sh reads it
INTERRUPTED = 128 + signal.SIGINT  # the exit code by which a shell reports a program that SIGINT ended
# A launcher may pass on the SIGINT that the terminal has already sent to its ranks: both count as one Ctrl-C.
SAME_S = 0.2
STOPPED = "stopped by Ctrl-C; start the same command again to continue"
SILENCE_S = 10.0  # a step or a save that takes longer is announced


class Stopped(SystemExit):
    """Raised when a process was asked to stop and wants to be restarted."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class InterruptWatch:
    """Handles Ctrl-C in a thread, so also while a collective or a long operation blocks the main thread.

    The first Ctrl-C is a request to the process' StopRequest; if it has none, there is nothing to save, and the process
    ends with 75 and a sentence. The second one ends it with 130.

    Only this thread receives SIGINT. Other threads hold it back, and so do the processes that they start (compilers,
    loader workers, W&B): a terminal sends it to those, too, and the step that needs them would fail.
    """

    current: InterruptWatch | None = None

    def __init__(self, program: str) -> None:
        self.program = program
        self.listener: StopRequest | None = None
        self.woken, self.wake = os.pipe()
        self.first: float | None = None

    @classmethod
    def begin(cls, program: str) -> None:
        """Watch from now on, in place of Python's KeyboardInterrupt; not if SIGINT is ignored, as under nohup."""
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            return
        cls.current = watch = cls(program)
        os.set_blocking(watch.wake, False)
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.set_wakeup_fd(watch.wake, warn_on_full_buffer=False)
        threading.Thread(target=watch.answer, daemon=True, name="interrupts").start()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])

    def answer(self) -> None:
        """Runs in the thread: every signal of this process arrives as a byte."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # also one that came while Python started
        announced = False
        while True:
            waiting = self.first is not None and not announced
            if waiting and not select.select([self.woken], [], [], SILENCE_S)[0]:
                announced = True
                say("stopping after this step; a second Ctrl-C ends at once, without saving")
                continue
            for number in os.read(self.woken, 64):
                if number == signal.SIGINT:
                    self.interrupted()

    def interrupted(self) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = now
            if self.listener is None:
                say(f"{self.program}: {STOPPED}")
                end(EXIT_CODE)
            self.listener.requested = True
        elif now - self.first > SAME_S:
            how = "start the same command again to continue from what was saved"
            say(f"{self.program}: ended by a second Ctrl-C; {how}")
            end(INTERRUPTED)


class StopRequest:
    """Remembers Ctrl-C, SIGTERM or SIGUSR1 (Slurm's warning before a time limit)."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            # A launcher that ignores USR1 for us passes it on as TERM; our children must inherit the ignoring.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def hear_interrupts(self) -> Self:
        """From now on, Ctrl-C is remembered, too; before, there is nothing to save, and it ends the process."""
        if (watch := InterruptWatch.current) is not None:
            watch.listener = self
            self.requested |= watch.first is not None  # it came to an earlier StopRequest of this process
        return self

    def over(self) -> None:
        """Nothing is left to save: from now on, Ctrl-C ends the process; Stopped if it came before."""
        if (watch := InterruptWatch.current) is not None:
            watch.listener = None
            if watch.first is not None:
                say(f"{watch.program}: {STOPPED}")
                raise Stopped


@contextlib.contextmanager
def held_back(numbers: Iterable[int]) -> Iterator[None]:
    """Processes that are started within hold these signals back, until they unblock them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_on_interrupt(program: str) -> None:
    """Until another handler is set, Ctrl-C ends the process with 75 and a sentence; not if SIGINT is ignored."""

    def leave(number: int, frame: FrameType | None) -> None:
        say(f"{program}: {STOPPED}")
        end(EXIT_CODE)

    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, leave)


def speaks() -> bool:
    """Whether this process prints what all ranks do."""
    return os.environ.get("RANK", "0") == "0"


def say(sentence: str) -> None:
    """Print on stderr, from one rank, past Python's buffers: the main thread may be writing. A progress bar stays."""
    if speaks():
        with contextlib.suppress(OSError):
            os.write(2, f"{os.linesep if os.isatty(2) else ''}{sentence}\n".encode())


def end(code: int) -> NoReturn:
    """End the process from any thread. Safe at any point: files are first written under temporary names."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)
