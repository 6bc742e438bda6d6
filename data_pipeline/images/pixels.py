"""Pixels as 0..255 and as [-1, 1], and the distance between pictures in dB."""

from __future__ import annotations

import numpy as np


def from_uint8(pixels: np.ndarray) -> np.ndarray:
    """0..255 in any shape -> float32 in [-1, 1]."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """(N, 3, H, W) in [-1, 1] -> (N, H, W, 3) in 0..255, rounded."""
    return np.clip(np.round((images.transpose(0, 2, 3, 1) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each pair of uint8 pictures, (N, H, W, 3) twice -> (N,)."""
    error = np.square(a.astype(np.float64) - b.astype(np.float64)).mean((1, 2, 3))
    return 10.0 * np.log10(255.0**2 / np.maximum(error, 1e-10))
