"""Arrays are copied as they are stored, and what is written otherwise comes with the same values."""

import itertools
import threading

import numpy as np
import pytest
import torch
from loaders import loader_of

from data_pipeline.common.errors import DataError
from data_pipeline.loading import loader
from data_pipeline.loading.array_batch import ArrayLayout, empty, not_finite
from data_pipeline.loading.batch import Batch, DataCursor
from data_pipeline.shards import codec
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.writer import ShardWriter

DTYPES = ["float16", "float32", "float64", "int8", "uint8", "int32", "int64"]


def write(root, arrays, sizes=(5, 7)):
    """A latent data set whose sample n has arrays(n), by name."""
    shards, number = [], 0
    for i, size in enumerate(sizes):
        writer = ShardWriter()
        for _ in range(size):
            members = {f"{name}.npy": value for name, value in arrays(number).items()}
            writer.add(f"{number:03d}", {**members, "json": {"caption": f"picture {number}"}})
            number += 1
        shards.append(writer.publish(root, f"shards/{i:06d}.tar"))
    fields = {f"{name}.npy": {} for name in arrays(0)} | {"json": {}}
    Manifest("latents", tuple(shards), fields).save(root)
    return str(root)


def workers_here(make, count, ahead):
    """Workers' shares in turns, in this process."""
    return zip(*(make(worker, count) for worker in range(count)), strict=True)


def first(root, count=3, **how):
    return list(itertools.islice(loader_of(root, 4, 2, **how), count))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_as_stored_and_is_widened_on_its_way(tmp_path, dtype):
    values = np.random.default_rng(0).integers(0, 100, (12, 3, 5)).astype(dtype)
    root = write(tmp_path, lambda n: {"moments": values[n], "label": np.asarray(n, dtype)})
    for batch in first(root):
        numbers = [int(key) for key in batch.keys]
        assert batch.captions == tuple(f"picture {n}" for n in numbers)
        assert batch.tensors["moments"].dtype == getattr(torch, dtype)
        np.testing.assert_array_equal(batch.tensors["moments"].numpy(), values[numbers])
        wide = batch.to("cpu").tensors
        assert wide["moments"].dtype == (torch.float32 if "float" in dtype else torch.int64)
        assert wide["label"].tolist() == numbers


def test_bfloat16_is_read_as_two_bytes_without_a_type(tmp_path):
    values = torch.randn(12, 3, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    root = write(tmp_path, lambda n: {"moments": values[n].view(torch.int16).numpy().view(np.dtype("V2"))})
    for batch in first(root):
        assert batch.tensors["moments"].dtype == torch.bfloat16
        assert torch.equal(batch.tensors["moments"], values[[int(key) for key in batch.keys]])
        assert batch.to("cpu").tensors["moments"].dtype == torch.float32


@pytest.mark.parametrize("odd", [np.asfortranarray, lambda v: v.astype(">f2"), lambda v: v.astype(np.float32)])
@pytest.mark.parametrize("which", [lambda n: n % 3 == 0, lambda n: True])
@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_written_otherwise_has_the_same_values(tmp_path, monkeypatch, odd, which, workers):
    monkeypatch.setattr(loader, "Workers", workers_here)
    values = np.random.default_rng(0).random((12, 3, 5), np.float32).astype(np.float16)
    root = write(tmp_path, lambda n: {"moments": odd(values[n]) if which(n) else values[n]})
    for batch in first(root, 6, num_workers=workers):
        got = batch.to("cpu").tensors["moments"]
        np.testing.assert_array_equal(got.numpy(), values[[int(key) for key in batch.keys]].astype(np.float32))


def test_a_sample_that_lacks_a_field_or_has_another_shape_is_named(tmp_path):
    whole = {"moments": np.zeros((2, 2), np.float16)}
    root = write(tmp_path / "a", lambda n: whole if n != 7 else {"moments": np.zeros((2, 3), np.float16)})
    with pytest.raises(DataError, match=r"sample 007 has moments of shape \(2, 3\)"):
        first(root)
    root = write(tmp_path / "b", lambda n: whole if n != 7 else {"other": np.zeros(2, np.float16)})
    with pytest.raises(DataError, match=r"sample 007 of shard .*: it lacks moments\.npy"):
        first(root)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_each_half_that_is_not_finite_is_found_and_no_other(dtype):
    """All 65,536 of them, each the last of its row."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = torch.isfinite(halves)
    assert not_finite(torch.stack([torch.ones(len(halves), dtype=dtype), halves], 1)[finite]) is None
    for value in halves[~finite]:
        rows = torch.ones(3, 2, dtype=dtype)
        rows[1, 1] = value
        assert not_finite(rows) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_floats_that_are_not_finite(dtype):
    limits = torch.finfo(dtype)
    good = torch.tensor([[0.0, -0.0, limits.max, limits.min, limits.tiny, -limits.tiny, 1e-40, -1.5]], dtype=dtype)
    assert not_finite(good) is None
    for value in (float("inf"), float("-inf"), float("nan"), -float("nan")):
        assert not_finite(torch.cat([good, torch.full((1, 8), value, dtype=dtype), good])) == 1
    assert not_finite(torch.zeros(0, 3, dtype=dtype)) is None
    assert not_finite(torch.full((2,), -1)) is None


def test_layouts_of_what_can_not_be_copied():
    plain = codec.encode("x.npy", np.zeros((2, 3), np.float16))
    assert ArrayLayout.of(plain)[1:] == (np.dtype("f2"), (2, 3))
    assert plain.startswith(ArrayLayout.of(plain).header)
    for other in (np.zeros(2, bool), np.zeros(2, complex), np.zeros(2, "U3"), np.zeros(2, ">i4")):
        assert ArrayLayout.of(codec.encode("x.npy", other)) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_batches_are_pinned_where_cuda_is(tmp_path):
    root = write(tmp_path, lambda n: {"moments": np.full((3, 5), n, np.float16)})
    for batch in first(root) + first(root, num_workers=2):
        assert batch.tensors["moments"].is_pinned()
        assert batch.to("cuda").tensors["moments"][:, 0, 0].tolist() == [float(key) for key in batch.keys]
    values, tensor = empty((2, 3), np.dtype("V2"), True)
    assert tensor.is_pinned()
    assert tensor.dtype == torch.bfloat16
    assert values.shape == (2, 3)


def test_reading_ahead_changes_nothing_and_ends_with_its_reader(tmp_path):
    root = write(tmp_path, lambda n: {"moments": np.full((3, 5), n, np.float16)})
    keys = [batch.keys for batch in first(root, 20, prefetch=0)]
    batches = iter(loader_of(root, 4, 2, prefetch=3))
    assert [batch.keys for batch in itertools.islice(batches, 20)] == keys
    ahead = [thread for thread in threading.enumerate() if "(_make)" in thread.name]
    assert ahead
    batches.close()
    assert not any(thread.is_alive() for thread in ahead)


def test_an_error_ahead_comes_after_the_batches_before_it(tmp_path):
    root = write(tmp_path, lambda n: {"moments": np.full((3, 5 + (n == 11)), n, np.float16)})
    how = {"shuffle": False, "start": DataCursor(0)}
    batches = iter(loader_of(root, 4, 1, **how))
    assert [next(batches).keys[0] for _ in range(2)] == ["000", "004"]
    with pytest.raises(DataError, match="sample 011"):
        next(batches)


def test_a_batch_is_widened_as_a_whole():
    batch = Batch(("a",), ("",), {"x": torch.zeros(1, 2).half(), "n": torch.zeros(1).int()}, (0,), 0, DataCursor())
    assert {value.dtype for value in batch.to("cpu").tensors.values()} == {torch.float32, torch.int64}
