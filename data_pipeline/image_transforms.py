"""From a picture of any shape to the square that models take."""

from __future__ import annotations

import numpy as np
from PIL import Image

from data_pipeline.codec import to_rgb


def centre_square(image: Image.Image, size: int) -> np.ndarray:
    """Shortest side to `size` (Lanczos), the middle kept: (size, size, 3) uint8, transparency on white.

    Only the middle is resized: the whole of a slender picture could take all memory.
    """
    picture = Image.fromarray(to_rgb(image))
    scale = size / min(picture.size)
    box = []  # left, top, right, bottom in the picture, of whole pixels in the resized one
    for side in picture.size:
        resized = max(size, round(side * scale))
        first = (resized - size) // 2
        box.append((first * side / resized, (first + size) * side / resized))
    (left, right), (top, bottom) = box
    return np.array(picture.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, right, bottom)))
