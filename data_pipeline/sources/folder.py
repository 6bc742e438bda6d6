"""A folder of pictures, each with its caption beside it: cat.jpg with cat.txt, or cat.json holding "caption"."""

from __future__ import annotations

import functools
import itertools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import DataError, UserError
from data_pipeline.images.decode import Decoding, Picture, decode_picture, open_image
from data_pipeline.images.formats import HEAD, IMAGES, RAW, is_picture
from data_pipeline.images.resize import centre_square, upright_sides
from data_pipeline.shards import codec
from data_pipeline.sources.source import SourceItem
from data_pipeline.sources.tars import readable

# Files that lie beside pictures: captions and tables.
BESIDE = (".txt", ".json", ".caption", ".csv", ".tsv", ".parquet", ".jsonl")
# Files and folders that systems and programs leave behind, beside those whose name begins with a dot.
SYSTEM = ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "$recycle.bin")


@dataclass(frozen=True, slots=True)
class PictureFile(SourceItem):
    """stamp: size in bytes and modification time, by which make_shards notices a changed picture under an old name."""

    stamp: tuple[int, int] = (0, 0)


class ImageFolder:
    """Pictures below `path`, by name. passed_over: the other files that the last listing met, by extension."""

    def __init__(
        self, path: str | None, limit: int | None = None, background: Any = "white", animated: str = "first"
    ) -> None:
        if path is None:
            raise UserError("input must be given: the folder that holds the pictures; add input=....")
        self.path, self.limit, self.how = Path(path), limit, Decoding.of(background, animated)
        self.passed_over: Counter[str] = Counter()

    def items(self) -> Iterator[SourceItem]:
        if not self.path.is_dir():
            raise UserError(f"input={self.path} is not a folder: give one that holds pictures with captions.")
        path = None
        self.passed_over.clear()
        for path in itertools.islice(pictures_below(self.path, self.passed_over), self.limit):
            yield self._item(path)
        if path is None:
            others = ", ".join(f"{count} x {what}" for what, count in self.passed_over.most_common(5))
            raise UserError(f"input={self.path} holds no pictures ({others or 'no files at all'}): check the path.")

    def _item(self, path: Path) -> SourceItem:
        # A dot would end the key in a tar's member name.
        key = str(path.relative_to(self.path).with_suffix("")).replace("/", "_").replace(".", "_")
        if reason := why_unusable(path, self.path):
            return PictureFile(key, functools.partial(load, path), None, unusable=reason, where=str(path))
        load_it = functools.partial(load, path, how=self.how)
        facts = path.stat()
        stamp = facts.st_size, facts.st_mtime_ns
        look = functools.partial(sides, path)
        caption, meta = caption_of(path, self.path), about(path, self.path)
        return PictureFile(key, load_it, caption, meta, look, stamp=stamp, where=str(path))


def pictures_below(folder: Path, passed_over: Counter[str], hidden: bool = False) -> Iterator[Path]:
    """All pictures below a folder, sorted by name in each; only one folder's names are held in memory at a time. Other
    files are counted, except those that lie beside pictures; so are all files of hidden folders."""
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
            yield path
        elif path.suffix.lower() not in BESIDE:
            passed_over[path.suffix.lower() or "file without an extension"] += 1


def looks_like_picture(path: Path) -> bool:
    """Whether a file is one by its extension, or, under an extension that is not known, by its first bytes."""
    extension = path.suffix.lower()
    if extension in BESIDE or extension[1:] in (*IMAGES, *RAW):
        return extension not in BESIDE
    try:
        if not path.is_file():  # a pipe would wait for ever
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


def load(path: Path, size: int, how: Decoding = Decoding()) -> Picture:  # noqa: B008
    """The centre square of a picture at (size, size, 3)."""
    return centre_square(decode_picture(path, how=how), size)


def sides(path: Path) -> tuple[int, int]:
    """Width and height of a picture, from its header."""
    with open_image(path) as image:
        return upright_sides(image)


def caption_of(path: Path, folder: Path) -> str | None:
    """The caption in the .txt or .json beside a picture; None if there is neither, or it is empty or unreadable."""
    text = companion(path, ".txt")
    try:
        if not why_unusable(text, folder):
            return codec.decode("txt", text.read_bytes()).strip() or None
        return readable(str(sidecar_fields(path, folder).get("caption") or "")) or None
    except DataError:  # not UTF-8, not JSON, or too long
        return None


def companion(path: Path, extension: str) -> Path:
    """The file of this extension beside a picture; in capitals, as in UP.TXT, if there is no other."""
    lower, upper = path.with_suffix(extension), path.with_suffix(extension.upper())
    return upper if not os.path.exists(lower) and os.path.exists(upper) else lower  # names may be too long


def about(path: Path, folder: Path) -> dict[str, Any]:
    """The entries of the .json beside a picture, without the caption; and the file's name."""
    try:
        facts = sidecar_fields(path, folder)
    except DataError:
        facts = {}
    return {name: value for name, value in facts.items() if name != "caption"} | {"file": path.name}


def sidecar_fields(path: Path, folder: Path) -> dict[str, Any]:
    """The contents of the .json beside a picture; {} if there is none."""
    file = companion(path, ".json")
    return {} if why_unusable(file, folder) else codec.decode("json", file.read_bytes())
