"""Options checked against their annotations: type, range, choice. A value that does not fit is refused in one sentence.

lr: Annotated[float, Within(0)]                 "optimizer.lr=-1 is not valid: use a number of 0 or more."
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from data_pipeline.common.errors import UserError

KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    types.NoneType: "null",
}


@dataclass(frozen=True, slots=True)
class Within:
    """A range of finite numbers. above: `least` itself is excluded; below: `most` itself is excluded."""

    least: float
    most: float = math.inf
    above: bool = False
    below: bool = False

    def allows(self, value: float) -> bool:
        """Whether a number is in the range; NaN and infinity never are."""
        inside = math.isfinite(value) and self.least <= value <= self.most
        return inside and not (self.above and value == self.least) and not (self.below and value == self.most)

    def __str__(self) -> str:
        if self.least == -math.inf:
            return "that is finite"
        if self.most == math.inf:
            return f"above {self.least:g}" if self.above else f"of {self.least:g} or more"
        return f"{'above' if self.above else 'from'} {self.least:g} {'below' if self.below else 'to'} {self.most:g}"


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of these values."""

    names: Sequence[Any]


@dataclass(frozen=True, slots=True)
class NotEmpty:
    """A text that is not empty: an empty path would be the root of the file system. what: its words in messages."""

    what: str = "a text that is not empty"

    def allows(self, value: str) -> bool:
        return bool(value.strip())

    def __str__(self) -> str:
        return self.what


Count = Annotated[int, Within(1)]
Positive = Annotated[float, Within(0, above=True)]
NotNegative = Annotated[float, Within(0)]
Finite = Annotated[float, Within(-math.inf)]
Path = Annotated[str, NotEmpty()]
Folder = Annotated[str, NotEmpty("a folder")]
Share = Annotated[float, Within(0, 1)]


def refuse_wrong(options: Any, prefix: str) -> None:
    """Check a dataclass' fields, in its __post_init__; `prefix`: where they are in the configuration."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    refuse_wrong_values(values, get_type_hints(type(options), include_extras=True), f"{prefix}.")


def refuse_wrong_values(values: Mapping[str, Any], hints: Mapping[str, Any], prefix: str = "") -> None:
    """Check the given values, by name, against their annotations."""
    for name, value in values.items():
        if not fits(value, hints[name]):
            raise UserError(f"{prefix}{name}={value} is not valid: use {described(hints[name])}.")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value fits an annotation. Types not covered here, such as another dataclass, accept anything."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fits(value, parts[0]) and all(_meets(value, condition) for condition in parts[1:])
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin in (tuple, list, Sequence):
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        wanted = parts if origin is tuple else parts * len(value) if listed else ()
        return listed and len(value) == len(wanted) and all(map(fits, value, wanted))
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
    if is_typeddict(hint):
        hints = get_type_hints(hint, include_extras=True)
        there = isinstance(value, Mapping) and hint.__required_keys__ <= value.keys() <= hints.keys()
        return there and all(fits(part, hints[name]) for name, part in value.items())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint not in KINDS or isinstance(value, hint)


def _meets(value: Any, condition: Within | OneOf | NotEmpty) -> bool:
    return value in condition.names if isinstance(condition, OneOf) else condition.allows(value)


def described(hint: Any) -> str:
    """The allowed values, in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        if isinstance(parts[1], OneOf):
            return f"one of {', '.join(map(str, parts[1].names))}"
        if isinstance(parts[1], NotEmpty):
            return str(parts[1])
        return f"{described(parts[0])} {parts[1]}"
    if origin in (Union, types.UnionType):
        return ", or ".join(map(described, parts))
    if origin is tuple:
        return f"a list of {len(parts)}, each {described(parts[0])}"
    if origin in (list, Sequence):
        return "a list, as [a,b]" + ("" if parts[0] is Any else f", each {described(parts[0])}")
    if origin in (dict, Mapping):
        return "a table, as {name: value}" + ("" if parts[1] is Any else f", each value {described(parts[1])}")
    if is_typeddict(hint):
        return f"a table of some of {', '.join(get_type_hints(hint))}"
    return KINDS.get(hint, "something else")
