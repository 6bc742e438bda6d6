"""verify_shards.py on good and damaged data sets, of both kinds, on disk and in a bucket; and what it draws."""

import dataclasses
import io
import json
import shutil

import boto3
import numpy as np
import pytest
import torch
import webdataset as wds
from moto.server import ThreadedMotoServer
from PIL import Image
from precompute_process import SMALL, Table
from synthetic import run, tar_of

from data_pipeline.audit.sample_sheet import Drawing, evenly, inspect_samples, sheet_of
from data_pipeline.audit.shard_checks import KEPT, Findings
from data_pipeline.common import storage
from data_pipeline.common.errors import UserError
from data_pipeline.common.progress import Progress
from data_pipeline.encode.batch_encoder import Encoders
from data_pipeline.encode.caption_cache import CaptionCache
from data_pipeline.encode.latent_dataset import SplitToEncode
from data_pipeline.encode.latent_shard import OutputPaths
from data_pipeline.encode.shard_reader import ShardReader
from data_pipeline.encode.split_encoder import encode_split
from data_pipeline.encode.text_conditions import Text
from data_pipeline.images.aspect_buckets import sizes_of
from data_pipeline.images.pixels import to_uint8
from data_pipeline.loading.loader import read_dataset
from data_pipeline.shards.key_set import KnownKeys
from data_pipeline.shards.manifest import Manifest, Shard
from data_pipeline.shards.tar_index import read_index
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.verify_shards import agree, check_encoders, check_set, opened
from train.models.autoencoder import AutoencoderKL
from train.weights.saved import load_autoencoder, save_model

SIZES = {"train": [3, 4], "heldout": [2]}


def smooth(number, size=32):
    """A picture of waves that only this number gives."""
    x, y = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size))
    waves = np.random.default_rng(number).uniform(1, 6, (3, 2))
    return np.uint8(127.5 + 127.5 * np.stack([np.sin(a * x + b * y) for a, b in waves], -1))


def write_images(root):
    number = 0
    for split, sizes in SIZES.items():
        shards = []
        for count in sizes:
            writer = ShardWriter()
            for _ in range(count):
                writer.add(f"key{number}", {"png": smooth(number), "txt": f"thing {number % 3}", "json": {"n": number}})
                number += 1
            shards.append(writer.publish(root / split, f"shards/{len(shards):06d}.tar"))
        fields = {"png": {"dtype": "uint8", "shape": [32, 32, 3]}, "txt": {}, "json": {}}
        Manifest("image-text", tuple(shards), fields, {"size": 32}).save(root / split)


def precompute(images, output, image, sizes=None):
    sizes = sizes or sizes_of(None, None, 64, 2)
    using = Encoders(image, CaptionCache(Table(), 4), {"text": Text()}, torch.device("cpu"), 4, "float16", False)
    for name in SIZES:
        source = Manifest.load(images / name)
        reader = ShardReader(str(images / name), using, sizes)
        encode_split(SplitToEncode(name, source, OutputPaths(str(output), name, sizes.split), reader))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """images/, latents/, buckets/ of them, and the autoencoder that made those."""
    root = tmp_path_factory.mktemp("made")
    write_images(root / "images")
    torch.manual_seed(0)
    save_model(root / "autoencoder", "AutoencoderKL", SMALL, AutoencoderKL(**SMALL).state_dict(), {})
    image = load_autoencoder(str(root / "autoencoder"))
    precompute(root / "images", root / "latents", image)
    precompute(root / "images", root / "buckets", image, sizes_of(32, ["32x32", "16x64"], 16, 2))
    return root


@pytest.fixture
def copy(made, tmp_path):
    """The same, to be damaged."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def drawing(made):
    return Drawing(load_autoencoder(str(made / "autoencoder")), torch.device("cpu"))


def found(root, shards=None, autoencoder=None, text=None, drawing=None):
    """Set -> check -> sentences; what main does, without its files."""
    sets, known = opened(str(root), None if shards is None else str(shards)), KnownKeys()
    with Progress("verify", 1, shown=False) as bar:
        for each in sets:
            check_set(each, 1, known, bar)
    agree(sets)
    for each in sets:
        check_encoders(each, autoencoder, {} if text is None else {"clip": text})
        if drawing:
            inspect_samples(each.root, each.manifest, each.source, 8, drawing, each.findings)
    return {each.name: each.findings.sentences for each in sets if each.findings.sentences}


def test_good_sets_have_no_findings(made, drawing):
    mark = drawing.image.fingerprint
    assert found(made / "images", drawing=drawing) == {}
    assert found(made / "latents", made / "images", mark, Table(), drawing) == {}
    assert found(made / "latents" / "train", made / "images" / "train", mark, Table(), drawing) == {}
    assert found(made / "buckets", made / "images", mark, Table(), drawing) == {}
    assert [each.name for each in opened(str(made / "buckets"), None)] == ["32x32/train", "32x32/heldout"]


def test_every_check_was_made(made):
    (train, _) = sets = opened(str(made / "latents"), str(made / "images"))
    with Progress("verify", 1, shown=False) as bar:
        check_set(train, 1, KnownKeys(), bar)
    assert train.findings.state("decoding") == "-"
    assert {train.findings.state(check) for check in train.findings.checks_run} == {"ok"}
    assert len(train.findings.checks_run) == 11
    assert sets[1].findings.checks_run == set()


# The entry point.


@pytest.mark.processes
def test_a_report_with_pictures_and_psnr(made, drawing, tmp_path):
    done = run("data_pipeline/verify_shards.py", f"input={made}/latents", f"output={tmp_path}", "samples=5",
               f"shards={made}/images", f"autoencoder.path={made}/autoencoder")  # fmt: skip
    assert "verify_shards: no faults" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["wrong"], list(report["sets"])) == (0, ["train", "heldout"])
    assert {check: state for check, state in report["sets"]["train"]["checks"].items() if state != "ok"} == {}
    chosen = [0, 1, 2, 4, 5]  # of seven, evenly spaced
    latents, images = read_dataset(str(made / "latents/train")), read_dataset(str(made / "images/train"))
    with torch.no_grad():
        means = torch.from_numpy(np.stack([latents[i]["moments"][:4] for i in chosen]).astype(np.float32))
        pictures = to_uint8(drawing.image.decode(means).numpy())
    originals = np.stack([images[i]["image"] for i in chosen])
    expected = 10 * np.log10(255**2 / np.square(pictures - originals.astype(float)).mean((1, 2, 3)))
    assert report["sets"]["train"]["psnr_db"] == pytest.approx(expected.mean(), abs=1e-3)
    sheet = np.asarray(Image.open(tmp_path / "train.png"))
    assert (sheet[8:136, 8:136] == pictures[0].repeat(4, 0).repeat(4, 1)).mean() > 0.999  # enlarged four times
    assert (sheet[8:136, 144:272] == originals[0].repeat(4, 0).repeat(4, 1)).all()


@pytest.mark.processes
def test_buckets_of_several_shapes_through_the_entry_point(made, tmp_path):
    """Wide and square pictures, in two buckets; a sheet for each, and what is missing from one is missed."""
    for split, count in (("train", 7), ("heldout", 3)):
        writer = ShardWriter()
        for number in range(count):
            picture = smooth(number)[: 32 if number % 2 else 12]
            writer.add(f"{split}{number}", {"png": picture, "txt": f"thing {number}", "json": {}})
        shards = (writer.publish(tmp_path / "images" / split, "shards/000000.tar"),)
        Manifest("image-text", shards, {}, {"size": 32}).save(tmp_path / "images" / split)
    image = load_autoencoder(str(made / "autoencoder"))
    precompute(tmp_path / "images", tmp_path / "buckets", image, sizes_of(32, ["32x32", "16x64"], 16, 2))
    arguments = [f"input={tmp_path}/buckets", f"output={tmp_path}/r", f"shards={tmp_path}/images"]
    done = run("data_pipeline/verify_shards.py", *arguments, f"autoencoder.path={made}/autoencoder")
    assert "verify_shards: no faults" in done.stdout
    about = json.loads((tmp_path / "r/report.json").read_text())["sets"]
    assert {name: each["samples"] for name, each in about.items()} == {
        "32x32/train": 3, "32x32/heldout": 1, "16x64/train": 4, "16x64/heldout": 2,
    }  # fmt: skip
    assert {each["checks"]["accounting"] for each in about.values()} == {"ok"}
    for name, (width, height) in {"32x32_train": (128, 128), "16x64_train": (128, 32)}.items():
        sheet = np.asarray(Image.open(tmp_path / f"r/{name}.png"))
        assert sheet.shape[1] == 8 + (128 + 8) * min(8, 2 * about[name.replace("_", "/")]["samples"])
        assert (sheet[8 : 8 + height, 8 : 8 + width] != 255).any(-1).mean() > 0.9
    shutil.rmtree(tmp_path / "buckets/16x64")
    done = run("data_pipeline/verify_shards.py", *arguments, check=False)
    assert done.returncode == 3
    assert "has 3 samples and 0 set aside, but 7 were listed" in done.stdout


@pytest.mark.processes
def test_the_input_is_no_place_for_the_report(made):
    done = run("data_pipeline/verify_shards.py", f"input={made}/latents", f"output={made}/latents/", check=False)
    assert done.returncode == 2
    assert "is the same folder as input=: choose another one for the report" in done.stderr


@pytest.mark.parametrize(("shape", "size"), [((5, 3), (75, 125)), ((2000, 1500), (240, 320)), ((8, 800), (320, 3))])
def test_cells_of_tiny_and_huge_pictures(shape, size):
    """(H, W) on the sheet as (width, height): enlarged by a whole number, or reduced; slender ones in the middle."""
    picture = np.zeros((*shape, 3), np.uint8)
    sheet = np.asarray(Image.open(io.BytesIO(sheet_of([picture] * 2, ["", ""]))))
    dark = np.argwhere((sheet == 0).all(-1))
    assert sheet.shape[:2] == (size[1] + 16, 2 * (max(size[0], 128) + 8) + 8)
    assert dark.min(0)[0] == 8
    assert len(np.unique(dark[:, 0])) == size[1]


@pytest.mark.processes
def test_damage_ends_with_3_and_is_said(copy, tmp_path):
    path = copy / "images/train/shards/000001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    done = run("data_pipeline/verify_shards.py", f"input={copy}/images", f"output={tmp_path}/r", check=False)
    assert done.returncode == 3
    assert "train, sizes: shard" in done.stdout
    assert "copy it again" in done.stdout
    report = json.loads((tmp_path / "r/report.json").read_text())
    assert report["sets"]["train"]["checks"]["sizes"] != "ok"
    assert report["sets"]["heldout"]["checks"]["sizes"] == "ok"
    with pytest.raises(UserError, match="contains no data set"):
        opened(str(tmp_path / "r"), None)


# What is wrong, one by one.


def only(findings, name, check):
    """The first sentence of the one finding there is."""
    assert [(n, c) for n, by_check in findings.items() for c in by_check] == [(name, check)]
    return findings[name][check][0]


def edit(root, **changes):
    dataclasses.replace(Manifest.load(str(root)), **changes).save(root)


def test_other_encoders(made, drawing):
    findings = found(made / "latents", autoencoder="another")
    assert findings.keys() == {"train", "heldout"}
    assert f"autoencoder {drawing.image.fingerprint}, not another" in findings["train"]["fingerprints"][0]

    class Other(Table):
        def encode_text(self, captions):
            states = super().encode_text(captions)
            return dataclasses.replace(states, tokens=states.tokens + 0.01)

    sentence = found(made / "latents", text=Other())["train"]["constants"][0]
    assert "is not this text encoder's state of the empty prompt" in sentence


def test_splits_of_different_encoders(copy):
    manifest = Manifest.load(copy / "latents/heldout")
    edit(copy / "latents/heldout", fingerprints={**manifest.fingerprints, "dtype": "float32"})
    assert "differs from" in only(found(copy / "latents"), "heldout", "fingerprints")


def test_other_pictures(copy, drawing):
    edit(copy / "images/train", shards=Manifest.load(copy / "images/train").shards[:1])
    findings = found(copy / "latents", copy / "images", drawing=drawing)["train"]
    assert "images" in findings["fingerprints"][0]
    assert "7 samples and 0 set aside, but 3 were listed" in findings["accounting"][0]
    assert "key3 is not in" in findings["decoding"][0]


def test_a_picture_that_changed_since_it_was_encoded(copy, drawing):
    path = copy / "images/train/shards/000000.tar"
    at, size = read_index(str(copy / "images/train"), Manifest.load(copy / "images/train").shards[0])[0].members["png"]
    data = bytearray(path.read_bytes())
    buffer = io.BytesIO()
    Image.fromarray(smooth(99)).save(buffer, "PNG")
    data[at : at + size] = buffer.getvalue()[:size].ljust(size, b"\0")
    path.write_bytes(data)
    sentences = found(copy / "latents", copy / "images", drawing=drawing)["train"]["decoding"]
    assert "key0 was made from another picture" in sentences[0]


def rewrite(root, change):
    """Each shard of `root` with its samples' arrays passed through change(list of samples)."""
    manifest, shards, samples = Manifest.load(str(root)), [], read_dataset(str(root))
    change(samples)
    rest = iter(samples)
    for shard in manifest.shards:
        writer = ShardWriter()
        for _ in range(shard.samples):
            sample = next(rest)
            members = {f"{name}.npy": value for name, value in sample.items() if isinstance(value, np.ndarray)}
            writer.add(sample["key"], {**members, "json": sample["meta"]})
        shards.append(writer.publish(root, shard.name))
    edit(root, shards=tuple(shards))


def test_latents_that_the_autoencoder_did_not_make(copy, drawing):
    """Well-formed in every other way."""

    def scaled(samples):
        for sample in samples:
            sample["moments"] = sample["moments"] * np.float16(0.18215)

    rewrite(copy / "latents/train", scaled)
    sentence = only(found(copy / "latents", copy / "images", drawing=drawing), "train", "decoding")
    assert "but the autoencoder's own reconstructions have" in sentence


def test_an_autoencoder_of_other_channels(made):
    other = Drawing(AutoencoderKL(8, **{k: v for k, v in SMALL.items() if k != "latent_channels"}).eval(),
                    torch.device("cpu"))  # fmt: skip
    assert "don't fit this autoencoder" in found(made / "latents", drawing=other)["train"]["decoding"][0]


def test_a_key_in_both_splits_or_twice(copy):
    rewrite(copy / "latents/heldout", lambda samples: samples[1].update(key="key2"))
    sentence = only(found(copy / "latents"), "heldout", "keys")
    assert sentence.startswith("key2 of ")


def test_a_tar_that_is_not_listed(copy):
    shutil.copy(copy / "images/train/shards/000000.tar", copy / "images/train/shards/000007.tar")
    assert "000007.tar is not in the manifest: delete it" in only(found(copy / "images"), "train", "manifest")


def test_manifests_that_were_edited_or_damaged(copy):
    path = copy / "images/train/manifest.json"
    saved = path.read_text()
    path.write_text(saved.replace('"samples": 7', '"samples": 8'))
    assert "was changed after it was written" in only(found(copy / "images"), "train", "manifest")
    path.write_text(saved[:-30])
    assert "is damaged" in only(found(copy / "images"), "train", "manifest")


@pytest.mark.parametrize("damage", ["missing", "cut", "other shape"])
def test_constants(copy, damage):
    path = copy / "latents/train/null.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    else:
        from safetensors.torch import save_file

        save_file({"text": torch.zeros(3, 24), "pooled": torch.zeros(24)}, path)
    assert "null" in only(found(copy / "latents"), "train", "constants")


def test_a_sample_without_caption_or_with_a_broken_picture(copy):
    manifest = Manifest.load(str(copy / "images/heldout"))
    data = tar_of([("a.png", b"x"), ("a.txt", b"a"), ("b.txt", b"b"), ("c.txt", b"")])
    (copy / "images/heldout/shards/000000.tar").write_bytes(data)
    (copy / "images/heldout/shards/000000.idx").unlink()
    shard = dataclasses.replace(manifest.shards[0], samples=3, bytes=len(data))
    edit(copy / "images/heldout", shards=(shard,))
    sentences = found(copy / "images")["heldout"]
    assert sentences.keys() == {"digests", "fields"}
    reasons = [sentence.split(": ")[1] for sentence in sentences["fields"]]
    assert reasons == ["not a picture of a known format", *["missing picture or caption"] * 2]


def test_index_of_shards_that_others_wrote(tmp_path):
    """Samples left out and the shard's name before keys are as it should be; another index, or none, is not."""
    from data_pipeline.shards.tar_index import scan
    from data_pipeline.sources.filters import Filters
    from data_pipeline.sources.tar_listing import Index

    shards = []
    index = Index(str(tmp_path), Filters({}), True, 0.9)
    for number in range(2):
        png = io.BytesIO()
        Image.fromarray(smooth(number)).save(png, "PNG")
        data = tar_of([("0.png", png.getvalue()), ("0.txt", b"a"), ("1.png", b"broken"), ("1.txt", b"b")])
        (tmp_path / "shards").mkdir(exist_ok=True)
        (tmp_path / f"shards/{number:06d}.tar").write_bytes(data)
        shards.append(index.add(f"shards/{number:06d}.tar", data, scan(data, "a")))
    index.finish(shards, {"made_from": "x", "size": 16})
    assert found(tmp_path) == {}
    path = tmp_path / "shards/000001.idx"
    row = json.loads(path.read_text())
    path.write_text(json.dumps([row[0], {**row[1], "png": [0, 512]}]) + "\n")
    sentences = found(tmp_path)[""]
    assert "run index_shards.py again" in sentences["index"][0]
    path.unlink()
    assert "which records what was filtered, is missing" in found(tmp_path)[""]["index"][0]


def test_many_findings_are_counted_and_the_first_kept():
    findings = Findings()
    for number in range(KEPT + 5):
        findings.add("keys", str(number))
    assert (findings.state("keys"), findings.sentences["keys"]) == ("25 wrong", [str(n) for n in range(KEPT)])


def test_sources_must_have_the_splits(made):
    with pytest.raises(UserError, match=r"has no train"):
        opened(str(made / "latents"), str(made / "images/train"))


def test_samples_to_look_at_are_evenly_spaced():
    manifest = Manifest("latents", tuple(Shard(str(i), n, 1, "") for i, n in enumerate([3, 1, 6])))
    assert [(shard.name, n) for shard, n in evenly(manifest, 5)] == [("0", 0), ("0", 2), ("2", 0), ("2", 2), ("2", 4)]
    assert len(evenly(manifest, 50)) == 10


def test_plain_webdataset_reads_latents(made):
    samples = list(wds.WebDataset(str(made / "latents/train/shards/{000000..000001}.tar"), shardshuffle=False).decode())
    expected = read_dataset(str(made / "latents/train"))
    assert [sample["__key__"] for sample in samples] == [sample["key"] for sample in expected]
    for sample, ours in zip(samples, expected, strict=True):
        for name in ("moments", "text", "pooled"):
            np.testing.assert_array_equal(sample[f"{name}.npy"], ours[name])
        assert sample["json"] == ours["meta"]


# In a bucket.


@pytest.fixture
def bucket(monkeypatch):
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="verify")
    yield "s3://verify"
    server.stop()


def test_a_data_set_in_a_bucket(made, bucket, drawing):
    for path in made.rglob("*"):
        if path.is_file() and path.parts[-4:][0] != "buckets":
            storage.write_atomically(f"{bucket}/{path.relative_to(made)}", path.read_bytes())
    assert found(f"{bucket}/latents", f"{bucket}/images", drawing.image.fingerprint, Table(), drawing) == {}
    shard = "latents/heldout/shards/000000.tar"
    data = bytearray((made / shard).read_bytes())
    data[-2000] ^= 1
    storage.write_atomically(f"{bucket}/{shard}", bytes(data))
    assert "digests" in found(f"{bucket}/latents")["heldout"]
