"""Checks before training that each node's scratch folder has room for the files that its ranks write there."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.common import storage
from data_pipeline.common.errors import UserError
from train.distributed.collectives import gathered_objects


def refuse_little_room(folder: Path, needed: int) -> None:
    """UserError on all ranks if a node's disk has less free space than its ranks need. needed: bytes for this rank."""
    found = gathered_objects((storage.HOST, needed, storage.free_bytes(folder)))
    for node in dict.fromkeys(host for host, *_ in found):
        of_node = sum(needed for host, needed, _ in found if host == node)
        free = min(free for host, _, free in found if host == node)
        if of_node > free:
            raise UserError(
                f"training.scratch: {folder.parent} on {node} needs {of_node} bytes for a checkpoint's parts, and "
                f"{free} are free: make room there, or name another disk."
            )
