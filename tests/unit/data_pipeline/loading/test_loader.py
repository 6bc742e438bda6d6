"""Batches follow the plan, whatever the number of ranks, micro-batches and workers."""

import hashlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from loaders import loader_of

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, UserError
from data_pipeline.loading import sample_reader
from data_pipeline.loading.batch import DataCursor
from data_pipeline.loading.epoch_plan import EpochPlan
from data_pipeline.loading.loader import read_dataset
from data_pipeline.loading.sample_reader import SampleReader
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.tar_index import read_index, refuse_other_bytes
from data_pipeline.shards.writer import ShardWriter

SIZES = [7, 5, 9, 6]


def take(loader, count):
    return list(itertools.islice(loader, count))


def same(one, other):
    assert (one.keys, one.captions, one.streams, one.step, one.cursor) == (
        other.keys,
        other.captions,
        other.streams,
        other.step,
        other.cursor,
    )
    assert one.tensors.keys() == other.tensors.keys()
    for name, value in one.tensors.items():
        assert torch.equal(value, other.tensors[name])


@pytest.fixture
def images(tmp_path, make_images):
    return make_images(tmp_path / "set", SIZES)


def test_a_batch_is_what_the_plan_says(images, picture):
    plan = EpochPlan(SIZES, 5, 8, 4)
    firsts = np.cumsum([0, *SIZES])
    for step, batch in enumerate(take(loader_of(images, 8, 4, seed=5), 12)):
        numbers = [int(firsts[shard] + i) for shard, i in plan.step(step)]
        assert batch.keys == tuple(f"key{n:04d}" for n in numbers)
        assert batch.captions == tuple(f"thing {n % 5}" for n in numbers)
        expected = np.stack([picture(n).transpose(2, 0, 1) for n in numbers]).astype(np.float32) / 127.5 - 1
        np.testing.assert_allclose(batch.tensors["image"].numpy(), expected, atol=1e-6)
        assert batch.tensors["image"].dtype == torch.float32
        assert (batch.step, batch.cursor, batch.streams) == (step, DataCursor(step + 1), (0, 1, 2, 3))


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_share_the_global_batch(images, world_size, accumulation):
    whole = take(loader_of(images, 8, 4), 6)
    ranks = [
        take(loader_of(images, 8, 4, rank=r, world_size=world_size, accumulation=accumulation), 6 * accumulation)
        for r in range(world_size)
    ]
    for step, expected in enumerate(whole):
        parts = [b for rank in ranks for b in rank[step * accumulation : (step + 1) * accumulation]]
        assert all(part.step == step for part in parts)
        assert tuple(key for part in parts for key in part.keys) == expected.keys
        assert tuple(stream for part in parts for stream in part.streams) == expected.streams
        assert torch.equal(torch.cat([part.tensors["image"] for part in parts]), expected.tensors["image"])


def test_starting_at_a_cursor_goes_on_where_it_stopped(images):
    whole = take(loader_of(images, 8, 4), 9)
    for one, other in zip(take(loader_of(images, 8, 4, start=whole[5].cursor), 3), whole[6:], strict=True):
        same(one, other)


@pytest.mark.processes
def test_workers_change_nothing_and_hand_on_a_damaged_shard(images):
    without = take(loader_of(images, 8, 4, accumulation=2), 10)
    for one, other in zip(take(loader_of(images, 8, 4, accumulation=2, num_workers=2), 10), without, strict=True):
        same(one, other)
    spoil(images, "png")
    with pytest.raises(DataError, match=r"^sample key0008 of shard .*000001\.tar: undecodable \.png"):
        take(loader_of(images, 8, 4, num_workers=1), 10)


def spoil(root, member, value=b"x", restamp=True):
    """Fill a member of sample key0008, in shard 1, with `value`; as if it had been written so, with `restamp`."""
    manifest = Manifest.load(root)
    shard = manifest.shards[1]
    data = bytearray(storage.read_bytes(f"{root}/{shard.name}"))
    offset, size = read_index(root, shard)[1].members[member]
    data[offset : offset + size] = value.ljust(size, value if len(value) == 1 else b" ")
    storage.write_atomically(f"{root}/{shard.name}", bytes(data))
    if restamp:
        shards = list(manifest.shards)
        shards[1] = replace(shard, sha256=hashlib.sha256(data).hexdigest())
        replace(manifest, shards=tuple(shards)).save(root)


@pytest.mark.processes
def test_a_stop_that_reaches_the_workers_does_not_end_them(images):
    batches = iter(loader_of(images, 8, 4, num_workers=1))
    got = [next(batches)]
    for worker in multiprocessing.active_children():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker.pid, number)
    got += take(batches, 14)  # more than was fetched ahead
    for one, other in zip(got, take(loader_of(images, 8, 4), 15), strict=True):
        same(one, other)


def test_a_changed_shard_is_named_when_it_is_opened_and_checked_once(images, monkeypatch):
    digests = []

    def watched(data, path, shard):
        digests.append(shard.name)
        return refuse_other_bytes(data, path, shard)

    monkeypatch.setattr(sample_reader, "refuse_other_bytes", watched)
    take(loader_of(images, 4, 4, window_shards=1, cache_mb=0), 40)
    assert sorted(digests) == [f"shards/{i:06d}.tar" for i in range(4)]
    spoil(images, "txt", b"thing 9", restamp=False)  # a caption that can be read as well as the one before
    with pytest.raises(DataError, match=r"000001\.tar is damaged \(its sha256 .* copy it again"):
        take(loader_of(images, 8, 4), 10)
    with pytest.raises(DataError, match=r"000001\.tar is damaged"):
        read_dataset(images)


def test_json_that_is_no_object_is_named(images):
    spoil(images, "json", b"[1]")
    for use in (lambda: take(loader_of(images, 8, 4), 10), lambda: read_dataset(images)):
        with pytest.raises(DataError, match=r"sample key0008 of shard .*undecodable \.json \(not an object but list\)"):
            use()


@pytest.mark.parametrize("cache_mb", [0.0, 0.002])
def test_a_small_cache_changes_nothing(images, cache_mb):
    for one, other in zip(
        take(loader_of(images, 8, 4, cache_mb=cache_mb), 12), take(loader_of(images, 8, 4), 12), strict=True
    ):
        same(one, other)


def test_each_shard_is_opened_once_an_epoch_and_few_are_held(tmp_path, make_images, monkeypatch):
    """Two streams, no cache: 48 shards of which each stream shuffles 1 or 2 together, a sample at a time."""
    root = make_images(tmp_path / "set", [2, 6] * 24)  # so that streams do not change windows in step
    opened, held = [], []
    read = SampleReader._shard

    def watched(self, number):
        opened.append(number)
        held.append(len(self.shards.keys() | self.opening.keys()))
        return read(self, number)

    monkeypatch.setattr(SampleReader, "_shard", watched)
    take(loader_of(root, 2, 2, cache_mb=0, window_shards=1, prefetch=0), 3 * 96)
    assert set(opened) == set(range(48))
    # 3 epochs; in each the one that the cut between the streams goes through comes twice; and what is opened ahead
    assert len(opened) <= 3 * 49 + 6
    assert max(held) <= 12


@pytest.mark.processes
def test_a_process_that_leaves_takes_its_workers_with_it(images, tmp_path):
    """Workers ignore TERM, by which Python would end them before it waits for them."""
    script = tmp_path / "leaves.py"
    script.write_text(
        "from data_pipeline.loading.loader import Loader, LoaderConfig\n"
        "if __name__ == '__main__':\n"
        f"    batches = iter(Loader({str(images)!r}, 8, LoaderConfig(4, num_workers=1)))\n"
        "    next(batches)\n"
        "    raise SystemExit(7)\n"
    )
    assert subprocess.run([sys.executable, str(script)], timeout=60).returncode == 7


def test_checks_before_the_first_batch(images, tmp_path):
    with pytest.raises(UserError, match=r"data\.streams=4 can't be shared by 3 ranks"):
        loader_of(images, 8, 4, world_size=3)
    assert take(loader_of(images, 10 * 27 // 4 * 4, 4), 1)  # nine times each
    with pytest.raises(
        UserError, match=r"batch_size=272 would read all of .* \(27 samples\) more than 10 times a step"
    ):
        loader_of(images, 272, 4)
    with pytest.raises(UserError, match=r"data\.num_workers=5"):
        loader_of(images, 8, 4, num_workers=5)
    with pytest.raises(UserError, match="is not a data set"):
        loader_of(str(tmp_path / "nowhere"), 8, 4)
    path = tmp_path / "set" / "shards" / "000002.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"000002\.tar has \d+ bytes"):
        loader_of(images, 8, 4)


def latents_set(root, shapes):
    writer = ShardWriter()
    for i, shape in enumerate(shapes):
        arrays = {"moments.npy": np.full(shape, i, np.float16), "text.npy": np.full((3, 4), i, np.float16)}
        writer.add(f"k{i}", {**arrays, "pooled.npy": np.zeros(4, np.float16), "json": {"caption": f"c{i}"}})
    fields = {name: {} for name in ("moments.npy", "text.npy", "pooled.npy", "json")}
    Manifest("latents", (writer.publish(root, "shards/000000.tar"),), fields).save(root)
    return str(root)


def test_latents_become_float32_and_one_odd_shape_is_named(tmp_path):
    batch = take(loader_of(latents_set(tmp_path / "a", [(8, 2, 2)] * 4), 4, 2, shuffle=False), 1)[0]
    assert {value.dtype for value in batch.tensors.values()} == {torch.float16}  # half the bytes to move
    batch = batch.to("cpu")
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.tensors.items()} == {
        "moments": (torch.float32, (4, 8, 2, 2)),
        "text": (torch.float32, (4, 3, 4)),
        "pooled": (torch.float32, (4, 4)),
    }
    assert [float(batch.tensors["moments"][i].mean()) for i in range(4)] == [0, 1, 2, 3]
    assert batch.captions == ("c0", "c1", "c2", "c3")
    odd = latents_set(tmp_path / "b", [(8, 2, 2)] * 3 + [(8, 4, 4)])
    with pytest.raises(DataError, match="sample k3 has moments of shape"):
        take(loader_of(odd, 4, 2, shuffle=False), 1)


def test_read_dataset_is_in_order_and_limited(images, picture):
    samples = read_dataset(images)
    assert [sample["key"] for sample in samples] == [f"key{i:04d}" for i in range(sum(SIZES))]
    np.testing.assert_array_equal(samples[20]["image"], picture(20))
    assert (samples[20]["caption"], samples[20]["meta"]) == ("thing 0", {"number": 20})
    assert [sample["key"] for sample in read_dataset(images, limit=9)] == [f"key{i:04d}" for i in range(9)]
