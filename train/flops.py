"""How much arithmetic a training step is, and what the device could do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

# Dense peak of the matrix units in FLOP/s by the makers' data sheets: (bf16 and fp16, fp32 as TF32 where it is used).
PEAKS = {
    "A100": (312e12, 19.5e12),
    "H100": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "B200": (2250e12, 80e12),
    "L40S": (362e12, 91.6e12),
}


def counted(step: Callable[[], Any]) -> tuple[Any, int]:
    """What `step` returns, and the floating-point operations of its matrix products and convolutions, both passes.

    What torch can't see into is left out: xformers' attention, compiled code.
    """
    with FlopCounterMode(display=False) as counter:
        result = step()
    return result, counter.get_total_flops()


def peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Of one device, in FLOP/s; None where no data sheet is known, as for CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    half, full = next((peaks for card, peaks in PEAKS.items() if card in name), (None, None))
    return full if dtype == torch.float32 else half
