"""The settings that a data set was made with, and the refusal of others."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from data_pipeline.common.errors import UserError
from data_pipeline.shards.manifest import Manifest

# Later options, with the values that change nothing: outputs of earlier versions still count as finished.
LATER = {
    "source.background": "white", "source.of.background": "white", "source.animated": "first", "animated": "first",
    "source.caption": None, "source.encoding": None, "source.key": None, "source.unended": None, "key": None,
    "unended": None, "tokenizer": None, "buckets": None, "bucket_step": 64, "resize": "crop",
}  # fmt: skip


def without_later(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options as in earlier versions: those in LATER are left out if they have their defaults."""
    kept = {name: value for name, value in options.items() if LATER.get(prefix + name, ...) != value}
    return {
        name: without_later(value, f"{prefix}{name}.") if isinstance(value, Mapping) else value
        for name, value in kept.items()
    }


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by their full names: {"source": {"limit": 1}} becomes {"source.limit": 1}."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {prefix + name: value}
    return found


def made_otherwise(before: Mapping[str, Any] | None, now: Mapping[str, Any], most: int = 5) -> str:
    """How the settings that a data set was made with differ from others, old -> new, in brackets; "": an earlier
    version made it, which did not record them."""
    if before is None:
        return ""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if not names:
        return " (the options are the same, but the contents of input= have changed)"
    shown = [f"{name}: {brief(before.get(name))} -> {brief(now.get(name))}" for name in names[:most]]
    return f" ({', '.join(shown)}{f', and {len(names) - most} more' if len(names) > most else ''})"


def brief(value: Any, most: int = 60) -> str:
    """A setting's value, shortened for a sentence."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else text[: most - 3] + "..."


def settings_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options given, except the output's path and the store."""
    left_out = ("output", "store", "max_aside_fraction")
    return flat({name: value for name, value in options.items() if name not in left_out})


def refuse_made_otherwise(roots: Iterable[str], holder: str, mark: str, settings: Mapping[str, Any]) -> None:
    """Refuse data sets made by another configuration. holder: what must be removed then, with its verb."""
    for root in roots:
        info = Manifest.load(root).info
        if info.get("made_from") != mark:
            what = made_otherwise(info.get("made_with"), settings)
            raise UserError(f"{holder} made from other data or settings{what}: remove it, or choose another output=.")
