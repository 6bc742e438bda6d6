"""From a picture of any shape to the square that models take."""

from __future__ import annotations

import numpy as np
from PIL import Image

from data_pipeline.codec import to_rgb

ORIENTATION, TURNED = 0x0112, range(5, 9)  # EXIF: the picture lies on its side


def upright_sides(image: Image.Image) -> tuple[int, int]:
    """Width and height as to_rgb will turn it; from the header alone."""
    width, height = image.size
    return (height, width) if image.getexif().get(ORIENTATION) in TURNED else (width, height)


def centre_square(image: Image.Image, size: int) -> np.ndarray:
    """Shortest side to `size` (Lanczos), the middle kept: (size, size, 3) uint8, transparency on white.

    Only the middle is resized: the whole of a slender picture could take all memory.
    """
    return square_of(to_rgb(image), size)


def square_of(pixels: np.ndarray, size: int) -> np.ndarray:
    """The same of decoded pixels (H, W, 3) uint8; what is that square already is returned as it is."""
    if pixels.shape == (size, size, 3):
        return pixels
    picture = Image.fromarray(pixels)
    scale = size / min(picture.size)
    box = []  # left, top, right, bottom in the picture, of whole pixels in the resized one
    for side in picture.size:
        resized = max(size, round(side * scale))
        first = (resized - size) // 2
        box.append((first * side / resized, (first + size) * side / resized))
    (left, right), (top, bottom) = box
    return np.array(picture.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, right, bottom)))
