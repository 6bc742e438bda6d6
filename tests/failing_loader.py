"""A loader that fails on rank 1 at a given step: data._target_=failing_loader.FailingLoaderConfig."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_pipeline.common.errors import DataError
from data_pipeline.loading.batch import Batch
from data_pipeline.loading.loader import Loader, LoaderConfig

BAD_STEP = 5


@dataclass(frozen=True, slots=True)
class FailingLoaderConfig(LoaderConfig):
    """does: the kind of failure, crash, damaged or starve."""

    does: str = "nothing"

    def loader(self, root: str, batch_size: int, **position: Any) -> FailingLoader:
        return FailingLoader(root, batch_size, self, **position)


class FailingLoader(Loader):
    """Fails at BAD_STEP."""

    def __init__(self, root: str, batch_size: int, config: FailingLoaderConfig, **position: Any) -> None:
        super().__init__(root, batch_size, config, **position)
        self.does = config.does if position.get("rank") == 1 else "nothing"

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if batch.step == BAD_STEP:
                self._be_bad()
            yield batch

    def _be_bad(self) -> None:
        if self.does == "crash":
            raise RuntimeError("something broke")
        if self.does == "damaged":
            raise DataError("sample 000001 of shard shards/000000.tar: cut")
        if self.does == "starve":
            time.sleep(600)
