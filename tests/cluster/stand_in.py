"""Stands in for an entry script: writes down what it was given, then does what `do=` says."""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

ARGUMENTS = dict(argument.split("=", 1) for argument in sys.argv[1:])
OUTPUT, RANK = Path(ARGUMENTS["output"]), int(os.environ["RANK"])
NAMES = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def say() -> None:
    """One line a start."""
    facts = {name: os.environ.get(name) for name in NAMES}
    facts |= {"host": socket.gethostname(), "cwd": os.getcwd(), "arguments": sys.argv[1:]}
    with (OUTPUT / f"rank-{RANK}.jsonl").open("a") as file:
        print(json.dumps(facts), file=file)


def meet() -> int:
    """Rank 1 reaches rank 0 where the environment says."""
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if RANK == 0:
        with socket.create_server(place) as server:
            server.settimeout(10)
            server.accept()[0].sendall(b"hello")
        return 0
    for _ in range(100):
        try:
            with socket.create_connection(place, timeout=10) as connection:
                return 0 if connection.recv(5) == b"hello" else 1
        except ConnectionRefusedError:
            time.sleep(0.1)
    return 1


def again() -> int:
    """Ask to be started again; rank 0 has its logs to close, after the others have left."""
    time.sleep(1 if RANK == 0 else 0)
    (OUTPUT / f"closed-{RANK}").touch()
    return 75


def fail() -> int:
    """Rank 1 fails, and rank 0 would wait for it for ever."""
    if RANK == 0:
        time.sleep(600)
    return 3


def stop() -> int:
    """Wait for a signal to this process, then say which it was."""
    number = signal.sigwait([signal.SIGUSR1, signal.SIGTERM])
    (OUTPUT / f"got-{signal.Signals(number).name}").touch()
    return 75


signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTERM] if ARGUMENTS["do"] == "stop" else [])
say()
sys.exit({"meet": meet, "again": again, "fail": fail, "stop": stop, "nothing": lambda: 0}[ARGUMENTS["do"]]())
