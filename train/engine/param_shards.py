"""Pieces of parameters, as ZeRO deals them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

Shards = Sequence[Tensor]  # a rank's tensors of one kind; those of another kind are cut in the same way


class Fragment(NamedTuple):
    """`length` values from `start` of the flattened parameter `name`: at `offset` of shard number `shard`."""

    name: str
    start: int
    length: int
    shard: int
    offset: int

    def of(self, shards: Shards) -> Tensor:
        """The piece itself, a view."""
        return shards[self.shard].detach().view(-1).narrow(0, self.offset, self.length)
