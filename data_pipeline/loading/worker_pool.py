"""Processes that make items in turns. If one dies, the run ends with one sentence; if the run dies, they end."""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.multiprocessing  # it sends tensors through shared memory, not through the pipe

from data_pipeline.common.errors import UserError
from data_pipeline.common.stop_request import held_back

REQUESTS_TO_STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
Make = Callable[[int, int], Iterator[Any]]  # worker, number of workers -> its items


class WorkerDied(RuntimeError):
    """Not the user's mistake as far as we can tell: memory ran out, or someone killed it. A restart may help."""


class Workers:
    """`for items in Workers(make, count, ahead)`: one item of each worker, in their order; each makes up to `ahead`
    before they are taken. A worker's UserError is raised here; any other error ends the workers and is reported."""

    def __init__(self, make: Make, count: int, ahead: int) -> None:
        _kill_workers_at_exit()
        self.count = count
        self.processes: list[BaseProcess] = []
        self.connections: list[Connection] = []
        context = multiprocessing.get_context("spawn")  # s3fs does not survive a fork
        for worker in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, make, worker, count), daemon=True, name=f"loader worker {worker}"
            )
            with held_back(REQUESTS_TO_STOP):  # until the process ignores them: it imports for seconds before
                process.start()
            theirs.close()  # so that its end is noticed here
            self.processes.append(process)
            self.connections.append(ours)
        for worker in range(count):
            for _ in range(max(ahead, 1)):
                self._ask(worker)

    def __iter__(self) -> Iterator[list[Any]]:
        try:
            while True:
                yield [self._receive(worker) for worker in range(self.count)]
        finally:
            self.close()

    def _ask(self, worker: int) -> None:
        with contextlib.suppress(OSError):  # it died: first read what it sent before, then report its death
            self.connections[worker].send(None)

    def _receive(self, worker: int) -> Any:
        connection = self.connections[worker]
        try:
            wait([connection, self.processes[worker].sentinel])
            if not connection.poll():
                raise EOFError
            item = connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied(self._how_it_ended(worker)) from error
        if isinstance(item, UserError):
            raise item
        self._ask(worker)
        return item

    def _how_it_ended(self, worker: int) -> str:
        process = self.processes[worker]
        process.join(5)
        code = process.exitcode
        how = "closed its pipe" if code is None else f"exited with code {code}: its error is above"
        if code is not None and code < 0:
            how = (
                f"was killed by {signal.Signals(-code).name}: memory may have run out (data.num_workers, data.cache_mb)"
            )
        return f"loader worker {worker} of {self.count} (process {process.pid}) {how}; start the run again to continue."

    def close(self) -> None:
        """End them all."""
        for process, connection in zip(self.processes, self.connections, strict=True):
            process.kill()
            connection.close()
        for process in self.processes:
            process.join()


def _serve(connection: Connection, make: Make, worker: int, count: int) -> None:
    """A worker's life: make an item, wait for a request, send it. It ends when its process' pipe does."""
    _ignore_requests_to_stop()
    torch.set_num_threads(1)
    try:
        try:
            for item in make(worker, count):
                connection.recv()
                connection.send(item)
        except UserError as error:
            connection.send(error)
            while True:  # the run may still fetch what was sent before from this process' memory
                connection.recv()
    except (EOFError, ConnectionError):
        pass  # the run has ended


def _ignore_requests_to_stop() -> None:
    """A signal to the process group reaches workers, too: they must continue, so that the run can save and end them."""
    for number in REQUESTS_TO_STOP:
        signal.signal(number, signal.SIG_IGN)


@functools.cache
def _kill_workers_at_exit() -> None:
    """Python sends its children TERM at exit, which they ignore, and would wait for them forever."""
    atexit.register(lambda: [child.kill() for child in multiprocessing.active_children() if child.daemon])
