"""What colours a picture's pixels stand for: by its embedded ICC profile, or by other tags, from which one is made."""

from __future__ import annotations

import contextlib
import functools
import io
import struct
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from data_pipeline.images.exif import is_adobe_rgb

XY = tuple[float, float]
D65: XY = (0.3127, 0.3290)
D50 = (0.9642, 1.0, 0.8249)  # XYZ of the white of ICC profiles
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
USUAL_GAMMA, TOLERANCE = 1 / 2.2, 0.02  # of a PNG's gAMA chunk: the value for sRGB
# Red, green, blue, white.
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), D65)
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), D65)
# ITU-T H.273, by number: color primaries (others are close to sRGB's, or unspecified) and transfer characteristics.
PRIMARIES: Mapping[int, tuple[XY, XY, XY, XY]] = {
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), D65),  # BT.2020
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)),  # DCI P3
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), D65),  # Display P3
}
GAMMAS: Mapping[int, float] = {4: 2.2, 5: 2.8, 8: 1.0}  # others have sRGB's curve: cameras' are meant for it
HDR = {16: "PQ", 18: "HLG"}
BOX, HEADER = b"colrnclx", 2**14  # in AVIF and HEIC, among their first bytes


class Stated(NamedTuple):
    """What a file says of its colours: an ICC profile (embedded, or made from tags, which `by` names), or a PNG's gamma
    alone. hdr: the name of a transfer function that has no white."""

    profile: bytes | None = None
    by: str = "ICC profile"
    gamma: float | None = None
    hdr: str = ""


def stated_colours(image: Image.Image) -> Stated:
    """Of an opened picture. A PNG's cICP comes before its ICC profile (PNG 3, section 4.3), elsewhere the profile comes
    first; then a PNG's cHRM and gAMA, and Exif's "R03": Adobe RGB (DCF 2.0)."""
    profile = image.info.get("icc_profile")
    if image.format == "PNG" and len(code := png_chunk(image, b"cICP")) == 4:
        return by_code(code[0], code[1], "cICP")
    if profile:
        return Stated(profile)
    if image.format == "PNG":
        return by_png(image.info)
    if image.format in ("AVIF", "HEIF") and (code := nclx(image)):
        return by_code(*code, "nclx")
    if is_adobe_rgb(image):
        return Stated(profile_of(ADOBE_RGB, 563 / 256), "Exif's Adobe RGB")
    return Stated()


def by_code(primaries: int, transfer: int, where: str) -> Stated:
    """From numbers of H.273."""
    if transfer in HDR:
        return Stated(hdr=HDR[transfer])
    if primaries not in PRIMARIES and transfer not in GAMMAS:
        return Stated()
    return Stated(profile_of(PRIMARIES.get(primaries, SRGB), GAMMAS.get(transfer)), where)


def by_png(info: Mapping[str, Any]) -> Stated:
    """From cHRM and gAMA; an sRGB chunk outranks both."""
    gamma, xy = info.get("gamma"), info.get("chromaticity")
    if "srgb" in info:
        return Stated()
    if xy is None or (gamma is not None and not is_plausible(gamma)):
        return Stated(gamma=gamma)
    usual = gamma is None or abs(gamma / USUAL_GAMMA - 1) < TOLERANCE
    white, *primaries = (tuple(xy[i : i + 2]) for i in range(0, 8, 2))
    try:
        return Stated(profile_of((*primaries, white), None if usual else 1 / gamma), "cHRM")
    except (np.linalg.LinAlgError, ZeroDivisionError, struct.error):  # no triangle of colours
        return Stated(gamma=gamma)


def is_plausible(gamma: float) -> bool:
    """Whether a PNG's gamma can be meant: written by mistake, 0 or 1/100000 would make everything black or white."""
    return 0.1 < gamma < 10.0


def png_chunk(image: Image.Image, name: bytes) -> bytes:
    """The first 64 bytes of a chunk before a PNG's pixels; b"" if there is none. Pillow drops the chunks that it does
    not know."""
    with from_start(image) as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == name:
                return file.read(min(length, 64))
            if kind == b"IDAT":
                break
            file.seek(length + 4, 1)
    return b""


def nclx(image: Image.Image) -> tuple[int, int] | None:
    """Primaries and transfer characteristics in the header of an AVIF or HEIC."""
    with from_start(image) as file:
        _, found, code = file.read(HEADER).partition(BOX)
    return struct.unpack(">HH", code[:4]) if found and len(code) >= 4 else None


@contextlib.contextmanager
def from_start(image: Image.Image) -> Iterator[IO[bytes]]:
    """The file of an opened picture, from its first byte; then where it was. Empty if Pillow has closed it."""
    file = image.fp or io.BytesIO()
    before = file.tell()
    file.seek(0)
    try:
        yield file
    finally:
        file.seek(before)


@functools.lru_cache(32)
def profile_of(colours: tuple[XY, XY, XY, XY], gamma: float | None = None) -> bytes:
    """An ICC profile (version 4.2) of these chromaticities of red, green, blue and white, and of a gamma; None: with
    sRGB's curve. The white is adapted to D50 by Bradford's matrix (ICC.1:2010, annex E). LinAlgError, ZeroDivisionError
    or struct.error for colours that can't be."""
    xyz = [np.array([x / y, 1.0, (1 - x - y) / y]) for x, y in colours]
    columns, white = np.stack(xyz[:3], 1), xyz[3]
    columns = columns * np.linalg.solve(columns, white)
    adapted = np.diag((BRADFORD @ np.array(D50)) / (BRADFORD @ white))
    columns = np.linalg.inv(BRADFORD) @ adapted @ BRADFORD @ columns
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(*D50)}
    for name, column in zip(b"rgb", columns.T, strict=True):
        tags[bytes([name]) + b"XYZ"] = b"XYZ " + bytes(4) + fixed(*column)
        tags[bytes([name]) + b"TRC"] = curve(gamma)
    return assembled(tags)


def fixed(*values: float) -> bytes:
    """Numbers as ICC's s15Fixed16."""
    return struct.pack(f">{len(values)}i", *(round(float(value) * 65536) for value in values))


def curve(gamma: float | None) -> bytes:
    """A parametric curve: a power, or sRGB's (IEC 61966-2-1)."""
    if gamma is not None:
        return b"para" + bytes(8) + fixed(gamma)
    return b"para" + bytes(4) + b"\0\3\0\0" + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def assembled(tags: Mapping[bytes, bytes]) -> bytes:
    """A profile of a display in RGB: header of 128 bytes, table of tags, tags."""
    at, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data
    header = struct.pack(">I4xI4s4s4s12x4s28x", at + len(body), 0x04200000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    return header + fixed(*D50) + bytes(128 - len(header) - 12) + table + body
