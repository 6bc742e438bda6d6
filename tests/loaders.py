"""Loaders for tests, in one line: options of LoaderConfig and the position in the data together."""

from __future__ import annotations

from typing import Any

from data_pipeline.loading.loader import Loader, LoaderConfig

POSITION = ("seed", "rank", "world_size", "accumulation", "start")


def loader_of(root: Any, batch_size: int, streams: int, **how: Any) -> Loader:
    """loader_of(root, 8, 4, num_workers=2, rank=1, world_size=2)."""
    position = {name: how.pop(name) for name in POSITION if name in how}
    return Loader(root, batch_size, LoaderConfig(streams, **how), **position)
