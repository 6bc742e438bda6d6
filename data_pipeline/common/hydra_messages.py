"""Hydra's messages about unknown options, reworded in one sentence that names those that exist."""

from __future__ import annotations

import difflib
import functools
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

NOT_LOADED = re.compile(r"Could not (?:load|find) '([\w/]+)/(\w+)'")
NOT_SET = re.compile(r"Could not override '([\w./@]+)'")
# Options by their earlier name -> by today's. Both are accepted in this version.
RENAMED = {
    "training.bad_numbers": "training.stability",
    "training.may_change": "training.allow_mismatch",
    "captions_kept": "caption_cache_size",
}


def with_new_names(arguments: Sequence[str]) -> list[str]:
    """A command line with today's names of options in place of earlier ones."""
    return [_with_new_name(argument) for argument in arguments]


def _with_new_name(argument: str) -> str:
    for old, new in RENAMED.items():
        if found := re.match(rf"([+~]*){re.escape(old)}(?=[.=]|$)", argument):
            say_renamed(old)
            return found[1] + new + argument[found.end() :]
    return argument


def say_renamed(old: str) -> None:
    """One sentence on stderr, from one rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: the option {old} is now {RENAMED[old]}; the next version refuses {old}.", file=sys.stderr)


def explained(said: str, conf: Path, root: str) -> str:
    """One sentence for Hydra's message on an entry of conf/<root>.yaml; other messages stay as they are."""
    if found := NOT_LOADED.search(said):
        group, name = found.groups()
        if group == "conditions" and (conf / "conditioning" / f"{name}.yaml").exists():
            return f"conditions={name}: conditioning=[{name}] needs nothing that is stored for it: leave {name} out."
        there = sorted(path.stem for path in (conf / group).glob("*.yaml"))
        if there:
            return f"{group}={name} does not exist: use {any_of(there)}."
    if found := NOT_SET.search(said):
        return f"there is no option {found[1]}{advice(found[1], conf, root)}."
    return said.partition("Set the environment variable HYDRA_FULL_ERROR")[0].strip()


def advice(key: str, conf: Path, root: str) -> str:
    """The group to choose, where an option of an unchosen group is set; else options with similar names."""
    group, _, rest = key.partition(".")
    name = rest.partition(".")[0]
    known = options(conf, root)
    if (conf / group / f"{name}.yaml").exists() and key in known:
        return f" unless it is chosen: add {group}=[{name}]"
    if choices := _files_with(key, conf, root):
        return f" in the chosen {group}: choose {group}={any_of(choices)}"
    near = difflib.get_close_matches(key, sorted({*known, *top_keys(conf, root)}), 3, 0.7)
    return f": is it {any_of(near)} (see --help)" if near else " (see --help)"


def _files_with(key: str, conf: Path, root: str) -> list[str]:
    """Files of a config group (one of which is chosen) that have this option."""
    group, _, rest = key.partition(".")
    defaults = [default for default in loaded(conf / f"{root}.yaml").get("defaults", []) if isinstance(default, dict)]
    if not rest or not any(group in default and not isinstance(default[group], list) for default in defaults):
        return []
    return sorted(path.stem for path in (conf / group).glob("*.yaml") if rest in names_in(loaded(path)))


def any_of(names: list[str]) -> str:
    """a, b or c"""
    return " or ".join([*filter(None, [", ".join(names[:-1])]), names[-1]])


@functools.cache
def options(conf: Path, root: str) -> list[str]:
    """Names of all options of an entry, whichever of its groups' files is chosen."""
    own = loaded(conf / f"{root}.yaml")
    found = set(names_in(own))
    for default in own.get("defaults", []):
        group = next(iter(default)) if isinstance(default, dict) else ""
        for path in (conf / group).glob("*.yaml") if group else ():
            found |= {f"{group.replace('/', '.')}.{name}" for name in names_in(loaded(path))}
    return sorted(found)


@functools.cache
def top_keys(conf: Path, root: str) -> set[str]:
    """Names allowed at the top level of an entry's configuration: its own, its groups, and those of global files."""
    own = loaded(conf / f"{root}.yaml")
    known = set(own) - {"defaults", "hydra"}
    for default in own.get("defaults", []):
        group = next(iter(default)) if isinstance(default, dict) else ""
        known.add(group.partition("/")[0])
        files = (
            (conf / group).glob("*.yaml") if group else [path for path in conf.glob("*.yaml") if path.stem == default]
        )
        known |= {name for path in files if "@package _global_" in path.read_text() for name in loaded(path)}
    return known


def names_in(content: Any, prefix: str = "") -> list[str]:
    """Dotted names below a mapping, branches included."""
    if not isinstance(content, dict):
        return []
    own = [name for name in content if name not in ("defaults", "hydra", "_target_")]
    return [n for name in own for n in (prefix + str(name), *names_in(content[name], f"{prefix}{name}."))]


def loaded(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text()) or {}
