"""Which caption a sample has, of several places that may hold one; and why, if none does."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from data_pipeline.common.errors import DataError, UserError
from data_pipeline.shards.captions import ONE, removed_from, texts_in

CLEANED = "invisible characters removed from the caption"


class Captions(NamedTuple):
    """texts: by name, the first is the sample's caption; empty: why there is none. notes: what was done to them."""

    texts: dict[str, str]
    why: str = ""
    notes: tuple[str, ...] = ()

    @property
    def first(self) -> str | None:
        return next(iter(self.texts.values()), None)

    @property
    def several(self) -> dict[str, str]:
        """All of them, if they are more than one."""
        return self.texts if len(self.texts) > 1 else {}


class Place(NamedTuple):
    """Where captions may be: named values; or the reason why it can't be read. none: what to say if it has no text."""

    name: str
    values: Mapping[str, Any]
    fault: str = ""
    none: str = "is empty"


def chosen(places: Iterable[Place], missing: str) -> Captions:
    """The captions of the first place that has one. A place that can't be read, or holds no text, ends the search:
    what it says may be what was meant. missing: what to say if there is no place at all."""
    tried = []
    for place in places:
        if place.fault:
            return Captions({}, place.fault)
        try:
            texts = texts_in(place.values, place.name)
        except DataError as error:
            return Captions({}, str(error))
        if texts:
            return Captions(texts, notes=(CLEANED,) if removed_from(place.values) else ())
        tried.append(f"{place.name} {place.none}")
    return Captions({}, f"missing caption ({'; '.join(tried) or missing})")


def of_object(name: str, facts: Mapping[str, Any], names: Sequence[str]) -> Place:
    """A JSON object as a place: those of its entries that have these names."""
    values = {each if len(names) > 1 else ONE: facts.get(each) for each in names}
    if any(value is not None for value in values.values()):
        return Place(name, values)
    others = ", ".join(brief(key) for key in list(facts)[:5]) or "nothing"
    return Place(name, values, none=f"has no {' or '.join(names)} (but {others})")


def brief(text: str, most: int = 60) -> str:
    """A name, printable and not too long for a sentence."""
    shown = text if text.isprintable() else repr(text)
    return shown if len(shown) <= most else shown[: most - 3] + "..."


def caption_names(option: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names that source.caption= gives; () for none."""
    names = tuple(option or ()) if option is None or isinstance(option, list | tuple) else (option,)
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise UserError(f"source.caption={option} can't be: give a name, or several as source.caption=[short,long].")
    return names


def known_encoding(encoding: str | None) -> str | None:
    """source.encoding=, checked."""
    try:
        if encoding is not None:
            "a".encode(codecs.lookup(encoding).name)
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"source.encoding={encoding} is not known: take a name such as utf-8, utf-16, cp1252, shift_jis or gb18030."
        ) from error
    return encoding
