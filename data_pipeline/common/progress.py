"""Progress with rate and ETA: a bar on a terminal, elsewhere a plain line from time to time."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0
SECONDS_OF_SILENCE = 60.0  # without a terminal, the longest time between two lines, even while nothing is done


class Progress:
    """`with Progress("encode", total=500, unit="images") as bar: bar.advance(8, loss="0.12")`."""

    def __init__(self, what: str, total: int, unit: str = "it", initial: int = 0, shown: bool = True) -> None:
        self.what, self.total, self.unit, self.shown = what, total, unit, shown
        self.done = self.initial = initial
        self.started = self.last_line = time.monotonic()
        self.values: dict[str, str] = {}
        self.bar, self.thread, self.over = None, None, threading.Event()
        if shown and sys.stderr.isatty():
            self.bar = tqdm(desc=what, total=total, unit=unit, initial=initial, dynamic_ncols=True, unit_scale=False)

    def advance(self, count: int = 1, **values: str) -> None:
        """Count `count` more units done; `values` are shown beside the rate."""
        self.done += count
        self.values = values or self.values
        if self.bar is not None:
            if values:
                self.bar.set_postfix(values, refresh=False)
            self.bar.update(count)
        elif self.shown and time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self._print_line()

    def skip(self, count: int) -> None:
        """Count `count` units that others have done: they are done, but don't count for the rate."""
        self.done += count
        self.initial += count
        if self.bar is not None:
            self.bar.initial += count
            self.bar.update(count)

    def note(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        elif self.shown:
            print(text, file=sys.stderr, flush=True)

    def _speak_up(self) -> None:
        """Run by a thread: print a line when there was none for SECONDS_OF_SILENCE."""
        while not self.over.wait(max(self.last_line + SECONDS_OF_SILENCE - time.monotonic(), 0.01)):
            if time.monotonic() - self.last_line >= SECONDS_OF_SILENCE:
                self._print_line()

    def _print_line(self) -> None:
        self.last_line = time.monotonic()
        rate = (self.done - self.initial) / max(self.last_line - self.started, 1e-9)
        eta = (self.total - self.done) / rate if rate > 0 else float("inf")
        shown = "".join(f"  {name} {value}" for name, value in self.values.items())
        left = f"{int(eta) // 60}:{int(eta) % 60:02d}" if eta < 1e7 else "?"
        print(
            f"{self.what}: {self.done}/{self.total} {self.unit}  {rate:.1f} {self.unit}/s  {left} left{shown}",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> Progress:
        if self.shown and self.bar is None:
            self.thread = threading.Thread(target=self._speak_up, daemon=True, name="progress")
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()
        if self.thread is not None:
            self.thread.join()
        if self.bar is not None:
            self.bar.close()
        elif self.shown and kind is None and self.done > self.initial:
            self._print_line()
