"""A folder of pictures, each with its caption beside it, as cat.jpg with cat.txt: sidecars.py says where it is looked
for."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.common.errors import UserError
from data_pipeline.images.decode import IMAGES, open_image
from data_pipeline.images.resize import centre_square, upright_sides
from data_pipeline.sources.captions import caption_names, known_encoding
from data_pipeline.sources.sidecars import Sidecars
from data_pipeline.sources.source import SourceItem


@dataclass(frozen=True, slots=True)
class PictureFile(SourceItem):
    """stamp: size in bytes and modification time, by which make_shards notices a changed picture under an old name."""

    stamp: tuple[int, int] = (0, 0)


class ImageFolder:
    """Pictures below `path`, by name."""

    def __init__(
        self,
        path: str | None,
        limit: int | None = None,
        caption: str | Sequence[str] | None = None,
        encoding: str | None = None,
    ) -> None:
        if path is None:
            raise UserError("input must be given: the folder that holds the pictures; add input=....")
        self.path, self.limit = Path(path), limit
        self.names, self.encoding = caption_names(caption), known_encoding(encoding)

    def items(self) -> Iterator[SourceItem]:
        if not self.path.is_dir():
            raise UserError(f"input={self.path} is not a folder: give one that holds pictures with captions.")
        path, sidecars = None, Sidecars(self.path, self.names, self.encoding)
        for path in itertools.islice(pictures_below(self.path), self.limit):
            yield self._item(path, sidecars)
        for missing, row in sidecars.unmatched() if self.limit is None else ():
            key = os.path.relpath(missing, self.path).replace("/", "_").replace(".", "_")
            yield PictureFile(key, functools.partial(load, missing), None, unusable="missing picture", where=row)
        if path is None:
            raise UserError(f"input={self.path} holds no pictures ({', '.join(IMAGES)}): check the path.")

    def _item(self, path: Path, sidecars: Sidecars) -> SourceItem:
        # A dot would end the key in a tar's member name.
        key = str(path.relative_to(self.path).with_suffix("")).replace("/", "_").replace(".", "_")
        if reason := why_unusable(path, self.path):
            return PictureFile(key, functools.partial(load, path), None, unusable=reason, where=str(path))
        facts = path.stat()
        stamp = facts.st_size, facts.st_mtime_ns
        look = functools.partial(sides, path)
        captions, meta = sidecars.about(path)
        given = {"uncaptioned": captions.why, "captions": captions.several, "notes": captions.notes}
        meta, where = meta | {"file": path.name}, str(path)
        return PictureFile(
            key, functools.partial(load, path), captions.first, meta, look, where=where, stamp=stamp, **given
        )


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
