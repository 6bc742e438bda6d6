"""Tars as people have them: index_shards.py and make_shards.py take the same of them, and verify_shards.py agrees."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from entered import entered
from PIL import Image
from synthetic import tar_of

from data_pipeline.loading.loader import read_dataset
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.samples import captions_of


def png(shade: int = 9) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), shade).save(buffer, "PNG")
    return buffer.getvalue()


def sample(key: str, caption: str | bytes | None = None, **more: Any) -> list[tuple[str, bytes]]:
    """A picture, its .txt if there is a caption, and further members by extension."""
    text = caption.encode() if isinstance(caption, str) else caption
    found = [(f"{key}.png", png())] + ([(f"{key}.txt", text)] if text is not None else [])
    objects = {name: json.dumps(v).encode() if not isinstance(v, bytes) else v for name, v in more.items()}
    return found + [(f"{key}.{name}", data) for name, data in objects.items()]


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.LNKTYPE, target
    return info


def write(folder: Path, **tars: bytes) -> Path:
    folder.mkdir()
    for name, data in tars.items():
        (folder / f"{name}.tar").write_bytes(data)
    return folder


def index(folder: Path, *options: str, code: int = 0) -> Any:
    """index_shards, into another folder: its samples, reasons by key and what it printed. verify_shards must agree."""
    output = folder.parent / f"{folder.name}_index"
    given = [f"input={folder}", f"output={output}", "size=8", "max_aside_fraction=0.99"]
    done = entered("data_pipeline/index_shards", *given, *options)
    assert done.code == code, done.error
    if code:
        return done.error
    verified(output)
    rows = [json.loads(line) for path in sorted((output / "aside").glob("*.jsonl")) for line in path.open()]
    return read_dataset(str(output)), {row["key"]: row["reason"] for row in rows}, done.said


def made(folder: Path, *options: str) -> Any:
    """make_shards source=tars: its samples and its reasons by their keys in the tars. verify_shards must agree."""
    output = folder.parent / f"{folder.name}_shards"
    given = [f"input={folder}", f"output={output}", "size=8", "heldout_every=null", "max_aside_fraction=0.99"]
    done = entered("data_pipeline/make_shards", "source=tars", *given, *options)
    assert done.code == 0, done.error
    verified(output)
    path = output / "aside/make_shards.jsonl"
    rows = [json.loads(line) for line in path.open()] if path.exists() else []
    return read_dataset(str(output / "train")), {row["where"].partition(" of ")[0]: row["reason"] for row in rows}


def verified(output: Path) -> None:
    done = entered("data_pipeline/verify_shards", f"input={output}", f"output={output}_report", "samples=0")
    assert done.code == 0, done.said


def test_samples_of_every_kind(tmp_path: Path) -> None:
    """One tar, twice: by index_shards and by source=tars. Both take the same samples for the same reasons."""
    members = [
        *sample("bom", b"\xef\xbb\xbfa\0 cat\x07"), *sample("shape", "a cat", json=[1, 2]),
        *sample("empty", " \u200b", json={"caption": "from json", "id": 2**60 + 1}),
        *sample("list", json={"caption": ["a fox", "a red fox"]}), *sample("more", "a cat", cls=b"5"),
        ("more.seg.png", png()),
        *sample("latin", "größe".encode("latin-1")), *sample("other", json={"text": "a"}), *sample("bare"),
        *sample("truth", json={"caption": True}), *sample("broken", "a", json=b'{"caption": "a"'),
        ("lost.json", b'{"status": "success", "caption": "a"}'), ("fail.json", b'{"status": "failed", "caption": "a"}'),
        link("hard.png", "bom.png"), ("hard.txt", b"a"), ("apart.png", png()), *sample("next", "b"),
        ("apart.txt", b"a"),
    ]  # fmt: skip
    folder = write(tmp_path / "tars", a=tar_of(members))
    indexed, reasons, said = index(folder)
    taken = {"bom": "a cat", "shape": "a cat", "empty": "from json", "list": "a fox", "more": "a cat", "apart": "a",
             "next": "b"}  # fmt: skip
    assert {each["key"]: each["caption"] for each in indexed} == taken
    by_key = {each["key"]: each for each in indexed}
    assert captions_of(by_key["list"]) == {"0": "a fox", "1": "a red fox"}
    assert by_key["empty"]["meta"]["id"] == 2**60 + 1
    expected = {
        "latin": "undecodable .txt (not UTF-8, byte 2 is 0xf6: make_shards.py reads it with source.encoding=cp1252)",
        "other": "missing caption (.json has no caption (but text))",
        "bare": "missing caption (no .txt or .json beside .png)",
        "truth": "caption is no text (caption of .json is true or false)",
        "broken": "undecodable .json (Expecting ',' delimiter: line 1 column 16 (char 15))",
        "lost": "missing picture (it has only .json)",
        "fail": "not fetched: failed",
        "hard": "missing picture (its .png is a link, a device or sparse: these are not read)",
    }
    assert reasons == expected
    assert "index_shards: 1 x invisible characters removed from the caption" in said
    assert "index_shards: 1 x a json that is no object left out" in said
    assert (
        "set aside 2 x missing picture, first lost, it has only .json, in shards/a.tar; hard, its .png is a l" in said
    )
    again, others = made(folder)
    assert {each["meta"]["original_key"]: each["caption"] for each in again} == taken
    assert others == {key: reason for key, reason in expected.items() if key != "fail"}
    assert captions_of(next(each for each in again if each["meta"]["original_key"] == "list")) == {
        "0": "a fox", "1": "a red fox"
    }  # fmt: skip
    (tmp_path / "tars_shards").rename(tmp_path / "before")
    again, _ = made(folder, "source.encoding=latin-1", "source.caption=text")
    assert {each["caption"] for each in again} >= {"größe", "a", "a cat"}


def test_keys_with_dots(tmp_path: Path) -> None:
    members = [*sample("22.05", "five"), *sample("22.06", "six"), *sample("v.1/a.b", "dotted"), *sample("7", "seven")]
    folder = write(tmp_path / "tars", **{"part.0": tar_of(members)})
    _, reasons, said = index(folder)
    assert "4 listed" in said
    fall = "pictures that fall together"
    assert reasons["22"].startswith(
        f"{fall} (22.06.png and 22.05.png have one key, 22: key=full, for make_shards.py sou"
    )
    assert reasons["v.1/a"].startswith("missing picture (v.1/a.b.png has dots in its key: key=full")
    assert f"set aside 2 x {fall}" in said
    (tmp_path / "tars_index").rename(tmp_path / "first")
    samples, reasons, _ = index(folder, "key=full")
    assert {each["key"]: each["caption"] for each in samples} == {
        "22_05": "five", "22_06": "six", "v.1/a_b": "dotted", "7": "seven"
    }  # fmt: skip
    assert not reasons
    assert Manifest.load(tmp_path / "tars_index").info["tars"] == {"full_keys": True}
    samples, _ = made(folder, "source.key=full")
    assert [each["key"] for each in samples] == [f"part_0_{number:06d}" for number in range(4)]
    assert "key=last can't be: take first" in index(folder, "key=last", code=2)


def test_names_twice_joined_tars_and_missing_ends(tmp_path: Path) -> None:
    first, second = tar_of([*sample("0", "a"), *sample("1", "b")]), tar_of([*sample("2", "c"), *sample("0", "again")])
    folder = write(tmp_path / "joined", a=first + second)
    samples, reasons, _ = index(folder)
    assert [each["caption"] for each in samples] == ["a", "b", "c"]
    assert reasons == {"0": "a key that the same tar has twice"}
    assert [each["caption"] for each in made(folder)[0]] == ["a", "b", "c", "again"]
    end = len(first.rstrip(b"\0")) + 511 & ~511
    folder = write(tmp_path / "open", a=first[:end], b=second)
    error = index(folder, code=3)
    assert "1 of 2 shards are damaged" in error
    assert f"two empty blocks are missing after its last member, which ends at byte {end}" in error
    assert "unended=true reads it" in error
    samples, reasons, _ = index(folder, "unended=true")
    assert [each["caption"] for each in samples] == ["a", "b", "c"]
    assert list(reasons.values()) == ["a key that came before; tars that all count from 0 want shard_in_keys=true"]
    samples, _ = made(folder, "source.unended=true")
    assert len(samples) == 4


def test_rejected_samples_are_counted_and_the_first_three_named(tmp_path: Path) -> None:
    members = [each for number in range(5) for each in sample(str(number), json={"caption": number})]
    error = index(write(tmp_path / "tars", a=tar_of(members)), code=3)
    assert (
        "5 of 5 samples can't be used (5 x caption is no text; first 0, caption is no text (caption of .json is a"
        in error
    )
    assert error.count("in shards/a.tar") == 3
