"""What make_shards reads from: items one after another, each of which can be loaded by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class SourceItem:
    """load(size) -> (size, size, 3) uint8; caption None where there is none.

    sides() -> width and height of the picture as it was found; None: a drawing, of any size. heldout: None leaves it to
    heldout_every. absent: why the source itself says that there is no picture. unusable: why it must be set aside, with
    `where` that was seen.
    """

    key: str
    load: Callable[[int], np.ndarray]
    caption: str | None
    meta: dict[str, Any] = field(default_factory=dict)
    sides: Callable[[], tuple[int, int]] | None = None
    heldout: bool | None = None
    absent: str = ""
    unusable: str = ""
    where: str = ""


class Source(Protocol):
    """`items` gives everything, in a fixed order, each time it is called; nothing is decoded yet."""

    def items(self) -> Iterable[SourceItem]: ...
