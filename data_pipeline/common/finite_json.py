"""JSON for reports: NaN and infinity, which JSON does not have, become null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any


def json_of(content: Any) -> bytes:
    """`content` as indented JSON that every parser accepts."""
    return json.dumps(finite(content), indent=1, allow_nan=False).encode()


def finite(content: Any) -> Any:
    """The same content with null in place of numbers that are not finite."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, Sequence) and not isinstance(content, str):
        return [finite(value) for value in content]
    return content
