"""Pictures as people have them: each with the colour that it must have, or a part of the reason to set it aside."""

from __future__ import annotations

import io
import struct
import zlib

import icc
import numpy as np
from PIL import Image

from data_pipeline.images.formats import reads_heic

PIXEL, WHITE, SIZE = (200, 30, 39), (255, 255, 255), (16, 16)
IN_P3 = (218, 0, 25)
ICC, BROKEN = "ICC profile to sRGB", "broken ICC profile ignored"
FULL = {"quality": 100, "subsampling": 0}
ISO_HEIC = struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(200)


def saved(image, kind, **how):
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def flat(mode="RGB", colour=PIXEL, size=SIZE):
    return Image.new(mode, size, colour)


def noise(size=(64, 64)):
    return Image.effect_noise(size, 80).convert("RGB")


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(depth, colour_type, row, *chunks, size=SIZE):
    """A PNG of equal rows, by its chunks."""
    header = struct.pack(">IIBBBBB", *size, depth, colour_type, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress((b"\0" + row) * size[1]))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + body + chunk(b"IEND", b"")


def half(data):
    """Half a JPEG with an end marker."""
    return data[: len(data) // 2] + b"\xff\xd9"


def erased(data, count=60):
    """A file with zeros in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes(count) + data[middle + count :]


def tiff(bits, white, sample_format, row):
    """An uncompressed grey TIFF of equal rows. white: its PhotometricInterpretation, 0 (0 is white) or 1."""
    data = row * SIZE[1]
    tags = [(256, SIZE[0]), (257, SIZE[1]), (258, bits), (259, 1), (262, white), (273, 8), (277, 1), (278, SIZE[1]),
            (279, len(data)), (339, sample_format)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def with_nclx(primaries, transfer):
    """An AVIF with these numbers of ITU-T H.273, and no profile."""
    data = saved(flat(), "AVIF", quality=100, subsampling="4:4:4")
    at = data.index(b"colrnclx") + 8
    return data[:at] + struct.pack(">HH", primaries, transfer) + data[at + 4 :]


def adobe_exif(space=65535, index=b"R03\0"):
    """Exif with a colour space and an interoperability index, as cameras write it for Adobe RGB."""
    first = struct.pack("<HHHIII", 1, 0x8769, 4, 1, 26, 0)
    second = struct.pack("<HHHIIHHIII", 2, 0xA001, 3, 1, space, 0xA005, 4, 1, 56, 0)
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + first + second + struct.pack("<HHHI4sI", 1, 1, 2, 4, index, 0)


def chromaticities(primaries, white=icc.D65):
    values = [round(100000 * value) for xy in (white, *primaries) for value in xy]
    return chunk(b"cHRM", struct.pack(">8I", *values))


def embedded(profile):
    return chunk(b"iCCP", b"p\0\0" + zlib.compress(profile))


def frames(kind, **how):
    first, *rest = (flat(colour=c) for c in (PIXEL, (0, 255, 0), (0, 0, 255)))
    return saved(first, kind, save_all=True, append_images=rest, **how)


def turned():
    """Red at the left as stored; orientation 6 turns it to the top."""
    pixels = np.full((16, 16, 3), 255, np.uint8)
    pixels[:, :8] = PIXEL
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(pixels), "PNG", exif=exif)


def with_broken_exif():
    return saved(flat(), "JPEG", **FULL, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1\x12\0\3")


P3 = icc.rgb_profile(icc.P3, "srgb")
SRGB = icc.rgb_profile(((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)), "srgb")
ADOBE = icc.rgb_profile(icc.ADOBE, 2.2)
PROPHOTO = icc.rgb_profile(icc.PROPHOTO, 1.8, (0.3457, 0.3585))
# Name -> bytes, colour of the first pixel, and what is counted as converted.
TAKEN = {
    "p3.png": (saved(flat(), "PNG", icc_profile=P3), IN_P3, ICC),
    "p3.jpg": (saved(flat(), "JPEG", icc_profile=P3, **FULL), IN_P3, ICC),
    "adobe.tif": (saved(flat(), "TIFF", icc_profile=ADOBE), (233, 24, 34), ICC),
    "prophoto.png": (
        saved(flat(colour=(90, 120, 60)), "PNG", icc_profile=PROPHOTO),
        (90, 145, 60), ICC),
    "cmyk_profile.jpg": (
        saved(flat("CMYK", (255, 0, 0, 0)), "JPEG", quality=100, icc_profile=icc.cmyk_profile((55, -37, -50))),
        (0, 150, 218), ICC),
    "lab.tif": (
        saved(Image.merge("LAB", [Image.new("L", SIZE, v) for v in (136, 208, 195)]), "TIFF"), (250, 3, 11),
        ICC),
    "grey_profile.png": (saved(flat("L", 100), "PNG", icc_profile=icc.grey_profile(1.0)), (168,) * 3, ICC),
    "p3_alpha.png": (saved(flat("RGBA", (*PIXEL, 0)), "PNG", icc_profile=P3), WHITE, ICC),
    "p3_palette.png": (
        saved(flat().convert("P", palette=Image.Palette.ADAPTIVE), "PNG", icc_profile=P3), IN_P3, ICC),
    "broken_profile.png": (saved(flat(), "PNG", icc_profile=b"x" * 200), PIXEL, BROKEN),
    "other_profile.png": (
        saved(flat(), "PNG", icc_profile=icc.grey_profile(1.0)), PIXEL, BROKEN),
    "srgb_profile.png": (
        saved(flat(), "PNG", icc_profile=SRGB), PIXEL, ""),
    "cmyk.jpg": (saved(flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=100), (254, 0, 0), ""),
    "linear.png": (
        png(8, 2, bytes(PIXEL) * 16, chunk(b"gAMA", struct.pack(">I", 100000))), (229, 95, 109), "gamma to sRGB"),
    "no_gamma.png": (
        png(8, 2, bytes(PIXEL) * 16, chunk(b"gAMA", struct.pack(">I", 1))), PIXEL, "impossible gamma ignored"),
    "chrm.png": (
        png(8, 2, bytes(PIXEL) * 16, chunk(b"gAMA", struct.pack(">I", 45455)), chromaticities(icc.P3)), IN_P3,
        "cHRM to sRGB"),
    "chrm_of_nothing.png": (png(8, 2, bytes(PIXEL) * 16, chunk(b"cHRM", bytes(32))), PIXEL, ""),
    "chrm_beside_srgb.png": (
        png(8, 2, bytes(PIXEL) * 16, chunk(b"sRGB", b"\0"), chromaticities(icc.P3)), PIXEL, ""),
    "cicp.png": (png(8, 2, bytes(PIXEL) * 16, chunk(b"cICP", b"\x0c\x0d\0\1")), IN_P3, "cICP to sRGB"),
    "cicp_before_profile.png": (
        png(8, 2, bytes(PIXEL) * 16, chunk(b"cICP", b"\1\x0d\0\1"), embedded(P3)), PIXEL, ""),
    "nclx.avif": (with_nclx(12, 13), IN_P3, "nclx to sRGB"),
    "nclx_video.avif": (with_nclx(1, 1), PIXEL, ""),
    "adobe_exif.jpg": (saved(flat(), "JPEG", exif=adobe_exif(), **FULL), (233, 24, 34), "Exif's Adobe RGB to sRGB"),
    "srgb_exif.jpg": (saved(flat(), "JPEG", exif=adobe_exif(1, b"R98\0"), **FULL), PIXEL, ""),
    "la_16_profile.png": (
        png(16, 4, b"\x64\x64\xff\xff" * 16, embedded(icc.grey_profile(1.0))), (168,) * 3, ICC),
    "white_is_0.tif": (tiff(16, 0, 1, bytes(32)), WHITE, ""),
    "bits_12.tif": (tiff(12, 1, 1, b"\xff" * 24), WHITE, ""),
    "usual_gamma.png": (png(8, 2, bytes(PIXEL) * 16, chunk(b"gAMA", struct.pack(">I", 45455))), PIXEL, ""),
    "rgba.png": (saved(flat("RGBA", (0, 0, 0, 0)), "PNG"), WHITE, "transparency"),
    "half_clear.png": (saved(flat("RGBA", (0, 0, 0, 128)), "PNG"), (127,) * 3, "transparency"),
    "la.png": (saved(flat("LA", (0, 0)), "PNG"), WHITE, "transparency"),
    "palette.png": (saved(flat("P", 0), "PNG", transparency=0), WHITE, "transparency"),
    "clear.gif": (saved(flat("P", 0), "GIF", transparency=0), WHITE, "transparency"),
    "clear.webp": (saved(flat("RGBA", (0, 0, 0, 0)), "WEBP", lossless=True), WHITE, "transparency"),
    "rgb_trns.png": (saved(flat(), "PNG", transparency=PIXEL), WHITE, "transparency"),
    "grey_trns.png": (saved(flat("L", 7), "PNG", transparency=7), WHITE, "transparency"),
    "bit_trns.png": (png(1, 0, b"\0\0", chunk(b"tRNS", b"\0\0")), WHITE, "transparency"),
    "bit_opaque.png": (png(1, 0, b"\0\0", chunk(b"tRNS", b"\0\1")), (0, 0, 0), ""),
    "bits_2_trns.png": (png(2, 0, b"\x55" * 4, chunk(b"tRNS", b"\0\1")), WHITE, "transparency"),
    "bits_4_trns.png": (png(4, 0, b"\x33" * 8, chunk(b"tRNS", b"\0\3")), WHITE, "transparency"),
    "grey_16_trns.png": (png(16, 0, b"\x12\x34" * 16, chunk(b"tRNS", b"\x12\x34")), WHITE, "transparency"),
    "grey_16.png": (png(16, 0, b"\x80\x00" * 16), (128,) * 3, ""),
    "rgb_16_trns.png": (
        png(16, 2, b"\x12\x34\0\0\0\0" * 16, chunk(b"tRNS", b"\x12\x34\0\0\0\0")), WHITE, "transparency"),
    "rgba_16.png": (png(16, 6, bytes(8) * 16), WHITE, "transparency"),
    "la_16.png": (png(16, 4, bytes(4) * 16), WHITE, "transparency"),
    "turned.png": (turned(), PIXEL, ""),
    "broken_exif.jpg": (with_broken_exif(), PIXEL, ""),
    "a.jfif": (saved(flat(), "JPEG", **FULL), PIXEL, ""),
    "b.jpe": (saved(flat(), "JPEG", **FULL), PIXEL, ""),
    "c.bmp": (saved(flat(), "BMP"), PIXEL, ""),
    "d.gif": (saved(flat(), "GIF"), PIXEL, ""),
    "e.avif": (saved(flat(), "AVIF", quality=100, subsampling="4:4:4"), PIXEL, ""),
    "f.tif": (saved(flat(), "TIFF"), PIXEL, ""),
    "g.JPG": (saved(flat(), "JPEG", **FULL), PIXEL, ""),
    "h.jpg": (saved(flat(), "PNG"), PIXEL, ""),
    "i.png": (saved(flat(), "JPEG", **FULL), PIXEL, ""),
    "j.jp2": (saved(flat(), "JPEG2000"), PIXEL, ""),
    "k.tga": (saved(flat(), "TGA"), PIXEL, ""),
    "l.ppm": (saved(flat(), "PPM"), PIXEL, ""),
    "m.ico": (saved(flat(), "ICO", sizes=[SIZE]), PIXEL, ""),
    "moves.gif": (frames("GIF"), PIXEL, "animated, the first frame taken"),
    "moves.webp": (frames("WEBP", lossless=True), PIXEL, "animated, the first frame taken"),
    "moves.apng": (frames("PNG"), PIXEL, "animated, the first frame taken"),
    "pages.tiff": (frames("TIFF"), PIXEL, "several pages, the first taken"),
    "trailing.jpg": (saved(flat(), "JPEG", **FULL) + b"\0" * 500 + b"motion", PIXEL, ""),
    "padded.jpg": (saved(flat(), "JPEG", **FULL)[:-2] + bytes(40) + b"\xff\xd9", PIXEL, ""),
}  # fmt: skip
# Name -> bytes, and the reason.
ASIDE = {
    "half.jpg": (half(saved(noise(), "JPEG")), "damaged JPEG picture (corrupt JPEG data: premature end"),
    "cut.jpg": (saved(noise(), "JPEG")[:2000], "damaged JPEG picture (premature end"),
    "erased.jpg": (erased(saved(noise(), "JPEG")), "damaged JPEG picture (its data are zeros from byte"),
    "half_progressive.jpg": (half(saved(noise(), "JPEG", progressive=True)), "damaged JPEG picture (corrupt"),
    "erased_progressive.jpg": (erased(saved(noise(), "JPEG", progressive=True)), "damaged JPEG picture ("),
    "cut.png": (saved(noise(), "PNG")[:3000], "damaged PNG picture (image file is truncated"),
    "cut.webp": (saved(noise(), "WEBP")[:1000], "damaged WebP picture ("),
    "cut.tif": (saved(noise(), "TIFF")[:3000], "damaged TIFF picture ("),
    "cut.avif": (saved(noise(), "AVIF")[:900], "damaged AVIF picture ("),
    "large.png": (
        saved(Image.new("1", (10000, 7000)), "PNG"), "too large picture (10000x7000 pixels are more than 67,108,864"),
    "jxl.jxl": (b"\xff\x0a" + bytes(50), "JPEG XL picture, a format that is not read (save it as PNG"),
    "drawn.svg": (b'<?xml version="1.0"?><svg xmlns="http://w3.org/2000/svg"/>', "SVG picture, a format that is not"),
    "page.jpg": (b"\n<!DOCTYPE html><p>404</p>", "not a picture, but an HTML page"),
    "empty.png": (b"", "not a picture, but an empty file"),
    "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "EPS picture, a format that is not read"),
    "pointer.png": (
        b"version https://git-lfs.github.com/spec/v1\n", "not a picture, but a Git LFS pointer: run git lfs"),
    "text.png": (b"not a picture", "not a picture of a known format"),
    "raw.nef": (saved(flat(), "TIFF"), "a camera's raw file, which is not read (NEF"),
    "hdr.png": (png(8, 2, bytes(PIXEL) * 16, chunk(b"cICP", b"\x09\x10\0\1")), "HDR picture (PQ, in which white"),
    "hdr.avif": (with_nclx(9, 18), "HDR picture (HLG"),
    "signed.tif": (tiff(16, 1, 2, b"\xff\x7f" * 16), "picture of signed numbers (what is black"),
    "bits_32.tif": (tiff(32, 1, 1, b"\xc8\0\0\0" * 16), "grey picture of more than 16 bits"),
    "float.tif": (saved(Image.new("F", SIZE, 0.5), "TIFF"), "picture of floating-point numbers"),
}  # fmt: skip
if reads_heic():
    TAKEN["phone.heic"] = (saved(flat(), "HEIF", quality=-1), PIXEL, "")
else:
    ASIDE["phone.heic"] = (ISO_HEIC, "HEIC picture, which needs pillow-heif (run pip install -e '.[heic]'")
