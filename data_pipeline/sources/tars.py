"""WebDataset tars written by others, such as img2dataset: <key>.jpg (.png, .webp, ...), <key>.txt, <key>.json."""

from __future__ import annotations

import functools
import io
import mmap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, UserError
from data_pipeline.images.decode import Decoding, Picture, decode_picture, open_image
from data_pipeline.images.formats import HEAD, IMAGES, RAW, is_picture, kind_of
from data_pipeline.images.framing import Framing
from data_pipeline.images.resize import upright_sides
from data_pipeline.shards import codec
from data_pipeline.shards.captions import ONE
from data_pipeline.shards.samples import picture_in
from data_pipeline.shards.tar_index import IndexEntry, Member, TarRules, scan
from data_pipeline.sources.captions import Captions, Place, caption_names, chosen, known_encoding, of_object
from data_pipeline.sources.filters import Candidate
from data_pipeline.sources.source import SourceItem

NAMED = frozenset((*IMAGES, *RAW))
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
FULL = "key=full, for make_shards.py source.key=full, ends a key at the last dot, not at the first"


def tars_in(folder: str) -> list[str]:
    """Names of the tars directly in a folder, sorted; other files there (.parquet, _stats.json) are ignored."""
    packed = [name for ending in COMPRESSED for name in storage.files(folder, ending)]
    if packed:
        raise UserError(
            f"input={folder} holds compressed tars ({packed[0]}): unpack them, as samples are read by offset."
        )
    names = storage.files(folder, ".tar")
    if not names:
        raise UserError(f"input={folder} holds no .tar: use the folder that contains the tars.")
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
    """A usable sample has a candidate, an unusable one a reason. absent: its json says that there is no picture, as
    img2dataset does for one that could not be fetched. converted: what was changed or left out, in words."""

    entry: IndexEntry
    candidate: Candidate | None = None
    reason: str = ""
    absent: bool = False
    converted: tuple[str, ...] = ()


def inspected(entry: IndexEntry, data: bytes | mmap.mmap, how: Decoding = Decoding()) -> Inspected:  # noqa: B008
    """Decode a sample, and keep only the members that are read: one picture, .txt and .json."""
    if not entry.key.isprintable() or entry.key.startswith("/") or ".." in entry.key.split("/"):
        return Inspected(entry, reason="a name that leads elsewhere, or can't be printed")
    picture, about = picture_in(entry), described(entry, data)
    names = (picture, "txt", "json") if about.meta is not None else (picture, "txt")
    kept = IndexEntry(entry.key, {n: m for n, m in entry.members.items() if n in names})
    if picture is None:
        reason, absent = without_picture(entry, about.meta, data)
        return Inspected(kept, reason=reason, absent=absent)
    if about.captions.first is None or about.fault:
        return Inspected(kept, reason=about.captions.why or about.fault)
    try:
        found = codec.read_picture(picture, _bytes(data, entry.members[picture]), how)
    except DataError as error:
        return Inspected(kept, reason=str(error))
    sides = found.pixels.shape[1], found.pixels.shape[0]
    candidate = Candidate(about.captions.first, about.meta or {}, lambda: sides, lambda: found.pixels)
    converted = (*found.converted, *about.captions.converted, *others_left_out(entry))
    return Inspected(kept, candidate, converted=converted)


class Described(NamedTuple):
    """The contents of a sample's .txt and .json. meta: None if the json is not an object; fault: why it can't be
    read."""

    captions: Captions
    meta: dict[str, Any] | None
    fault: str = ""


def described(
    entry: IndexEntry, data: bytes | mmap.mmap, names: tuple[str, ...] = (), encoding: str | None = None
) -> Described:
    """The caption is from the .txt or, if that is empty, the json. Given `names`, these entries of the json come
    first."""
    text, facts, other, fault = [], {}, [], ""
    missing = f"no .txt or .json beside {', '.join(f'.{name}' for name in list(entry.members)[:5]) or 'nothing'}"
    if "txt" in entry.members:
        try:
            text = [Place(".txt", {ONE: codec.decode("txt", _bytes(data, entry.members["txt"]), encoding)})]
        except DataError as error:
            text = [Place(".txt", {}, str(error))]
    if "json" in entry.members:
        try:
            facts = codec.decode("json", _bytes(data, entry.members["json"]), encoding)
            other = [of_object(".json", facts, names or (ONE,))]
        except DataError as error:
            facts = None
            fault = "" if isinstance(error.__cause__, codec.NoObject) else str(error)
            other = [Place(".json", {}, fault, f"is {error}")]
    captions = chosen([*other, *text] if names else [*text, *other], missing)
    if facts is None and not fault:
        captions = captions._replace(converted=(*captions.converted, f"json left out ({other[0].none[3:]})"))
    return Described(captions, facts, fault)


def others_left_out(entry: IndexEntry) -> tuple[str, ...]:
    """What to report for a key with several pictures, as 0.jpg and 0.png: a sample has only one."""
    picture = picture_in(entry)
    others = [name for name in entry.members if name in NAMED and name != picture]
    taken = f".{picture} taken, {', '.join(f'.{name}' for name in others)} not"
    return (f"one of several pictures with one key ({taken})",) if others else ()


def without_picture(entry: IndexEntry, meta: dict[str, Any] | None, data: bytes | mmap.mmap) -> tuple[str, bool]:
    """Why a sample has no picture, and whether its json says that it was not fetched. Other reasons: the picture is
    missing, its name has several dots, or its extension is unknown."""
    status = (meta or {}).get("status", "success")
    if status != "success":
        return f"not fetched: {status}", True
    names = [f"{entry.key}.{name}" for name in dotted_pictures(entry)]
    if len(names) > 1:
        return f"pictures that fall together ({names[0]} and {names[1]} have one key, {entry.key}: {FULL})", False
    if names:
        return f"missing picture ({names[0]} has dots in its key: {FULL})", False
    if linked := [name for name in entry.links if name in NAMED]:
        return f"missing picture (its .{linked[0]} is a link, a device or sparse: these are not read)", False
    for name, place in entry.members.items():
        head = data[place.offset : place.offset + min(place.size, HEAD)]
        if name not in ("txt", "json") and is_picture(head):
            return f"picture under an extension that is not known (.{name}: {kind_of(head)})", False
    return f"missing picture (it has only {', '.join(f'.{name}' for name in entry.members) or 'links'})", False


def dotted_pictures(entry: IndexEntry) -> list[str]:
    """Extensions such as 05.png, of pictures whose intended key contains a dot. If the sample also has a picture of its
    own, only those with their own caption: 0.mask.png beside 0.png is another member."""
    named = [name for name in entry.members if "." in name and name.rpartition(".")[2] in NAMED]
    if picture_in(entry) is None:
        return named
    return [n for n in named if {f"{n.rpartition('.')[0]}.{kind}" for kind in ("txt", "json")} & entry.members.keys()]


def told_apart(entries: Iterable[IndexEntry]) -> list[IndexEntry]:
    """The entries, and one for each picture that was grouped under another's key, so that each is accounted for."""
    found = []
    for entry in entries:
        names = dotted_pictures(entry)
        if picture_in(entry) is not None or not names:
            found.append(entry)
        for name in names:
            first = {each: entry.members[each] for each in (name, *names)}
            found.append(IndexEntry(entry.key, first))
    return found


def tar_rules(key: str | None, unended: bool | None, option: str = "") -> TarRules:
    """The options key= and unended=, checked. option: the prefix of their names in messages."""
    if key not in (None, "first", "full"):
        raise UserError(
            f"{option}key={key} is not valid: use first (of a name's dots, as webdataset) or full (the last)."
        )
    if unended not in (None, True, False):
        raise UserError(f"{option}unended={unended} is not valid: use true or false.")
    return TarRules(key == "full", bool(unended))


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

    def __init__(
        self,
        path: str,
        limit: int | None = None,
        caption: str | list[str] | None = None,
        encoding: str | None = None,
        key: str | None = None,
        unended: bool | None = None,
        background: Any = "white",
        animated: str = "first",
    ) -> None:
        self.how, self.passed_over = Decoding.of(background, animated), Counter[str]()
        self.path, self.limit, self.rules = path, limit, tar_rules(key, unended, "source.")
        self.names, self.encoding = caption_names(caption), known_encoding(encoding)

    def items(self) -> Iterator[SourceItem]:
        count = 0
        self.passed_over.clear()
        for name in tars_in(self.path):
            path = storage.join(self.path, name)
            data = contents(path)
            for number, entry in enumerate(told_apart(scan(data, path, self.rules, self.passed_over))):
                if count == self.limit:
                    return
                count += 1
                yield self._item(path, name.removesuffix(".tar").replace(".", "_"), number, entry, data)

    def _item(self, path: str, stem: str, number: int, entry: IndexEntry, data: bytes | mmap.mmap) -> SourceItem:
        picture, about = picture_in(entry), described(entry, data, self.names, self.encoding)
        reason, absent = ("", False) if picture else without_picture(entry, about.meta, data)
        place = entry.members[picture] if picture else Member(0, 0)
        fields = about.captions.as_fields()
        fields["uncaptioned"] = fields["uncaptioned"] or about.fault
        fields["converted"] += others_left_out(entry)
        return TarSample(
            f"{stem}_{number:06d}",
            functools.partial(framed, path, place, picture or "", how=self.how),
            None if about.fault else about.captions.first,
            (about.meta or {}) | {"original_key": entry.key},
            functools.partial(sides_in, path, place, picture or ""),
            absent=reason if absent else "",
            unusable="" if absent else reason,
            where=f"{entry.key} of {path}",
            **fields,
            stamp=(len(data), place.offset),
        )


def framed(path: str, place: Member, extension: str, framing: Framing, how: Decoding) -> Picture:
    """A picture in a tar, resized by its framing."""
    return framing.applied(decode_picture(io.BytesIO(storage.read_bytes(path, *place)), extension, how))


def sides_in(path: str, place: Member, extension: str) -> tuple[int, int]:
    """Width and height of a picture in a tar, from its header."""
    with open_image(io.BytesIO(storage.read_bytes(path, *place)), extension) as image:
        return upright_sides(image)
