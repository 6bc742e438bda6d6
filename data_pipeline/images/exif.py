"""What is read of a picture's Exif: its orientation, and whether its colours are Adobe RGB."""

from __future__ import annotations

import struct
import zlib

from PIL import Image

# What Pillow raises on damaged metadata, which is tolerated.
METADATA_ERRORS = (
    ValueError, OSError, SyntaxError, EOFError, RecursionError, struct.error, zlib.error, MemoryError, TypeError,
    KeyError, IndexError, AttributeError, OverflowError, ZeroDivisionError,
)  # fmt: skip
ORIENTATION, EXIF, COLOUR_SPACE, INTEROPERABILITY = 0x0112, 0x8769, 0xA001, 0xA005
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def orientation(image: Image.Image) -> int:
    """The orientation, 1 to 8; 1 if it can't be read. Decodes a PNG, whose Exif may follow its pixels."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except METADATA_ERRORS:
        return 1


def is_adobe_rgb(image: Image.Image) -> bool:
    """Whether an RGB picture is Adobe RGB: its interoperability index is R03 (DCF 2.0), and it does not also claim
    sRGB. False if it can't be read."""
    if image.mode != "RGB" or b"R03" not in image.info.get("exif", b""):
        return False
    try:
        exif = image.getexif()
        index, space = exif.get_ifd(INTEROPERABILITY).get(1), exif.get_ifd(EXIF).get(COLOUR_SPACE)
        return str(index).startswith("R03") and space != 1
    except METADATA_ERRORS:
        return False
