"""One split of image-text shards, written shard by shard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.common import storage
from data_pipeline.common.errors import UserError
from data_pipeline.common.temp_files import sweep
from data_pipeline.shards.manifest import Shard
from data_pipeline.shards.rejects import examples, format_counts, summary
from data_pipeline.shards.writer import ShardWriter


class SplitWriter:
    """A split being written: one shard of samples in memory, the earlier ones published."""

    def __init__(self, root: str, shard_size: int) -> None:
        self.root, self.shard_size = root, shard_size
        self.shards: list[Shard] = []
        self.writer = ShardWriter()
        self.sides: Counter[tuple[int, int]] = Counter()  # of pictures: height, width

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been added."""
        return not self.shards and not self.writer.count

    def add(self, key: str, sample: dict[str, Any]) -> None:
        self.writer.add(key, sample)
        self.sides[sample["png"].shape[:2]] += 1
        if self.writer.count == self.shard_size:
            self._publish()

    def close(self, left_out: str, aside: Sequence[Mapping[str, str]], alone: bool = True) -> None:
        """Publish the last samples; shards of an earlier run are removed. left_out, aside: what the message says if no
        sample is left: the counts of all splits, and the samples set aside; alone: no other split has samples."""
        if self.writer.count:
            self._publish()
        remove_leftovers(self.root, len(self.shards))
        sweep(storage.join(self.root, "shards"))
        if not self.shards:
            why = "; ".join(part for part in (left_out, format_counts(summary(aside), 3), examples(aside)) if part)
            raise UserError(
                f"no picture of a split can be used: {self.root} would be empty ({why}): check the source and "
                f"filters={'' if alone else ', or set heldout_every=null'}."
            )

    def _publish(self) -> None:
        self.shards.append(self.writer.publish(self.root, f"shards/{len(self.shards):06d}.tar"))
        self.writer = ShardWriter()


def remove_leftovers(root: str | Path, number: int) -> None:
    """Remove shards from `number` on: an interrupted earlier run with more shards may have left some."""
    while storage.exists(storage.join(root, f"shards/{number:06d}.idx")):
        for ending in ("tar", "idx"):
            storage.remove(storage.join(root, f"shards/{number:06d}.{ending}"))
        number += 1
