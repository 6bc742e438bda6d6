"""Chooses a sample's captions from the places that may hold them; or says why there is none."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from data_pipeline.common.errors import DataError, UserError
from data_pipeline.shards.captions import ONE, removed_from, texts_in

CLEANED = "invisible characters removed from the caption"


class Captions(NamedTuple):
    """texts: by name, the first is the sample's caption; empty: `why` says why. converted: the conversions made, in
    words that are counted."""

    texts: dict[str, str]
    why: str = ""
    converted: tuple[str, ...] = ()

    @property
    def first(self) -> str | None:
        return next(iter(self.texts.values()), None)

    @property
    def several(self) -> dict[str, str]:
        """All of them, if there are several."""
        return self.texts if len(self.texts) > 1 else {}

    def as_fields(self) -> dict[str, Any]:
        """The fields of a SourceItem for all captions but the first."""
        return {"uncaptioned": self.why, "captions": self.several, "converted": self.converted}


class Place(NamedTuple):
    """A place that may hold captions: named values, or the reason why it can't be read. none: the message if it has no
    text."""

    name: str
    values: Mapping[str, Any]
    fault: str = ""
    none: str = "is empty"


def chosen(places: Iterable[Place], missing: str) -> Captions:
    """The captions of the first place that has any. A place that can't be read, or holds a value that is not text, ends
    the search: it may be the one that was meant. missing: the message if there is no place at all."""
    tried = []
    for place in places:
        if place.fault:
            return Captions({}, place.fault)
        try:
            texts = texts_in(place.values, place.name)
        except DataError as error:
            return Captions({}, str(error))
        if texts:
            return Captions(texts, converted=(CLEANED,) if removed_from(place.values) else ())
        tried.append(f"{place.name} {place.none}")
    return Captions({}, f"missing caption ({'; '.join(tried) or missing})")


def of_object(name: str, facts: Mapping[str, Any], names: Sequence[str]) -> Place:
    """The place for a JSON object: its entries with these names."""
    values = {each if len(names) > 1 else ONE: facts.get(each) for each in names}
    if any(value is not None for value in values.values()):
        return Place(name, values)
    others = ", ".join(brief(key) for key in list(facts)[:5]) or "nothing"
    return Place(name, values, none=f"has no {' or '.join(names)} (but {others})")


def brief(text: str, most: int = 60) -> str:
    """A name made printable, and short enough for a sentence."""
    shown = text if text.isprintable() else repr(text)
    return shown if len(shown) <= most else shown[: most - 3] + "..."


def caption_names(option: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names given by source.caption=; () if there are none."""
    names = tuple(option or ()) if option is None or isinstance(option, list | tuple) else (option,)
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise UserError(f"source.caption={option} is not valid: use a name, or several as source.caption=[short,long].")
    return names


def known_encoding(encoding: str | None) -> str | None:
    """The value of source.encoding=, checked."""
    try:
        if encoding is not None:
            "a".encode(codecs.lookup(encoding).name)
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"source.encoding={encoding} is not known: use a name such as utf-8, utf-16, cp1252, shift_jis or gb18030."
        ) from error
    return encoding
