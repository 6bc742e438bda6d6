"""A loader that fails on rank 1 at a given step: data._target_=failing_loader.FailingLoader."""

from __future__ import annotations

import time
from collections.abc import Iterator

from data_pipeline.common.errors import DataError
from data_pipeline.loading.batch import Batch
from data_pipeline.loading.loader import Loader

BAD_STEP = 5


class FailingLoader(Loader):
    """does: the kind of failure, crash, damaged or starve."""

    def __init__(self, *args, does: str = "nothing", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.does = does if kwargs.get("rank") == 1 else "nothing"

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
