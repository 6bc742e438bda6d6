"""Encoding: what is stored, what a second start redoes, and which encoders are refused."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.common.device import chosen_device
from data_pipeline.common.errors import DataError, UserError
from data_pipeline.encode.batch_encoder import Encoders
from data_pipeline.encode.caption_cache import CaptionCache
from data_pipeline.encode.encoders import TextStates
from data_pipeline.encode.latent_dataset import SplitToEncode
from data_pipeline.encode.latent_shard import OutputPaths
from data_pipeline.encode.shard_reader import ShardReader
from data_pipeline.encode.split_encoder import encode_split
from data_pipeline.encode.text_conditions import Text
from data_pipeline.images.aspect_buckets import sizes_of
from data_pipeline.loading.loader import read_dataset
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.rejects import Rejects
from data_pipeline.shards.tar_index import read_index


class Halves:
    """Moments by averaging 2x2 pixels; stops the process, so to say, when `stop_after` batches are done."""

    stored_as, factor, stated_scaling = "moments", 2, None

    def __init__(self, fingerprint="image", stop_after=None):
        self.fingerprint, self.batches, self.stop_after = fingerprint, 0, stop_after

    def encode_stored(self, images):
        if self.batches == self.stop_after:
            raise KeyboardInterrupt
        self.batches += 1
        mean = torch.nn.functional.avg_pool2d(images, 2)
        return torch.cat([mean, mean.sin() - 2], 1)

    def posterior_of(self, stored):
        mean, logvar = stored.chunk(2, 1)
        return mean, logvar.exp()


class Letters:
    """States that spell the caption; remembers how many it was asked for."""

    def __init__(self, fingerprint="text"):
        self.fingerprint, self.asked = fingerprint, 0

    def encode_text(self, captions):
        self.asked += len(captions)
        codes = torch.tensor([[float(ord(c)) for c in caption.ljust(8)[:8]] for caption in captions])
        return TextStates(codes[:, :, None].expand(-1, -1, 4) / 8, codes[:, :5])


def encoders(image=None, text=None, dtype="float16", keep=0, **how):
    conditions = how.pop("conditions", {"text": Text()})
    batch_size = how.pop("batch_size", 4)
    text = CaptionCache(text or Letters(), batch_size, keep)
    return Encoders(image or Halves(), text, conditions, torch.device("cpu"), batch_size, dtype, **how)


def precompute(images, root, using, max_aside_fraction=0.05):
    source = Manifest.load(images, "image-text")
    reader = ShardReader(images, using, sizes_of(source.info.get("size"), None, 64, using.image.factor))
    encode_split(SplitToEncode("", source, OutputPaths(str(root)), reader, max_aside_fraction))
    return Manifest.load(root, "latents")


def contents(root):
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(root).rglob("*")
        if path.is_file()
    }


@pytest.fixture
def images(tmp_path, make_images):
    return make_images(tmp_path / "images", [6, 6, 6, 6])


def test_what_is_stored(images, tmp_path):
    manifest = precompute(images, tmp_path / "latents", encoders(flips=True))
    pictures, latents = read_dataset(images), read_dataset(str(tmp_path / "latents"))
    assert [s["key"] for s in latents] == [s["key"] for s in pictures]
    assert [shard.samples for shard in manifest.shards] == [6, 6, 6, 6]
    pixels = torch.from_numpy(np.stack([s["image"] for s in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1
    moments = Halves().encode_stored(pixels).numpy()
    states = Letters().encode_text([s["caption"] for s in pictures])
    for i, sample in enumerate(latents):
        assert sample["moments"].dtype == np.float16
        np.testing.assert_array_equal(sample["moments"], moments[i].astype(np.float16))
        flipped = Halves().encode_stored(pixels[i : i + 1].flip(-1)).numpy()[0]
        np.testing.assert_array_equal(sample["moments_flip"], flipped.astype(np.float16))
        np.testing.assert_array_equal(sample["text"], states.tokens[i].numpy().astype(np.float16))
        np.testing.assert_array_equal(sample["pooled"], states.pooled[i].numpy().astype(np.float16))
        assert (sample["caption"], sample["meta"]["number"]) == (pictures[i]["caption"], i)
    assert manifest.fields["moments.npy"] == {"dtype": "float16", "shape": [6, 4, 4]}
    assert manifest.fingerprints["autoencoder"] == "image"
    assert manifest.fingerprints["text_encoder"] == "text"
    assert manifest.fingerprints["images"] == Manifest.load(images).fingerprint


def test_statistics_are_those_of_posterior_draws(images, tmp_path):
    info = precompute(images, tmp_path / "latents", encoders(dtype="float32")).info
    moments = np.stack([s["moments"] for s in read_dataset(str(tmp_path / "latents"))]).astype(np.float64)
    mean, logvar = np.split(moments, 2, axis=1)
    draws = mean + np.exp(logvar / 2) * np.random.default_rng(0).standard_normal((500, *mean.shape))
    np.testing.assert_allclose(info["latents"]["mean"], mean.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(info["latents"]["std"], draws.std((0, 1, 3, 4)), rtol=5e-3)
    assert info["pixel_range"] == [-1.0, 1.0]


def test_the_null_is_the_encoders_own(images, tmp_path):
    precompute(images, tmp_path / "latents", encoders())
    null, expected = load_file(tmp_path / "latents" / "null.safetensors"), Letters().encode_text([""])
    assert torch.equal(null["text"], expected.tokens[0])
    assert torch.equal(null["pooled"], expected.pooled[0])


def test_each_caption_of_a_batch_is_encoded_once(images, tmp_path):
    text = Letters()
    precompute(images, tmp_path / "latents", encoders(text=text, batch_size=64))
    assert text.asked == 4 * 5 + 1  # five captions in each of four shards, and the null


@pytest.mark.parametrize("stop_after", [0, 2, 3, 7])
def test_interrupted_and_started_again(images, tmp_path, stop_after):
    """Two batches a shard: what was finished is kept, what was begun is redone, and the bytes are the same."""
    precompute(images, tmp_path / "whole", encoders())
    with pytest.raises(KeyboardInterrupt):
        precompute(images, tmp_path / "latents", encoders(Halves(stop_after=stop_after)))
    assert not (tmp_path / "latents" / "manifest.json").exists()
    again = Halves()
    precompute(images, tmp_path / "latents", encoders(again))
    assert again.batches == 8 - 2 * (stop_after // 2)
    assert contents(tmp_path / "latents") == contents(tmp_path / "whole")
    third = Halves()
    precompute(images, tmp_path / "latents", encoders(third))
    assert third.batches == 0


def test_a_shard_that_was_cut_in_between_is_redone(images, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        precompute(images, tmp_path / "latents", encoders(Halves(stop_after=4)))
    tar = tmp_path / "latents" / "shards" / "000000.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    again = Halves()
    precompute(images, tmp_path / "latents", encoders(again))
    assert again.batches == 6
    assert len(read_dataset(str(tmp_path / "latents"))) == 24


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"image": Halves("another")}, "autoencoder was image and is another"),
        ({"text": Letters("another")}, "text_encoder was text and is another"),
        ({"dtype": "float32"}, "dtype was float16 and is float32"),
        ({"flips": True}, "flips was None and is encoded"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_encoders_are_refused_and_nothing_changes(images, tmp_path, other, named, finished):
    if finished:
        precompute(images, tmp_path / "latents", encoders())
    else:
        with pytest.raises(KeyboardInterrupt):
            precompute(images, tmp_path / "latents", encoders(Halves(stop_after=2)))
    before = contents(tmp_path / "latents")
    with pytest.raises(UserError, match=f"{named}.*choose another output="):
        precompute(images, tmp_path / "latents", encoders(**other))
    assert contents(tmp_path / "latents") == before


def test_other_pictures_are_refused(images, tmp_path, make_images):
    precompute(images, tmp_path / "latents", encoders())
    with pytest.raises(UserError, match="images was"):
        precompute(make_images(tmp_path / "fewer", [6]), tmp_path / "latents", encoders())


def spoil(images, numbers):
    """Pictures that were damaged before their shard was written: its digest is that of the damaged one."""
    manifest = Manifest.load(images)
    for number in numbers:
        shard = manifest.shards[number // 6]
        path = Path(images) / shard.name
        data = bytearray(path.read_bytes())
        offset, size = read_index(images, shard)[number % 6].members["png"]
        data[offset : offset + size] = b"x" * size
        path.write_bytes(data)
        manifest = with_digest(manifest, number // 6, hashlib.sha256(data).hexdigest())
    manifest.save(images)


def with_digest(manifest, number, digest):
    shards = list(manifest.shards)
    shards[number] = dataclasses.replace(shards[number], sha256=digest)
    return dataclasses.replace(manifest, shards=tuple(shards))


def test_a_shard_that_changed_since_it_was_written_is_refused(images, tmp_path):
    path = Path(images) / Manifest.load(images).shards[1].name
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"000001\.tar is damaged"):
        precompute(images, tmp_path / "latents", encoders())


def test_damaged_pictures_are_set_aside_also_over_a_restart(images, tmp_path):
    spoil(images, [1, 13])
    with pytest.raises(KeyboardInterrupt):
        precompute(images, tmp_path / "latents", encoders(Halves(stop_after=2)), 0.1)
    manifest = precompute(images, tmp_path / "latents", encoders(), 0.1)
    rows = [json.loads(line) for line in (tmp_path / "latents" / "aside" / "precompute.jsonl").open()]
    assert [row["key"] for row in rows] == ["key0001", "key0013"]
    assert all(row["reason"] == "not a picture of a known format" for row in rows)
    assert manifest.samples + len(rows) == 24


def test_too_many_damaged_pictures_stop_the_run(images, tmp_path):
    spoil(images, [1, 13])
    with pytest.raises(DataError, match=r"2 of 24 samples can't be used \(2 x not a picture"):
        precompute(images, tmp_path / "latents", encoders(), 0.05)
    assert not (tmp_path / "latents" / "manifest.json").exists()


def test_values_beyond_float16_stop_the_run(images, tmp_path):
    class Large(Halves):
        def encode_stored(self, images):
            return super().encode_stored(images) * 1e6

    with pytest.raises(DataError, match="moments is not finite in float16: use dtype=float32"):
        precompute(images, tmp_path / "latents", encoders(Large()))


def test_aside_counts_up_to_its_cap():
    aside = Rejects(40, 0.05)
    aside.add("a", "why")
    aside.add("b", "why")
    with pytest.raises(DataError, match="3 of 40"):
        aside.add("c", "why")


@pytest.mark.parametrize("name", ["gpu", "nonsense:1"])
def test_an_unknown_device_gets_a_sentence(name):
    with pytest.raises(UserError, match="device=auto"):
        chosen_device(name)
