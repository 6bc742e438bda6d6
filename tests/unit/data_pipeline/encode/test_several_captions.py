"""Several captions a picture, from image-text shards to batches: stored once beside one encoded picture, and drawn."""

import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from loaders import loader_of

from data_pipeline.audit.shard_checks import Codes, Findings, check_shard
from data_pipeline.common.errors import UserError
from data_pipeline.encode.base_dataset import base_of
from data_pipeline.encode.batch_encoder import Encoders
from data_pipeline.encode.caption_cache import CaptionCache
from data_pipeline.encode.conditions import PlainCondition
from data_pipeline.encode.encoders import TextStates
from data_pipeline.encode.latent_dataset import SplitToEncode
from data_pipeline.encode.latent_shard import OutputPaths
from data_pipeline.encode.shard_reader import ShardReader
from data_pipeline.encode.split_encoder import encode_split
from data_pipeline.encode.text_conditions import Text
from data_pipeline.images.aspect_buckets import sizes_of
from data_pipeline.loading.array_batch import ArrayLayout
from data_pipeline.loading.batch import DataCursor
from data_pipeline.loading.caption_draw import CaptionOptions, draws_of
from data_pipeline.loading.loader import read_dataset
from data_pipeline.shards.caption_edits import StoredEdits
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reader import read_shard
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.sources.caption_counts import CaptionCounts

SIZES = [7, 5, 6]
LETTERS = 12


class Counted:
    """A first stage and a text encoder that remember what they were given; exact arithmetic, for fixed bytes."""

    stored_as, factor, stated_scaling, fingerprint, context_length = "moments", 2, None, "a", 20

    def __init__(self):
        self.pictures, self.captions = 0, []

    def encode_stored(self, images):
        self.pictures += len(images)
        return torch.cat([images[:, :2, ::2, ::2], images[:, 1:, ::2, ::2].round() - 2], 1)

    def posterior_of(self, stored):
        mean, logvar = stored.chunk(2, 1)
        return mean, logvar.exp()

    def encode_text(self, captions):
        self.captions += captions
        return spelt(captions)

    def count_tokens(self, captions):
        return [len(caption) for caption in captions]


class OfBoth(PlainCondition):
    """A user's condition that is made of picture and caption together."""

    fields, made_from = ("both",), ("picture", "caption")

    def encode(self, samples, images, tools):
        return {"both": images.mean((1, 2, 3))[:, None] + torch.tensor([[len(s["caption"])] for s in samples])}


def spelt(captions):
    codes = torch.tensor([[float(ord(c)) for c in caption.ljust(LETTERS)[:LETTERS]] for caption in captions])
    return TextStates(codes[:, :, None] / 8, codes[:, :5])


def captions_for(number):
    """One to four captions, some of which other samples have, too."""
    every = {"short": f"s {number % 5}", "Long é": f"a long one {number}", "0": f"thing {number}", "1": "alike"}
    return dict(list(every.items())[: 1 + number % 4])


def write(root, picture, captions=captions_for):
    shards, number, counts = [], 0, CaptionCounts()
    for count in SIZES:
        writer = ShardWriter()
        for _ in range(count):
            found = captions(number)
            meta = {"captions": found} if len(found) > 1 else {}
            writer.add(f"key{number:04d}", {"png": picture(number), "txt": next(iter(found.values())), "json": meta})
            counts.add("", f"key{number:04d}", next(iter(found.values())), meta)
            number += 1
        shards.append(writer.publish(root, f"shards/{len(shards):06d}.tar"))
    Manifest("image-text", tuple(shards), {}, {"size": 8, **counts.info("")}).save(root)
    return str(root)


def precompute(images, output, edits=StoredEdits(), base=None, conditions=None, encoder=None):  # noqa: B008
    """Returns the encoder that was asked."""
    encoder = encoder or Counted()
    conditions = conditions or {"text": Text()}
    using = Encoders(encoder, CaptionCache(encoder, 4), conditions, torch.device("cpu"), 4, edits=edits)
    sizes = sizes_of(8, None, 8, 2)
    lender = base_of(str(base), "", using, sizes.described) if base else None
    reader = ShardReader(str(images), using, sizes, lender)
    encode_split(SplitToEncode("", Manifest.load(images), OutputPaths(str(output)), reader))
    encoder.captions = [caption for caption in encoder.captions if caption]  # without the null's
    return encoder


@pytest.fixture
def images(tmp_path, picture):
    return write(tmp_path / "images", picture)


@pytest.fixture
def latents(images, tmp_path):
    precompute(images, tmp_path / "latents")
    return str(tmp_path / "latents")


def members(root):
    shards = Manifest.load(root).shards
    return {sample["__key__"]: sample for shard in shards for sample in read_shard(root, shard)}


def test_each_caption_is_stored_and_nothing_is_encoded_twice(images, tmp_path):
    encoder = precompute(images, tmp_path / "out")
    assert encoder.pictures == sum(SIZES)
    firsts = np.cumsum([0, *SIZES])
    per_shard = [{t for n in range(*pair) for t in captions_for(n).values()} for pair in itertools.pairwise(firsts)]
    assert Counter(encoder.captions) == sum((Counter(texts) for texts in per_shard), Counter())
    for number, (key, sample) in enumerate(members(tmp_path / "out").items()):
        captions = captions_for(number)
        assert key == f"key{number:04d}"
        assert sample["json"]["caption"] == captions["short"]
        assert list(sample["json"].get("captions", {"short": 0}).items()) == list(captions.items()) or number % 4 == 0
        names = {"short": "", "Long é": ".%4cong%20%c3%a9", "0": ".0", "1": ".1"}
        expected = {f"{field}{names[name]}.npy" for name in captions for field in ("text", "pooled")}
        assert {name for name in sample if name.endswith(".npy")} == {"moments.npy", *expected}
        for name, text in captions.items():
            states = spelt([text])
            assert np.array_equal(sample[f"text{names[name]}.npy"], states.tokens[0].half().numpy())
            assert np.array_equal(sample[f"pooled{names[name]}.npy"], states.pooled[0].half().numpy())
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.info["captions"] == {"caption": 5, "short": 13, "Long é": 13, "0": 8, "1": 4}
    assert set(manifest.fields) == {"moments.npy", "text.npy", "pooled.npy", "json"}
    assert [name for name, line in manifest.fields.items() if line.get("captions")] == ["text.npy", "pooled.npy"]


def test_a_set_of_single_captions_is_what_it_was(tmp_path, picture):
    images = write(tmp_path / "images", picture, lambda number: {"caption": f"thing {number % 5}"})
    precompute(images, tmp_path / "out")
    manifest = Manifest.load(tmp_path / "out")
    assert "captions" not in manifest.info
    assert not any("captions" in line for line in manifest.fields.values())
    shards = [(tmp_path / "out" / shard.name).read_bytes() for shard in manifest.shards]
    assert hashlib.sha256(b"".join(shards)).hexdigest()[:16] == "72f61bd90eec1fbd"  # as written before


def test_it_is_what_a_picture_and_a_caption_make_together_too(images, tmp_path):
    encoder = precompute(images, tmp_path / "out", conditions={"both": OfBoth()})
    assert encoder.pictures == sum(SIZES)
    for number, sample in enumerate(members(tmp_path / "out").values()):
        captions = list(captions_for(number).values())
        lengths = [float(value[0] - sample["both.npy"][0]) for name, value in sample.items() if name.startswith("both")]
        assert sorted(lengths) == pytest.approx(sorted(len(text) - len(captions[0]) for text in captions), abs=0.02)


def test_a_base_lends_the_states_of_every_caption(images, tmp_path, picture):
    precompute(images, tmp_path / "first")
    turned = write(tmp_path / "turned", picture, lambda n: dict(reversed(captions_for(n).items())) | {"new": f"n {n}"})
    encoder = precompute(turned, tmp_path / "second", base=tmp_path / "first")
    assert encoder.pictures == 0
    assert sorted(encoder.captions) == sorted(f"n {n}" for n in range(sum(SIZES)))
    plain = precompute(turned, tmp_path / "plain")
    assert plain.pictures == sum(SIZES)
    for ours, theirs in zip(members(tmp_path / "second").values(), members(tmp_path / "plain").values(), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours if name != "json")
        assert ours["json"] == theirs["json"]


def taken(root, steps, rank=0, world_size=1, batch_size=8, **how):
    """(step, stream) -> keys, captions and tensors, of `steps` steps."""
    how = {"seed": 3, "captions": CaptionOptions(weights={"short": 1, "0": 2, "Long é": 1, "1": 4}), **how}
    loader = loader_of(root, batch_size, 4, rank=rank, world_size=world_size, **how)
    found = {}
    for batch in itertools.islice(loader, steps):
        for i, stream in enumerate(batch.streams):
            part = slice(i * batch_size // 4, (i + 1) * batch_size // 4)
            tensors = {name: value[part] for name, value in batch.tensors.items()}
            found[batch.step, stream] = (batch.keys[part], batch.captions[part], tensors)
    return found


def same(one, other):
    assert one.keys() == other.keys()
    for place, (keys, captions, tensors) in one.items():
        assert (keys, captions) == other[place][:2]
        assert tensors.keys() == other[place][2].keys()
        assert all(torch.equal(value.double(), other[place][2][name].double()) for name, value in tensors.items())


def test_the_drawn_caption_is_what_comes_in_text_and_states(latents, images):
    seen = Counter()
    for keys, captions, tensors in taken(latents, 60).values():
        for row, (key, text) in enumerate(zip(keys, captions, strict=True)):
            assert text in captions_for(int(key[3:])).values()
            seen[key, text] += 1
            states = spelt([text])
            assert torch.equal(tensors["text"][row], states.tokens[0].half())
            assert torch.equal(tensors["pooled"][row], states.pooled[0].half())
    every = {(f"key{n:04d}", text) for n in range(sum(SIZES)) for text in captions_for(n).values()}
    assert seen.keys() <= every
    assert len(every - seen.keys()) <= 2
    pictures = taken(images, 60)  # encoded while training: the same captions
    for place, (keys, captions, _) in taken(latents, 60).items():
        assert (keys, captions) == pictures[place][:2]


@pytest.mark.parametrize(
    ("world_size", "workers"), [(2, 0), (4, 0), (1, 2), pytest.param(2, 1, marks=pytest.mark.exhaustive)]
)
def test_any_number_of_ranks_and_workers_draws_the_same(latents, world_size, workers):
    whole = taken(latents, 6)
    parts = [taken(latents, 6, rank, world_size, num_workers=workers) for rank in range(world_size)]
    same(whole, {place: found for part in parts for place, found in part.items()})


def test_it_goes_on_with_the_same_draws(latents):
    whole, later = taken(latents, 9), taken(latents, 4, start=DataCursor(5))
    same({place: found for place, found in whole.items() if place[0] >= 5}, later)
    assert any(taken(latents, 9, seed=4)[place][1] != found[1] for place, found in whole.items())


def test_arrays_decoded_one_by_one_are_those_of_the_drawn_caption(latents, monkeypatch):
    copied = taken(latents, 6)
    monkeypatch.setattr(ArrayLayout, "of", classmethod(lambda cls, data: None))
    same(copied, taken(latents, 6))


def test_only_the_first_caption_without_weights_of_others_and_in_held_out_sets(latents):
    for number, sample in enumerate(read_dataset(latents)):
        assert sample["caption"] == captions_for(number)["short"]
        assert np.array_equal(sample["text"], spelt([sample["caption"]]).tokens[0].numpy())
    firsts = taken(latents, 12, captions=CaptionOptions(weights={"short": 1}))
    assert all(text.startswith("s ") for _, captions, _ in firsts.values() for text in captions)


def test_weights_of_captions_that_are_not_there_are_refused_before_anything_is_read(latents):
    with pytest.raises(UserError, match="no caption tall, but of caption, short, Long é, 0, 1"):
        loader_of(latents, 8, 4, captions=CaptionOptions(weights={"short": 1, "tall": 1}))


def test_edits_while_training_are_those_of_the_draw(images):
    options = CaptionOptions(prefix="<", suffix=">", first_tags=3, shuffle_tags=True)
    tags = write(Path(images) / "tags", lambda n: np.full((8, 8, 3), n, np.uint8), lambda n: {"caption": f"a{n},b,c,d"})
    found = [text for _, captions, _ in taken(tags, 40, captions=options).values() for text in captions]
    assert len(set(found)) > 3 * sum(SIZES)
    assert all(sorted(text[1:-1].split(", ")[-3:])[1:] == ["b", "c"] for text in found)
    assert all(text[0] == "<" and text[-1] == ">" for text in found)
    assert [s["caption"] for s in read_dataset(tags, 2, captions=options)] == ["<a0, b, c>", "<a1, b, c>"]
    again = [text for _, captions, _ in taken(tags, 40, captions=options).values() for text in captions]
    assert found == again
    assert draws_of(3, 0, [0], 1) != draws_of(3, 1, [0], 1)


def test_edits_before_encoding_are_named_and_change_the_data_set(images, tmp_path, picture):
    tags = write(tmp_path / "tags", picture, lambda n: {"caption": f"t{n}, u, v, w"})
    encoder = precompute(tags, tmp_path / "plain")
    edits = StoredEdits(prefix="a ", tag_orders=3)
    edited = precompute(tags, tmp_path / "edited", edits)
    assert edited.pictures == encoder.pictures == sum(SIZES)
    assert len(set(edited.captions)) == len(edited.captions) > 2 * sum(SIZES)
    manifest = Manifest.load(tmp_path / "edited")
    assert json.loads(manifest.fingerprints["caption_edits"]) == {"prefix": "a ", "tag_orders": 3}
    assert "caption_edits" not in Manifest.load(tmp_path / "plain").fingerprints
    assert manifest.fingerprint != Manifest.load(tmp_path / "plain").fingerprint
    assert {"caption.0", "caption.1", "caption.2"} == set(manifest.info["captions"])
    first = read_dataset(str(tmp_path / "edited"), 1)[0]
    assert first["caption"] == first["meta"]["captions"]["caption.0"] == "a t0, u, v, w"
    (tmp_path / "edited" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"caption_edits was \{.*\} and is None"):
        precompute(tags, tmp_path / "edited")


def test_captions_that_the_encoder_cuts_are_counted(images, tmp_path, picture, capsys):
    long = write(tmp_path / "long", picture, lambda n: captions_for(n) | ({"x": "y" * (20 + n)} if n % 6 == 1 else {}))
    precompute(long, tmp_path / "out")
    expected = {"captions": 3, "context_length": 20, "longest": 33, "example": "key0013"}
    assert Manifest.load(tmp_path / "out").info["cut_captions"] == expected
    assert (
        "tokens that the text encoder reads, and cut there: 3 (the longest has 33, of key0013)"
        in capsys.readouterr().out
    )
    precompute(images, tmp_path / "short")
    assert "cut_captions" not in Manifest.load(tmp_path / "short").info


def test_verify_knows_the_members_of_captions(latents):
    manifest = Manifest.load(latents)

    def found(shard):
        findings = Findings()
        check_shard(latents, shard, manifest, Codes(), findings)
        return {
            check: findings.sentences[check] for check in ("fields", "values", "webdataset") if findings.counts[check]
        }

    assert not any(found(shard) for shard in manifest.shards)
    spoilt = {"text.0.npy": None, "text.9.npy": np.zeros((LETTERS, 1), np.float16), "pooled.0.npy": np.zeros(5)}
    writer = ShardWriter()
    for sample in read_shard(latents, manifest.shards[0]):
        key = sample.pop("__key__")
        sample = sample | spoilt if key == "key0003" else sample
        writer.add(key, {name: value for name, value in sample.items() if value is not None})
    wrong = found(writer.publish(latents, manifest.shards[0].name))
    sentences = " ".join(wrong.pop("fields"))
    assert not wrong
    for part in ("it lacks text.0.npy", "has no caption for text.9.npy", "pooled.0.npy is <f8, not <f2"):
        assert f"sample key0003 of shard {latents}/shards/000000.tar: " in sentences
        assert part in sentences
