"""Picture files to (H, W, 3) uint8, of a few formats and a limited size."""

from __future__ import annotations

import io
import struct
import tokenize
import zlib
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 64 * 1024 * 1024
IMAGES = ("png", "jpg", "jpeg", "webp")
# The formats allowed, whatever a file's name says. Pillow reads more: one of them, EPS, starts a program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # above twice this, Pillow raises before it decodes; below, to_rgb does
# Errors that Pillow, numpy and json raise on bytes that are not what they claim to be.
UNDECODABLE = (
    ValueError,
    OSError,
    SyntaxError,
    EOFError,
    RecursionError,
    struct.error,
    zlib.error,
    tokenize.TokenError,  # the header of a .npy is in Python's notation
    MemoryError,
    Image.DecompressionBombError,
)


def decode_image(data: bytes) -> np.ndarray:
    """PNG, JPEG or WebP bytes -> (H, W, 3) uint8; transparency becomes white."""
    return to_rgb(open_image(io.BytesIO(data)))


def open_image(file: str | Path | IO[bytes]) -> Image.Image:
    """Open a picture of one of FORMATS, recognised by its content; only its header is read."""
    return Image.open(file, formats=FORMATS)


def to_rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8, on white. The size is checked before anything is decoded."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are more than the {MAX_PIXELS} allowed")
    image = ImageOps.exif_transpose(image)  # a phone's picture records which way is up
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        image = Image.fromarray(np.round(np.clip(np.asarray(image), 0, 65535) / 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))
