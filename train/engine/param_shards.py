"""Pieces of parameters, as ZeRO partitions them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

Shards = Sequence[Tensor]  # a rank's tensors of one kind; all kinds are partitioned in the same way


class Fragment(NamedTuple):
    """`length` values of the flattened parameter `name` from `start` on, stored at `offset` of shard number `shard`."""

    name: str
    start: int
    length: int
    shard: int
    offset: int

    def of(self, shards: Shards) -> Tensor:
        """The piece itself, as a view."""
        return shards[self.shard].detach().view(-1).narrow(0, self.offset, self.length)
