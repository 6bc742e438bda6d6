"""Sizes come from each sample's json, and their means from the manifest, or from the samples."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from data_pipeline.common.errors import DataError, UserError
from data_pipeline.loading import loader
from data_pipeline.loading.loader import Loader, LoaderConfig, read_dataset
from data_pipeline.shards import json_fields
from data_pipeline.shards.json_fields import mean_in_manifest, mean_size, size_sums
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.writer import ShardWriter


def meta(n):
    return {
        "original_size": [100 + 3 * n, 7000 + n],
        "crop_top_left": [n % 4, 0],
        "target_size": [64, 48 + 16 * (n % 2)],
    }


def six(n):
    return [value for pair in meta(n).values() for value in pair]


def write(root, metas, sizes, dtype=lambda n: np.float16):
    """A latent data set of these jsons, without anything on sizes in its manifest."""
    shards, numbers = [], itertools.count()
    for i, size in enumerate(sizes):
        writer = ShardWriter()
        for n in itertools.islice(numbers, size):
            writer.add(
                f"{n:03d}", {"moments.npy": np.full((2, 2), n, dtype(n)), "json": {**metas[n], "caption": str(n)}}
            )
        shards.append(writer.publish(root, f"shards/{i:06d}.tar"))
    Manifest("latents", tuple(shards), {"moments.npy": {}, "json": {}}).save(root)
    return str(root)


@pytest.fixture
def latents(tmp_path):
    return write(tmp_path, [meta(n) for n in range(12)], (5, 7))


def workers_here(make, count, ahead):
    return zip(*(make(worker, count) for worker in range(count)), strict=True)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dtype", [lambda n: np.float16, lambda n: [np.float16, np.float32][n % 2]])
def test_a_batch_has_the_six_numbers_of_each_of_its_samples(tmp_path, monkeypatch, workers, dtype):
    """Also where arrays are decoded one by one, as their dtypes differ."""
    monkeypatch.setattr(loader, "Workers", workers_here)
    root = write(tmp_path, [meta(n) for n in range(12)], (5, 7), dtype)
    for batch in itertools.islice(Loader(root, 4, LoaderConfig(2, workers), json_fields=("size",)), 6):
        assert batch.to("cpu").tensors["size"].tolist() == [six(int(key)) for key in batch.keys]
        assert batch.tensors["size"].dtype == torch.float32


def test_samples_have_them_too(latents):
    assert [sample["size"].tolist() for sample in read_dataset(latents, 3, ("size",))] == [six(n) for n in range(3)]


def test_without_being_asked_for_nothing_is_read(latents):
    assert set(next(iter(Loader(latents, 4, LoaderConfig(2)))).tensors) == {"moments"}
    assert "size" not in read_dataset(latents, 1)[0]


BAD = [
    {"crop_top_left": None},
    {"original_size": [3]},
    {"target_size": ["a", 3]},
    {"original_size": [3, -1]},
    {"crop_top_left": [True, 1]},
]


@pytest.mark.parametrize("changed", BAD)
def test_a_json_without_a_size_is_named(tmp_path, changed):
    metas = [meta(n) for n in range(12)]
    metas[8] |= changed
    root = write(tmp_path, metas, (5, 7))
    reason = f"sample 008 of shard .*000001.tar: its json has no {next(iter(changed))} of two numbers"
    with pytest.raises(DataError, match=reason):
        list(itertools.islice(Loader(root, 4, LoaderConfig(2, prefetch=0), json_fields=("size",)), 3))
    with pytest.raises(UserError, match=f"conditioning=size: {reason}.*: make the latents with precompute"):
        mean_size(root, Manifest.load(root))
    assert size_sums(metas) is None


def test_means_are_of_all_samples_or_of_evenly_spaced_ones(tmp_path, monkeypatch):
    sizes = (1, 4, 0, 20, 5)
    root = write(tmp_path, [meta(n) for n in range(30)], sizes)
    every = np.mean([six(n) for n in range(30)], 0).tolist()
    assert mean_size(root, Manifest.load(root)) == (every, 30)
    monkeypatch.setattr(json_fields, "MEASURED_ON", 10)
    assert mean_size(root, Manifest.load(root)) == (np.mean([six(n) for n in range(0, 30, 3)], 0).tolist(), 10)


def test_the_manifests_mean_is_that_of_the_samples(latents):
    """In a data set of this version, no sample is read for it."""
    parts = [size_sums([meta(n) for n in part]) for part in (range(5), range(5, 12))]
    manifest = Manifest.load(latents)
    with_mean = dataclasses.replace(manifest, info=mean_in_manifest(parts), shards=())
    assert mean_size("nowhere", with_mean) == mean_size(latents, manifest)
    assert mean_in_manifest([parts[0], None]) == {}  # a shard of an earlier version
    edited = dataclasses.replace(manifest, info={"size_conditioning": {"count": 3, "mean": "large"}})
    with pytest.raises(DataError, match=r"manifest\.json: size_conditioning: mean=large"):
        mean_size(latents, edited)
