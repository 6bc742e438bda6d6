"""Whether a run may go on from a checkpoint: by what the two are made of, and by their shapes."""

from __future__ import annotations

from typing import Any


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by dots, so that only the leaves that differ are named."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _spelled(layout: dict[str, Any]) -> str:
    return f"{layout['ranks']} rank(s) and ZeRO stage {layout['zero_stage']}"
