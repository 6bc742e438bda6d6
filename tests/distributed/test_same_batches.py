"""The ids of every global batch over three epochs, at 1 to 8 ranks and 0 to 3 workers: of one data set, of a mix, and
of buckets; few shards, and none."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loaders import loader_of

from data_pipeline.common.errors import DataError, UserError
from data_pipeline.loading import loader
from data_pipeline.loading.batch import Batch
from data_pipeline.shards.input_option import Input
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.writer import ShardWriter

SIZES = [9, 0, 17, 4, 11, 30, 1, 25, 8, 13, 2, 7, 19]  # an odd number of shards, one of them empty: 146 samples
BATCH, STREAMS = 24, 24
STEPS = 19  # 456 samples, three epochs and a little
# Ranks, rank, workers.
REAL = [(2, 1, 3), *(pytest.param(*real, marks=pytest.mark.exhaustive) for real in ((1, 0, 1), (8, 7, 3)))]


def write_latents(root: Path, sizes: list[int], number: int = 0, width: int = 2) -> str:
    """number: of the first sample."""
    shards = []
    for i, size in enumerate(sizes):
        writer = ShardWriter()
        for _ in range(size):
            moments = np.full((8, 2, width), number, np.float16)
            writer.add(f"{number:04d}", {"moments.npy": moments, "json": {"caption": f"picture {number}"}})
            number += 1
        shards.append(writer.publish(root, f"shards/{i:06d}.tar"))
    field = {"dtype": "float16", "shape": [8, 2, width]}
    Manifest("latents", tuple(shards), {"moments.npy": field, "json": {}}).save(root)
    return str(root)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_latents(tmp_path_factory.mktemp("set"), SIZES)


@pytest.fixture(scope="module", params=["one", "mix", "buckets"])
def data(request: pytest.FixtureRequest, latents: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One data set; three of 146, 30 and 5 samples mixed 3 : 2 : 1; the same three as buckets of different shapes."""
    if request.param == "one":
        return latents
    folder, numbers = tmp_path_factory.mktemp(request.param), itertools.count(0, 1000)
    for (name, sizes), number in zip({"2x2": SIZES, "2x4": [20, 10], "2x6": [5]}.items(), numbers, strict=False):
        width = 2 if request.param == "mix" else int(name[2:])
        write_latents(folder / name / "train", sizes, number, width)
    weights = {"2x2": 3, "2x4": 2, "2x6": 1}
    listed = [{"path": str(folder / name), "weight": weight} for name, weight in weights.items()]
    return Input.of(listed if request.param == "mix" else str(folder)).split("train")


def batches(root: Any, ranks: int, rank: int, workers: int, steps: int = STEPS, **how: Any) -> list[Batch]:
    how = {"window_shards": 2} | how
    loader = loader_of(root, BATCH, STREAMS, seed=5, rank=rank, world_size=ranks, num_workers=workers, **how)
    return list(itertools.islice(loader, steps))


def ids(parts: list[Batch]) -> list[list[str]]:
    return [[f"{key} {caption}" for key, caption in zip(part.keys, part.captions, strict=True)] for part in parts]


@pytest.fixture(scope="module")
def alone(data: Any) -> list[list[str]]:
    return ids(batches(data, 1, 0, 0))


class WorkersHere:
    """Workers' shares of the streams, made in turns in this process."""

    def __init__(self, make: Any, count: int, ahead: int) -> None:
        self.made = [make(worker, count) for worker in range(count)]

    def __iter__(self) -> Iterator[list[Any]]:
        return zip(*self.made, strict=True)


def test_each_id_once_an_epoch(latents: str) -> None:
    """The epochs' ends are the streams' own: counted there, each id comes exactly once."""
    plan = loader_of(latents, BATCH, STREAMS, seed=5, window_shards=2).plan
    keys = [part.keys for part in batches(latents, 1, 0, 0)]
    for epoch in range(3):
        came: Counter[str] = Counter()
        for stream in range(STREAMS):
            positions = range(plan.stream_start(stream, epoch), plan.stream_start(stream, epoch + 1))
            came.update(keys[position][stream] for position in positions)
        assert set(came.values()) == {1}
        assert len(came) == sum(SIZES)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_ranks_and_workers_change_no_global_batch(
    data: Any, alone: list[list[str]], ranks: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "Workers", WorkersHere)
    of_ranks = [ids(batches(data, ranks, rank, workers)) for rank in range(ranks)]
    assert [list(itertools.chain(*step)) for step in zip(*of_ranks, strict=True)] == alone


@pytest.mark.processes
@pytest.mark.parametrize(("ranks", "rank", "workers"), REAL)
def test_so_do_worker_processes(data: Any, alone: list[list[str]], ranks: int, rank: int, workers: int) -> None:
    own = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    parts = batches(data, ranks, rank, workers)
    assert ids(parts) == [step[own] for step in alone]
    for part in parts:
        assert part.tensors["moments"][:, 0, 0, 0].tolist() == [float(key) for key in part.keys]
        assert not part.bucket or part.tensors["moments"].shape[-1] == int(part.bucket[2:])


@pytest.mark.timeout(60)
def test_one_shard_for_eight_ranks(tmp_path: Path) -> None:
    root = write_latents(tmp_path, [50])
    whole = ids(batches(root, 1, 0, 0, 10))
    of_ranks = [ids(batches(root, 8, rank, 0, 10)) for rank in range(8)]
    assert [list(itertools.chain(*step)) for step in zip(*of_ranks, strict=True)] == whole
    assert len(set(itertools.chain(*whole))) == 50


@pytest.mark.timeout(60)
@pytest.mark.parametrize("sizes", [[], [0], [0, 0, 0]])
def test_a_set_without_samples_is_refused(tmp_path: Path, sizes: list[int]) -> None:
    with pytest.raises(DataError, match="has no samples"):
        loader_of(write_latents(tmp_path, sizes), 8, 8, world_size=8)


@pytest.mark.timeout(60)
def test_fewer_samples_than_streams_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"5 samples can't fill 8 streams: set data\.streams=5"):
        loader_of(write_latents(tmp_path, [5, 0]), 8, 8, world_size=8)
