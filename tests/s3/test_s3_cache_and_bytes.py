"""What an epoch reads of a bucket, counted at a proxy, and the cache of shards that a node's processes share."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest
import torch
from fault_proxy import FaultProxy
from loaders import loader_of
from synthetic import started, write_latents

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.loading.shard_cache import ShardCache, open_shard, seen
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.tar_index import read_index

pytestmark = pytest.mark.xdist_group("s3")  # one server for them all

SAMPLES, SHARD_SIZE, BATCH, STREAMS = 104, 8, 8, 8
SHAPES = {"moments.npy": (8, 16, 16), "text.npy": (8, 32), "pooled.npy": (5,)}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("latents")
    write_latents(root, SAMPLES, SHAPES, SHARD_SIZE)
    return root


@pytest.fixture
def remote(local: Path, bucket: str, server) -> str:
    upload(local, bucket, server.client())
    return f"s3://{bucket}/latents"


def upload(local: Path, bucket: str, client: boto3.client) -> None:
    for path in local.rglob("*.*"):
        client.put_object(Bucket=bucket, Key=f"latents/{path.relative_to(local)}", Body=path.read_bytes())


def epoch(root: str, rank: int = 0, world_size: int = 1, num_workers: int = 0, batch: int = BATCH, **more: int) -> list:
    how = {"cache_mb": 0, "prefetch": min(num_workers, 1)}  # without workers, nothing of the next epoch
    shared = {"rank": rank, "world_size": world_size, "num_workers": num_workers, **how, **more}
    batches = iter(loader_of(root, batch, STREAMS, **shared))
    return [next(batches) for _ in range(SAMPLES // batch)]


def shard_bytes(local: Path) -> int:
    return sum(shard.bytes for shard in Manifest.load(local).shards)


def same(one: list, other: list) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a.keys, a.captions) == (b.keys, b.captions)
        assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in b.tensors)


def test_an_epoch_reads_the_data_set_once(remote, local, proxy: FaultProxy):
    same(epoch(remote), epoch(str(local)))
    assert 0.9 * shard_bytes(local) < proxy.bytes_read(".tar") <= shard_bytes(local)
    assert proxy.bytes_read() < 1.05 * shard_bytes(local)


@pytest.mark.parametrize(("batch", "window_shards"), [(BATCH, 4), (BATCH, 1), (SAMPLES, 1), (SAMPLES // 4, 2)])
def test_four_nodes_together_read_it_once(remote, local, proxy: FaultProxy, batch, window_shards):
    """13 shards for 4 ranks: three of them are shared by two ranks. Also where a step comes of several windows."""
    how = {"batch": batch // STREAMS * STREAMS, "window_shards": window_shards}
    for rank in range(4):
        same(epoch(remote, rank, 4, **how), epoch(str(local), rank, 4, **how))
    assert 0.9 * shard_bytes(local) < proxy.bytes_read(".tar") <= shard_bytes(local)
    listings_and_manifests = 4 * (5000 + (local / "manifest.json").stat().st_size)
    assert proxy.bytes_read() - listings_and_manifests < 1.05 * shard_bytes(local)


@pytest.mark.processes
def test_two_workers_read_it_once(remote, local, proxy: FaultProxy):
    same(epoch(remote, num_workers=2), epoch(str(local)))
    ahead = 2 * 2 * BATCH / SAMPLES  # what workers prefetch of the next epoch: two parts of a step each
    assert proxy.bytes_read(".tar") < (1.05 + ahead) * shard_bytes(local)


def test_changed_bytes_are_refused(remote, local, bucket, server):
    data = bytearray((local / "shards" / "000003.tar").read_bytes())
    data[1000] ^= 1
    server.client().put_object(Bucket=bucket, Key="latents/shards/000003.tar", Body=bytes(data))
    loader = loader_of(remote, BATCH, 1, cache_mb=0)  # one stream: it reads all shards as a whole
    batches = iter(loader)
    with pytest.raises(DataError, match=r"000003.tar is damaged \(its sha256"):
        [next(batches) for _ in range(SAMPLES // BATCH)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: Path) -> ShardCache:
    """One that all shards fit into."""
    return configured(tmp_path / "cache", 2 * shard_bytes(local), monkeypatch)


def configured(folder: Path, capacity: int, monkeypatch: pytest.MonkeyPatch) -> ShardCache:
    monkeypatch.setenv("STORE_CACHE", str(folder))
    monkeypatch.setenv("STORE_CACHE_GB", str(capacity / 1e9))
    seen.clear()
    return ShardCache.configured()


def held(cache: ShardCache) -> list[Path]:
    return sorted(path for path in cache.folder.iterdir() if path.suffix != ".lock")


def test_a_second_epoch_comes_of_the_cache(remote, local, proxy, cache):
    first = epoch(remote)
    assert proxy.bytes_read(".tar") == shard_bytes(local)
    assert len(held(cache)) == len(Manifest.load(local).shards)
    same(epoch(remote), first)
    assert proxy.bytes_read(".tar") == shard_bytes(local)


@pytest.mark.processes
def test_processes_of_a_node_fetch_each_shard_once(remote, local, proxy, cache, tmp_path):
    arguments = ["tests/reads_an_epoch.py", remote, str(tmp_path)]
    processes = [started(tmp_path / f"log{i}", *arguments) for i in range(3)]
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 3 or any(process.poll() for process in processes))
    (tmp_path / "go").touch()
    assert [process.wait(60) for process in processes] == [0, 0, 0], (tmp_path / "log0").read_text()
    assert proxy.bytes_read(".tar") == shard_bytes(local)


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped"])
def test_a_damaged_cached_shard_is_fetched_again(remote, local, proxy, cache, damage):
    shard = Manifest.load(local).shards[0]
    entries = read_index(remote, shard)
    data = (local / shard.name).read_bytes()
    assert open_shard(remote, shard, entries, lambda: [])[:] == data
    (path,) = held(cache)
    path.write_bytes({"cut": data[:-1], "empty": b"", "flipped": bytes([data[0] ^ 1]) + data[1:]}[damage])
    seen.clear()  # as in another process
    assert open_shard(remote, shard, entries, lambda: [])[:] == data
    assert proxy.bytes_read(".tar") == 2 * len(data)
    assert path.read_bytes() == data


def test_what_was_used_longest_ago_goes_first(remote, local, proxy, tmp_path, monkeypatch):
    shards = Manifest.load(local).shards
    cache = configured(tmp_path / "cache", 3 * shards[0].bytes + 100, monkeypatch)
    for number in (0, 1, 2):
        cache.mapped(remote, shards[number])
        os.utime(cache.folder / f"{shards[number].sha256}.tar", (number, number))
    cache.mapped(remote, shards[0])  # used again: 1 is the oldest now
    cache.mapped(remote, shards[3])
    assert {path.stem for path in held(cache)} == {shards[number].sha256 for number in (0, 2, 3)}
    same(epoch(remote), epoch(str(local)))
    assert sum(path.stat().st_size for path in held(cache)) <= cache.capacity


def test_a_killed_process_leaves_no_lock_and_no_rubbish(remote, local, cache):
    shard = Manifest.load(local).shards[0]
    dead = multiprocessing.get_context("spawn").Process(target=print)
    dead.start()
    dead.join()
    cache.folder.mkdir()
    (cache.folder / f"x.tar.tmp.{storage.HOST}.{dead.pid}").write_bytes(b"half")
    cache.mapped(remote, shard)
    assert [path.stem for path in held(cache)] == [shard.sha256]


def test_a_shard_larger_than_the_cache_is_read_past_it(remote, local, tmp_path, monkeypatch):
    cache = configured(tmp_path / "cache", 1000, monkeypatch)
    same(epoch(remote), epoch(str(local)))
    assert not cache.folder.exists()
