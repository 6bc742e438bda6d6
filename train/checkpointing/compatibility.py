"""Whether a run may resume from a checkpoint: compares their identities and parameter shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.common.errors import UserError
from data_pipeline.common.saved_names import named
from data_pipeline.shards.provenance import flat


def refuse_what_differs(
    identity: Mapping[str, Any], saved: Mapping[str, Any], allow_mismatch: Sequence[str], where: str
) -> list[str]:
    """Refuse to resume from a checkpoint whose run has another identity; returns the differences that are allowed."""
    now, before = flat(identity), flat(named(saved))
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
    refused = [what for name, what in differing.items() if name not in allow_mismatch]
    if refused:
        raise UserError(
            f"can't resume from {where}: {'; '.join(refused)}. Restore these settings, use another output=, or permit "
            f"the change with training.allow_mismatch=[{','.join(n for n in differing)}]."
        )
    return list(differing.values())


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
