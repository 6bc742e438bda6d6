"""Threads that work ahead of their caller. Queues are bounded; errors are raised in the calling thread."""

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


def ordered_map(
    pool: ThreadPoolExecutor, function: Callable[[Given], Made], items: Iterable[Given], ahead: int
) -> Iterator[Made]:
    """Like map, but computes at most `ahead` results in advance: decoded pictures are large. A pool of one thread makes
    the calls in order, also if `items` is slower; calls that have begun are finished even after an error."""
    running: collections.deque[Future[Made]] = collections.deque()
    for item in items:
        running.append(pool.submit(function, item))
        if len(running) > ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()
