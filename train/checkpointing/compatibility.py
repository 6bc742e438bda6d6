"""Whether a run may resume from a checkpoint: compares their identities and parameter shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.common.errors import UserError
from data_pipeline.common.saved_names import named
from data_pipeline.shards.provenance import flat

SETS = "sets"  # in an identity: [name, fingerprint] of each of several data sets; not there in older checkpoints


def refuse_what_differs(
    identity: Mapping[str, Any], saved: Mapping[str, Any], allow_mismatch: Sequence[str], where: str
) -> list[str]:
    """Refuse to resume from a checkpoint whose run has another identity; returns the differences that are allowed."""
    now, before = flat(identity), flat(named(saved))
    sets_before, sets_now = before.pop(SETS, None), now.pop(SETS, None)
    if unknown := set(allow_mismatch) - (now | before).keys() - {"run_id"}:
        raise UserError(
            f"training.allow_mismatch contains unknown names: {', '.join(sorted(unknown))}. Use any of "
            f"{', '.join(sorted(now | before))}."
        )
    differing = {
        name: f"{name} was {before.get(name)} and is now {now.get(name)}"
        for name in sorted(now | before)
        if now.get(name) != before.get(name)
    }
    for name in {"data", "images"} & differing.keys():
        differing[name] = changed_sets(sets_before, sets_now) or differing[name]
    refused = [what for name, what in differing.items() if name not in allow_mismatch]
    if refused:
        raise UserError(
            f"can't resume from {where}: {'; '.join(refused)}. Restore these settings, use another output=, or permit "
            f"the change with training.allow_mismatch=[{','.join(n for n in differing)}]."
        )
    return list(differing.values())


def changed_sets(before: Sequence[Sequence[str]] | None, now: Sequence[Sequence[str]] | None) -> str:
    """Which of several data sets, given as [name, fingerprint], differ, in words; "" if that is not known."""
    if not before or not now:
        return ""
    was, marks_before, marks_now = dict(before), {mark for _, mark in before}, {mark for _, mark in now}
    changed = [
        f"data set {name} was {was[name]} and is now {mark}" for name, mark in now if was.get(name, mark) != mark
    ]
    gone = [f"data set {n} is gone" for n, mark in before if mark not in marks_now and n not in dict(now)]
    new = [f"data set {n} is new" for n, mark in now if mark not in marks_before and n not in was]
    if found := [*changed, *gone, *new]:
        return "; ".join(found)
    orders = (", ".join(name for name, _ in sets) for sets in (before, now))
    return "the data sets were {} and are now {}".format(*orders)


def refuse_other_shapes(saved: Mapping[str, list[int]], own: Mapping[str, list[int]], where: str) -> None:
    """UserError if shapes differ: as pieces are flat, they would load into other shapes too, as nonsense."""
    differing = sorted(name for name in saved | own if saved.get(name) != own.get(name))
    if differing:
        name = differing[0]
        raise UserError(
            f"can't resume from {where}: {len(differing)} parameter(s) are new, missing or of another shape, such as "
            f"{name}, whose shape was {saved.get(name)} and is now {own.get(name)}. Restore unet, conditioning and "
            "data, or start a new run in another output= with start_from=."
        )


def describe_layout(layout: Mapping[str, Any]) -> str:
    return f"{layout['ranks']} rank(s) and ZeRO stage {layout['zero_stage']}"
