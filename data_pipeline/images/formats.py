"""Which files are pictures: recognised by content; in listings and messages, by extension."""

from __future__ import annotations

import functools

from PIL import Image

# Read whatever the file's extension is: each of these formats has its own signature.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "ICNS", "PPM", "PSD", "QOI", "DDS", "SGI")
# Never opened: EPS starts a program, and Pillow can't decode the others by itself.
REFUSED = ("EPS", "PDF", "WMF", "EMF", "BUFR", "GRIB", "HDF5", "MPEG")
OLDEST = ("png", "jpg", "jpeg", "webp")  # of several pictures in one sample, these are preferred
# Extensions by which pictures are found in folders and tars; a message names a file whose content is something else.
IMAGES = (
    *OLDEST, "jpe", "jfif", "jif", "pjpeg", "pjp", "mpo", "apng", "gif", "bmp", "dib", "tif", "tiff", "avif", "avifs",
    "jp2", "j2k", "j2c", "jpc", "jpf", "jpx", "ico", "icns", "ppm", "pgm", "pbm", "pnm", "tga", "psd", "qoi", "dds",
    "pcx", "sgi", "heic", "heif", "heics", "hif", "img", "image", "jxl", "svg", "svgz", "exr", "xcf", "eps",
)  # fmt: skip
# Raw files of cameras are TIFFs whose first picture is a thumbnail.
RAW = ("dng", "nef", "cr2", "cr3", "arw", "orf", "rw2", "pef", "raf", "srw", "nrw", "3fr", "iiq")
HEAD = 512  # bytes that `kind_of` reads
SAVE_AS = "save it as PNG, JPEG or WebP"

# (offset, signature, format)
SIGNATURES = (
    (0, b"\x89PNG\r\n\x1a\n", "PNG"), (0, b"\xff\xd8", "JPEG"), (0, b"GIF8", "GIF"), (8, b"WEBP", "WebP"),
    (0, b"BM", "BMP"), (0, b"II*\0", "TIFF"), (0, b"MM\0*", "TIFF"), (0, b"II+\0", "TIFF"), (0, b"MM\0+", "TIFF"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"), (0, b"\xff\x4f\xff\x51", "JPEG 2000"), (0, b"8BPS", "PSD"),
    (0, b"qoif", "QOI"), (0, b"DDS ", "DDS"), (0, b"icns", "ICNS"), (0, b"\0\0\1\0", "ICO"), (0, b"\1\xda", "SGI"),
    (0, b"\xff\x0a", "JPEG XL"), (0, b"\0\0\0\x0cJXL ", "JPEG XL"), (0, b"v/1\1", "OpenEXR"), (0, b"gimp xcf", "XCF"),
    (0, b"#?RADIANCE", "Radiance HDR"), (0, b"%!PS", "EPS"), (0, b"\xc5\xd0\xd3\xc6", "EPS"), (0, b"IIRO", "raw"),
    (0, b"IIU\0", "raw"), (0, b"FUJIFILMCCD-RAW", "raw"),
)  # fmt: skip
BRANDS = {"avif": "AVIF", "avis": "AVIF", "crx ": "raw"} | dict.fromkeys(
    ("heic", "heix", "heim", "heis", "hevc", "hevx", "mif1", "msf1"), "HEIC"
)
READ = ("PNG", "JPEG", "GIF", "WebP", "BMP", "TIFF", "JPEG 2000", "PSD", "QOI", "DDS", "ICNS", "ICO", "SGI", "AVIF")
UNREAD = ("JPEG XL", "OpenEXR", "XCF", "Radiance HDR", "EPS", "SVG", "raw")
OTHERS = (
    (b"\0\5\x16\7", "a macOS companion file (AppleDouble)"), (b"%PDF", "a PDF"), (b"PK\3\4", "a ZIP archive"),
    (b"\x1f\x8b", "compressed by gzip"), (b"\x1aE\xdf\xa3", "a video"),
    (b"version https://git-lfs", "a Git LFS pointer: run git lfs pull"),
    (b"<!doctype html", "an HTML page"), (b"<html", "an HTML page"), (b"<svg", "SVG"), (b"<?xml", "XML"),
)  # fmt: skip


def kind_of(head: bytes) -> str:
    """What a file with these first bytes is: one of READ or UNREAD, "HEIC", or words such as "an HTML page"; "":
    unknown."""
    if not head:
        return "an empty file"
    if head[4:8] == b"ftyp":
        brands = [head[8:12], *(head[at : at + 4] for at in range(16, min(int.from_bytes(head[:4]), len(head)), 4))]
        known = [BRANDS[name] for brand in brands if (name := brand.decode("latin-1")) in BRANDS]
        return ("AVIF" if "AVIF" in known else known[0]) if known else "a video"
    for offset, signature, kind in SIGNATURES:
        if head.startswith(signature, offset):
            return kind
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    kind = next((kind for signature, kind in OTHERS if head.startswith(signature) or text.startswith(signature)), "")
    if kind in ("XML", "SVG"):
        return "SVG" if b"<svg" in text else "an XML file"
    return kind or ("an empty file (only zeros)" if not head.strip(b"\0") else "")


def is_picture(head: bytes) -> bool:
    """Whether these first bytes are those of a picture, of any format."""
    kind = kind_of(head)
    return kind in READ or kind in UNREAD or kind == "HEIC"


def formats_for(extension: str) -> tuple[str, ...]:
    """The formats to try: those with a signature; a format without one (TGA, ICO, PCX, ...) only for its own
    extension."""
    extension = extension.lower()
    if extension in ("", *OLDEST):
        return FORMATS
    named = registered().get(f".{extension}")
    return FORMATS if named is None or named in (*FORMATS, *REFUSED) else (*FORMATS, named)


@functools.cache
def registered() -> dict[str, str]:
    """Pillow's formats by extension."""
    return Image.registered_extensions()


@functools.cache
def reads_heic() -> bool:
    """Whether the optional package for HEIC is installed; if so, Pillow opens such files from now on."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True
