"""FLOPs of a training step, and the peak FLOP/s of the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

# Dense peak FLOP/s of the matrix units by the makers' data sheets: (bf16 and fp16, TF32, which fp32 may use).
PEAKS = {
    "A100": (312e12, 156e12),
    "H100": (989e12, 495e12),
    "H200": (989e12, 495e12),
    "B200": (2250e12, 1125e12),
    "L40S": (362e12, 183e12),
}


def of_training(forward: Callable[[], Any]) -> int:
    """Floating-point operations of a step's matrix products and convolutions: three times those of the forward pass, as
    the backward pass needs two for each.

    This is an extra forward pass: while counting, torch uses other kernels, whose last bits differ. What torch can't
    count is left out: xformers' attention, compiled code (the engine turns its own compiled code off for this).
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return 3 * counter.get_total_flops()


def peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak of one device in FLOP/s; None if no data sheet is listed, as for CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    half, full = next((peaks for card, peaks in PEAKS.items() if card in name), (None, None))
    return full if dtype == torch.float32 else half
