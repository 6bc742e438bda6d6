"""ICC profiles made from their definitions, and pictures that carry them."""

from __future__ import annotations

import struct

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
D65 = (0.3127, 0.3290)
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
PROPHOTO = ((0.734699, 0.265301), (0.159597, 0.840403), (0.036598, 0.000105))


def xyz_of(xy):
    return np.array([xy[0] / xy[1], 1.0, (1 - xy[0] - xy[1]) / xy[1]])


def colorants(primaries, white):
    """(3, 3): XYZ under D50 of red, green and blue, in columns."""
    columns = np.stack([xyz_of(xy) for xy in primaries], 1)
    columns = columns * np.linalg.solve(columns, xyz_of(white))
    cones = (BRADFORD @ np.array(D50)) / (BRADFORD @ xyz_of(white))
    return np.linalg.inv(BRADFORD) @ np.diag(cones) @ BRADFORD @ columns


def fixed(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(space, device, pcs, tags):
    """A version 4.2 profile: header, table of tags, tags."""
    at, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data
    header = struct.pack(">I4sI4s4s4s", at + len(body), b"lcms", 0x04200000, device, space, pcs)
    header += bytes(12) + b"acsp" + bytes(28) + fixed(*D50)
    return header + bytes(128 - len(header)) + table + body


def curve(gamma):
    """A power, or sRGB's curve."""
    if gamma == "srgb":
        return b"para" + bytes(4) + b"\0\3\0\0" + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return b"para" + bytes(8) + fixed(gamma)


def rgb_profile(primaries, gamma, white=D65):
    columns = colorants(primaries, white)
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(*D50)}
    for name, column in zip("rgb", columns.T, strict=True):
        tags[f"{name}XYZ".encode()] = b"XYZ " + bytes(4) + fixed(*column)
        tags[f"{name}TRC".encode()] = curve(gamma)
    return profile(b"RGB ", b"mntr", b"XYZ ", tags)


def grey_profile(gamma):
    return profile(b"GRAY", b"mntr", b"XYZ ", {b"wtpt": b"XYZ " + bytes(4) + fixed(*D50), b"kTRC": curve(gamma)})


def cmyk_profile(cyan_lab):
    """Paper is white, full cyan is `cyan_lab`, every other corner black."""
    corners = np.zeros((16, 3))
    corners[:, 1:] = 128
    corners[0] = 255, 128, 128
    corners[8] = cyan_lab[0] * 2.55, cyan_lab[1] + 128, cyan_lab[2] + 128
    ramp = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4
    lut += np.round(corners).astype(np.uint8).tobytes() + ramp * 3
    return profile(b"CMYK", b"prtr", b"Lab ", {b"A2B0": lut, b"wtpt": b"XYZ " + bytes(4) + fixed(*D50)})


def srgb_of(linear):
    """Linear light -> 0..255."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def in_srgb(pixel, primaries, gamma, white=D65):
    """What a pixel of such a profile is in sRGB, by the definitions."""
    value = np.array(pixel) / 255
    linear = (
        np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
        if gamma == "srgb"
        else (value**gamma)
    )
    srgb = colorants(((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)), D65)
    return srgb_of(np.linalg.solve(srgb, colorants(primaries, white) @ linear))
