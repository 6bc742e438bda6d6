"""What make_shards reads from: a list of items, each of which can be loaded by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class SourceItem:
    """load(size) -> (size, size, 3) uint8; caption None where there is none."""

    key: str
    load: Callable[[int], np.ndarray]
    caption: str | None
    meta: dict[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """`items` lists everything, in a fixed order; nothing is decoded yet."""

    def items(self) -> Sequence[SourceItem]: ...
