"""Members of a sample in a tar: bytes to arrays and back. Nothing here can run code: no pickle, no shell."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data_pipeline.common.errors import DataError
from data_pipeline.common.finite_json import finite
from data_pipeline.images.decode import UNDECODABLE, Decoding, Picture, PictureError, decode_picture
from data_pipeline.images.formats import IMAGES
from data_pipeline.shards.captions import decode_text

MAX_MEMBER_BYTES = 256 * 1024 * 1024
MAX_TEXT_BYTES = 1024 * 1024  # of a caption, or of the JSON beside it
BFLOAT16 = np.dtype("V2")  # numpy has none: a .npy holds two bytes without a type, as JAX and ml_dtypes write it


def encode(name: str, value: Any) -> bytes:
    """`value` as the member whose extension is `name`: image (H, W, 3) uint8, array, text or a JSON object."""
    kind = name.rsplit(".", 1)[-1]
    buffer = io.BytesIO()
    if kind == "png":
        Image.fromarray(value).save(buffer, format="PNG")
    elif kind == "npy":
        np.lib.format.write_array(buffer, np.asarray(value, order="C"), allow_pickle=False)
    elif kind == "txt":
        buffer.write(value.encode())
    elif kind == "json":
        buffer.write(encode_object(finite(value)).encode())
    else:
        raise ValueError(f"no codec for .{name}")
    return buffer.getvalue()


def decode(name: str, data: bytes, encoding: str | None = None, strict: bool = True) -> Any:
    """The inverse of `encode`; also reads other formats of pictures. DataError if the bytes can't be decoded. encoding:
    that of text that is not UTF-8. strict: also refuse errors that decoders tolerate: a damaged picture, a name twice
    in a JSON."""
    kind = name.rsplit(".", 1)[-1].lower()
    if kind in IMAGES:
        return read_picture(kind, data, Decoding(strict=strict)).pixels
    try:
        allowed = MAX_TEXT_BYTES if kind in ("txt", "json") else MAX_MEMBER_BYTES
        if len(data) > allowed:
            raise ValueError(f"{len(data)} bytes are more than the {allowed} allowed")
        if kind == "npy":
            return decode_array(data)
        if kind == "txt":
            return decode_text(data, encoding)
        if kind == "json":
            return decode_object(data, encoding, strict)
    except UNDECODABLE as error:
        # Pillow's message contains an address; MemoryError has no message.
        why = type(error).__name__ if isinstance(error, (OSError, MemoryError)) else str(error)
        raise DataError(f"undecodable .{name} ({why})") from error
    return None  # a member that no reader here asks for


def read_picture(extension: str, data: bytes, how: Decoding) -> Picture:
    """Decode a member that is a picture. DataError says why it can't be used."""
    if len(data) > MAX_MEMBER_BYTES:
        raise DataError(f"too large picture ({len(data):,} bytes are more than {MAX_MEMBER_BYTES:,})")
    try:
        return decode_picture(io.BytesIO(data), extension, how)
    except PictureError as error:
        raise DataError(str(error)) from error


class NoObject(ValueError):
    """Valid JSON that is not an object: a list, a number, ..."""


def encode_object(value: Mapping[str, Any]) -> str:
    """A JSON object with its names sorted, except those in "captions", whose order says which caption is the first."""
    if "captions" not in value:
        return json.dumps(value, sort_keys=True)
    fields = (
        f"{json.dumps(name)}: {json.dumps(each, sort_keys=name != 'captions')}" for name, each in sorted(value.items())
    )
    return f"{{{', '.join(fields)}}}"


def decode_object(data: bytes, encoding: str | None = None, strict: bool = True) -> dict[str, Any]:
    """A JSON object. NaN and Infinity, which are not JSON but which programs write for a missing number, become None.
    The text is UTF-8, -16 or -32, as JSON must be, else `encoding`. strict: ValueError if a name comes twice."""
    how = {"parse_constant": lambda _: None} | ({"object_pairs_hook": object_once} if strict else {})
    try:
        value = json.loads(data, **how)
    except UnicodeDecodeError:
        value = json.loads(decode_text(data, encoding), **how)
    if not isinstance(value, dict):
        raise NoObject(f"not an object but {type(value).__name__}")
    return value


def object_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; ValueError if a name comes twice, as one of the values would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"it has {json.dumps(twice[:60])} twice")
    return found


class ArrayHeader(NamedTuple):
    """What the header of a .npy says, and where the values begin."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype
    offset: int


def array_header(data: bytes) -> ArrayHeader:
    """The header of a .npy, checked against the number of bytes; arrays of objects are refused."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    header = ArrayHeader(*read_header(file), file.tell())
    if header.dtype.hasobject:
        raise ValueError("arrays of objects are refused")
    if any(isinstance(side, bool) or side < 0 for side in header.shape):
        raise ValueError(f"{header.shape} is not a valid shape")
    length = len(data) - header.offset
    if math.prod(header.shape) * header.dtype.itemsize != length:
        raise ValueError(f"{length} bytes don't match {header.dtype} of shape {header.shape}")
    return header


def decode_array(data: bytes) -> np.ndarray:
    """A .npy without objects, read-only. Its header is checked before memory is allocated for it."""
    shape, fortran_order, dtype, offset = array_header(data)
    array = np.frombuffer(data[offset:], dtype).reshape(shape, order="F" if fortran_order else "C")
    return widened(array) if dtype == BFLOAT16 else array


def widened(array: np.ndarray) -> np.ndarray:
    """bfloat16, the upper half of a float32, as float32."""
    return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
