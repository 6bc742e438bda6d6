"""A folder of pictures, each with its caption beside it: cat.jpg with cat.txt, or cat.json holding "caption"."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.common.errors import DataError, UserError
from data_pipeline.images.decode import IMAGES, open_image
from data_pipeline.images.resize import centre_square, upright_sides
from data_pipeline.shards import codec
from data_pipeline.sources.source import SourceItem
from data_pipeline.sources.tars import readable


@dataclass(frozen=True, slots=True)
class PictureFile(SourceItem):
    """stamp: size in bytes and modification time, by which make_shards notices a changed picture under an old name."""

    stamp: tuple[int, int] = (0, 0)


class ImageFolder:
    """Pictures below `path`, by name."""

    def __init__(self, path: str | None, limit: int | None = None) -> None:
        if path is None:
            raise UserError("input must be given: the folder that holds the pictures; add input=....")
        self.path, self.limit = Path(path), limit

    def items(self) -> Iterator[SourceItem]:
        if not self.path.is_dir():
            raise UserError(f"input={self.path} is not a folder: give one that holds pictures with captions.")
        path = None
        for path in itertools.islice(pictures_below(self.path), self.limit):
            yield self._item(path)
        if path is None:
            raise UserError(f"input={self.path} holds no pictures ({', '.join(IMAGES)}): check the path.")

    def _item(self, path: Path) -> SourceItem:
        # A dot would end the key in a tar's member name.
        key = str(path.relative_to(self.path).with_suffix("")).replace("/", "_").replace(".", "_")
        if reason := why_unusable(path, self.path):
            return PictureFile(key, functools.partial(load, path), None, unusable=reason, where=str(path))
        facts = path.stat()
        stamp = facts.st_size, facts.st_mtime_ns
        look = functools.partial(sides, path)
        caption, meta = caption_of(path, self.path), about(path, self.path)
        return PictureFile(key, functools.partial(load, path), caption, meta, look, stamp=stamp)


def pictures_below(folder: Path) -> Iterator[Path]:
    """All pictures below a folder, sorted by name in each; only one folder's names are held in memory at a time."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from pictures_below(path)
        elif path.suffix.lower().lstrip(".") in IMAGES:
            yield path


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


def load(path: Path, size: int) -> np.ndarray:
    """The centre square of a picture at (size, size, 3) uint8."""
    with open_image(path) as image:
        return centre_square(image, size)


def sides(path: Path) -> tuple[int, int]:
    """Width and height of a picture, from its header."""
    with open_image(path) as image:
        return upright_sides(image)


def caption_of(path: Path, folder: Path) -> str | None:
    """The caption in the .txt or .json beside a picture; None if there is neither, or it is empty or unreadable."""
    text = path.with_suffix(".txt")
    try:
        if not why_unusable(text, folder):
            return codec.decode("txt", text.read_bytes()).strip() or None
        return readable(str(sidecar_fields(path, folder).get("caption") or "")) or None
    except DataError:  # not UTF-8, not JSON, or too long
        return None


def about(path: Path, folder: Path) -> dict[str, Any]:
    """The entries of the .json beside a picture, without the caption; and the file's name."""
    try:
        facts = sidecar_fields(path, folder)
    except DataError:
        facts = {}
    return {name: value for name, value in facts.items() if name != "caption"} | {"file": path.name}


def sidecar_fields(path: Path, folder: Path) -> dict[str, Any]:
    """The contents of the .json beside a picture; {} if there is none."""
    file = path.with_suffix(".json")
    return {} if why_unusable(file, folder) else codec.decode("json", file.read_bytes())
