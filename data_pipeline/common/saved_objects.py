"""Builds what files of data sets, runs and models describe: only what is on the list in saved_names.py.

Such files are not trusted: they choose among what is listed, and give plain arguments, each checked against the
annotation of its own parameter. Hydra's instantiate, which calls anything that is named, never sees them. Beyond the
list, only what this checkout's conf/ names is accepted: it is the user's own. docs/security.md has the whole story.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from torch import nn

from data_pipeline.common.errors import DataError, UserError
from data_pipeline.common.option_checks import described, fits
from data_pipeline.common.saved_names import GETTERS, LIST, named, target_of

CONF = Path(__file__).resolve().parents[2] / "conf"
Target = tuple[str, bool]  # a path, and whether to call it or to use it as it is


@dataclass(frozen=True, slots=True)
class Group:
    """supplied: arguments that only the program may give; a target that takes any becomes a partial, which it calls.
    parts: arguments that are entries themselves, and their groups. conf: its folder in conf/, if named otherwise."""

    supplied: tuple[str, ...] = ()
    parts: tuple[tuple[str, str], ...] = ()
    conf: str | None = None


GROUPS: Mapping[str, Group] = {
    **{group: Group() for group in LIST},
    "conditioning": Group(supplied=("facts",)),
    "objective": Group(
        supplied=("network", "latents", "seed"),
        parts=tuple((part, part) for part in ("process", "parameterization", "time_sampling", "loss", "weighting")),
    ),
    "time_sampling": Group(supplied=("u",)),
    "sampler": Group(parts=(("function", "sampling"), ("times", "spacing"))),
    "sampling": Group(supplied=("denoise", "x", "times", "process", "noise"), conf="sampler"),
    "spacing": Group(supplied=("process", "steps")),
}


@dataclass(frozen=True, slots=True)
class Checked:
    """An entry that was checked and not yet built. arguments: those given, with defaults for the others."""

    make: Callable[..., Any]
    given: Mapping[str, Any]
    arguments: Mapping[str, Any]
    where: str
    called: bool

    def build(self) -> Any:
        """The object; or a partial of it, where the program has arguments to add."""
        given = {name: value.build() if isinstance(value, Checked) else value for name, value in self.given.items()}
        if not self.called:
            return functools.partial(self.make, **given) if given else self.make
        try:
            return self.make(**given)
        except UserError as error:
            if file := self.where.rpartition(": ")[0]:
                raise type(error)(f"{file}: {error}") from error
            raise
        except Exception as error:  # a constructor may refuse values that are valid one by one
            raise DataError(f"{self.where} can't be built from its arguments ({_brief(error)}).") from error


def build(saved: Any, group: str, where: str, own: Collection[Target] = ()) -> Any:
    """Build what an entry of a file describes. where: the file, and the entry's name in it; own: targets beyond the
    list that the user's command line names."""
    return checked(saved, group, where, own).build()


def checked(saved: Any, group: str, where: str, own: Collection[Target] = ()) -> Checked:
    """An entry with its parts, looked up and its arguments checked; anything invalid is a DataError."""
    saved, about = named(saved), GROUPS[group]
    if not isinstance(saved, Mapping):
        raise DataError(f"{where} must be a table with a name, not {_brief(saved)}.")
    make, reference = _looked_up(saved, group, where, own)
    heads = {"_target_", "path"} if reference else {"_target_"} if "_target_" in saved else {"name"}
    if "_target_" in saved:  # the user's own class: in the notation of their conf/
        heads, reference = heads | {"_partial_", "_convert_"}, reference or saved.get("_partial_") is True
    given = {name: value for name, value in saved.items() if name not in heads}
    return _with_arguments(make, given, about, where, own, reference)


def _with_arguments(
    make: Callable[..., Any],
    given: Mapping[str, Any],
    about: Group,
    where: str,
    own: Collection[Target],
    reference: bool,
) -> Checked:
    parameters, is_open = _parameters(make)
    hints, parts = _hints(make), dict(about.parts)
    free = {name: parameter for name, parameter in parameters.items() if name not in about.supplied}
    for name, value in given.items():
        if name not in free and not (is_open and isinstance(name, str) and not name.startswith("_")):
            raise DataError(f"{where} has no argument {_brief(name)}{_near(name, free)}.")
        if name not in parts and name in hints and not fits(value, hints[name]):
            raise DataError(f"{where}.{name}={_brief(value)} is not valid: it must be {described(hints[name])}.")
    called = not reference and len(free) == len(parameters)
    lacking = [name for name, p in free.items() if p.default is p.empty and name not in given]
    if lacking and not reference:
        raise DataError(f"{where} lacks {', '.join(lacking)}.")
    made = {
        name: checked(value, parts[name], f"{where}.{name}", own) if name in parts else value
        for name, value in given.items()
    }
    defaults = {name: p.default for name, p in free.items() if p.default is not p.empty}
    return Checked(make, made, {**defaults, **made}, where, called)


def _looked_up(
    saved: Mapping[str, Any], group: str, where: str, own: Collection[Target]
) -> tuple[Callable[..., Any], bool]:
    """The target that an entry names, and whether it is used as it is rather than called."""
    if "_target_" not in saved:
        name = saved.get("name")
        if not isinstance(name, str) or name not in LIST[group]:
            raise DataError(
                f"{where} names {_brief(name)}, which is not one of {', '.join(LIST[group])}{_near(name, LIST[group])}."
            )
        return _imported(LIST[group][name], where), False
    target = target_of(saved)
    if target is None or (target not in own and target not in targets_in_conf(group)):
        path, folder = target[0] if target else saved["_target_"], GROUPS[group].conf or group
        raise DataError(
            f"{where} names {_brief(path)}, but a file may name only what is on the list ({', '.join(LIST[group])}): "
            f"use files only from people you trust; for a class of your own, add a file to conf/{folder}/ that names "
            "it (docs/security.md)."
        )
    return _imported(target[0], where), not target[1]


def _imported(path: str, where: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{where} names {path}, which can't be imported ({error}): install it, or add it to PYTHONPATH."
        ) from error


def _parameters(make: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """Parameters by name; for a class, also those of bases that get its **options. And whether others are accepted."""
    found: dict[str, inspect.Parameter] = {}
    for function in _functions(make):
        parameters = inspect.signature(function).parameters.values()
        named_ones = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        found = {**{p.name: p for p in named_ones if p.name != "self"}, **found}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return found, False
    return found, bool(_functions(make))


def _hints(make: Callable[..., Any]) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    for function in _functions(make):
        try:
            hints = {**get_type_hints(function, include_extras=True), **hints}
        except NameError:  # a class of the user's own, with annotations for type checkers only
            continue
    return hints


def _functions(make: Callable[..., Any]) -> list[Callable[..., Any]]:
    """The functions whose parameters count: a function itself, or the constructors of a class, its own first."""
    if not inspect.isclass(make):
        return [make]
    return [vars(c)["__init__"] for c in make.__mro__ if "__init__" in vars(c) and c not in (object, nn.Module)]


@functools.cache
def targets_in_conf(group: str) -> frozenset[Target]:
    """All targets that this checkout's conf/ names for a group: in its folder, or in its section of other files."""
    folder, found = GROUPS[group].conf or group, set()
    for path in CONF.rglob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        if CONF / folder not in path.parents:
            content = content.get(folder) if isinstance(content, Mapping) else None
        found |= targets_in(content)
    return frozenset(found)


def targets_in(tree: Any) -> set[Target]:
    """All targets that a user's own configuration names, at any depth; none of Hydra's own."""
    items = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list | tuple) else ()
    found = set().union(*map(targets_in, items)) if items else set()
    target = target_of(tree) if isinstance(tree, Mapping) else None
    return found | ({target} if target and not target[0].startswith("hydra.") and target[0] not in GETTERS else set())


def read_config(path: Path) -> dict[str, Any]:
    """A run's config.yaml as plain data with short names; ${...} stays as text."""
    return _read(path, lambda text: named(yaml.safe_load(text)), yaml.YAMLError)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    return _read(path, json.loads, ValueError)


def _read(path: Path, parse: Callable[[str], Any], wrong: type[Exception]) -> dict[str, Any]:
    try:
        content = parse(path.read_text())
    except (wrong, UnicodeDecodeError, OSError, RecursionError) as error:
        raise DataError(f"{path} can't be read ({_brief(error)}): make or copy it again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} does not contain a table of options: make or copy it again.")
    return content


def refuse_wrong_kinds(values: Mapping[str, Any], hints: Mapping[str, Any], where: str) -> None:
    """Check the facts of a file, by name, against annotations; refuse missing ones and those of another type."""
    for name, hint in hints.items():
        if name not in values:
            raise DataError(f"{where} lacks {name}: make or copy it again.")
        if not fits(values[name], hint):
            raise DataError(f"{where}: {name}={_brief(values[name])} is not valid: it must be {described(hint)}.")


def _near(name: Any, names: Collection[str]) -> str:
    near = difflib.get_close_matches(str(name), list(names), 1)
    return f": did it mean {near[0]}?" if near else ""


def _brief(value: Any, most: int = 80) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= most else text[: most - 3] + "..."
