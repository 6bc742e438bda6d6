"""The device to compute on, and how many CPUs may be used."""

from __future__ import annotations

import os

import torch

from data_pipeline.common.errors import UserError


def chosen_device(name: str) -> torch.device:
    """auto: the GPU if there is one; of several, the one with this process's number on its machine."""
    if name == "auto":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % count) if count else torch.device("cpu")
    if name.split(":")[0] not in ("cpu", "cuda") or (name.startswith("cuda") and not torch.cuda.is_available()):
        raise UserError(f"device={name} is not available here: use device=auto or device=cpu.")
    return torch.device(name)


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
