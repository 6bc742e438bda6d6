"""The entry points, as a user starts them: in a process of their own, on files."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from synthetic import run

from data_pipeline.images.framing import Framing
from data_pipeline.loading.loader import read_dataset
from data_pipeline.shards.manifest import Manifest
from data_pipeline.sources.folder import ImageFolder
from data_pipeline.sources.openmoji import OpenMoji, rasterise

REPOSITORY = Path(__file__).resolve().parents[3]


def start(*arguments, script="make_shards"):
    return run(f"data_pipeline/{script}.py", *arguments, check=False)


def sentence(done, code):
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    return done.stderr


@pytest.fixture
def pictures(tmp_path):
    """Forty pictures: one cannot be decoded, one lacks its caption, one has its caption in JSON."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(40):
        Image.fromarray(np.full((12, 20, 3), 5 * i, np.uint8)).save(folder / f"p{i:02d}.png")
        (folder / f"p{i:02d}.txt").write_text(f"grey {i}\n")
    (folder / "p03.png").write_bytes(b"not a picture")
    (folder / "p05.txt").unlink()
    (folder / "p07.txt").unlink()
    (folder / "p07.json").write_text('{"caption": "grey from json"}')
    return folder


@pytest.mark.processes
def test_folder_end_to_end(pictures, tmp_path):
    output = tmp_path / "shards"
    arguments = ["source=folder", f"input={pictures}", f"output={output}", "size=8", "shard_size=16"]
    before = set(REPOSITORY.iterdir())
    done = start(*arguments)
    assert done.returncode == 0, done.stderr
    assert set(REPOSITORY.iterdir()) == before  # Hydra leaves nothing here
    assert "2 set aside, of 40 listed" in done.stdout
    assert "1 x missing caption" in done.stdout
    train, heldout = Manifest.load(output / "train"), Manifest.load(output / "heldout")
    assert [shard.samples for shard in train.shards] == [16, 16, 2]
    assert train.samples + heldout.samples + 2 == 40
    assert [s["key"] for s in read_dataset(str(output / "heldout"))] == ["p09", "p19", "p29", "p39"]
    samples = {s["key"]: s for s in read_dataset(str(output / "train"))}
    assert samples["p07"]["caption"] == "grey from json"
    assert samples["p10"]["caption"] == "grey 10"
    np.testing.assert_array_equal(samples["p10"]["image"], np.full((8, 8, 3), 50))
    rows = [json.loads(line) for line in (output / "aside" / "make_shards.jsonl").open()]
    assert [(row["key"], row["reason"]) for row in rows] == [
        ("p03", "not a picture of a known format"),
        ("p05", "missing caption (no p05.txt, p05.caption or p05.json, and no metadata.jsonl names it)"),
    ]

    stamp = (output / "train" / "manifest.json").stat().st_mtime_ns
    assert "finished already" in start(*arguments).stdout
    assert (output / "train" / "manifest.json").stat().st_mtime_ns == stamp
    assert "made from other data or settings (size: 8 -> 16, shard_size: 16 -> 64)" in sentence(
        start(*arguments[:-2], "size=16"), 2
    )
    (pictures / "p05.txt").write_text("a caption at last")
    assert "made from other data or settings (the options are the same, but" in sentence(
        start(*arguments), 2
    )  # another source, though the same command


@pytest.mark.processes
def test_half_made_output_is_finished_not_taken_for_whole(pictures, tmp_path):
    output = tmp_path / "shards"
    arguments = ["source=folder", f"input={pictures}", f"output={output}", "size=8", "shard_size=16"]
    assert start(*arguments).returncode == 0
    whole = (output / "train" / "manifest.json").read_bytes()
    (output / "train" / "manifest.json").unlink()
    (output / "aside/filtered.jsonl").write_text("{}")  # of an earlier run, which filtered
    for ending in ("tar", "idx"):  # as an earlier run with more shards would leave
        (output / "train" / "shards" / f"000003.{ending}").write_bytes(b"old")
    assert start(*arguments).returncode == 0
    assert (output / "train" / "manifest.json").read_bytes() == whole
    assert len(list((output / "train" / "shards").glob("*.tar"))) == 3
    assert [path.name for path in (output / "aside").iterdir()] == ["make_shards.jsonl"]


@pytest.mark.processes
def test_past_the_cap_the_run_stops_and_says_why(pictures, tmp_path):
    arguments = ["source=folder", f"input={pictures}", f"output={tmp_path / 'out'}", "max_aside_fraction=0.03"]
    error = sentence(start(*arguments), 3)
    assert "2 of 40 samples can't be used" in error
    assert "max_aside_fraction" in error
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()


@pytest.mark.processes
def test_a_wrong_path_and_a_missing_output_get_a_sentence(tmp_path):
    error = sentence(start("source=folder", "input=/no/such/folder", f"output={tmp_path / 'out'}"), 2)
    assert "/no/such/folder is not a folder" in error
    assert not (tmp_path / "out").exists()
    assert "output must be given: add output=..." in sentence(start(), 2)
    arguments = [f"output={tmp_path / 'out'}", "autoencoder.path=a", "clip.path=b", f"input={tmp_path / 'nowhere'}"]
    assert "contains no data set" in sentence(start(*arguments, script="precompute_latents"), 2)


@pytest.mark.processes
def test_some_of_openmoji(tmp_path):
    given = [f"output={tmp_path / 'out'}", "size=16"]
    done = start(*given, "source.things={hearts: [red heart, blue heart], flags: [Japan]}", "heldout_every=3")
    assert done.returncode == 0, done.stderr
    assert [s["caption"] for s in read_dataset(str(tmp_path / "out" / "train"))] == ["red heart", "blue heart"]
    flag = read_dataset(str(tmp_path / "out" / "heldout"))[0]
    assert (flag["caption"], flag["meta"]["group"], flag["meta"]["name"]) == ("japan", "flags", "japan")
    red, white = flag["image"][8, 8].astype(int), flag["image"][0, 0]
    assert red[0] > 150
    assert red[1:].max() < 100
    assert (white == 255).all()
    assert "no such thing" in sentence(start(*given, "source.things={a: [no such thing]}"), 2)


def test_openmoji_lists_each_thing_once_without_skin_tones():
    items = OpenMoji().items()
    captions = [item.caption for item in items]
    assert 1800 < len(items) < 2000
    assert len(set(captions)) == len(captions) == len({item.key for item in items})
    assert not [item.key for item in items if "1F3FD" in item.key]
    assert all(caption == caption.lower() and caption.strip() for caption in captions)
    assert [item.key for item in OpenMoji(limit=7).items()] == [item.key for item in items[:7]]
    np.testing.assert_array_equal(items[0].load(Framing(16)).pixels, rasterise(items[0].key, 16).pixels)


def test_folder_captions_that_can_not_be_read_are_missing(pictures):
    (pictures / "p01.txt").write_bytes(b"\xff\xfe\xff")
    (pictures / "p02.txt").write_text("  \n")
    (pictures / "p07.json").write_text("[1]")
    captions = {item.key: item.caption for item in ImageFolder(str(pictures)).items()}
    assert [key for key, caption in captions.items() if caption is None] == ["p01", "p02", "p05", "p07"]


@pytest.mark.processes
def test_help_says_what_it_does_and_writes_nothing():
    """As a module; as scripts: tests/unit/test_what_is_imported.py."""
    for script in ("make_shards", "precompute_latents"):
        command = [sys.executable, "-m", f"data_pipeline.{script}", "--help"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0
        assert f"python data_pipeline/{script}.py" in done.stdout
