"""Stands in for an entry script: writes down what it was given, then does what `do=` says."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ARGUMENTS = dict(argument.split("=", 1) for argument in sys.argv[1:])
OUTPUT, RANK = Path(ARGUMENTS["output"]), int(os.environ["RANK"])
NAMES = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
NAMES += ("TMPDIR", "TRITON_CACHE_DIR", "LOCAL_DISK", "OF_PREPARE_JOB", "OF_CONTAINER")


def say() -> None:
    """One line a start."""
    facts = {name: os.environ.get(name) for name in NAMES}
    facts |= {
        "array_task": os.environ.get("SLURM_ARRAY_TASK_ID"),
        "host": socket.gethostname(),
        "cwd": os.getcwd(),
        "arguments": sys.argv[1:],
    }
    with (OUTPUT / f"rank-{RANK}.jsonl").open("a") as file:
        print(json.dumps(facts), file=file)


def restarted() -> bool:
    """By Slurm, or by itself."""
    return bool(os.environ.get("SLURM_RESTART_COUNT") or os.environ.get("CHAIN_RESTARTS"))


def talk() -> int:
    """Something for the logs, and a file in the folder for temporary ones."""
    print(f"rank {RANK} says this", flush=True)
    print(f"rank {RANK} complains", file=sys.stderr)
    (Path(os.environ["TMPDIR"]) / f"of-{RANK}").touch()
    return 0


def once_again() -> int:
    return 0 if restarted() else again()


def meet() -> int:
    """Rank 1 reaches rank 0 where the environment says."""
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if RANK == 0:
        with socket.create_server(place) as server:
            server.settimeout(60)
            server.accept()[0].sendall(b"hello")
        return 0
    for _ in range(600):
        try:
            with socket.create_connection(place, timeout=60) as connection:
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
    """Wait to be told to stop, beside a child that must not be stopped with us. Started again, be done."""
    if restarted():
        return 0
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    with subprocess.Popen(["sleep", "600"]) as child:
        (OUTPUT / f"ready-{RANK}").touch()
        signal.sigwait([signal.SIGTERM])
        time.sleep(0.2)
        (OUTPUT / ("child-died" if child.poll() else "child-lives")).touch()
        child.kill()
    return 75


def sleep() -> int:
    """As one that is still importing: no handler stands. Started again, be done."""
    if not restarted():
        (OUTPUT / f"ready-{RANK}").touch()
        time.sleep(600)
    return 0


def one_of_array() -> int:
    """The last task waits to be told to stop, the others to be let go."""
    if os.environ["SLURM_ARRAY_TASK_ID"] == "2":
        return stop()
    while not (OUTPUT / "go").exists():
        time.sleep(0.1)
    return 0


def crash() -> int:
    """Rank 1 crashes at each start, and rank 0 would wait for it for ever."""
    if RANK == 0:
        time.sleep(600)
    return 1


def crash_further_on() -> int:
    """Rank 1 is killed at the first two starts, each time behind a new checkpoint."""
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if restarts == 2:
        return 0
    if RANK == 1:
        (OUTPUT / "checkpoints").mkdir(exist_ok=True)
        (OUTPUT / "checkpoints/latest").write_text(f"step-{restarts:08d}")
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
    return 0


DO = {
    "crash": crash,
    "further": crash_further_on,
    "meet": meet,
    "again": again,
    "once again": once_again,
    "talk": talk,
    "fail": fail,
    "stop": stop,
    "one of array": one_of_array,
    "sleep": sleep,
    "nothing": lambda: 0,
}
say()
sys.exit(DO[ARGUMENTS["do"]]())
