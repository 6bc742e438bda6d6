"""What make_shards reads from: a sequence of items, each of which can be loaded by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from data_pipeline.images.decode import Picture
from data_pipeline.images.framing import Framing


@dataclass(frozen=True, slots=True)
class SourceItem:
    """load(framing) -> the picture, resized; caption is None if there is none: uncaptioned says why.

    sides() -> width and height of the original picture; None: a drawing, of any size. heldout: None leaves it to
    heldout_every. absent: why, according to the source itself, there is no picture. unusable: why the item must be set
    aside; where: the picture's path. captions: all by name, if there are several; the first is `caption`. converted:
    what was changed in, or left out of, the picture's caption and metadata, in words that are counted.
    """

    key: str
    load: Callable[[Framing], Picture]
    caption: str | None
    meta: dict[str, Any] = field(default_factory=dict)
    sides: Callable[[], tuple[int, int]] | None = None
    heldout: bool | None = None
    absent: str = ""
    unusable: str = ""
    where: str = ""
    uncaptioned: str = ""
    captions: dict[str, str] = field(default_factory=dict)
    converted: tuple[str, ...] = ()


class Source(Protocol):
    """`items` lists everything, in a fixed order, each time it is called; nothing is decoded yet."""

    def items(self) -> Iterable[SourceItem]: ...
