"""WebDataset tars that others wrote, such as img2dataset: <key>.jpg (.png, .webp, ...), <key>.txt, <key>.json."""

from __future__ import annotations

import functools
import io
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, UserError
from data_pipeline.images.decode import Decoding, Picture, decode_picture, open_image
from data_pipeline.images.formats import HEAD, is_picture, kind_of
from data_pipeline.images.resize import centre_square, upright_sides
from data_pipeline.shards import codec
from data_pipeline.shards.samples import picture_in
from data_pipeline.shards.tar_index import IndexEntry, Member, scan
from data_pipeline.sources.filters import Candidate
from data_pipeline.sources.source import SourceItem

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def tars_in(folder: str) -> list[str]:
    """Names of the tars directly in a folder, sorted; other files there (.parquet, _stats.json) are ignored."""
    packed = [name for ending in COMPRESSED for name in storage.files(folder, ending)]
    if packed:
        raise UserError(
            f"input={folder} holds compressed tars ({packed[0]}): unpack them, as samples are read by offset."
        )
    names = storage.files(folder, ".tar")
    if not names:
        raise UserError(f"input={folder} holds no .tar: give the folder that contains the tars.")
    return names


def contents(path: str) -> bytes | mmap.mmap:
    """A tar's bytes: mapped; in a bucket, read as a whole."""
    if storage.is_s3(path):
        return storage.read_bytes(path)
    if not storage.size(path):
        raise DataError(f"shard {path} is empty: copy it again.")
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class Inspected(NamedTuple):
    """A usable sample has a candidate, an unusable one a reason. absent: its json itself says that there is no picture,
    as img2dataset writes for what it could not fetch. converted: what had to be done to the picture, in words."""

    entry: IndexEntry
    candidate: Candidate | None = None
    reason: str = ""
    absent: bool = False
    converted: tuple[str, ...] = ()


def inspected(entry: IndexEntry, data: bytes | mmap.mmap, how: Decoding = Decoding()) -> Inspected:  # noqa: B008
    """Decode a sample, and keep only the members that are read: one picture, .txt and .json."""
    if not entry.key.isprintable() or entry.key.startswith("/") or ".." in entry.key.split("/"):
        return Inspected(entry, reason="a name that leads elsewhere, or can't be printed")
    picture, whole = picture_in(entry), entry
    entry = IndexEntry(entry.key, {n: m for n, m in entry.members.items() if n in (picture, "txt", "json")})
    try:
        facts = {n: codec.decode(n, _bytes(data, m)) for n, m in entry.members.items() if n != picture}
        if picture is None:
            return without_picture(whole, facts, data)
        caption = readable(codec.caption_in(facts))
        if not caption:
            return Inspected(entry, reason="missing caption")
        pixels, converted = codec.read_picture(picture, _bytes(data, entry.members[picture]), how)
    except DataError as error:
        return Inspected(entry, reason=str(error))
    sides = pixels.shape[1], pixels.shape[0]
    candidate = Candidate(caption, facts.get("json") or {}, lambda: sides, lambda: pixels)
    return Inspected(entry, candidate, converted=converted)


def without_picture(entry: IndexEntry, facts: dict[str, Any], data: bytes | mmap.mmap) -> Inspected:
    """Not fetched, according to its json; under an extension that is not looked for; or lost."""
    status = (facts.get("json") or {}).get("status", "success")
    if status != "success":
        return Inspected(entry, reason=f"not fetched: {status}", absent=True)
    others = {name: place for name, place in entry.members.items() if name not in ("txt", "json")}
    for name, place in others.items():
        head = data[place.offset : place.offset + min(place.size, HEAD)]
        if is_picture(head):
            return Inspected(entry, reason=f"picture under an extension that is not known (.{name}: {kind_of(head)})")
    there = f" (only {', '.join(f'.{name}' for name in list(others)[:5])})" if others else ""
    return Inspected(entry, reason=f"missing picture{there}")


def readable(caption: str) -> str:
    """The caption stripped of blanks; DataError for half a surrogate pair, which only JSON can hold."""
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise DataError("caption is not text") from error
    return caption.strip()


def _bytes(data: bytes | mmap.mmap, member: Member) -> bytes:
    return data[member.offset : member.offset + member.size]


@dataclass(frozen=True, slots=True)
class TarSample(SourceItem):
    """stamp: its tar's size and its place there."""

    stamp: tuple[int, ...] = ()


class Tars:
    """Samples of all tars of a folder, to be cut to squares and written again (index_shards.py uses tars as they are).

    One tar is held in memory at a time. Keys: the tar's name and the sample's.
    """

    def __init__(self, path: str, limit: int | None = None, background: Any = "white", animated: str = "first") -> None:
        self.path, self.limit, self.how = path, limit, Decoding.of(background, animated)

    def items(self) -> Iterator[SourceItem]:
        count = 0
        for name in tars_in(self.path):
            path = storage.join(self.path, name)
            data = contents(path)
            for number, entry in enumerate(scan(data, path)):
                if count == self.limit:
                    return
                count += 1
                yield self._item(path, name.removesuffix(".tar"), number, entry, data)

    def _item(self, path: str, stem: str, number: int, entry: IndexEntry, data: bytes | mmap.mmap) -> SourceItem:
        key = f"{stem}_{number:06d}"
        picture = picture_in(entry)
        facts, caption, absent, unusable = {}, None, "", ""
        try:
            facts = {n: codec.decode(n, _bytes(data, m)) for n, m in entry.members.items() if n in ("txt", "json")}
            caption = readable(codec.caption_in(facts)) or None
            if picture is None:
                without = without_picture(entry, facts, data)
                absent, unusable = (without.reason, "") if without.absent else ("", without.reason)
        except DataError:
            pass  # without a caption it is set aside
        meta = (facts.get("json") or {}) | {"original_key": entry.key}
        place = entry.members[picture] if picture else Member(0, 0)
        load = functools.partial(square_in, path, place, picture or "", how=self.how)
        sides = functools.partial(sides_in, path, place, picture or "")
        where, stamp = f"{path}: {entry.key}.{picture or '*'}", (len(data), place.offset)
        return TarSample(key, load, caption, meta, sides, absent=absent, unusable=unusable, where=where, stamp=stamp)


def square_in(path: str, place: Member, extension: str, size: int, how: Decoding) -> Picture:
    """The centre square of a picture in a tar."""
    return centre_square(decode_picture(io.BytesIO(storage.read_bytes(path, *place)), extension, how), size)


def sides_in(path: str, place: Member, extension: str) -> tuple[int, int]:
    """Width and height of a picture in a tar, from its header."""
    with open_image(io.BytesIO(storage.read_bytes(path, *place)), extension) as image:
        return upright_sides(image)
