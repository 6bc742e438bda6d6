"""Captions and tables as people have them, through make_shards.py: read, or set aside with the true reason."""

from __future__ import annotations

import codecs
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from entered import entered
from PIL import Image

from data_pipeline.loading.loader import read_dataset
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.samples import captions_of


def png(shade: int = 9) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), shade).save(buffer, "PNG")
    return buffer.getvalue()


def put(folder: Path, **files: str | bytes | dict[str, Any]) -> None:
    """Write a picture NAME.png, unless it is there, and what lies beside it: cat_txt="a" is cat.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        stem, _, ending = name.rpartition("_")
        (folder / f"{stem}.png").write_bytes(png())
        content = json.dumps(content) if isinstance(content, dict) else content
        (folder / f"{stem}.{ending}").write_bytes(content if isinstance(content, bytes) else content.encode())


def make(folder: Path, source: str, *options: str, code: int = 0) -> Any:
    """make_shards of all of a folder; the samples by key, the reasons by key, and what it printed."""
    output = folder.parent / f"{folder.name}_shards"
    given = [f"source={source}", f"input={folder}", f"output={output}", "size=8", "heldout_every=null"]
    done = entered("data_pipeline/make_shards", *given, "max_aside_fraction=1", *options)
    assert done.code == code, done.error
    if code:
        return done.error
    rows = output / "aside/make_shards.jsonl"
    aside = {row["key"]: row for row in map(json.loads, rows.open())} if rows.exists() else {}
    return {sample["key"]: sample for sample in read_dataset(str(output / "train"))}, aside, done.said


READ = {  # what lies beside the picture -> its caption
    "bom": ({"txt": codecs.BOM_UTF8 + b"a fox"}, "a fox"),
    "controls": ({"txt": "a\0 \x1b[1mf\u200box\ufeff\x7f\tb\r\nc"}, "a [1mfox\tb\r\nc"),
    "kept": ({"txt": "\U0001f469\u200d\U0001f680 \u200fe\u0301"}, "\U0001f469\u200d\U0001f680 \u200fe\u0301"),
    "null": ({"txt": "null"}, "null"),
    "nan": ({"json": {"caption": "NaN"}}, "NaN"),
    "kohya": ({"caption": "from .caption"}, "from .caption"),
    "upper": ({"TXT": "in upper case"}, "in upper case"),
    "mixcase": ({"Caption": "in mixed case"}, "in mixed case"),
    "empty": ({"txt": " \n", "json": {"caption": "from json"}}, "from json"),
    "shape": ({"txt": "a cat", "json": "[1, 2]"}, "a cat"),
    "ujson": ({"json": json.dumps({"caption": "größe"}, ensure_ascii=False).encode("utf-16")}, "größe"),
    "one": ({"json": {"caption": ["", None, "only one"]}}, "only one"),
}
ASIDE = {  # what lies beside the picture -> reason
    "cp1252": ({"txt": "caf\u00e9".encode("cp1252")}, "undecodable caption (cp1252.txt: not UTF-8, byte 3 is 0xe9: make_shards.py reads it with source.encoding=cp1252)"),  # noqa: E501
    "utf16": ({"txt": "a fox".encode("utf-16")}, "source.encoding=utf-16)"),
    "nomark": ({"txt": "a fox".encode("utf-16-le")}, "source.encoding=utf-16-le)"),
    "long": ({"txt": "a" * (2**20 + 1)}, "undecodable caption (long.txt: 1048577 bytes are more than the"),
    "blank": ({"txt": "\u200b\u200d\x01 \u3000\u2800"}, "missing caption (blank.txt is empty)"),
    "nothing": ({}, "(no nothing.txt, nothing.caption or nothing.json, and no metadata.jsonl names it)"),
    "beside": ({"png.txt": "a"}, "names it; beside it: beside.png.txt)"),
    "other": ({"json": {"text": "a"}}, "missing caption (other.json has no caption (but text))"),
    "object": ({"json": {"caption": {"en": "a"}}}, "caption is no text (caption of object.json is an object)"),
    "truth": ({"json": {"caption": True}}, "caption is no text (caption of truth.json is true or false)"),
    "number": ({"json": {"caption": 5}}, "caption is no text (caption of number.json is a number)"),
    "mixed": ({"json": {"caption": ["a", 5]}}, "caption is no text (caption of mixed.json is a number)"),
    "none": ({"json": {"caption": None}}, "missing caption (none.json has no caption (but caption))"),
    "broken": ({"json": '{"caption": "a"'}, "undecodable caption (broken.json: "),
}  # fmt: skip


def test_captions_beside_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, (beside, _) in (READ | ASIDE).items():
        put(folder, **{f"{name}_{ending}": content for ending, content in {**beside, "png": png()}.items()})
    put(folder, several_json={"caption": ["a fox", "a red fox"], "id": 12345678901234567890, "x": 5})
    samples, aside, said = make(folder, "folder")
    assert {key: sample["caption"] for key, sample in samples.items()} == {
        **{name: caption for name, (_, caption) in READ.items()},
        "several": "a fox",
    }
    for name, (_, reason) in ASIDE.items():
        assert reason in aside[name]["reason"], name
        assert aside[name]["where"].endswith(f"{name}.png")
    assert aside.keys() == ASIDE.keys()
    assert captions_of(samples["several"]) == {"0": "a fox", "1": "a red fox"}
    assert captions_of(samples["null"]) == {"caption": "null"}
    meta = {"captions": {"0": "a fox", "1": "a red fox"}, "file": "several.png", "id": 12345678901234567890, "x": 5}
    assert samples["several"]["meta"] == meta
    assert samples["one"]["meta"] == {"file": "one.png"}  # one caption: as ever
    assert "1 x invisible characters removed from the caption" in said
    assert "1 x a json that can't be read left out (shape.png)" in said
    assert "set aside 4 x caption is no text, first mixed, caption of mixed.json is a number, /" in said
    info = Manifest.load(tmp_path / "in_shards/train").info
    assert info["notes"]["invisible characters removed from the caption"] == 1


def test_an_encoding_is_an_option_and_names_of_captions_too(tmp_path: Path) -> None:
    put(tmp_path / "a", a_txt="caf\u00e9 \u201cx\u201d".encode("cp1252"), b_txt="größe".encode("utf-8-sig"))
    put(tmp_path / "a", c_json={"caption": "größe"}, d_json='{"caption": "größe"}'.encode("cp1252"))
    samples, _, _ = make(tmp_path / "a", "folder", "source.encoding=cp1252")
    assert [sample["caption"] for sample in samples.values()] == ["caf\u00e9 \u201cx\u201d", *["größe"] * 3]
    put(tmp_path / "b", a_json={"short": "a", "long": "a long one"}, a_txt="tags", b_txt="tags")
    put(tmp_path / "b", c_json={"short": " ", "long": ["l", "m"]})
    samples, _, _ = make(tmp_path / "b", "folder", "source.caption=[short,long]")
    assert list(captions_of(samples["a"]).items()) == [("short", "a"), ("long", "a long one")]
    assert list(samples["a"]["meta"]["captions"]) == ["short", "long"]  # stored in this order
    assert samples["a"]["caption"] == "a"
    assert captions_of(samples["b"]) == {"caption": "tags"}
    assert captions_of(samples["c"]) == {"long.0": "l", "long.1": "m"}
    for option, words in (
        ("encoding=base64", "base64 is not known"),
        ("caption=[a,a]", "give a name"),
        ("caption=5", "give a name"),
    ):
        assert words in make(tmp_path / "b", "folder", f"source.{option}", code=2)


def test_metadata_of_image_folders(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for name in ("a.png", "sub/b.png", "sub/c.png", "sub/own.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png())
    (folder / "a.txt").write_text("its own")
    (folder / "sub/own.txt").write_text("")
    rows = [{"file_name": "sub/own.png", "text": "from above"}, {"file_name": "gone.png", "text": "x"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sub/metadata.csv").write_bytes(
        codecs.BOM_UTF8 + b"file_name;text;score\r\n./b.png;one;5\r\nb.png;two;6\r\nc.png;nan;7"
    )
    samples, aside, _ = make(folder, "folder")
    assert {key: sample["caption"] for key, sample in samples.items()} == {
        "a": "its own", "sub_own": "from above", "sub_b": "one"
    }  # fmt: skip
    assert captions_of(samples["sub_b"]) == {"0": "one", "1": "two"}
    assert samples["sub_b"]["meta"]["score"] == 5
    assert (
        aside["sub_c"]["reason"] == "missing caption (its row of metadata.csv has no text (but file_name, text, score))"
    )
    assert aside["gone_png"]["reason"] == "missing picture"
    assert "line 2 of" in aside["gone_png"]["where"]
    (folder / "metadata.jsonl").write_text('{"name": "a.png"}\n')
    (folder / "sub/metadata.csv").unlink()
    (tmp_path / "in_shards").rename(tmp_path / "before")
    _, aside, _ = make(folder, "folder")
    assert "metadata.jsonl has no file_name (but name)" in aside["sub_b"]["reason"]


def table(folder: Path, name: str, content: bytes | str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for picture in ("a.png", "b.png", "c.png"):
        (folder / picture).write_bytes(png())
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


TABLES = {  # name and contents, options, captions of the rows
    "bom": ("t.csv", codecs.BOM_UTF8 + b"file,caption\na.png,one\n", [], ["one"]),
    "excel": ("t.csv", "file\tcaption\r\na.png\tgröße\r\n".encode("utf-16"), [], ["größe"]),
    "semicolon": ("t.csv", "file;caption;x\na.png;a, b;1\n", [], ["a, b"]),
    "cp1252": ("T.CSV", "file,caption\na.png,größe\n".encode("cp1252"), ["source.encoding=cp1252"], ["größe"]),
    "spaced": ("t.csv", '\nfile, caption\na.png, "a, b"\n', [], ["a, b"]),
    "sep": ("t.csv", "sep=;\r\nfile;caption\r\na.png;x\r\n", [], ["x"]),
    "blank": ("t.tsv", "caption\t file\n one \ta.png\n", [], ["one"]),
    "lines": ("t.jsonl", '{"file": "a.png", "caption": "nan"}\n\n{"file": "b.png", "caption": ["x", "y"]}', [],
              ["nan", "x"]),
    "quotes": ("t.csv", 'file,caption\na.png,"a ""big"" dog, and\na cat"\n', [], ['a "big" dog, and\na cat']),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_any_kind(tmp_path: Path, name: str) -> None:
    file, content, options, captions = TABLES[name]
    samples, aside, _ = make(table(tmp_path / name, file, content), "table", *options)
    assert [sample["caption"] for sample in samples.values()] == captions
    assert not aside


def test_rows_of_a_csv(tmp_path: Path) -> None:
    """What stands for a missing value, and rows that are too short or too long."""
    rows = [["a.png", each, "5"] for each in ("", "nan", "NaN", "None", "NULL", "null", "N/A", " ", "\u200b")]
    rows += [["a.png", "good", "007"], ["b.png", "good", "1.50"], ["b.png", "good", "12345678901234567890"]]
    rows += [["c.png"], ["c.png", "a fox", "5", "running"], ["c.png", "a fox", "5", ""], ["null", "x", "5"]]
    text = io.StringIO()
    csv.writer(text).writerows([["file", "caption", "n"], *rows])
    samples, aside, said = make(table(tmp_path / "in", "t.csv", text.getvalue()), "table")
    assert [sample["meta"].get("n") for sample in samples.values()] == [None, 1.5, 12345678901234567890, 5]
    assert len(aside) == 9 + 3
    reasons = [row["reason"].partition(" (")[0] for row in aside.values()]
    assert reasons == ["missing caption"] * 10 + ["row with too many cells", "no name of a picture in the folder"]
    assert "has no caption: empty, or a spelling of NaN" in aside["000000001"]["reason"]
    assert aside["000000012"]["where"].endswith("line 14 of " + str(tmp_path / "in/t.csv") + ", which has 1 cells under 3 columns")  # fmt: skip # noqa: E501
    assert "line 15 of" in aside["000000013"]["where"]
    assert "set aside 10 x missing caption, first 000000000, the row has no caption" in said
    assert "line 2 of" in said
    assert "line 4 of" in said


REFUSED = {  # name, contents and options -> code and words
    "twice": ("t.csv", "file,caption,caption\na.png,x,y\n", [], 2, "has two columns named caption"),
    "wrong": ("t.csv", "image,text\na.png,x\n", [], 2, "has no column file: set source.file= to one of image, text"),
    "jsonl": ("t.csv", '{"file": "a.png", "caption": "x"}\n', [], 2, "name it .jsonl"),
    "quote": ("t.csv", 'file,caption\nb.png,x\na.png,"x\n', [], 3, "unexpected end of data, in or after line 3"),
    "bytes": ("t.csv", "file,caption\nb.png,x\na.png,caf\u00e9\n".encode("cp1252"), [], 3, "in line 3): save it as"),
    "utf16": ("t.csv", "file,caption\na.png,x\n".encode("utf-16-le"), [], 3, "source.encoding=utf-16-le"),
    "cut": ("t.jsonl", '{"file": "a.png", "caption": "x"}\n{"file": "b.png", "ca', [], 3, "in or after line 2"),
    "names": ("t.jsonl", '{"file": "a.png", "caption": "x", "caption": "y"}\n', [], 3, "it has caption twice"),
    "zip": ("t.csv", b"PK\x03\x04 and so on", [], 2, "is a spreadsheet"),
    "all": ("t.csv", "file,caption\na.png,\nb.png,nan\nc.png,null\n", ["max_aside_fraction=0.7"], 3,
            "3 of 3 samples can't be used (3 x missing caption; first 000000000, missing caption (the row has no"),
    "none left": ("t.csv", "file,caption\na.png,\nd.png,x\n", [], 2,
                  "2 set aside; 1 x missing caption; 1 x missing picture; first 000000000, missing caption ("),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_tables_that_are_refused(tmp_path: Path, name: str) -> None:
    file, content, options, code, words = REFUSED[name]
    assert words in make(table(tmp_path / "in", file, content), "table", *options, code=code)


def test_parquet_as_on_the_hub(tmp_path: Path) -> None:
    """Pictures in the table, lists and columns of captions, and types that stay what they are."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder, nothing = tmp_path / "in", {"short": None, "long": None, "n": None, "share": float("nan")}
    rows = [
        {"image": {"bytes": png(), "path": "x.png"}, "short": "a", "long": ["b", "c"], "n": 2**60 + 1, "share": 0.5},
        {"image": {"bytes": None, "path": "a.png"}, **nothing, "short": "nan"},
        {"image": {"bytes": b"no picture", "path": None}, **nothing, "short": "a"},
        {"image": {"bytes": png(), "path": None}, **nothing, "short": "\0"},
        {"image": None, **nothing, "short": "a"},
    ]
    table(folder, "unused.txt", "")
    parquet.write_table(pyarrow.Table.from_pylist(rows[:3]), folder / "train-00000-of-00002.parquet")
    schema = parquet.read_schema(folder / "train-00000-of-00002.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows[3:], schema), folder / "train-00001-of-00002.parquet")
    given = ["source.table='train-*.parquet'", "source.file=image", "source.caption=[short,long]"]
    samples, aside, _ = make(folder, "table", *given)
    assert list(samples) == ["000000000", "000000001"]
    assert captions_of(samples["000000000"]) == {"short": "a", "long.0": "b", "long.1": "c"}
    assert samples["000000000"]["meta"].items() >= {"file": "x.png", "n": 2**60 + 1, "share": 0.5}.items()
    assert samples["000000000"]["image"].max() == 9
    assert samples["000000001"]["meta"] == {"file": "a.png"}
    assert samples["000000001"]["caption"] == "nan"  # a text of a Parquet is a text
    reasons = [row["reason"].partition(" (")[0] for row in aside.values()]
    assert reasons == ["undecodable picture", "missing caption", "no name of a picture in the folder"]
    odd = [{"image": png(), "caption": value} for value in (b"bytes",)]
    table(tmp_path / "odd", "unused.txt", "")
    parquet.write_table(pyarrow.Table.from_pylist(odd), tmp_path / "odd/t.parquet")
    error = make(tmp_path / "odd", "table", "source.file=image", "max_aside_fraction=0", code=3)
    assert "caption is no text (caption of the row is bytes)" in error
