"""Shards of others become a data set: every sample accounted for, not a byte of a tar changed."""

import hashlib
import io
import json
import os
import tarfile

import img2dataset_run
import numpy as np
import pytest
from loaders import loader_of
from PIL import Image
from synthetic import run

from data_pipeline.loading.epoch_plan import Place
from data_pipeline.loading.loader import read_dataset
from data_pipeline.loading.sample_reader import SampleReader
from data_pipeline.shards.data_sets import DataSets
from data_pipeline.shards.key_set import KnownKeys
from data_pipeline.shards.manifest import Manifest
from data_pipeline.sources.tar_listing import AGAIN


def start(*arguments):
    return run("data_pipeline/index_shards.py", *arguments, check=False)


def sentence(done, code):
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    return done.stderr


def picture(number, kind="JPEG", sides=(40, 30)):
    pixels = np.full((sides[1], sides[0], 3), 5 * number, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path, samples):
    """As img2dataset: (key, {extension: bytes}) in order."""
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def good(number, kind="JPEG", **facts):
    extension = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind]
    about = {"caption": f"grey {number}", "status": "success", "aesthetic": number / 10} | facts
    members = {extension: picture(number, kind, (40 + number, 30)), "txt": about["caption"].encode()}
    return members | {"json": json.dumps(about).encode()}


@pytest.fixture
def tars(tmp_path):
    """Three tars of three formats, 41 samples: two not fetched, one undecodable, one without caption, one key twice."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for shard, kind in enumerate(("JPEG", "PNG", "WEBP")):
        samples = [(f"{shard:05d}{i:04d}", good(10 * shard + i, kind)) for i in range(12)]
        write_tar(folder / f"{shard:05d}.tar", samples)
    gone = json.dumps({"caption": "gone", "status": "failed_to_download"}).encode()
    extra = [("x1", {"json": gone}), ("x2", {"json": gone}), ("x3", good(1) | {"jpg": b"nothing"}),
             ("x4", {"jpg": picture(3), "txt": b" "}), ("000000003", good(4))]  # fmt: skip
    write_tar(folder / "00003.tar", extra)
    write_tar(folder / "00004.tar", [])  # img2dataset leaves such, where nothing could be fetched
    (folder / "00000_stats.json").write_text(json.dumps({"count": 15, "successes": 12, "failed_to_download": 3}))
    (folder / "00000.parquet").write_bytes(b"not looked at")
    return folder


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}


@pytest.mark.processes
def test_foreign_tars_become_a_data_set_untouched(tars):
    before = digests(tars)
    done = start(f"input={tars}", "size=16", "max_aside_fraction=0.1")
    assert done.returncode == 0, done.stderr
    assert "36 processed, 2 filtered, 3 set aside, of 41 listed" in done.stdout
    assert "filtered 2 x not fetched: failed_to_download" in done.stdout
    assert "img2dataset reports 12 of 15" in done.stdout
    assert digests(tars) == before
    manifest = Manifest.load(tars)
    assert manifest.info["accounting"] == {
        "listed": 41,
        "processed": 36,
        "filtered": {"not fetched: failed_to_download": 2},
        "set_aside": {"not a picture of a known format": 1, "missing caption": 1, AGAIN: 1},
    }
    assert [(s.name, s.samples) for s in manifest.shards] == [(f"{i:05d}.tar", 12) for i in range(3)]
    rows = [json.loads(line) for line in (tars / "aside" / "00003.jsonl").open()]
    assert [row["key"] for row in rows] == ["x3", "x4", "000000003"]
    rows = [json.loads(line) for line in (tars / "aside" / "00003.filtered.jsonl").open()]
    assert [row["key"] for row in rows] == ["x1", "x2"]

    samples = read_dataset(str(tars))
    assert [s["caption"] for s in samples] == [f"grey {10 * shard + i}" for shard in range(3) for i in range(12)]
    assert all(s["image"].shape == (16, 16, 3) for s in samples)
    assert [int(np.median(s["image"])) // 5 for s in samples] == [int(s["caption"].split()[1]) for s in samples]
    batches = iter(loader_of(str(tars), 6, 2))
    seen = [key for _ in range(6) for key in next(batches).keys]
    assert sorted(seen) == sorted(s["key"] for s in samples)

    assert "finished already" in start(f"input={tars}", "size=16", "max_aside_fraction=0.1").stdout
    assert "was made from other data or settings (size: 16 -> 32): remove it" in sentence(
        start(f"input={tars}", "size=32"), 2
    )


@pytest.mark.processes
def test_into_another_folder_with_filters(tars, tmp_path):
    output = tmp_path / "set" / "train"
    filters = ["filters=[columns,aspect]", "filters.columns.bounds={aesthetic: {min: 0.5}}", "filters.aspect.at_most=2"]
    given = [f"input={tars}", f"output={output}", "size=16", "max_aside_fraction=0.1"]
    before = sorted(os.listdir(tars))
    done = start(*given, *filters)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tars)) == before
    manifest = Manifest.load(output)
    numbers = [10 * shard + i for shard in range(3) for i in range(12)]
    kept = [n for n in numbers if n >= 5 and 40 + n <= 60]
    assert [s["caption"] for s in read_dataset(str(output))] == [f"grey {n}" for n in kept]
    account = manifest.info["accounting"]
    assert account["filtered"] == {"not fetched: failed_to_download": 2, "aesthetic under 0.5": 5,
                                   "aspect over 2": sum(n > 20 for n in numbers)}  # fmt: skip
    assert account["processed"] + sum(account["filtered"].values()) + 3 == account["listed"] == 41
    other = tmp_path / "other"
    assert start(*given, f"output={other}").returncode == 0
    assert Manifest.load(other).fingerprint != manifest.fingerprint  # the same tars, but other samples


@pytest.mark.processes
def test_past_the_cap_it_stops_with_the_reasons(tars):
    error = sentence(start(f"input={tars}", "max_aside_fraction=0.05"), 3)
    assert "3 of about 44 samples can't be used" in error
    assert "1 x missing caption" in error
    assert "max_aside_fraction" in error
    assert not (tars / "manifest.json").exists()


@pytest.mark.processes
def test_a_run_stops_early_where_most_is_damaged(tmp_path):
    """By what the whole will likely be: not after all tars, and not for the first few samples."""
    for shard in range(4):
        bad = [(f"{shard}{i:04d}", good(i) | ({"jpg": b""} if shard else {})) for i in range(20)]
        write_tar(tmp_path / f"{shard:05d}.tar", bad)
    sentence(start(f"input={tmp_path}"), 3)
    assert (tmp_path / "00000.idx").exists()
    assert not (tmp_path / "00003.idx").exists()


@pytest.mark.processes
def test_all_damaged_tars_are_named_at_once(tars):
    for name in ("00001", "00002"):
        data = (tars / f"{name}.tar").read_bytes()
        (tars / f"{name}.tar").write_bytes(data[: len(data) // 2 // 512 * 512])
    error = sentence(start(f"input={tars}"), 3)
    assert "2 of 5 shards are damaged" in error
    assert "00001.tar is damaged" in error
    assert "00002.tar is damaged" in error
    assert not (tars / "manifest.json").exists()


@pytest.mark.processes
def test_fewer_samples_than_img2dataset_says_are_named(tars):
    (tars / "00001_stats.json").write_text(json.dumps({"count": 15, "successes": 13}))
    assert "00001.tar has 12 samples, but" in sentence(start(f"input={tars}", "max_aside_fraction=0.1"), 3)


@pytest.mark.processes
def test_tars_that_all_count_from_zero(tmp_path):
    for shard in range(2):
        write_tar(tmp_path / f"{shard:05d}.tar", [(f"{i:04d}", good(i + shard)) for i in range(4)])
    error = sentence(start(f"input={tmp_path}"), 3)
    assert "shard_in_keys=true" in error
    assert start(f"input={tmp_path}", "shard_in_keys=true").returncode == 0
    keys = [sample["key"] for sample in read_dataset(str(tmp_path))]
    assert keys == [f"{shard:05d}/{i:04d}" for shard in range(2) for i in range(4)]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "holds no .tar"),
        (lambda folder: (folder / "a.tar.gz").write_bytes(b""), "compressed tars"),
        (lambda folder: write_tar(folder / "a.tar", []), "not one of 0 samples is left (the tars are empty)"),
    ],
)
def test_a_folder_without_samples_gets_a_sentence(tmp_path, make, words):
    make(tmp_path)
    done = start(f"input={tmp_path}")
    assert words in sentence(done, done.returncode)
    assert done.returncode in (2, 3)


def test_keys_are_known_again_across_many_shards():
    known, random, before = KnownKeys(), np.random.default_rng(0), set()
    for _ in range(40):
        keys = [str(n) for n in random.integers(0, 3000, int(random.integers(0, 90)))]
        expected = [key in before or key in keys[:i] for i, key in enumerate(keys)]
        assert known.contains(keys).tolist() == expected
        before |= set(keys)
    assert sum(map(len, known.runs)) == len(before)
    assert len(known.runs) <= 12


def stand_in(root):
    """In the layout of img2dataset, by plain tarfile."""
    names = img2dataset_run.make_pictures(root / "served")
    folder = root / "tars"
    folder.mkdir()
    fetched = [(i, n) for i, n in enumerate(names) if not n.startswith("broken") and not n.startswith("gone")]
    for shard in range(0, len(names), 8):
        rows = [(f"{i:09d}", n) for i, n in fetched if shard <= i < shard + 8]
        samples = []
        for key, name in rows:
            buffer = io.BytesIO()
            image = Image.open(root / "served" / name).convert("RGB")
            image.resize((48, max(1, 48 * image.height // image.width))).save(buffer, "JPEG")
            about = {"caption": f"picture {name}", "aesthetic": int(key) / 2, "status": "success", "exif": "{}"}
            samples.append(
                (key, {"jpg": buffer.getvalue(), "json": json.dumps(about).encode(), "txt": about["caption"].encode()})
            )
        write_tar(folder / f"{shard // 8:05d}.tar", samples)
        stats = {"count": min(8, len(names) - shard), "successes": len(rows), "failed_to_download": 0}
        (folder / f"{shard // 8:05d}_stats.json").write_text(json.dumps(stats))
    return folder


@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    """What img2dataset makes of pictures on loopback, some missing or broken; without it, the same layout."""
    root = tmp_path_factory.mktemp("img2dataset")
    interpreter = os.environ.get("IMG2DATASET_PYTHON")
    if interpreter:
        return img2dataset_run.run(interpreter, root)
    print("img2dataset itself is not run: IMG2DATASET_PYTHON names no interpreter that has it")
    return stand_in(root)


@pytest.mark.processes
def test_what_img2dataset_wrote_goes_in_untouched(fetched):
    before = digests(fetched)
    done = start(f"input={fetched}", "size=24", "filters=[columns]", "filters.columns.bounds={aesthetic: {max: 5}}")
    assert done.returncode == 0, done.stderr
    assert digests(fetched) == before
    total = sum(img2dataset_run.TALLY.values())
    assert f"img2dataset reports 14 of {total}" in done.stdout
    assert "11 processed, 3 filtered, 0 set aside, of 14 listed" in done.stdout
    manifest = Manifest.load(fetched)
    assert manifest.info["img2dataset"] == {"count": total, "successes": 14}
    reader = SampleReader(DataSets.of(str(fetched)), 0)
    samples = read_dataset(str(fetched))
    assert [s["meta"]["aesthetic"] for s in sorted(samples, key=lambda s: s["key"])] == [i / 2 for i in range(11)]
    for sample in samples:
        with Image.open(fetched.parent / "served" / sample["caption"].removeprefix("picture ")) as image:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.convert("RGB").crop((left, top, left + side, top + side)).resize((24, 24))
        assert np.abs(sample["image"].astype(int) - np.asarray(square)).mean() < 12
    assert reader.read(Place(1, 0))["image"].shape == (24, 24, 3)
