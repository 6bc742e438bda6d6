"""Converts a picture's colours to sRGB by its ICC profile, or by a PNG's gamma."""

from __future__ import annotations

import functools
import io
import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

from data_pipeline.images.colour_tags import TOLERANCE, USUAL_GAMMA, Stated, is_plausible

SAME = 2  # 8-bit levels: a profile that differs less from sRGB counts as sRGB, and the pixels stay as they are
MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # a profile's colour space -> Pillow's mode
BROKEN = "broken ICC profile ignored"


class Colours(NamedTuple):
    """A picture in sRGB, and the conversion that was made, in words; "": none."""

    image: Image.Image
    converted: str = ""


def to_srgb(image: Image.Image, stated: Stated) -> Colours:
    """An opaque picture (L, RGB, CMYK or LAB) in sRGB, as RGB or L. A profile that is broken, or is for other pixels,
    is ignored and reported."""
    if not stated.profile and image.mode != "LAB":
        return with_gamma(image, stated.gamma)
    try:
        mode, transform = transform_of(stated.profile or lab_profile())
        if mode == "RGB" and image.mode == "L":
            if transform is None:
                return Colours(image)
            image = image.convert("RGB")
        if mode != image.mode:
            raise ImageCms.PyCMSError(f"a profile of {mode} pixels")
        return Colours(image) if transform is None else Colours(transform.apply(image), f"{stated.by} to sRGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, KeyError):
        if image.mode == "LAB":
            return to_srgb(image, Stated(lab_profile()))._replace(converted=BROKEN)
        return Colours(image, BROKEN)


@functools.lru_cache(32)
def transform_of(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode of a profile's pixels, and their transform to sRGB; None: they are sRGB already."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = MODES[source.profile.xcolor_space.strip()]
    transform = ImageCms.buildTransform(source, srgb(), mode, "RGB", ImageCms.Intent.PERCEPTUAL)
    if mode in ("CMYK", "LAB"):
        return mode, transform
    probe = colours_of(mode)
    after = np.asarray(transform.apply(probe), np.int16) - np.asarray(probe.convert("RGB"), np.int16)
    return mode, None if np.abs(after).max() <= SAME else transform


@functools.cache
def srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


@functools.cache
def lab_profile() -> bytes:
    """CIE Lab as an ICC profile, for pictures in Lab without one."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def colours_of(mode: str) -> Image.Image:
    """All grey levels, or a grid of colours, as a picture of one row."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    return Image.fromarray(np.array([list(itertools.product(range(0, 256, 17), repeat=3))], np.uint8))


def with_gamma(image: Image.Image, gamma: float | None) -> Colours:
    """The pixels, which were stored with a PNG's gamma, in sRGB."""
    if gamma is None or abs(gamma / USUAL_GAMMA - 1) < TOLERANCE or image.mode not in ("L", "RGB"):
        return Colours(image)
    if not is_plausible(gamma):
        return Colours(image, "impossible gamma ignored")
    linear = np.linspace(0, 1, 256) ** (1 / gamma)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    table = np.round(255 * encoded).astype(np.uint8).tolist()
    return Colours(image.point(table * len(image.getbands())), "gamma to sRGB")
