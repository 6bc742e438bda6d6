"""Decodes picture files to (H, W, 3) uint8 in sRGB; for a picture that can't be used, the error names the cause."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import struct
import tokenize
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image, ImageColor, UnidentifiedImageError

from data_pipeline.common.errors import UserError
from data_pipeline.images import jpeg
from data_pipeline.images.colour import to_srgb
from data_pipeline.images.colour_tags import Stated, stated_colours
from data_pipeline.images.exif import TURNS, orientation
from data_pipeline.images.formats import HEAD, RAW, READ, SAVE_AS, UNREAD, formats_for, kind_of, reads_heic

MAX_PIXELS = 64 * 1024 * 1024
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # above twice this, Pillow raises before it decodes; between, `open_image` raises
# Pillow's warnings contain a path of the environment. Sizes are checked here; damaged metadata is tolerated.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
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
BITS, PHOTOMETRIC, SAMPLE_FORMAT, SIGNED = 258, 262, 339, 2  # TIFF's tags, and a value of the last
MOVING = ("GIF", "WEBP", "PNG", "AVIF", "HEIF")  # formats whose frames are an animation, not pages
LOW_BITS = {"1": 255, "L;1": 255, "L;2": 85, "L;4": 17}  # Pillow's factors from a PNG's few bits to 8
Box = tuple[int, int, int]


class PictureError(ValueError):
    """Why a picture can't be used: words shared by many pictures, then details of this one in brackets."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How pictures are read. background: put under transparency. animated: "first" frame, or "reject". strict: whether
    to refuse a damaged picture that the decoder would accept."""

    background: Box = (255, 255, 255)
    animated: str = "first"
    strict: bool = True

    @classmethod
    def of(cls, background: Any, animated: Any) -> Decoding:
        """From the options source.background and source.animated."""
        if animated not in ("first", "reject"):
            raise UserError(f"animated={animated} is unknown: choose first (the first frame) or reject.")
        return cls(colour_of(background), animated)


class Picture(NamedTuple):
    """Pixels (H, W, 3) uint8 in sRGB, and the conversions that were made, in words that are counted. original: (H, W)
    before it was resized, if it was; offset: (top, left) of what was kept after that."""

    pixels: np.ndarray
    converted: tuple[str, ...] = ()
    original: tuple[int, int] | None = None
    offset: tuple[int, int] = (0, 0)


def colour_of(value: Any) -> Box:
    """A colour from its name, or from rrggbb with or without #."""
    text = f"{value:06d}" if isinstance(value, int) else str(value)
    with contextlib.suppress(ValueError):
        return ImageColor.getrgb(f"#{text}" if re.fullmatch("[0-9a-fA-F]{6}", text) else text)[:3]
    raise UserError(f"source.background={value} is not a colour: use a name such as white, or six digits as ff8000.")


def decode_image(data: bytes, extension: str = "", strict: bool = True) -> np.ndarray:
    """A picture's bytes -> (H, W, 3) uint8, transparency on white. PictureError if it can't be used."""
    return decode_picture(io.BytesIO(data), extension, Decoding(strict=strict)).pixels


def decode_picture(file: Path | IO[bytes], extension: str = "", how: Decoding = Decoding()) -> Picture:  # noqa: B008
    """A picture from a file or from bytes. PictureError if it can't be used."""
    with naming_errors(file), open_image(file, extension) as image:
        return to_picture(image, how)


def open_image(file: str | Path | IO[bytes], extension: str = "") -> Image.Image:
    """Open a picture, recognised by its content; only its header is read. extension: that of its name, needed for
    formats without a signature. PictureError if it is too large, or not a picture that is read here."""
    extension = extension or (Path(file).suffix[1:] if isinstance(file, str | Path) else "")
    if extension.lower() in RAW:
        raise PictureError(f"a camera's raw file, which is not read ({extension.upper()}: {SAVE_AS})")
    formats = formats_for(extension)
    with naming_errors(file):
        try:
            image = Image.open(file, formats=formats)
        except UnidentifiedImageError:
            if kind_of(head_of(file)) != "HEIC" or not reads_heic():
                raise
            image = Image.open(file, formats=["HEIF"])
    if image.width * image.height > MAX_PIXELS:
        raise too_large(f"{image.width}x{image.height}")
    return image


def too_large(size: str) -> PictureError:
    return PictureError(f"too large picture ({size} pixels are more than {MAX_PIXELS:,}: scale it down)")


@contextlib.contextmanager
def naming_errors(file: str | Path | IO[bytes]) -> Iterator[None]:
    """Turns errors raised inside into a PictureError that says what the file is, and what is wrong with it."""
    try:
        yield
    except PictureError:
        raise
    except FileNotFoundError as error:
        raise PictureError("missing picture") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise too_large(next(iter(re.findall(r"\d+", str(error))), "too many")) from error
    except UNDECODABLE as error:
        try:
            kind = kind_of(head_of(file))
        except OSError:
            raise PictureError(f"unreadable file ({type(error).__name__})") from error
        raise PictureError(reason_of(kind, error)) from error


def reason_of(kind: str, error: BaseException) -> str:
    """Why a file of this kind can't be read."""
    if kind == "HEIC" and not reads_heic():
        return "HEIC picture, which needs pillow-heif (run pip install -e '.[heic]', or save it as JPEG)"
    if kind in UNREAD:
        return f"{kind} picture, a format that is not read ({SAVE_AS})"
    if kind and kind not in (*READ, "HEIC"):
        return f"not a picture, but {kind}"
    # Pillow's message for an unidentified file contains a memory address; MemoryError has no message.
    unknown = isinstance(error, UnidentifiedImageError | MemoryError) or "object at 0x" in str(error)
    detail = ("its header is damaged" if kind else "") if unknown else str(error)
    detail = detail.partition("\n")[0] or type(error).__name__
    if not kind and unknown:
        return "not a picture of a known format"
    return f"damaged {kind} picture ({detail})" if kind else f"damaged picture ({detail})"


def head_of(file: str | Path | IO[bytes]) -> bytes:
    """The first bytes of a file."""
    if isinstance(file, str | Path):
        with open(file, "rb") as opened:
            return opened.read(HEAD)
    file.seek(0)
    return file.read(HEAD)


def to_rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 of an opened picture, on white."""
    return to_picture(image, Decoding()).pixels


def to_picture(image: Image.Image, how: Decoding) -> Picture:
    """An opened picture, decoded: its first frame, in sRGB, on the background, upright."""
    converted = [frames_of(image, how)]
    stored, stated = stored_mode(image), stated_colours(image)  # before `orientation`, which may decode the picture
    turn = TURNS.get(orientation(image))
    if stated.hdr:
        raise PictureError(f"HDR picture ({stated.hdr}, in which white is not stated: save it as sRGB)")
    plain = image.mode == "RGB" and stated == Stated() and turn is None
    if plain and (pixels := jpeg_pixels(image, how.strict)) is not None:
        return Picture(pixels)  # the usual case, most photographs: no copy
    image, alpha = planes(image, stored, how.strict)
    image, changed = to_srgb(image, stated)
    converted.append(changed)
    image = as_mode(image, "RGB")
    if alpha is not None:
        converted.append("transparency laid over the background" if alpha.getextrema()[0] < 255 else "")
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, how.background), image).convert("RGB")
    if turn is not None:
        image = image.transpose(turn)
    return Picture(np.array(image), tuple(filter(None, converted)))


def frames_of(image: Image.Image, how: Decoding) -> str:
    """How several frames were handled, in words. PictureError if animated pictures are rejected."""
    if not getattr(image, "is_animated", False) or image.format == "MPO":  # MPO: a photograph with its preview
        return ""
    if image.format not in MOVING:
        return "several pages, the first taken"
    if how.animated == "reject":
        raise PictureError("animated picture (animated=reject)")
    return "animated, the first frame taken"


def planes(image: Image.Image, stored: str, strict: bool) -> tuple[Image.Image, Image.Image | None]:
    """An opened picture's colours (L, RGB, CMYK or LAB, 8 bits) and its opacity (L; None: opaque). stored: its
    `stored_mode`."""
    mode = image.mode
    if (pixels := jpeg_pixels(image, strict)) is not None:
        return Image.fromarray(pixels), None
    image.load()
    clear = image.info.get("transparency")
    if is_signed(image):
        raise PictureError("picture of signed numbers (what is black is not stated: save it as PNG)")
    if mode.startswith("I"):
        return from_16_bits(image, clear)
    if mode == "F":
        raise PictureError("picture of floating-point numbers (what is white is not stated: save it as PNG)")
    if isinstance(clear, int | tuple) and mode != "P":
        image = with_clear(image, clear, stored)
        mode = image.mode
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if mode in ("RGBa", "La"):
            image = image.convert({"RGBa": "RGBA", "La": "LA"}[mode])
        if image.mode == "LA" or stored.startswith("LA"):  # Pillow makes RGBA of 16-bit grey with alpha
            return image.getchannel(0), image.getchannel("A")
        image = as_mode(image, "RGBA")
        return image.convert("RGB"), image.getchannel("A")
    return as_mode(image, mode if mode in ("L", "CMYK", "LAB") else "L" if mode == "1" else "RGB"), None


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    """The picture in `mode`; without a copy if it already has it."""
    return image if image.mode == mode else image.convert(mode)


def jpeg_pixels(image: Image.Image, strict: bool) -> np.ndarray | None:
    """A JPEG's pixels; None if Pillow must decode it. ValueError if it is damaged."""
    if image.format not in ("JPEG", "MPO") or image.mode not in jpeg.SPACES:
        return None
    image.fp.seek(0)
    pixels = jpeg.decoded(image.fp.read(), image.mode, strict)
    if pixels is None:
        image.fp.seek(0)
    return pixels


def from_16_bits(image: Image.Image, clear: Any) -> tuple[Image.Image, Image.Image | None]:
    """Grey of 9 to 16 bits, which Pillow would clip at 255, and its opacity."""
    values, (bits, inverted) = np.asarray(image), grey_in_tiff(image)
    if values.min() < 0 or values.max() > 65535 or bits > 16:
        raise PictureError("grey picture of more than 16 bits (what is white is not stated: save it as PNG)")
    grey = np.round(values / ((2**bits - 1) / 255)).astype(np.uint8)
    grey = Image.fromarray(255 - grey if inverted else grey)
    opacity = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)) if isinstance(clear, int) else None
    return grey, opacity


def grey_in_tiff(image: Image.Image) -> tuple[int, bool]:
    """The bits of a TIFF's grey values, and whether 0 is white, which Pillow leaves to us above 8 bits; (16, False) in
    other formats, where Pillow scales to 16 bits."""
    if image.format != "TIFF":
        return 16, False
    return image.tag_v2.get(BITS, (16,))[0], image.tag_v2.get(PHOTOMETRIC) == 0


def is_signed(image: Image.Image) -> bool:
    """Whether a TIFF's numbers are signed; Pillow reads some of them as if they were not."""
    return image.format == "TIFF" and SIGNED in np.atleast_1d(image.tag_v2.get(SAMPLE_FORMAT, 1))


def stored_mode(image: Image.Image) -> str:
    """The mode of the pixels in the file, before decoding, in Pillow's words, such as L;2 or RGB;16B."""
    tiles = getattr(image, "tile", None)
    args = tiles[0].args if tiles else ""
    return args if isinstance(args, str) else str(args[0]) if args else ""


def with_clear(image: Image.Image, clear: int | tuple[int, ...], stored: str) -> Image.Image:
    """A picture with one transparent colour (a PNG's tRNS, a GIF's index), as RGBA or LA. tRNS has the bit depth of the
    file; the pixels have 8 bits."""
    pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
    scale = LOW_BITS.get(stored, 255 if image.mode == "1" else 1)
    value = np.asarray(clear) >> 8 if "16" in stored else np.asarray(clear) * scale
    same = pixels == value
    opacity = Image.fromarray(np.where(same if same.ndim == 2 else same.all(2), 0, 255).astype(np.uint8))
    image = Image.fromarray(pixels)
    image.putalpha(opacity)
    return image
