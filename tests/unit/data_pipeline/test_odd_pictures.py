"""Pictures as people have them, through the entry points: read right and counted, or named with the reason."""

import io
import json
import shutil
from collections import Counter

import icc
import numpy as np
import odd_pictures as odd
import pytest
from PIL import Image
from synthetic import run, tar_of

from data_pipeline.common.errors import UserError
from data_pipeline.images import decode
from data_pipeline.images.decode import PictureError, decode_image
from data_pipeline.loading.loader import read_dataset
from data_pipeline.shards.manifest import Manifest
from data_pipeline.sources.folder import ImageFolder
from train.sampling.requests import load_picture

pytestmark = pytest.mark.processes
CASES = {name: case[0] for name, case in {**odd.TAKEN, **odd.ASIDE}.items()}
EXTRA = {  # lie in the folder, and are no pictures of it
    "._a.png": b"\0\5\x16\7", ".DS_Store": b"x", "Thumbs.db": b"x", "__MACOSX/._a.png": b"x", "__MACOSX/a.png": b"x",
    "film.mp4": b"\0\0\0\x18ftypisom", "notes.pdf": b"%PDF", "more.PDF": b"%PDF",
}  # fmt: skip
ALL_KINDS = ["size=8", "heldout_every=null", "max_aside_fraction=1", "shard_size=200"]


def key_of(name):
    return name.replace(".", "_").lower()


def put(folder, files, suffix=".txt"):
    """Each picture in a folder of its own, as some have the same stem."""
    for name, data in files.items():
        path = folder / key_of(name) / name
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        path.with_suffix(suffix).write_text(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("odd") / "in"
    put(root, CASES)
    put(root, {"UP.PNG": odd.TAKEN["c.bmp"][0], "unknown.xyz": odd.TAKEN["c.bmp"][0]}, ".TXT")
    for name, data in EXTRA.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    return root


def make(source, given, output, *more, code=0):
    done = run(
        "data_pipeline/make_shards.py", f"source={source}", f"input={given}", f"output={output}", *more, check=False
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr  # Pillow's, with paths of the environment
    return done


def colours(output):
    """The first pixel of each sample, by its caption."""
    return {sample["caption"]: tuple(sample["image"][0, 0].astype(int)) for sample in read_dataset(str(output))}


def reasons(output, name="make_shards"):
    return [json.loads(line) for line in (output / "aside" / f"{name}.jsonl").open()]


def check_colours(got):
    for name, (_, colour, _) in odd.TAKEN.items():
        assert np.abs(np.subtract(got[name], colour)).max() <= (2 if name.endswith("avif") else 1), (name, got[name])


def converted(taken):
    known = [what for _, _, what in taken if what and what != "transparency"]
    clear = sum(what == "transparency" for _, _, what in taken) + 1  # and the one that also has a profile
    return Counter(known) + Counter({"transparency laid over the background": clear})


def test_a_folder_of_all_kinds(folder, tmp_path):
    done = make("folder", folder, tmp_path / "out", *ALL_KINDS)
    got = colours(tmp_path / "out/train")
    check_colours(got)
    assert got["UP.PNG"] == got["unknown.xyz"] == odd.PIXEL
    assert set(got) == {*odd.TAKEN, "UP.PNG", "unknown.xyz"}
    rows = reasons(tmp_path / "out")
    aside = {row["where"].rpartition("/")[2]: row["reason"] for row in rows}
    assert set(aside) == set(odd.ASIDE)
    for name, (_, reason) in odd.ASIDE.items():
        assert aside[name].startswith(reason), (name, aside[name])
        assert "object at" not in aside[name]
    info = Manifest.load(tmp_path / "out/train").info
    assert info["converted"] == converted(odd.TAKEN.values())
    assert info["passed_over"] == {"hidden or system file": 5, ".mp4": 1, ".pdf": 2}
    assert "make_shards: passed over 2 x .pdf" in done.stdout
    assert f"make_shards: converted {info['converted']['ICC profile to sRGB']} x ICC profile to sRGB" in done.stdout
    assert f"{len(odd.TAKEN) + 2} train, 0 filtered, {len(odd.ASIDE)} set aside" in done.stdout
    assert "set aside 1 x SVG picture, a format that is not read, first drawn_svg_drawn, save it as" in done.stdout


def test_a_table_of_all_kinds_on_another_background_without_animations(folder, tmp_path):
    names = [*CASES, "._a.png"]
    where = {name: f"{key_of(name)}/{name}" for name in CASES} | {"._a.png": "._a.png"}
    (folder / "table.csv").write_text("file,caption\n" + "".join(f"{where[name]},{name}\n" for name in names))
    given = [*ALL_KINDS, "source.background=0000ff", "source.animated=reject", "source.table=table.csv"]
    make("table", folder, tmp_path / "out", *given)
    (folder / "table.csv").unlink()
    got = colours(tmp_path / "out/train")
    assert got["p3.png"] == odd.IN_P3
    clear = [name for name, (_, colour, what) in odd.TAKEN.items() if what == "transparency" and colour == odd.WHITE]
    assert {got[name] for name in (*clear, "p3_alpha.png")} == {(0, 0, 255)}
    moving = {name for name in odd.TAKEN if name.startswith("moves")}
    rows = reasons(tmp_path / "out")
    aside = {row["where"].partition(", line ")[0].rpartition("/")[2]: row["reason"] for row in rows}
    assert {aside[name] for name in moving} == {"animated picture (animated=reject)"}
    assert aside["._a.png"] == "not a picture, but a macOS companion file (AppleDouble)"
    assert set(aside) == {*odd.ASIDE, *moving, "._a.png"}


def test_tars_of_all_kinds(tmp_path):
    """As a source of make_shards, and used in place: both take the same, and verify_shards and precompute read it."""
    members = [("__MACOSX/._a.png", b"x"), (".DS_Store", b"x")]
    for name, data in CASES.items():
        stem, _, extension = name.partition(".")
        members += [
            (f"{stem}_{extension.lower()}.{extension}", data),
            (f"{stem}_{extension.lower()}.TXT", name.encode()),
        ]
    members += [("odd.xyz", odd.TAKEN["c.bmp"][0]), ("odd.txt", b"odd"), ("film.mp4", b"x"), ("film.txt", b"film")]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.tar").write_bytes(tar_of(members))
    make("tars", tmp_path / "in", tmp_path / "out", *ALL_KINDS)
    check_colours(colours(tmp_path / "out/train"))
    rows = reasons(tmp_path / "out")
    aside = {row["where"].partition(" of ")[0]: row["reason"] for row in rows}
    for name, (_, reason) in odd.ASIDE.items():
        assert aside[key_of(name)].startswith(reason)
    assert aside["odd"] == "picture under an extension that is not known (.xyz: BMP)"
    assert aside["film"] == "missing picture (it has only .mp4, .txt)"

    given = [f"input={tmp_path / 'in'}", f"output={tmp_path / 'index'}", "size=8", "max_aside_fraction=1"]
    done = run("data_pipeline/index_shards.py", *given)
    check_colours(colours(tmp_path / "index"))
    info = Manifest.load(tmp_path / "index").info
    assert info["converted"] == converted(odd.TAKEN.values())
    assert info["passed_over"] == {"hidden or system file": 2}
    assert info["accounting"]["set_aside"]["damaged JPEG picture"] == 5
    assert len(reasons(tmp_path / "index", "a")) == len(rows)
    assert "index_shards: set aside 5 x damaged JPEG picture" in done.stdout
    assert run("data_pipeline/verify_shards.py", f"input={tmp_path / 'index'}", f"output={tmp_path / 'report'}")
    run("data_pipeline/index_shards.py", *given[:1], f"output={tmp_path / 'still'}", *given[2:], "animated=reject")
    assert Manifest.load(tmp_path / "still").samples == len(odd.TAKEN) - 3


def test_pictures_with_one_key_are_both_named(tmp_path):
    picture = odd.TAKEN["c.bmp"][0]
    for one, other in (("a/cat.jpg", "a/cat.webp"), ("a/b.png", "a_b.png"), ("v1.0.png", "v1_0.png")):
        root = tmp_path / one.replace("/", "-")
        for name in (one, other):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(picture)
            (root / name).with_suffix(".txt").write_text("a")
        error = make("folder", root, tmp_path / "out", code=2).stderr
        assert f"{root / one} and {root / other} would both have the key" in error
        assert "rename one of them" in error


def test_an_empty_split_gives_the_reasons(tmp_path):
    for i in range(11):
        (tmp_path / f"{i:02d}.png").write_bytes(odd.TAKEN["c.bmp"][0] if i != 9 else odd.ASIDE["half.jpg"][0])
        (tmp_path / f"{i:02d}.txt").write_text("a")
    given = ["heldout_every=10", "max_aside_fraction=0.2", "size=8"]
    error = make("folder", tmp_path, tmp_path / "out", *given, code=2).stderr
    assert "heldout would be empty (0 of 11 filtered, 1 set aside; 1 x damaged JPEG picture; first 09, damaged" in error
    assert "set heldout_every=null" in error
    shutil.rmtree(tmp_path / "out")
    error = make("folder", tmp_path, tmp_path / "out", *given, "filters=[shortest_side]",
                 "filters.shortest_side.at_least=9999", code=2).stderr  # fmt: skip
    assert "check the source and filters=." in error
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    error = make("folder", tmp_path, tmp_path / "out", "max_aside_fraction=0.01", code=3).stderr
    assert "stopped early: at least 1 of 11 samples can't be used" in error
    assert "(1 x damaged JPEG picture; first 09, damaged JPEG picture (" in error
    assert f"), {tmp_path / '09.png'}): fix the source" in error


def test_texts_without_pictures_and_pictures_without_texts(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(odd.TAKEN["c.bmp"][0])
        (tmp_path / (f"{i}.txt" if i < 2 else f"other{i}.txt")).write_text("a")
    error = make("folder", tmp_path, tmp_path / "out", "size=8", code=3).stderr
    assert "at least 1 of 4 samples can't be used (1 x missing caption; first 2," in error
    assert "): write a .txt with its caption beside each picture, or raise max_aside_fraction=0.05" in error
    done = make("folder", tmp_path, tmp_path / "out", "size=8", "max_aside_fraction=0.9")
    assert "passed over 2 x .txt without a picture" in done.stdout
    (tmp_path / "other2.txt").rename(tmp_path / "other2.caption")
    (tmp_path / "other3.txt").rename(tmp_path / "other3.JSON")
    shutil.rmtree(tmp_path / "out")  # its manifest.json would be counted
    done = make("folder", tmp_path, tmp_path / "out", "size=8", "max_aside_fraction=0.9")
    assert "passed over 1 x .caption without a picture" in done.stdout
    assert "passed over 1 x .json without a picture" in done.stdout


def test_options_that_can_not_be(tmp_path):
    assert (
        "source.background=blanc is not a colour"
        in make("folder", tmp_path, "out", "source.background=blanc", code=2).stderr
    )
    assert "animated=x is unknown: choose first" in make("table", tmp_path, "out", "source.animated=x", code=2).stderr
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    assert "holds no pictures (1 x .pdf): check the path" in make("folder", tmp_path, tmp_path / "out", code=2).stderr


def test_drawings_lie_on_the_background_asked_for(tmp_path):
    things = "source.things={hearts: [red heart, blue heart]}"
    make("openmoji", "null", tmp_path / "out", things, "size=8", "heldout_every=null", "source.background=navy")
    assert set(colours(tmp_path / "out/train").values()) == {(0, 0, 128)}


def test_what_is_beside_pictures_is_listed_once(folder):
    """Listing twice counts once; a pipe is not waited for."""
    source = ImageFolder(str(folder))
    assert len(list(source.items())) == len(list(source.items())) == len(CASES) + 2
    assert source.passed_over.total() == 8


def test_a_jpeg_has_the_same_pixels_as_by_pillow():
    """The decoder that tells damage is another build of the same library."""
    random = np.random.default_rng(0)
    for size, mode in (((37, 23), "RGB"), ((64, 64), "L"), ((9, 50), "CMYK")):
        pixels = random.integers(0, 256, (size[1], size[0], 4), np.uint8)
        for how in ({"subsampling": 0}, {"subsampling": 2}, {"progressive": True}, {"restart_marker_blocks": 3}):
            buffer = io.BytesIO()
            Image.fromarray(pixels).convert("RGB").convert(mode).resize((96, 96), 2).resize(size).save(
                buffer, "JPEG", **how
            )
            expected = np.asarray(Image.open(buffer).convert("RGB"))
            np.testing.assert_array_equal(decode_image(buffer.getvalue()), expected)


def test_colours_by_numbers_are_those_of_the_definitions():
    """cICP and cHRM against closed forms, over the whole cube: what no profile says."""
    colours = np.stack(np.meshgrid(*[np.arange(0, 256, 51)] * 3), -1).reshape(-1, 3).astype(np.uint8)
    row, size = colours.tobytes(), (len(colours), 1)
    bt2020 = ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046))
    cases = (
        (odd.chunk(b"cICP", b"\x09\x0d\0\1"), bt2020, "srgb"),
        (odd.chunk(b"cICP", b"\x0c\x08\0\1"), icc.P3, 1.0),
        (odd.chunk(b"cICP", b"\1\x05\0\1"), ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)), 2.8),
        (odd.chunk(b"gAMA", (55556).to_bytes(4)) + odd.chromaticities(icc.ADOBE), icc.ADOBE, 1.8),
    )
    for chunk, primaries, gamma in cases:
        got = decode_image(odd.png(8, 2, row, chunk, size=size))[0]
        expected = np.stack([icc.in_srgb(colour, primaries, gamma) for colour in colours])
        assert np.abs(got - expected).max() < 2
        assert np.abs(got - colours.astype(int)).max() > 8


def test_heic_without_its_package_is_named(monkeypatch):
    monkeypatch.setattr(decode, "reads_heic", lambda: False)
    with pytest.raises(PictureError, match=r"HEIC picture, which needs pillow-heif \(run pip install -e '.\[heic\]'"):
        decode_image(odd.ISO_HEIC)


def test_what_a_picture_given_to_sampling_is(tmp_path, capsys):
    for name in ("p3.png", "moves.gif", "clear.webp", "half.jpg"):
        (tmp_path / name).write_bytes(CASES[name])
    assert load_picture(str(tmp_path / "p3.png"), (8, 8))[0, 0].tolist() == list(odd.IN_P3)
    assert load_picture(str(tmp_path / "clear.webp"), (8, 8))[0, 0].tolist() == list(odd.WHITE)
    capsys.readouterr()
    load_picture(str(tmp_path / "moves.gif"), (8, 8))
    assert "moves.gif: animated, the first frame taken" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"half.jpg can't be used: damaged JPEG picture \("):
        load_picture(str(tmp_path / "half.jpg"), (8, 8))
