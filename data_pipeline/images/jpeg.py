"""Decodes a JPEG and checks that it is whole: libjpeg only warns of damage, and Pillow hides the warning."""

from __future__ import annotations

import re

import numpy as np
import simplejpeg

# libjpeg's warnings of missing or changed data; its other warnings concern only metadata.
DAMAGE = ("Corrupt JPEG data", "Premature end of JPEG file", "Inconsistent progression sequence")
PADDED = re.compile(r"extraneous bytes before marker 0xd9")
ERASED = bytes(24)  # a run of zeros that no encoder writes into a scan
END, NEXT_MARKER = b"\xff\xd9", re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}  # Pillow's modes
SOF0, SOF1, SOF2, DHT, SOS, EOI = 0xC0, 0xC1, 0xC2, 0xC4, 0xDA, 0xD9


def decoded(data: bytes, mode: str, strict: bool) -> np.ndarray | None:
    """(H, W, 3) or (H, W) uint8, the same values as Pillow's, in half the time; None: Pillow must decode it.

    strict: ValueError if data are missing or changed, where this can be detected: a lossy format has no checksum.
    """
    if strict and (at := erased_at(data)) is not None:
        raise ValueError(f"its data are zeros from byte {at} on")
    try:
        return read(data, mode)
    except ValueError as error:
        why = str(error)
        if not strict or not why.startswith(DAMAGE):
            return None
    try:
        if PADDED.search(why):  # some cameras pad the end with zeros
            return read(data[: data.rindex(END)].rstrip(b"\0") + END, mode)
    except ValueError:
        pass  # the first error counts
    raise ValueError(why[:1].lower() + why[1:])


def read(data: bytes, mode: str) -> np.ndarray | None:
    """The pixels. CMYK is only checked, at an eighth of the size: Pillow knows which files store it inverted."""
    small = 1 if mode == "CMYK" else 0
    pixels = simplejpeg.decode_jpeg(data, SPACES[mode], min_height=small, min_width=small)
    return {"RGB": pixels, "L": pixels[..., 0]}.get(mode)


def erased_at(data: bytes) -> int | None:
    """Where a part of a scan was overwritten by zeros, as after an interrupted download or copy; libjpeg often decodes
    that without a warning. Costs a search for zeros; the tables are read only if some are found."""
    if data.find(ERASED, max(data.find(b"\xff\xda"), 0)) < 0:
        return None
    at, progressive, tables = 2, False, {}
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        start = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        segment = data[at + 4 : start]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == EOI:
            return None
        if marker == DHT:
            tables |= first_symbols(segment)
        elif SOF0 <= marker <= SOF2:
            progressive = marker == SOF2
        if marker == SOS:
            found = NEXT_MARKER.search(data, start)
            end = found.start() if found else len(data)
            hole = data.find(ERASED, start, end)
            if hole >= 0 and data[hole:end].strip(b"\0") and not may_be_zeros(segment, tables, progressive):
                return hole
            start = end
        at = start
    return None


def first_symbols(segment: bytes) -> dict[int, int]:
    """Class and number of each Huffman table of a DHT segment -> the symbol whose code is all zeros."""
    found, at = {}, 0
    while at + 17 <= len(segment):
        symbols = sum(segment[at + 1 : at + 17])
        if symbols and at + 17 < len(segment):
            found[segment[at]] = segment[at + 17]
        at += 17 + symbols
    return found


def may_be_zeros(segment: bytes, tables: dict[int, int], progressive: bool) -> bool:
    """Whether an encoder can have written many zeros into a scan: flat blocks, if their code is all zeros; or the bits
    that refine a progressive picture. Elsewhere, zeros decode to the same coefficient again and again."""
    count = segment[0] if segment else 0
    if len(segment) < 4 + 2 * count:
        return True
    first, refines = segment[1 + 2 * count], segment[3 + 2 * count] >> 4
    if progressive and (first == 0 or refines):
        return True
    symbols = [tables.get(0x10 | segment[2 + 2 * i] & 15, 0) for i in range(count)]
    return not any(symbol & 15 for symbol in symbols)
