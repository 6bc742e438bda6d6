"""From a picture of any shape to the square that models take."""

from __future__ import annotations

import numpy as np
from PIL import Image

from data_pipeline.codec import to_rgb


def centre_square(image: Image.Image, size: int) -> np.ndarray:
    """Shortest side to `size` (Lanczos), the middle kept: (size, size, 3) uint8, transparency on white."""
    picture = Image.fromarray(to_rgb(image))
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(picture.crop((left, top, left + size, top + size)))
