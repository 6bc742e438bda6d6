"""Captions as text: all readers decode, clean and name them in the same way."""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Mapping
from typing import Any

from data_pipeline.common.errors import DataError

ONE = "caption"  # the name of a sample's only caption
# Removed anywhere: control characters except tab and line ends, byte-order marks and zero-width spaces. Joiners and
# direction marks stay: emoji and scripts need them.
REMOVED = dict.fromkeys([*(c for c in (*range(32), *range(127, 160)) if c not in (9, 10, 13)), 0x200B, 0x2060, 0xFEFF])
BLANK = ("Zs", "Zl", "Zp", "Cc", "Cf")
FILLERS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0") | {
    chr(c) for c in range(0xFE00, 0xFE10)
}
MARKS = {  # byte-order marks; that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def cleaned(text: str) -> tuple[str, int]:
    """The text without the characters in REMOVED and without blanks at its ends, "" if nothing visible is left; and the
    number of removed characters."""
    kept = text if text.isprintable() else text.translate(REMOVED)
    removed = len(text) - len(kept)
    seen = any(unicodedata.category(c) not in BLANK and c not in FILLERS for c in kept)
    return (kept.strip() if seen else ""), removed


def marked_encoding(data: bytes) -> str | None:
    """The encoding given by a byte-order mark."""
    return next((name for mark, name in MARKS.items() if data.startswith(mark)), None)


def probable_encoding(data: bytes) -> str:
    """The probable encoding of bytes that are not UTF-8, for a message."""
    if (marked := marked_encoding(data)) is not None and marked != "utf-8-sig":
        return marked
    zeros = data.count(0)
    if len(data) > 2 and 3 * zeros >= len(data):
        return "utf-16-le" if data[1::2].count(0) >= data[::2].count(0) else "utf-16-be"
    return "cp1252"


def decode_text(data: bytes, encoding: str | None = None) -> str:
    """Decodes UTF-8, or `encoding`, and drops a byte-order mark. ValueError names the encoding to try, if any."""
    marked = marked_encoding(data)
    if encoding is not None or marked == "utf-8-sig":
        return data.decode(marked or encoding or "utf-8")
    try:
        if marked or probable_encoding(data).startswith("utf-16"):
            raise ValueError("it is UTF-16 or UTF-32")
        return data.decode()
    except UnicodeDecodeError as error:
        what = f"byte {error.start} is 0x{data[error.start]:02x}"
    except ValueError as error:
        what = str(error)
    raise ValueError(f"not UTF-8, {what}: make_shards.py reads it with source.encoding={probable_encoding(data)}")


def texts_in(values: Mapping[str, Any], where: str = "") -> dict[str, str]:
    """The captions among named values, cleaned, in order. A value is a text or a list of texts; the names of a list are
    numbers ("0", "1", ...; with several values "short.0"). None, NaN and empty texts are left out. DataError for any
    other type: types are never converted. where: the file, for the message."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, list | tuple):
            texts = [text for each in value if (text := text_of(each, name, where))]
            prefix = f"{name}." if len(values) > 1 else ""
            found |= {f"{prefix}{number}": text for number, text in enumerate(texts)}
        elif text := text_of(value, name, where):
            found[name] = text
    return found


def text_of(value: Any, name: str = ONE, where: str = "") -> str:
    """A caption's text, cleaned; "" for None and NaN. DataError for a value that is not text."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if not isinstance(value, str):
        raise DataError(f"caption is no text ({name}{where and f' of {where}'} is {kind_of(value)})")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which is possible in JSON only
        raise DataError(f"caption is no text ({name}{where and f' of {where}'} holds half a surrogate pair)") from error
    return cleaned(value)[0]


def kind_of(value: Any) -> str:
    """A value's type, in words."""
    words = {bool: "true or false", int: "a number", float: "a number", bytes: "bytes", dict: "an object",
             list: "a list", tuple: "a list"}  # fmt: skip
    return words.get(type(value), f"of type {type(value).__name__}")


def removed_from(values: Mapping[str, Any]) -> int:
    """The number of characters that cleaning removes from the texts among these values."""
    texts = [each for value in values.values() for each in (value if isinstance(value, list) else [value])]
    return sum(cleaned(text)[1] for text in texts if isinstance(text, str))


def caption_in(members: Mapping[str, Any]) -> str:
    """The caption among decoded members: the .txt or, if that is empty, the json's "caption" (the first of a list),
    cleaned; "" if there is none or it is not text."""
    text = members.get("txt")
    if isinstance(text, str) and (found := cleaned(text)[0]):
        return found
    return next(iter(lenient_texts((members.get("json") or {}).get("caption")).values()), "")


def lenient_texts(value: Any) -> dict[str, str]:
    """texts_in for one value; {} for a value that is not text."""
    try:
        return texts_in({ONE: value})
    except DataError:
        return {}
