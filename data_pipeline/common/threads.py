"""Threads that read ahead or write behind. Queues are bounded, and errors are raised in the calling thread."""

from __future__ import annotations

import collections
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")
END = object()
Given, Made = TypeVar("Given"), TypeVar("Made")


class Prefetcher(Generic[T]):
    """`with Prefetcher(items, depth) as ahead: for item in ahead`: a thread makes up to `depth` items before they are
    taken.

    An error in the thread is raised in place of its item. Leaving ends the thread at its next item.
    """

    def __init__(self, items: Iterable[T], depth: int) -> None:
        self.made: queue.Queue[Any] = queue.Queue(depth)
        self.left = threading.Event()
        self.thread = threading.Thread(target=self._make, args=(items,), daemon=True)
        self.thread.start()

    def _make(self, items: Iterable[T]) -> None:
        try:
            for item in items:
                if not self._put((item, None)):
                    break
            if hasattr(items, "close"):
                items.close()  # here: a generator's own threads end with it
            self._put((END, None))
        except BaseException as error:  # even what is not an Exception must not leave the taker waiting
            self._put((END, error))

    def _put(self, made: tuple[Any, BaseException | None]) -> bool:
        while not self.left.is_set():
            try:
                self.made.put(made, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[T]:
        while True:
            item, error = self.made.get()
            if error is not None:
                raise error
            if item is END:
                return
            yield item

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.left.set()
        self.thread.join()


class BackgroundWriter:
    """`with BackgroundWriter(depth) as writer: writer.submit(write, data)`: a thread makes the calls, in order.

    `submit` waits while `depth` calls are queued. The first error is raised by the next `submit`, or on leaving; calls
    queued after it are not made. Leaving by another error still finishes the queued calls.
    """

    def __init__(self, depth: int) -> None:
        self.given: queue.Queue[Any] = queue.Queue(depth)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        while (job := self.given.get()) is not END:
            if self.error is None:
                try:
                    job[0](*job[1:])
                except BaseException as error:  # as above
                    self.error = error

    def submit(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Queue a call."""
        if self.error is not None:
            raise self.error
        self.given.put((function, *arguments))

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.given.put(END)
        self.thread.join()
        if self.error is not None and (error is None or isinstance(error, SystemExit)):
            raise self.error


def ordered_map(
    pool: ThreadPoolExecutor, function: Callable[[Given], Made], items: Iterable[Given], ahead: int
) -> Iterator[Made]:
    """Like map, but at most `ahead` results are made before they are taken: decoded pictures are large."""
    running: collections.deque[Future[Made]] = collections.deque()
    for item in items:
        running.append(pool.submit(function, item))
        if len(running) > ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()
