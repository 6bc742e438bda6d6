"""Finds this process' rank under torchrun, srun or alone, and creates and closes the process group."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from data_pipeline.common.errors import UserError

# The heartbeats detect hangs earlier, and with more detail; this only ensures that no collective hangs forever.
COLLECTIVE_TIMEOUT = timedelta(hours=1)
PR_SET_PDEATHSIG = 1  # from linux/prctl.h
MEETING_TIMEOUT = timedelta(minutes=10)
# Port 0: the system chooses a free port; a free port looked up before might be taken by then.
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process' rank, the number of ranks, and its device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def find_ranks() -> Ranks:
    """Join the process group given by the launcher's environment: torchrun's, else srun's; otherwise a single rank."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_the_launcher()
    if "RANK" not in os.environ and "SLURM_STEP_ID" in os.environ:
        os.environ.update({ours: os.environ[theirs] for ours, theirs in _SLURM.items()})
    meeting_place = {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not meeting_place:  # each would wait at its own address
        raise UserError(
            "there are several ranks, but MASTER_ADDR and MASTER_PORT are not set: start them with torchrun or "
            "slurm/*.sbatch."
        )
    for name, alone in ALONE.items():
        os.environ.setdefault(name, alone)
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = _meet(rank, world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
    return Ranks(rank, world_size, local_rank, device)


def _end_with_the_launcher() -> None:
    """Have Linux send SIGTERM when torchrun dies, as torchrun can't after kill -9: this rank then saves and exits."""
    with suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM.value)


def _meet(rank: int, world_size: int) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT, once all ranks have connected; TimeoutError names those that have not."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts_it = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # otherwise torchrun hosts it
    store = dist.TCPStore(address, port, world_size, hosts_it, timeout=MEETING_TIMEOUT, wait_for_workers=False)
    os.environ["MASTER_PORT"] = str(store.port)
    store.set(f"arrived/{rank}", "")
    deadline = time.monotonic() + MEETING_TIMEOUT.total_seconds()
    missing = list(range(world_size))
    while missing := [rank for rank in missing if not store.check([f"arrived/{rank}"])]:
        if time.monotonic() > deadline:
            names = ", ".join(map(str, missing))
            raise TimeoutError(f"rank(s) {names} did not connect to {address}:{store.port}: see their logs.")
        time.sleep(0.05)
    return store


@contextmanager
def closing_distributed() -> Iterator[None]:
    """Destroy the process group at the end, so that gloo and NCCL exit without warnings.

    Not after an error: destroying it may wait for the other ranks, while they wait for this one.
    """
    try:
        yield
    except SystemExit:  # all ranks have agreed to stop
        _leave_group()
        raise
    _leave_group()


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
