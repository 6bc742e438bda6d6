"""A folder of pictures, each with its caption beside it: cat.jpg with cat.txt, or cat.json holding "caption"."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.codec import IMAGES, MAX_PIXELS
from data_pipeline.errors import UserError
from data_pipeline.image_transforms import centre_square
from data_pipeline.sources.source import SourceItem

Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # beyond it Pillow raises before it decodes


@dataclass(frozen=True, slots=True)
class PictureFile(SourceItem):
    """stamp: bytes and time of change, by which make_shards sees that a picture is another one under its old name."""

    stamp: tuple[int, int] = (0, 0)


class ImageFolder:
    """Pictures below `path`, by name."""

    def __init__(self, path: str, limit: int | None = None) -> None:
        self.path, self.limit = Path(path), limit

    def items(self) -> list[SourceItem]:
        if not self.path.is_dir():
            raise UserError(f"input={self.path} is not a folder: give one that holds pictures with captions.")
        files = sorted(p for p in self.path.rglob("*") if p.suffix.lower().lstrip(".") in IMAGES)
        if not files:
            raise UserError(f"input={self.path} holds no pictures ({', '.join(IMAGES)}): check the path.")
        return [self._item(path) for path in files[: self.limit]]

    def _item(self, path: Path) -> SourceItem:
        # A dot would end the key, in a tar's member name.
        key = str(path.relative_to(self.path).with_suffix("")).replace("/", "_").replace(".", "_")
        facts = path.stat()
        stamp = facts.st_size, facts.st_mtime_ns
        return PictureFile(key, functools.partial(load, path), caption_of(path), {"file": path.name}, stamp)


def load(path: Path, size: int) -> np.ndarray:
    """The centre square of a picture at (size, size, 3) uint8."""
    with Image.open(path) as image:
        return centre_square(image, size)


def caption_of(path: Path) -> str | None:
    """From the .txt or .json beside it; None where there is neither, or it is empty or unreadable."""
    text, about = path.with_suffix(".txt"), path.with_suffix(".json")
    try:
        if text.exists():
            return text.read_text("utf-8").strip() or None
        if about.exists():
            return str(json.loads(about.read_text("utf-8"))["caption"] or "").strip() or None
    except (ValueError, KeyError, TypeError):  # not UTF-8, not JSON, or no object with a caption
        pass
    return None
