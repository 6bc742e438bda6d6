"""A folder of pictures with their captions beside them, as cat.jpg with cat.txt; sidecars.py says where captions are
looked for."""

from __future__ import annotations

import functools
import itertools
import os
import types
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import UserError
from data_pipeline.images.decode import Decoding, Picture, decode_picture, open_image
from data_pipeline.images.formats import HEAD, IMAGES, RAW, is_picture
from data_pipeline.images.framing import Framing
from data_pipeline.images.resize import upright_sides
from data_pipeline.sources.captions import caption_names, known_encoding
from data_pipeline.sources.sidecars import Sidecars
from data_pipeline.sources.source import SourceItem

# Files that lie beside pictures: captions and tables.
BESIDE = (".txt", ".json", ".caption", ".csv", ".tsv", ".parquet", ".jsonl", ".ndjson")
CAPTIONS = BESIDE[:3]  # one file a picture; the others are tables
# Files and folders that operating systems and programs create, besides those whose name begins with a dot.
SYSTEM = ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "$recycle.bin")


@dataclass(frozen=True, slots=True)
class PictureFile(SourceItem):
    """stamp: size in bytes and modification time, by which make_shards notices a changed picture under an old name."""

    stamp: tuple[int, int] = (0, 0)


class ImageFolder:
    """Pictures below `path`, by name. passed_over: other files found by the last listing, counted by extension."""

    remedies = types.MappingProxyType({"missing caption": "write a .txt with its caption beside each picture"})

    def __init__(
        self,
        path: str | None,
        limit: int | None = None,
        caption: str | Sequence[str] | None = None,
        encoding: str | None = None,
        background: Any = "white",
        animated: str = "first",
    ) -> None:
        if path is None:
            raise UserError("input must be set to the folder that holds the pictures: add input=....")
        self.path, self.limit, self.how = Path(path), limit, Decoding.of(background, animated)
        self.names, self.encoding = caption_names(caption), known_encoding(encoding)
        self.passed_over: Counter[str] = Counter()

    def items(self) -> Iterator[SourceItem]:
        if not self.path.is_dir():
            raise UserError(f"input={self.path} is not a folder: use one that holds pictures with captions.")
        path, sidecars = None, Sidecars(self.path, self.names, self.encoding)
        self.passed_over.clear()
        for path in itertools.islice(pictures_below(self.path, self.passed_over), self.limit):
            yield self._item(path, sidecars)
        for missing, row in sidecars.unmatched() if self.limit is None else ():
            key = os.path.relpath(missing, self.path).replace("/", "_").replace(".", "_")
            yield PictureFile(key, functools.partial(load, missing), None, unusable="missing picture", where=row)
        if path is None:
            others = ", ".join(f"{count} x {what}" for what, count in self.passed_over.most_common(5))
            raise UserError(f"input={self.path} holds no pictures ({others or 'no files at all'}): check the path.")

    def _item(self, path: Path, sidecars: Sidecars) -> SourceItem:
        # A dot would end the key in a tar's member name.
        key = str(path.relative_to(self.path).with_suffix("")).replace("/", "_").replace(".", "_")
        if reason := why_unusable(path, self.path):
            return PictureFile(key, functools.partial(load, path), None, unusable=reason, where=str(path))
        captions, meta = sidecars.about(path)
        return PictureFile(
            key,
            caption=captions.first,
            meta=meta | {"file": path.name},
            where=str(path),
            **captions.as_fields(),
            **in_file(path, self.how),
        )


def pictures_below(folder: Path, passed_over: Counter[str], hidden: bool = False) -> Iterator[Path]:
    """All pictures below a folder, sorted by name in each folder; only one folder's names are in memory at a time.
    Other files are counted, except those that belong to pictures; so are all files in hidden folders."""
    pictures, captions = set(), []
    for path in sorted(folder.iterdir()):
        here = hidden or path.name.startswith(".") or path.name.lower() in SYSTEM
        if path.is_dir():
            if path.is_symlink():
                passed_over["link to a folder"] += 1
            else:
                yield from pictures_below(path, passed_over, here)
        elif here:
            passed_over["hidden or system file"] += 1
        elif looks_like_picture(path):
            pictures.add(path.stem)
            yield path
        elif path.suffix.lower() in CAPTIONS:
            captions.append(path)
        elif path.suffix.lower() not in BESIDE:
            passed_over[path.suffix.lower() or "file without an extension"] += 1
    passed_over.update(f"{path.suffix.lower()} without a picture" for path in captions if path.stem not in pictures)


def looks_like_picture(path: Path) -> bool:
    """Whether a file is a picture by its extension or, if that is unknown, by its first bytes."""
    extension = path.suffix.lower()
    if extension in BESIDE or extension[1:] in (*IMAGES, *RAW):
        return extension not in BESIDE
    try:
        if not path.is_file():  # reading a pipe would wait forever
            return False
        with path.open("rb") as file:
            return is_picture(file.read(HEAD))
    except (OSError, ValueError):
        return False


def why_unusable(path: Path, folder: Path, through_folders: bool = False) -> str:
    """Why a file can't be opened: it is missing, or a link in `folder` (itself perhaps a link) leads out of it; "" if
    it can. through_folders: folders on the way may be links, too, which takes 50 microseconds to check."""
    try:
        if not path.is_file():
            return "missing picture"
        linked = through_folders or path.is_symlink()
        if linked and not path.resolve().is_relative_to(folder.resolve()):
            return "a link that leads out of the folder"
    except (OSError, RuntimeError, ValueError):  # a name too long for the file system, circular links, a null byte
        return "missing picture"
    return ""


def in_file(path: Path, how: Decoding) -> dict[str, Any]:
    """load, sides and stamp for a picture in a file."""
    facts = path.stat()
    look, stamp = functools.partial(load, path, how=how), (facts.st_size, facts.st_mtime_ns)
    return {"load": look, "sides": functools.partial(sides, path), "stamp": stamp}


def load(path: Path, framing: Framing, how: Decoding = Decoding()) -> Picture:  # noqa: B008
    """A picture from a file, resized by its framing."""
    return framing.applied(decode_picture(path, how=how))


def sides(path: Path) -> tuple[int, int]:
    """Width and height of a picture, from its header."""
    with open_image(path) as image:
        return upright_sides(image)
