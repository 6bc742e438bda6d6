"""Emoji in six styles from npm packages: "a rabbit, twemoji style". Whole pairs of thing and style are held out.

Drawings: @iconify-json/<style> (icons.json), each under its own licence; names: emojibase-data (MIT).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import DataError, UserError
from data_pipeline.sources.openmoji import framed, hex_of
from data_pipeline.sources.source import SourceItem

INSTALL = "npm install @iconify-json/{noto,twemoji,fluent-emoji,fluent-emoji-flat,openmoji,emojione} emojibase-data"


@dataclass(frozen=True, slots=True)
class Style:
    """One package: SVG bodies by name, names by code point if it lists them, and its licence."""

    name: str
    icons: Mapping[str, Mapping[str, Any]]
    sides: tuple[float, float]
    chars: Mapping[str, str]
    licence: str

    @classmethod
    def read(cls, packages: Path, name: str) -> Style:
        """Read @iconify-json/<name>; aliases become separate drawings."""
        folder = packages / "@iconify-json" / name
        drawings, chars = read_json(folder / "icons.json"), folder / "chars.json"
        icons = dict(drawings["icons"])
        for alias, facts in drawings.get("aliases", {}).items():
            if facts["parent"] in icons and not {"rotate", "vFlip"} & set(facts):
                icons[alias] = icons[facts["parent"]] | facts
        licence = read_json(folder / "info.json")["license"]["spdx"]
        sides = drawings.get("width", 16), drawings.get("height", 16)
        return cls(name, icons, sides, read_json(chars) if chars.exists() else {}, licence)

    def icon_of(self, thing: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> str | None:
        """The name of this style's drawing of a thing: by code point; else by other styles' names or the label."""
        code = plain_code(thing["hexcode"])
        slug = re.sub("[^a-z0-9]+", "-", thing["label"].lower()).strip("-")
        known = [self.chars[code]] if code in self.chars else [] if self.chars else [*names.get(code, []), slug]
        return next((name for name in known if name in self.icons), None)

    def svg(self, icon: str) -> str:
        """A drawing as a complete SVG file, centred in a square."""
        facts = self.icons[icon]
        width, height = facts.get("width", self.sides[0]), facts.get("height", self.sides[1])
        side = max(width, height)
        left, top = facts.get("left", 0) - (side - width) / 2, facts.get("top", 0) - (side - height) / 2
        box = f'viewBox="{left:g} {top:g} {side} {side}"'
        body = facts["body"]
        if facts.get("hFlip"):
            body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
        return f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box}>{body}</svg>'


class EmojiStyles:
    """Things without skin tones, each in all `styles` that draw it (`complete`: only things that all of them draw).

    Of the pairs of thing and style, about one in `heldout_every` is held out: at most one per thing, and none for a
    thing with one style, so that each held-out thing is trained on in other styles.
    """

    def __init__(
        self,
        path: str,
        styles: Sequence[str],
        heldout_every: int | None = None,
        complete: bool = False,
        limit: int | None = None,
        background: Any = "white",
    ) -> None:
        self.background = hex_of(background)
        self.path, self.styles, self.every, self.complete, self.limit = path, styles, heldout_every, complete, limit

    def items(self) -> Iterator[SourceItem]:
        if importlib.util.find_spec("resvg_py") is None:
            raise UserError("source=emoji_styles needs resvg-py: run pip install -e '.[demo]'.")
        packages = packages_in(Path(self.path))
        styles = [Style.read(packages, name) for name in self.styles]
        names = names_by_code(styles)
        owed, turn = 0.0, 0  # pairs that should have been held out by now; which of a thing's drawings is next
        for thing in named_things(packages)[: self.limit]:
            drawings = [(style, icon) for style in styles if (icon := style.icon_of(thing, names))]
            if self.complete and len(drawings) < len(styles):
                continue
            if self.every and len(drawings) > 1:
                owed += len(drawings) / self.every
            heldout = turn % len(drawings) if len(drawings) > 1 and owed >= 1 else None
            if heldout is not None:
                owed, turn = owed - 1, turn + 1
            for place, (style, icon) in enumerate(drawings):
                yield self._item(thing, style, icon, place == heldout)

    def _item(self, thing: Mapping[str, Any], style: Style, icon: str, heldout: bool) -> SourceItem:
        """key: code points and style; meta: the thing's name, its place among emoji, and the style's licence."""
        label = thing["label"].lower()
        meta = {"name": label, "style": style.name, "group": thing["group"], "code": thing["hexcode"]}
        meta |= {"tags": thing.get("tags", []), "licence": style.licence}
        key, caption = f"{thing['hexcode']}_{style.name}", f"{with_article(label)}, {style.name} style"
        draw = functools.partial(framed, functools.partial(style.svg, icon), background=self.background)
        return SourceItem(key, draw, caption, meta, heldout=heldout)


def with_article(label: str) -> str:
    """With its article: "a rabbit face", "an ear of corn"; no article before a plural, a number or "flag: Austria"."""
    first, last = label.partition(":")[0].split()[0], label.split()[-1]
    several = last.endswith("s") and not last.endswith(("ss", "us"))
    if ":" in label or several or not first.isalpha():
        return label
    return f"{'an' if first[0] in 'aeiou' else 'a'} {label}"


def packages_in(folder: Path) -> Path:
    """The folder of npm's packages: `folder`, or its node_modules."""
    for packages in (folder / "node_modules", folder):
        if (packages / "@iconify-json").is_dir() and (packages / "emojibase-data").is_dir():
            return packages
    raise UserError(f"input={folder} lacks @iconify-json/ or emojibase-data/: run there {INSTALL}.")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: run {INSTALL}, or leave that style out of source.styles.") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged: install its package again.") from error


def named_things(packages: Path) -> list[dict[str, Any]]:
    """Emoji without skin tones, in their usual order, with label, hexcode, tags and the name of their group."""
    groups = read_json(packages / "emojibase-data" / "meta" / "groups.json")["groups"]
    things = read_json(packages / "emojibase-data" / "en" / "data.json")
    named = [thing | {"group": groups[str(thing["group"])]} for thing in things if "group" in thing]
    return sorted((t for t in named if t["group"] != "component"), key=lambda thing: thing["order"])


def plain_code(hexcode: str) -> str:
    """A code point as chars.json spells it: lower case, without the colour selector."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def names_by_code(styles: Sequence[Style]) -> dict[str, list[str]]:
    """The names that styles give to a code point: for styles without such a list."""
    names: dict[str, list[str]] = {}
    for style in styles:
        for code, name in style.chars.items():
            names.setdefault(code, []).append(name)
    return names
