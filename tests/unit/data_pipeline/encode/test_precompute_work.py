"""Sizes and buckets, what latents made before lend, dtypes, what is set aside, threads, and who makes which shard."""

import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from precompute_process import SMALL, Table
from safetensors.torch import load_file

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, UserError
from data_pipeline.common.saved_objects import build
from data_pipeline.common.temp_files import sweep
from data_pipeline.common.threads import Prefetcher, ordered_map
from data_pipeline.encode.base_dataset import base_of
from data_pipeline.encode.batch_encoder import Encoders, FirstStage, Item, encode_batch
from data_pipeline.encode.caption_cache import CaptionCache
from data_pipeline.encode.conditions import Hole, ImageEmbedding, Label, LowResolution
from data_pipeline.encode.encoders import TextStates
from data_pipeline.encode.latent_dataset import SplitToEncode
from data_pipeline.encode.latent_shard import OutputPaths
from data_pipeline.encode.shard_reader import ShardReader
from data_pipeline.encode.split_encoder import encode_split
from data_pipeline.encode.text_conditions import Text
from data_pipeline.encode.workers import Worker, worker_of
from data_pipeline.images.aspect_buckets import automatic, geometry, sizes_of
from data_pipeline.images.decode import Picture
from data_pipeline.images.framing import Framing
from data_pipeline.images.pixels import psnr
from data_pipeline.images.resize import fitted
from data_pipeline.loading.loader import read_dataset
from data_pipeline.precompute_latents import text_encoders_for
from data_pipeline.shards import codec
from data_pipeline.shards.arrays import unusable
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.samples import collated
from data_pipeline.shards.writer import ShardWriter
from train.data.latent_facts import LatentFacts
from train.models.autoencoder import AutoencoderKL
from train.models.conditioning import StoredText


class Counted:
    """A first stage and a CLIP in one that say how many pictures and captions they were given."""

    stored_as, factor, stated_scaling = "moments", 2, None

    def __init__(self, fingerprint="a"):
        self.fingerprint, self.pictures, self.captions = fingerprint, 0, []

    def encode_stored(self, images):
        self.pictures += len(images)
        mean = torch.nn.functional.avg_pool2d(images, 2)
        return torch.cat([mean, mean.sin() - 2], 1)

    def posterior_of(self, stored):
        mean, logvar = stored.chunk(2, 1)
        return mean, logvar.exp()

    def encode_text(self, captions):
        self.captions += captions
        rows = torch.tensor([[float(ord(c)) for c in caption.ljust(9)[:9]] for caption in captions])
        return TextStates(rows[:, :, None] / 8, rows)


def using(image=None, text=None, dtype="float16", conditions=None, keep=0, batch_size=4, flips=False):
    text = CaptionCache(text or Counted(), batch_size, keep)
    conditions = {"text": Text()} if conditions is None else conditions
    return Encoders(image or Counted(), text, conditions, torch.device("cpu"), batch_size, dtype, flips)


def precompute(images, output, encoders, size=None, buckets=None, step=8, base=None, worker=Worker(), fraction=0.05):  # noqa: B008
    source = Manifest.load(images, "image-text")
    sizes = sizes_of(size or source.info.get("size"), buckets, step, encoders.image.factor)
    lender = base_of(str(base), "", encoders, sizes.described) if base else None
    reader = ShardReader(str(images), encoders, sizes, lender, threads=3)
    encode_split(SplitToEncode("", source, OutputPaths(str(output), "", sizes.split), reader, fraction), worker)


def write(root, samples, per_shard=6, info=None):
    """An image-text data set of (key, picture, caption, json)."""
    shards = []
    for first in range(0, len(samples), per_shard):
        writer = ShardWriter()
        for key, picture, caption, meta in samples[first : first + per_shard]:
            writer.add(key, {"png": picture, "txt": caption, "json": meta})
        shards.append(writer.publish(root, f"shards/{len(shards):06d}.tar"))
    Manifest("image-text", tuple(shards), {}, info or {}).save(root)
    return str(root)


def samples_of(picture, count, caption="thing {}", size=8):
    return [(f"key{i:04d}", picture(i, size), caption.format(i % 5), {"group": f"g{i % 2}"}) for i in range(count)]


# Sizes.


def test_automatic_buckets_are_all_there_are_up_to_an_area():
    found = automatic(512, 64)
    assert (512, 512) in found
    assert all(h * w <= 512 * 512 and h % 64 == w % 64 == 0 and max(h, w) <= 2 * min(h, w) for h, w in found)
    assert {(w, h) for h, w in found} == set(found)
    assert all(h * (w + 64) > 512 * 512 or w + 64 > 2 * h for h, w in found if w >= h)  # none could be wider
    sizes = sizes_of(512, "auto", 64, 8)
    for shape in [(1000, 1000), (300, 400), (400, 300), (100, 1000), (1234, 777)]:
        distance = {each: abs(np.log(each[1] / each[0]) - np.log(shape[1] / shape[0])) for each in found}
        assert distance[sizes.of(shape)] == min(distance.values())
    assert sizes.of((100, 1000)) == (320, 640)


@pytest.mark.parametrize(
    ("size", "buckets", "sentence"),
    [
        (None, "auto", "needs size="),
        (20, None, "multiple of 8"),
        (None, ["64x63"], "multiple of 8"),
        (None, ["wide"], "write height x width"),
        (32, "auto", "no bucket but the square: lower bucket_step, as bucket_step=8"),
        (64, "auto", "bucket_step=16, or raise size="),
    ],
)
def test_sizes_that_cannot_be_get_a_sentence(size, buckets, sentence):
    with pytest.raises(UserError, match=sentence):
        sizes_of(size, buckets, 64, 8)


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (16, 16), (31, 97), (8, 200)])
def test_a_square_is_the_one_that_make_shards_cuts(picture, shape):
    pixels = np.resize(picture(1, 64), (*shape, 3))
    np.testing.assert_array_equal(fitted(pixels, (16, 16)).pixels, Framing(16).applied(Picture(pixels)).pixels)


def test_what_was_cut_is_noted_and_boxes_move_with_it():
    """A picture of 40 x 80, its right half white, to 20 x 20: the middle 20 of 40 columns."""
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 40:] = 255
    fit = fitted(pixels, (20, 20))
    assert (fit.resized, fit.offset) == ((20, 40), (0, 10))
    meta = geometry(
        {"boxes": [["half", 0.5, 0.0, 1.0, 1.0], ["edge", 0, 0, 0.2, 1]], "hole": [0.25, 0, 0.75, 1]}, (40, 80), fit
    )
    assert meta == {
        "original_size": [40, 80], "crop_top_left": [0, 10], "target_size": [20, 20],
        "boxes": [["half", 0.5, 0.0, 1.0, 1.0]], "hole": [0.0, 0, 1.0, 1],
    }  # fmt: skip
    assert fit.pixels[:, :6].max() == 0
    assert fit.pixels[:, 14:].min() == 255
    resized_before = {"original_height": 400, "original_width": 800, "hole": "nonsense"}
    assert geometry(resized_before, (40, 80), fit)["original_size"] == [400, 800]
    assert geometry(resized_before, (40, 80), fit)["hole"] == "nonsense"


def test_a_data_set_for_each_bucket(tmp_path, picture):
    shapes = [(16, 16), (8, 24), (24, 8), (20, 17)]
    pictures = [np.resize(picture(i, 32), (*shapes[i % 4], 3)) for i in range(22)]
    images = write(tmp_path / "images", [(f"{i:03d}", each, "a", {"n": i}) for i, each in enumerate(pictures)])
    precompute(images, tmp_path / "out", using(dtype="float32", batch_size=2), 16, "auto", 4)
    manifests = {
        name: Manifest.load(tmp_path / "out" / name) for name in storage.subfolders(tmp_path / "out") if name != "work"
    }
    assert {name: manifest.samples for name, manifest in manifests.items()} == {"16x16": 11, "12x20": 6, "20x12": 5}
    for name, manifest in manifests.items():
        height, width = map(int, name.split("x"))
        assert manifest.fields["moments.npy"]["shape"] == [6, height // 2, width // 2]
        assert manifest.info["latents"] == manifests["16x16"].info["latents"]  # one scale for the model of all
        sizes = [
            sample["size"].astype(np.float64) for sample in read_dataset(f"{tmp_path}/out/{name}", None, ("size",))
        ]
        means = {"count": len(sizes), "mean": np.mean(sizes, 0).tolist()}
        assert manifest.info["size_conditioning"] == means  # of its own: a run on one bucket draws at its size
        for sample in read_dataset(str(tmp_path / "out" / name)):
            original = pictures[sample["meta"]["n"]]
            assert sample["meta"]["original_size"] == list(original.shape[:2])
            pixels = fitted(original, (height, width)).pixels
            expected = Counted().encode_stored(collated([{"key": "", "image": pixels}])["image"])[0]
            np.testing.assert_array_equal(sample["moments"], expected.numpy())


def test_pictures_of_another_size_are_named(tmp_path, picture):
    samples = [(f"{i:03d}", picture(i, 8 if i != 3 else 12), "a", {}) for i in range(6)]
    images = write(tmp_path / "images", samples)
    precompute(images, tmp_path / "aside", using(), fraction=0.2)
    assert (
        "a picture of 12x12 beside a picture of 8x8: set size="
        in (tmp_path / "aside/aside/precompute.jsonl").read_text()
    )
    precompute(images, tmp_path / "fitted", using(), size=12)
    assert Manifest.load(tmp_path / "fitted").samples == 6
    apart = write(tmp_path / "apart", [(f"{i:03d}", picture(i, 8 + 4 * (i // 6)), "a", {}) for i in range(12)])
    with pytest.raises(DataError, match="not of one size: set size="):
        precompute(apart, tmp_path / "apart_out", using())


# What is not made again.


def test_new_captions_take_the_pictures_from_the_base(tmp_path, picture):
    """Half of the captions are new: no picture is encoded, nor an old caption, and it is as if all were made afresh."""
    old = write(tmp_path / "old", samples_of(picture, 14))
    precompute(old, tmp_path / "base", using(conditions={"text": Text(), "small": LowResolution(2)}, flips=True))
    changed = [(k, p, c if i % 2 else f"new {i}", m) for i, (k, p, c, m) in enumerate(samples_of(picture, 14))]
    new, image, text = write(tmp_path / "new", changed), Counted(), Counted()
    conditions = {"text": Text(), "small": LowResolution(2), "group": Label(classes=["g0", "g1"])}
    encoders = using(image, text, conditions=conditions, flips=True)
    precompute(new, tmp_path / "out", encoders, base=tmp_path / "base")
    assert image.pictures == 0
    assert text.captions == [*(f"new {i}" for i in range(0, 14, 2)), ""]
    again = using(conditions=conditions, flips=True)
    precompute(new, tmp_path / "afresh", again)
    assert again.image.pictures == 28
    for lent, made in zip(*(read_dataset(str(tmp_path / name)) for name in ("out", "afresh")), strict=True):
        assert lent.keys() == made.keys()
        assert lent["meta"] == made["meta"]
        for name in (
            "moments",
            "moments_flip",
            "text",
            "pooled",
            "small" if "small" in lent else "low_resolution",
            "label",
        ):
            np.testing.assert_array_equal(lent[name], made[name])


def test_a_second_size_takes_the_captions_and_another_cut_of_shards_all(tmp_path, picture):
    samples = samples_of(picture, 14)
    images = write(tmp_path / "images", samples)
    precompute(images, tmp_path / "base", using(dtype="bfloat16"))
    image, text = Counted(), Counted()
    precompute(images, tmp_path / "large", using(image, text, "bfloat16"), 16, base=tmp_path / "base")
    assert (image.pictures, text.captions) == (14, [""])
    other, image, text = write(tmp_path / "other", samples[::-1], 4), Counted(), Counted()
    precompute(other, tmp_path / "cut", using(image, text, "bfloat16"), base=tmp_path / "base")
    assert (image.pictures, text.captions) == (0, [""])
    before = {sample["key"]: sample for sample in read_dataset(str(tmp_path / "base"))}
    for sample in read_dataset(str(tmp_path / "cut")):
        np.testing.assert_array_equal(sample["moments"], before[sample["key"]]["moments"])


def test_changed_pictures_and_other_encoders_are_encoded(tmp_path, picture):
    samples = samples_of(picture, 12)
    precompute(write(tmp_path / "old", samples), tmp_path / "base", using())
    key, _, caption, meta = samples[7]
    samples[7] = (key, picture(99), caption, meta)
    changed, image, text = write(tmp_path / "new", samples), Counted(), Counted()
    precompute(changed, tmp_path / "out", using(image, text), base=tmp_path / "base")
    assert (image.pictures, text.captions) == (1, [""])
    image, text = Counted("another"), Counted()
    precompute(changed, tmp_path / "other", using(image, text), base=tmp_path / "base")
    assert (image.pictures, text.captions) == (12, [""])
    with pytest.raises(UserError, match="nothing of it can be reused"):
        precompute(changed, tmp_path / "none", using(dtype="float32"), base=tmp_path / "base")


def test_holes_of_the_base_are_those_of_its_json(tmp_path, picture):
    samples = samples_of(picture, 6)
    precompute(write(tmp_path / "old", samples), tmp_path / "base", using(conditions={"hole": Hole()}))
    key, pixels, caption, meta = samples[2]
    samples[2] = (key, pixels, caption, {**meta, "hole": [0, 0, 0.5, 0.5]})
    image = Counted()
    precompute(
        write(tmp_path / "new", samples),
        tmp_path / "out",
        using(image, conditions={"hole": Hole()}),
        base=tmp_path / "base",
    )
    assert image.pictures == 1  # the hole's; the picture's moments are lent


def test_captions_kept_over_shards_are_encoded_once_and_alone(tmp_path, picture):
    text = Counted()
    precompute(write(tmp_path / "images", samples_of(picture, 24)), tmp_path / "out", using(text=text, keep=5))
    assert text.captions == [*(f"thing {i}" for i in range(5)), ""]


def test_states_do_not_depend_on_what_was_encoded_before():
    """A matrix product's last bits differ from batch to batch: the batches are those of the shard alone."""
    captions = [f"caption {i % 11}" for i in range(30)]
    first, second = CaptionCache(Table(), 4), CaptionCache(Table(), 4)
    second.begin(["caption 3", "other"])
    second.encode_text(["other"])
    first.begin(captions), second.begin(captions)
    second.encode_text(captions[7:9])
    assert torch.equal(first.encode_text(captions).tokens, second.encode_text(captions).tokens)


def test_a_text_encoder_without_an_image_tower_is_not_taken_for_a_clip(picture):
    items = [Item(0, {"key": "a", "image": picture(0), "caption": "a", "meta": {}})]
    encoders = using(text=Table(), conditions={"image_embedding": ImageEmbedding()})
    with pytest.raises(UserError, match="needs a CLIP with an image tower"):
        encode_batch(items, torch.zeros(1, 3, 8, 8), encoders)
    # And before the output is claimed:
    cfg = OmegaConf.create({"clip": {"_target_": "precompute_process.table_at", "path": "somewhere"}})
    assert text_encoders_for(cfg, {"text": Text()})["clip"].fingerprint == "table"
    with pytest.raises(UserError, match="needs a CLIP with an image tower"):
        text_encoders_for(cfg, {"text": Text(), "image_embedding": ImageEmbedding()})


def test_the_last_line_says_what_was_encoded_copied_and_there(tmp_path, picture, capsys):
    samples = samples_of(picture, 12)
    precompute(write(tmp_path / "half", samples[:6]), tmp_path / "base", using())
    images = write(tmp_path / "images", samples)
    assert "6 encoded, 0 set aside" in capsys.readouterr().out
    precompute(images, tmp_path / "out", using(), base=tmp_path / "base")
    assert "6 encoded, 6 copied from base=, 0 set aside" in capsys.readouterr().out
    (tmp_path / "out/manifest.json").unlink()
    (tmp_path / "out/shards/000001.tar.done.json").unlink()
    precompute(images, tmp_path / "out", using(), base=tmp_path / "base")
    assert "6 encoded, 6 there already or by other workers, 0 set aside" in capsys.readouterr().out


def test_each_stage_accounts_for_what_it_was_given(tmp_path, picture):
    before = {"listed": 20, "processed": 12, "filtered": {}, "set_aside": {"missing caption": 8}}
    samples = [(f"{i:03d}", picture(i, 8 if i != 3 else 12), "a", {}) for i in range(12)]
    images = write(tmp_path / "images", samples, info={"accounting": before, "made_with": {"size": 8}})
    precompute(images, tmp_path / "out", using(), fraction=0.2)
    info = Manifest.load(tmp_path / "out").info
    reason = "a picture of 12x12 beside a picture of 8x8: set size="
    assert info["accounting"] == {"listed": 12, "processed": 11, "filtered": {}, "set_aside": {reason: 1}}
    assert "made_with" not in info


OF_BEFORE = {"text": {"_target_": "data_pipeline.conditions.Text", "pooled": False}}


def test_an_output_begun_by_an_earlier_version_is_gone_on_with(tmp_path, picture, capsys):
    images, out = write(tmp_path / "images", samples_of(picture, 12)), tmp_path / "out"
    precompute(images, out, using(conditions={"text": Text(False)}))
    note = json.loads((out / "precompute.json").read_text())
    assert json.loads(note["conditions"]) == {"text": {"name": "text", "pooled": False}}
    whole = (out / "manifest.json").read_bytes()
    for path in (out / "manifest.json", out / "shards/000001.tar", out / "shards/000001.tar.done.json"):
        path.unlink()
    (out / "precompute.json").write_text(json.dumps({**note, "conditions": json.dumps(OF_BEFORE, sort_keys=True)}))
    precompute(images, out, using(conditions={"text": Text(False)}))
    assert "6 encoded, 6 there already" in capsys.readouterr().out
    assert (out / "manifest.json").read_bytes() == whole
    with pytest.raises(UserError, match=r"conditions was .*pooled.* and is"):
        precompute(images, out, using())


@pytest.mark.parametrize("note", ["", "3", "[]", "null", '{"conditions": 3}', '{"conditions": "text"}'])
def test_an_output_whose_note_is_damaged_is_refused(tmp_path, picture, note):
    images = write(tmp_path / "images", samples_of(picture, 1))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precompute.json").write_text(note)
    with pytest.raises(DataError, match=r"precompute\.json is damaged .*: remove that folder, or choose another out"):
        precompute(images, tmp_path / "out", using())


def test_latents_of_an_earlier_version_lend(tmp_path, picture, capsys):
    images, base = write(tmp_path / "images", samples_of(picture, 12)), tmp_path / "base"
    precompute(images, base, using(conditions={"text": Text(False)}))
    manifest = json.loads((base / "manifest.json").read_text())
    manifest["info"]["conditions"] = OF_BEFORE
    (base / "manifest.json").write_text(json.dumps(manifest))
    text = Counted()
    precompute(images, tmp_path / "out", using(text=text, conditions={"text": Text(False)}), base=base)
    assert "0 encoded, 12 copied from base=" in capsys.readouterr().out
    assert set(text.captions) <= {""}


def test_text_without_the_pooled_vector(tmp_path, picture):
    precompute(write(tmp_path / "i", samples_of(picture, 6)), tmp_path / "out", using(conditions={"text": Text(False)}))
    manifest = Manifest.load(tmp_path / "out")
    assert set(manifest.fields) == {"moments.npy", "text.npy", "json"}
    assert set(load_file(tmp_path / "out/null.safetensors")) == {"text"}
    again = build(manifest.info["conditions"]["text"], "conditions", "text")
    assert again.fields == ("text",)
    conditioner = StoredText(LatentFacts.of(str(tmp_path / "out"), manifest, 1))
    assert (conditioner.context_dim, conditioner.vector_dim) == (1, None)
    given = conditioner({"text": torch.ones(2, 9, 1)}, ["a", "b"]).given
    assert (given.context.shape, given.vector) == ((2, 9, 1), None)


# Values.


def test_stored_latents_equal_those_encoded_online(tmp_path, picture):
    """In float32, to the bit, for the same batch; float16 is decoded within 0.1 dB of the first stage's own."""
    torch.manual_seed(0)
    model = AutoencoderKL(**SMALL)
    smooth = [np.array(Image.fromarray(picture(i, 4)).resize((16, 16), Image.Resampling.BICUBIC)) for i in range(12)]
    images = write(tmp_path / "images", [(f"{i:03d}", each, f"c {i}", {}) for i, each in enumerate(smooth)])
    pixels = collated([{"key": "", "image": each} for each in smooth])["image"]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        mean, _ = model.encode_stored(pixels).chunk(2, 1)
        optimizer.zero_grad()
        (model.decode(mean) - pixels).square().mean().backward()
        optimizer.step()
    model = model.eval().requires_grad_(False)
    model.fingerprint = "trained"
    for dtype in ("float32", "float16"):
        precompute(images, tmp_path / dtype, using(model, dtype=dtype, batch_size=6))
    stored = {d: np.stack([s["moments"] for s in read_dataset(str(tmp_path / d))]) for d in ("float32", "float16")}
    online = torch.cat([model.encode_stored(part) for part in pixels.split(6)])
    np.testing.assert_array_equal(stored["float32"], online.numpy())
    ours, own = (
        psnr(as_pictures(model.decode(moments.chunk(2, 1)[0])), np.stack(smooth))
        for moments in (torch.from_numpy(stored["float16"]).float(), online)
    )
    assert own.mean() > 20
    assert np.abs(ours - own).max() < 0.1


def as_pictures(images):
    return ((images.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).byte().numpy()


def test_bfloat16_is_read_back_as_what_was_rounded(tmp_path, picture):
    precompute(write(tmp_path / "images", samples_of(picture, 6)), tmp_path / "out", using(dtype="bfloat16"))
    manifest, samples = Manifest.load(tmp_path / "out"), read_dataset(str(tmp_path / "out"))
    assert manifest.fields["moments.npy"] == {"dtype": "bfloat16", "shape": [6, 4, 4]}
    pixels = collated([{"key": "", "image": picture(i)} for i in range(6)])["image"]
    expected = Counted().encode_stored(pixels).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(np.stack([sample["moments"] for sample in samples]), expected)
    assert samples[0]["moments"].dtype == np.float32
    assert collated(samples)["moments"].dtype == torch.float32
    raw = np.arange(4, dtype=np.uint16).view(codec.BFLOAT16)
    assert b"'descr': '|V2'" in codec.encode("npy", raw)


@pytest.mark.parametrize(
    ("value", "dtype", "reason"),
    [
        (float("nan"), "float32", "moments is not finite in float32"),
        (float("inf"), "bfloat16", "moments is not finite in bfloat16: use dtype=float32"),
        (7e4, "float16", "moments is not finite in float16: use dtype=float32"),
        (1e7, "float32", "moments has values beyond 1e\\+06"),
    ],
)
def test_values_that_cannot_be_trained_on_are_named_and_counted(tmp_path, picture, value, dtype, reason):
    class Spoils(Counted):
        def encode_stored(self, images):
            stored = super().encode_stored(images)
            stored[images[:, 0, 0, 0] == marked, 0, 1, 1] = value
            return stored

    samples = samples_of(picture, 30)
    marked = collated([{"key": "", "image": samples[13][1]}])["image"][0, 0, 0, 0]
    hit = [s[0] for s in samples if s[1][0, 0, 0] == samples[13][1][0, 0, 0]]
    images = write(tmp_path / "images", samples)
    precompute(images, tmp_path / "out", using(Spoils(), dtype=dtype))
    rows = (tmp_path / "out/aside/precompute.jsonl").read_text().splitlines()
    assert [json.loads(row)["key"] for row in rows] == hit
    assert all(reason.replace("\\", "") in row for row in rows)
    assert Manifest.load(tmp_path / "out").samples + len(rows) == 30
    with pytest.raises(DataError, match=f"of 30 samples can't be used \\({len(hit)} x {reason}"):
        precompute(images, tmp_path / "capped", using(Spoils(), dtype=dtype), fraction=0.0)
    assert not (tmp_path / "capped/manifest.json").exists()


def test_codes_beyond_the_codebook_and_shapes_of_no_batch_are_named(picture):
    codes = np.array([[[0, 15]], [[3, 16]], [[-1, 2]]], np.int32)
    named = list(unusable({"indices": codes}, 16, "float32"))
    assert named == [
        (1, "indices has codes that are not in the codebook"),
        (2, "indices has codes that are not in the codebook"),
    ]

    class Short(Counted):
        def encode_stored(self, images):
            return super().encode_stored(images)[:-1]

    items = [Item(i, {"key": str(i), "image": picture(i), "caption": "a", "meta": {}}) for i in range(3)]
    with pytest.raises(DataError, match="moments of 3 samples has shape \\(2, 6, 4, 4\\)"):
        encode_batch(items, collated([item.sample for item in items])["image"], using(Short(), conditions={}))

    class Codes(Counted):
        stored_as = "indices"

    assert FirstStage(Codes(), True).fields == ("indices", "indices_flip")


# Threads.


def test_read_ahead_keeps_order_bounds_and_errors():
    made = []

    def numbers():
        for i in range(20):
            made.append(i)
            yield i
        raise DataError("the end")

    taken = []

    def take():
        with Prefetcher(numbers(), 2) as ahead:
            for i in ahead:
                assert len(made) <= i + 4  # taken, two waiting, one in hand
                taken.append(i)

    with pytest.raises(DataError, match="the end"):
        take()
    assert taken == list(range(20))


def test_leaving_early_ends_the_thread():
    threads, closed = threading.active_count(), []

    def endless():
        try:
            yield from iter(int, 1)
        finally:
            closed.append(threading.current_thread())

    with Prefetcher(endless(), 2) as ahead:
        next(iter(ahead))
    assert threading.active_count() == threads
    assert closed == [ahead.thread]


def test_results_come_in_order_and_calls_begun_are_finished():
    done = []

    def items(error=None):
        yield from range(10)
        if error:
            raise error

    with ThreadPoolExecutor(1) as pool:
        assert list(ordered_map(pool, lambda i: done.append(i) or -i, items(), 3)) == [-i for i in range(10)]
    assert done == list(range(10))
    with pytest.raises(KeyboardInterrupt), ThreadPoolExecutor(1) as pool:
        list(ordered_map(pool, done.append, items(KeyboardInterrupt()), 3))
    assert done == [*range(10), *range(10)]
    with pytest.raises(ZeroDivisionError), ThreadPoolExecutor(1) as pool:
        list(ordered_map(pool, lambda i: 1 // (i - 5), items(), 3))


def test_a_shard_is_not_published_without_the_batch_that_failed(tmp_path, picture):
    """Its end is already queued when the error comes."""
    broken, calls = Counted(), itertools.count()
    whole = broken.posterior_of
    broken.posterior_of = lambda stored: whole(stored) if next(calls) else raises(OSError("no room"))
    with pytest.raises(OSError, match="no room"):
        precompute(write(tmp_path / "images", samples_of(picture, 9)), tmp_path / "out", using(broken, broken))
    assert next(calls) > 1  # later batches were added
    assert not list((tmp_path / "out").rglob("000000.*"))


def raises(error):
    raise error


def test_decoded_pictures_are_bounded():
    made = []
    with ThreadPoolExecutor(3) as pool:
        for taken, value in enumerate(ordered_map(pool, lambda i: made.append(i) or i, range(50), 6)):
            assert value == taken
            assert len(made) <= taken + 7


@pytest.mark.parametrize("where", ["encode_stored", "posterior_of", "encode_text"])
def test_an_error_in_any_thread_ends_the_run_and_its_threads(tmp_path, picture, where):
    broken, threads = Counted(), threading.active_count()

    def fails(*_):
        raise ZeroDivisionError(where)

    setattr(broken, where, fails)
    with pytest.raises(ZeroDivisionError, match=where):
        precompute(write(tmp_path / "images", samples_of(picture, 60)), tmp_path / "out", using(broken, broken))
    assert threading.active_count() == threads


# Who makes what.


def test_each_worker_begins_with_its_share_and_goes_on_to_all():
    shards = list(range(23))
    shares = [Worker(k, 4).order(shards) for k in range(4)]
    assert all(sorted(order) == shards for order in shares)
    assert [order[: len(shards[k::4])] for k, order in enumerate(shares)] == [shards[k::4] for k in range(4)]
    assert len({tuple(order) for order in shares}) == 4
    assert Worker().order(shards) == shards


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1)),  # the batch script
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}, (2, 8)),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "0"}, (5, 8)),
        ({"SLURM_ARRAY_TASK_ID": "11", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1",
          "SLURM_ARRAY_TASK_STEP": "5", "RANK": "1", "WORLD_SIZE": "2"}, (5, 8)),
    ],
)  # fmt: skip
def test_who_a_process_is(environment, expected):
    assert worker_of(None, None, environment) == expected
    assert worker_of(2, 3, environment) == (2, 3)


@pytest.mark.parametrize(("number", "workers"), [(3, 3), (-1, 2), (None, 2), (1, None)])
def test_workers_that_cannot_be_get_a_sentence(number, workers):
    with pytest.raises(UserError, match="with worker from 0"):
        worker_of(number, workers, {})


def test_a_shard_that_another_finishes_meanwhile_is_dropped(tmp_path, picture):
    """While worker 1 encodes its first batch, worker 0 makes everything; worker 1 then encodes no second one."""
    images = write(tmp_path / "images", samples_of(picture, 24), 24)

    class Slow(Counted):
        def encode_stored(self, pictures):
            if not self.pictures:
                precompute(images, tmp_path / "out", using(), worker=Worker(0, 2))
            return super().encode_stored(pictures)

    slow = Slow()
    precompute(images, tmp_path / "out", using(slow), worker=Worker(1, 2))
    assert slow.pictures == 4
    assert Manifest.load(tmp_path / "out").samples == 24


def test_only_what_dead_processes_left_is_swept(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    host, old = socket.gethostname(), time.time() - 7200
    names = {
        f"0.tar.tmp.{host}.{dead.stdout.strip()}": None,
        f"0.tar.tmp.{host}.{os.getpid()}": None,
        "0.tar.tmp.elsewhere.net.17": None,
        "1.tar.tmp.elsewhere.net.17": old,
        "0.tar": old,
    }
    for name, stamp in names.items():
        (tmp_path / name).write_bytes(b"")
        if stamp:
            os.utime(tmp_path / name, (stamp, stamp))
    assert sweep(str(tmp_path)) == 2
    assert {path.name for path in tmp_path.iterdir()} == set(list(names)[1:3]) | {"0.tar"}
