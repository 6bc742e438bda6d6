"""Where pictures come from: tables of every kind, emoji in styles, and lists that are longer than memory."""

import json
import tracemalloc

import numpy as np
import pytest
import yaml
from PIL import Image
from synthetic import ROOT

from data_pipeline.common.errors import DataError, UserError
from data_pipeline.images.decode import PictureError
from data_pipeline.images.framing import Framing
from data_pipeline.shards.provenance import flat, without_later
from data_pipeline.shards.rejects import Rejects
from data_pipeline.sources.emoji_styles import EmojiStyles, with_article
from data_pipeline.sources.filters import Filters
from data_pipeline.sources.folder import ImageFolder
from data_pipeline.sources.listing import prepared_sample, scan_source
from data_pipeline.sources.openmoji import drawn
from data_pipeline.sources.pairs import Pairs
from data_pipeline.sources.source import SourceItem
from data_pipeline.sources.table import Table

ROWS = [
    {"file": "a.png", "caption": "größer, als\ngedacht", "aesthetic": 5.5, "note": "n"},
    {"file": "sub/b.jpg", "caption": " b ", "aesthetic": None, "note": ""},
    {"file": "gone.png", "caption": "gone", "aesthetic": 1.0, "note": ""},
    {"file": "../outside.png", "caption": "outside", "aesthetic": 1.0, "note": ""},
    {"file": "a.png", "caption": None, "aesthetic": 2.0, "note": ""},
    {"file": None, "caption": "no file", "aesthetic": 2.0, "note": ""},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures" / "sub").mkdir(parents=True)
    for name in ("pictures/a.png", "pictures/sub/b.jpg", "outside.png"):
        Image.fromarray(np.full((20, 30, 3), 99, np.uint8)).save(tmp_path / name)
    return tmp_path / "pictures"


def as_text(delimiter):
    def cell(value):
        text = "" if value is None else str(value)
        return f'"{text}"' if delimiter in text or "\n" in text else text

    lines = [ROWS[0].keys(), *(row.values() for row in ROWS)]
    return "\ufeff" + "\n".join(delimiter.join(cell(value) for value in line) for line in lines)


def write_table(path):
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        path.write_text(as_text({".csv": ",", ".tsv": "\t"}[path.suffix]), "utf-8")


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_a_table_of_any_kind(folder, kind):
    write_table(folder / f"table.{kind}")
    items = list(Table(str(folder)).items())
    assert [item.caption for item in items] == ["größer, als\ngedacht", "b", "gone", "outside", None, "no file"]
    assert [item.key for item in items] == [f"{i:09d}" for i in range(6)]
    assert items[0].meta == {"file": "a.png", "aesthetic": 5.5}
    assert items[1].meta == {"file": "sub/b.jpg"}
    for there in (items[0], items[1], items[4]):
        assert there.sides() == (30, 20)
        np.testing.assert_array_equal(there.load(Framing(8)).pixels, np.full((8, 8, 3), 99))
    for missing in (items[2], items[3], items[5]):  # a file outside the folder is as good as none
        with pytest.raises(PictureError, match="missing picture"):
            missing.load(Framing(8))
    assert len(list(Table(str(folder), limit=2).items())) == 2


def test_tables_that_can_not_be_read_get_a_sentence(folder):
    def words(**how):
        with pytest.raises(UserError) as caught:
            list(Table(str(folder), **how).items())
        return str(caught.value)

    assert "should hold one .csv, .tsv, .parquet or .jsonl (none)" in words()
    write_table(folder / "one.csv")
    assert "has no column text: set source.caption= to one of file, caption, aesthetic, note" in words(caption="text")
    assert "source.table=two.csv is not in" in words(table="two.csv")
    write_table(folder / "two.tsv")
    assert "(one.csv, two.tsv): set source.table=" in words()
    (folder / "two.tsv").write_bytes(b"file\tcaption\na.png\t\xff\xfe\n")
    assert "save it as UTF-8" in words(table="two.tsv")
    (folder / "two.tsv").write_text("file\tcaption\n")
    assert "has no rows" in words(table="two.tsv")
    (folder / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"bad\.parquet can't be read"):
        list(Table(str(folder), "bad.parquet").items())


def test_a_folder_is_listed_by_name_with_what_its_json_says(folder):
    (folder / "a.json").write_text('{"caption": "a", "aesthetic": 5, "bad": NaN}')
    (folder / "sub.txt").write_text("no picture")
    (folder / "loop").symlink_to(folder)  # round in circles, were it followed
    items = list(ImageFolder(str(folder)).items())
    assert [(item.key, item.caption) for item in items] == [("a", "a"), ("sub_b", None)]
    assert items[0].meta == {"aesthetic": 5, "bad": None, "file": "a.png"}
    assert items[0].sides() == (30, 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(folder / "a.png", exif=exif)
    assert items[0].sides() == (20, 30)
    with pytest.raises(UserError, match="holds no pictures"):
        list(ImageFolder(str(folder), limit=0).items())


def test_what_can_not_be_opened_is_set_aside(folder):
    """Links to nothing, out of the folder and in a circle, a folder in a caption's place, names beyond all length."""
    (folder / "dangling.png").symlink_to(folder / "gone.png")
    (folder / "outside.png").symlink_to(folder.parent / "outside.png")
    (folder / "inside.png").symlink_to("a.png")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "a.txt").mkdir()
    (folder / "inside.json").symlink_to("/etc/hostname")
    (folder / f"{'n' * 251}.png").write_bytes((folder / "a.png").read_bytes())
    items = {item.key: item for item in ImageFolder(str(folder)).items()}
    assert {key: item.unusable for key, item in items.items() if item.unusable} == {
        "circle": "missing picture",
        "dangling": "missing picture",
        "outside": "a link that leads out of the folder",
    }
    assert items["outside"].where == str(folder / "outside.png")
    assert {items[key].caption for key in ("a", "inside", "n" * 251)} == {None}
    assert items["inside"].load(Framing(8)).pixels.shape == (8, 8, 3)
    linked = folder.parent / "linked"
    linked.symlink_to(folder)  # the input itself may be a link
    assert not {item.key: item for item in ImageFolder(str(linked)).items()}["inside"].unusable


def test_a_table_says_which_path_was_tried(folder):
    (folder / "out").symlink_to(folder.parent)
    names = ["a.png", "img/a.png", "out/outside.png", "x" * 5000, "../outside.png"]
    (folder / "table.csv").write_text("file,caption\n" + "".join(f"{name},c\n" for name in names))
    items = list(Table(str(folder)).items())
    assert [item.unusable for item in items] == [
        "", "missing picture", "a link that leads out of the folder", "missing picture",
        "no name of a picture in the folder",
    ]  # fmt: skip
    tried = f"file=img/a.png, tried as {folder}/img/a.png"
    assert items[1].where == f"{tried}, line 3 of {folder}/table.csv"
    rejects = Rejects(5, 0.1)
    with pytest.raises(
        DataError, match=r"1 x missing picture; first 000000001, missing picture, file=img/a\.png, tried"
    ):
        prepared_sample(items[1], Framing(8), Filters({}), rejects)
    assert rejects.rows[0]["where"] == items[1].where


def test_a_pair_needs_two_things():
    with pytest.raises(UserError, match=r"needs two things to draw, not 1: raise source\.of\.limit"):
        Pairs(Endless(1), 3).items()
    assert len(Pairs(Endless(2), 3).items()) == 3


class Endless:
    """As many items as asked for, made as they are asked for."""

    def __init__(self, count):
        self.count = count

    def items(self):
        for i in range(self.count):
            meta = {"file": f"{i}.jpg", "aesthetic": float(i)}
            yield SourceItem(f"{i:09d}", lambda size: None, f"picture {i} of very many", meta)


def test_a_source_is_looked_through_item_by_item():
    options = {"output": "a", "heldout_every": 10, "filters": {}}
    peaks = {}
    for count in (1000, 5000):
        tracemalloc.start()
        _, listed, heldout = scan_source(options, Endless(count))
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (listed, heldout) == (count, count // 10)
    assert (peaks[5000] - peaks[1000]) / 4000 < 50  # bytes an item: its key's digest, sorted


def drawing(colour):
    return {"body": f'<path fill="{colour}" d="M0 0h8v16H0z"/>'}


@pytest.fixture
def packages(tmp_path):
    """Three styles in npm's layout: one with an alias, one without its chars.json, one with few drawings."""
    root = tmp_path / "node_modules"
    things = [("cat face", "1F431"), ("red heart", "2764-FE0F"), ("flag: Austria", "1F1E6-1F1F9"), ("zebra", "1F993")]
    data = [{"label": n, "hexcode": c, "group": 3, "order": 9 - i, "tags": ["t"]} for i, (n, c) in enumerate(things)]
    data += [{"label": "letter", "hexcode": "1F1E6"}, {"label": "hair", "hexcode": "1F9B0", "group": 2, "order": 20}]

    def save(name, value):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(value))

    save("emojibase-data/en/data.json", data)
    save("emojibase-data/meta/groups.json", {"groups": {"2": "component", "3": "animals-nature"}})
    names = {"1f431": "cat", "2764": "heart", "1f1e6-1f1f9": "flag-austria", "1f993": "zebra", "1f9b0": "hair"}
    styles = {
        "one": ({n: drawing("red") for n in ("cat", "heart", "zebra", "hair")}, names),
        "two": ({n: drawing("lime") for n in ("cat", "red-heart", "flag-austria")}, None),
        "three": ({"pussy": drawing("blue"), "heart": drawing("blue") | {"width": 8}}, names),
    }
    for style, (icons, chars) in styles.items():
        sheet = {"prefix": style, "icons": icons, "width": 16, "height": 16}
        if style == "three":
            sheet["aliases"] = {"cat": {"parent": "pussy", "hFlip": True}, "zebra": {"parent": "lost"}}
        save(f"@iconify-json/{style}/icons.json", sheet)
        save(f"@iconify-json/{style}/info.json", {"license": {"spdx": f"licence of {style}"}})
        if chars is not None:
            save(f"@iconify-json/{style}/chars.json", chars)
    return tmp_path


STYLES = ["one", "two", "three"]


def test_emoji_in_every_style_that_draws_them(packages):
    items = {item.key: item for item in EmojiStyles(str(packages), STYLES).items()}
    assert list(items) == ["1F993_one", "1F1E6-1F1F9_two", "2764-FE0F_one", "2764-FE0F_two", "2764-FE0F_three",
                           "1F431_one", "1F431_two", "1F431_three"]  # fmt: skip
    cat = items["1F431_three"]
    assert cat.caption == "a cat face, three style"
    assert cat.meta["licence"] == "licence of three"
    assert (cat.meta["style"], cat.meta["group"]) == ("three", "animals-nature")
    assert items["1F1E6-1F1F9_two"].caption == "flag: austria, two style"
    halves = {key: item.load(Framing(8)).pixels[4, [1, 6]].tolist() for key, item in items.items()}
    white, red, blue = [255] * 3, [255, 0, 0], [0, 0, 255]
    assert halves["1F431_one"] == [red, white]
    assert halves["1F431_three"] == [white, blue]  # an alias, turned round
    assert halves["2764-FE0F_three"] == [white, white]
    narrow = items["2764-FE0F_three"].load(Framing(8)).pixels[4]  # 8 x 16, in the middle of a square
    assert [pixel.tolist() for pixel in narrow] == [*[white] * 2, *[blue] * 4, *[white] * 2]
    assert len(list(EmojiStyles(str(packages), STYLES, complete=True).items())) == 6
    assert not any(item.heldout for item in items.values())


@pytest.mark.parametrize("every", [2, 3, 10])
def test_pairs_are_held_out_and_never_a_thing_in_all_its_styles(packages, every):
    path = packages / "node_modules" / "emojibase-data" / "en" / "data.json"
    data = json.loads(path.read_text())
    more = [data[0] | {"hexcode": f"1F431-{i:04X}", "order": 100 + i} for i in range(200)]
    path.write_text(json.dumps(data + more))
    chars = packages / "node_modules" / "@iconify-json" / "one" / "chars.json"
    names = json.loads(chars.read_text()) | {f"1f431-{i:04x}": "cat" for i in range(200)}
    for style in ("one", "three"):
        chars.with_name("chars.json").parent.parent.joinpath(style, "chars.json").write_text(json.dumps(names))
    items = list(EmojiStyles(str(packages), STYLES, every).items())
    things = {item.meta["code"] for item in items}
    trained = {item.meta["code"] for item in items if not item.heldout}
    assert trained == things
    held = [item.meta["style"] for item in items if item.heldout]
    assert len(held) == pytest.approx(min(len(items) / every, len(things) - 2), abs=2)
    assert max(map(held.count, STYLES)) - min(map(held.count, STYLES)) <= 2
    again = [item.heldout for item in EmojiStyles(str(packages), STYLES, every).items()]
    assert again == [item.heldout for item in items]


def test_missing_packages_get_a_sentence(packages, tmp_path):
    with pytest.raises(UserError, match="npm install @iconify-json"):
        list(EmojiStyles(str(tmp_path / "nowhere"), STYLES).items())
    with pytest.raises(UserError, match=r"four/icons\.json is missing: .*or leave that style out"):
        list(EmojiStyles(str(packages), ["four"]).items())


def test_articles_and_drawings():
    labels = ["rabbit", "ear of corn", "grapes", "glass", "flag: austria", "1st place medal", "octopus"]
    assert [with_article(label) for label in labels] == [
        "a rabbit", "an ear of corn", "grapes", "a glass", "flag: austria", "1st place medal", "an octopus",
    ]  # fmt: skip
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 2"><path fill="red" d="M0 0h1v2H0z"/></svg>'
    np.testing.assert_array_equal(drawn(svg, 2).pixels, [[[255, 0, 0], [255, 255, 255]]] * 2)


def test_options_that_came_later_do_not_mark_what_was_made_before_them():
    """At their defaults, in every configuration of a source, also of one inside another."""
    given = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "conf/source").glob("*.yaml")}
    given["openmoji_pairs"]["of"] = given["openmoji_demo"]
    for name, options in given.items():
        left = set(flat(without_later({"source": options})))
        new = {f"source.{each}" for each in ("background", "animated", "of.background", "encoding", "key", "unended")}
        assert not left & new, name
        assert ("source.caption" in left) == (name == "table")
