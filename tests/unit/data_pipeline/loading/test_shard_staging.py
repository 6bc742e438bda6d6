"""store.cache for data sets on a file system: shards are copied to the node's own disk, once, and read there."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from loaders import loader_of
from synthetic import TINY_LATENTS, write_latents

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, UserError
from data_pipeline.loading import shard_cache
from data_pipeline.loading.batch import Batch
from data_pipeline.shards.manifest import Manifest, Shard

SAMPLES, SHARD_SIZE, BATCH, STREAMS = 104, 8, 8, 8


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shared") / "latents"
    write_latents(root, SAMPLES, TINY_LATENTS, SHARD_SIZE)
    return root


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache, which is named by a variable of the node."""
    monkeypatch.setenv("NODE_DISK", str(tmp_path))
    monkeypatch.setenv("STORE_CACHE", "$NODE_DISK/shards")
    monkeypatch.setenv("STORE_CACHE_GB", "1")
    shard_cache.seen.clear()
    return tmp_path / "shards"


def epoch(root: Path, **more: int) -> list[Batch]:
    batches = iter(loader_of(str(root), BATCH, STREAMS, cache_mb=0, **more))
    return [next(batches) for _ in range(SAMPLES // BATCH)]


def staged(disk: Path) -> dict[str, tuple[int, int]]:
    return {path.stem: (path.stat().st_ino, path.stat().st_size) for path in disk.glob("*.tar")}


def test_the_batches_are_those_of_the_shared_file_system(shared, disk, monkeypatch):
    copied = epoch(shared)
    assert staged(disk).keys() == {shard.sha256 for shard in Manifest.load(shared).shards}
    monkeypatch.delenv("STORE_CACHE")
    for one, other in zip(copied, epoch(shared), strict=True):
        assert (one.keys, one.captions) == (other.keys, other.captions)
        assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in other.tensors)


def test_ranks_of_a_node_copy_each_shard_once_and_later_ones_none(shared, disk, monkeypatch):
    copies, copy_whole = [], shard_cache.copy_whole
    monkeypatch.setattr(shard_cache, "copy_whole", lambda *given: (copies.append(given[1].name), copy_whole(*given)))
    ranks = [threading.Thread(target=epoch, args=(shared,), kwargs={"rank": 0, "world_size": 1}) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert sorted(copies) == sorted(shard.name for shard in Manifest.load(shared).shards)
    before = staged(disk)
    epoch(shared)
    assert staged(disk) == before
    assert len(copies) == len(before)


def test_bytes_that_changed_are_refused_by_the_name_of_the_shard(shared, disk, tmp_path):
    write_latents(tmp_path / "damaged", SAMPLES, TINY_LATENTS, SHARD_SIZE)
    damaged = tmp_path / "damaged/shards/000003.tar"
    data = bytearray(damaged.read_bytes())
    data[1000] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(DataError, match=rf"{damaged} is damaged \(its sha256"):
        epoch(tmp_path / "damaged")
    assert not list(disk.glob("*.tmp.*"))


def test_a_shard_that_can_not_be_read_is_not_the_fault_of_the_cache(shared, disk, tmp_path):
    shard = Shard("folder.tar", 1, 10, "0" * 64)
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(RuntimeError, match=r"shard .*folder.tar can't be read \(Is a directory\)"):
        shard_cache.open_shard(str(tmp_path), shard, [], lambda: [])


def test_room_is_checked_before_anything_is_read(shared, disk, monkeypatch):
    """As much as the shards need that are not there yet, and no more than the cache may hold."""
    monkeypatch.setenv("STORE_CACHE_GB", "1e9")
    large = Shard("large.tar", 1, 10**17, "1" * 64)
    with pytest.raises(UserError, match=rf"store.cache={disk} on {storage.HOST} needs 100000000000000000 bytes for"):
        shard_cache.refuse_little_room([large])
    assert not disk.exists()
    monkeypatch.setenv("STORE_CACHE_GB", "0.001")
    shard_cache.refuse_little_room([large])  # read past the cache
    shard_cache.refuse_little_room([Shard(f"{i}.tar", 1, 10**5, f"{i:064d}") for i in range(10**4)])


def test_a_shard_that_another_rank_is_fetching_needs_no_second_room(disk, monkeypatch):
    """Its space is allocated when its copy begins: a rank that starts later must not ask for it again."""
    disk.mkdir()
    shards = [Shard(f"{i}.tar", 1, 1000, f"{i:064d}") for i in range(3)]
    (disk / f"{shards[0].sha256}.tar").write_bytes(bytes(1000))
    (disk / f"{shards[1].sha256}.tar.tmp.{storage.HOST}.1").write_bytes(bytes(1000))
    monkeypatch.setattr(storage, "free_bytes", lambda folder: 1000)
    shard_cache.refuse_little_room(shards)
    with pytest.raises(UserError, match="needs 2000 bytes for shards, and 1000 are free"):
        shard_cache.refuse_little_room([*shards, Shard("3.tar", 1, 1000, "3" * 64)])


def test_a_name_that_a_node_can_not_resolve_is_refused(monkeypatch):
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("STORE_CACHE", raising=False)
    for name in ("$EMPTY/shards", "${NOT_SET}/shards"):
        monkeypatch.setenv("STORE_CACHE", name)
        with pytest.raises(UserError, match=r"store.cache=\$.* is not set on .*: name a folder that exists on every"):
            storage.configure()
