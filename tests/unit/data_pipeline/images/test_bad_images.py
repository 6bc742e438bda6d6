"""Whatever is in a picture, a caption or a tar: it is read, or set aside under its reason; nothing runs, or is lost."""

import contextlib
import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image
from synthetic import tar_of

from data_pipeline.common.errors import DataError, UserError
from data_pipeline.images.decode import UNDECODABLE
from data_pipeline.images.framing import Framing
from data_pipeline.shards import codec
from data_pipeline.shards.tar_index import TarRules, scan
from data_pipeline.sources.tars import Tars, contents, inspected, tars_in


def encoded(mode="RGB", kind="PNG", size=(24, 16), **how):
    """A smooth picture, as a file."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    rgba = np.uint8(255 * np.stack([x, y, (x + y) / 2, np.ones_like(x)], -1))
    buffer = io.BytesIO()
    Image.fromarray(rgba).convert(mode).save(buffer, kind, **how)
    return buffer.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, depth, colour, packed, *more):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(more) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def bomb(side=50_000):
    """300 KB that unpack to a black and white picture of 2.5 billion pixels."""
    packer = zlib.compressobj(9)
    row = b"\0" * (1 + side // 8)
    return png(
        side, side, 1, 0, b"".join([*(packer.compress(row * 1000) for _ in range(side // 1000)), packer.flush()])
    )


def judged(*members):
    """(key, reason or "") of each sample of a tar."""
    data = tar_of(members)
    return [(each.entry.key, each.reason) for each in (inspected(entry, data) for entry in scan(data, "a.tar"))]


def shortly(*members):
    """The same, without what is in brackets."""
    return [(key, reason.partition(" (")[0]) for key, reason in judged(*members)]


READABLE = {
    "cmyk": ("jpg", encoded("CMYK", "JPEG")),
    "grey": ("jpg", encoded("L", "JPEG")),
    "palette": ("png", encoded("P")),
    "transparent": ("png", encoded("RGBA")),
    "grey with alpha": ("png", encoded("LA")),
    "one bit": ("png", encoded("1")),
    "16 bits": ("png", png(4, 2, 16, 0, zlib.compress((b"\0" + b"\x80\0" * 4) * 2))),
    "webp": ("webp", encoded("RGB", "WEBP")),
    "animated webp": ("webp", encoded("RGB", "WEBP", save_all=True, append_images=[Image.new("RGB", (24, 16))])),
    "animated gif under another name": (
        "jpg", encoded("P", "GIF", save_all=True, append_images=[Image.new("P", (24, 16))])),
    "png under another name": ("jpg", encoded()),
    "progressive": ("jpeg", encoded("RGB", "JPEG", progressive=True)),
    "capital letters": ("JPG", encoded("RGB", "JPEG")),
}  # fmt: skip


@pytest.mark.parametrize("name", READABLE)
def test_odd_pictures_become_rgb(name):
    extension, data = READABLE[name]
    assert judged((f"a.{extension}", data), ("a.txt", b"a cat")) == [("a", "")]
    pixels = codec.decode(extension, data)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    if name not in ("16 bits", "one bit", "grey", "grey with alpha"):
        np.testing.assert_allclose(pixels, codec.decode("png", encoded()), atol=60)  # palettes are coarse
        assert pixels[0, 0].max() < 80
    if name == "16 bits":
        assert (pixels == 128).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_stands_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = codec.decode("png", encoded(exif=exif))
    assert pixels.shape[:2] == ((16, 24) if orientation < 5 else (24, 16))


UNREADABLE = {
    "empty": b"",
    "text": b"<html>404 not found</html>",
    "huge header": png(50_000, 50_000, 8, 2, zlib.compress(b"")),
    "bomb": bomb(),
    "text bomb": png(4, 4, 8, 0, zlib.compress(b"\0" * 20), chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 2**27))),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n",
    "no pixels": png(0, 0, 8, 0, b""),
}


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
@pytest.mark.filterwarnings("error")
def test_what_is_no_picture_is_set_aside(name, extension):
    ((key, reason),) = judged((f"a.{extension}", UNREADABLE[name]), ("a.txt", b"a cat"))
    assert key == "a"
    assert reason.startswith(("not a picture", "too large picture", "damaged PNG picture (", "EPS picture, a format"))
    assert "0x" not in reason


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_cut_picture_is_whole_or_set_aside(kind):
    """At every byte; what is taken shows every row."""
    whole = encoded("RGB", kind)
    expected, taken = codec.decode("png", whole), 0
    for length in range(0, len(whole), 7 if kind == "JPEG" else 3):
        try:
            got = codec.decode("png", whole[:length])
        except DataError:
            continue
        taken += 1
        np.testing.assert_array_equal(got, expected)
    assert taken <= 8  # checksums and end marks: 24 bytes


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.filterwarnings("ignore")  # Pillow's, of EXIF that makes no sense
def test_flipped_bytes_never_raise_anything_else(kind):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x829A] = 6, "what it shows", (1, 60)
    whole = encoded("RGB", kind) if kind == "GIF" else encoded("RGB", kind, exif=exif)
    random = np.random.default_rng(0)
    read = 0
    for _ in range(400):
        data = bytearray(whole)
        for at in random.integers(0, len(data), random.integers(1, 6)):
            data[at] = random.integers(0, 256)
        with contextlib.suppress(DataError):
            read += codec.decode("png", bytes(data)).ndim == 3
    assert read > 0


CAPTIONS = {
    "missing caption": (b"", b" \n\t "),
    "undecodable .txt (": (b"\xff\xfea\0", "größe".encode("latin-1"), b"x" * (2**20 + 1)),
}


def test_captions_that_can_not_be_read():
    picture = ("a.jpg", encoded("RGB", "JPEG"))
    for reason, captions in CAPTIONS.items():
        for caption in captions:
            ((_, got),) = judged(picture, ("a.txt", caption))
            assert got.startswith(reason)
    assert judged(picture) == [("a", "missing caption (no .txt or .json beside .jpg)")]
    assert judged(picture, ("a.json", b'{"caption": "from json"}')) == [("a", "")]
    for value, kind in (
        ("5", "a number"),
        ("true", "true or false"),
        ('{"en": "a"}', "an object"),
        ("[1]", "a number"),
    ):
        reason = f"caption is no text (caption of .json is {kind})"
        assert judged(picture, ("a.json", f'{{"caption": {value}}}'.encode())) == [("a", reason)]
    assert shortly(picture, ("a.json", b'{"caption": "\\ud83d"}')) == [("a", "caption is no text")]
    assert judged(picture, ("a.json", b'{"text": "a"}')) == [("a", "missing caption (.json has no caption (but text))")]
    assert judged(picture, ("a.txt", b"\n"), ("a.json", b'{"caption": ["", "b"]}')) == [("a", "")]
    assert judged(picture, ("a.txt", b"long " * 200_000)) == [("a", "")]  # a caption of 1 MB is one; filters bound it


@pytest.mark.parametrize(
    "data",
    [b"[" * 100_000, b'{"a":' * 100_000, b"{", b"\xff", b'{"a": ' + b"1" * 5000 + b"}", b" " * (2**20 + 1)],
)
def test_json_that_can_not_be_read(data):
    ((_, reason),) = judged(("a.png", encoded()), ("a.txt", b"a cat"), ("a.json", data))
    assert reason.startswith("undecodable .json (")


def test_numbers_that_json_has_not_are_none():
    assert codec.decode("json", b'{"a": NaN, "b": [Infinity, -Infinity], "c": 1}') == {
        "a": None,
        "b": [None, None],
        "c": 1,
    }


# Tars.


def small_tar():
    members = [(f"{i:03d}.{e}", d) for i in range(3) for e, d in (("png", encoded()), ("txt", b"a cat"))]
    return tar_of(members), 3


def last_byte(data):
    """Where the last member's blocks end."""
    last = max(m.offset + m.size for entry in scan(data, "a.tar") for m in entry.members.values())
    return -(-last // 512) * 512


def test_a_tar_that_was_cut_at_any_block_is_named():
    data, count = small_tar()
    end = last_byte(data) + 1024  # of the empty blocks that mark it; padding follows
    for length in range(0, len(data) + 1, 512):
        if length < end:
            with pytest.raises(DataError, match=r"shard a\.tar is damaged"):
                scan(data[:length], "a.tar")
        else:
            assert len(scan(data[:length], "a.tar")) == count
    for length in range(end - 1600, end):  # and at any byte
        with pytest.raises(DataError, match="is damaged"):
            scan(data[:length], "a.tar")


def test_damage_inside_a_tar_is_named_or_leaves_every_sample():
    """A header that can't be read must not pass for the end of the archive."""
    data, _ = small_tar()
    for at in range(0, len(data), 512):
        spoilt = bytearray(data)
        spoilt[at : at + 512] = b"\x55" * 512
        with contextlib.suppress(DataError):
            assert len(scan(bytes(spoilt), "a.tar")) == 3
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        headers = [member.offset for member in tar]
    end = last_byte(data)
    for at in headers:
        spoilt = bytearray(data)
        spoilt[at : at + 512] = bytes(512)  # an empty block: tarfile stops here
        with pytest.raises(DataError, match="is damaged"):
            scan(bytes(spoilt), "a.tar")
    for gap in (512, 1536, 2560):  # neither the end of an archive nor filled up to a record
        with pytest.raises(DataError, match="no member begins"):
            scan(data[:end] + bytes(gap) + data, "a.tar")


def test_tars_that_were_joined_are_read_and_those_without_an_end_if_asked():
    data, count = small_tar()
    end = last_byte(data)
    for ended in (data, data[: end + 1024]):  # filled up to a record, or not
        assert len(scan(ended + data, "a.tar")) == 2 * count
        with pytest.raises(DataError, match=r"no end mark.*unended=true reads it"):
            scan(ended + data[:end], "a.tar")
        assert len(scan(ended + data[:end], "a.tar", TarRules(unended=True))) == 2 * count
    with pytest.raises(DataError, match=r"cut within 002\.txt"):
        scan(data[: end - 512], "a.tar", TarRules(unended=True))


def test_a_size_below_zero_does_not_go_round_in_circles():
    data, _ = small_tar()
    spoilt = bytearray(data)
    spoilt[124:136] = (-1024).to_bytes(12, "big", signed=True)
    spoilt[148:156] = b"        "
    spoilt[148:156] = b"%06o\0 " % sum(spoilt[:512])
    with pytest.raises(DataError, match="is damaged"):
        scan(bytes(spoilt), "a.tar")


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_links_and_devices_are_never_followed(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded())
    members = [
        special("a.png", tarfile.SYMTYPE, str(secret)),
        ("a.txt", b"a cat"),
        ("b.png", encoded()),
        ("b.txt", b"b"),
        special("c.png", tarfile.LNKTYPE, "b.png"),
        ("c.txt", b"c"),
        special("d.png", tarfile.CHRTYPE),
        special("d.txt", tarfile.FIFOTYPE),
        special("folder.png", tarfile.DIRTYPE),
    ]
    missing = "missing picture"
    assert shortly(*members) == [("a", missing), ("b", ""), ("c", missing), ("d", missing)]
    assert "its .png is a link" in judged(*members)[0][1]


def test_names_that_lead_elsewhere_are_set_aside():
    names = ["../out", "/etc/passwd", "x/../../out", "line\nfeed", "sub/inside"]
    members = [(f"{name}.{e}", d) for name in names for e, d in (("png", encoded()), ("txt", b"a cat"))]
    assert [reason[:24] for _, reason in judged(*members)] == ["a name that leads elsewh"] * 4 + [""]


class Runs:
    def __reduce__(self):
        return os.mkdir, ("/tmp/a-pickle-was-loaded",)


def test_members_of_other_kinds_are_never_loaded():
    bad = pickle.dumps(Runs())
    members = [("a.png", encoded()), ("a.txt", b"a cat"), *[(f"a.{e}", bad) for e in ("pkl", "pyd", "pt", "npy", "py")]]
    data = tar_of(members)
    (sample,) = [inspected(entry, data) for entry in scan(data, "a.tar")]
    assert set(sample.entry.members) == {"png", "txt"}
    assert not os.path.exists("/tmp/a-pickle-was-loaded")
    with pytest.raises(DataError):
        codec.decode("npy", bad)
    assert codec.decode("pkl", bad) is None


def test_interleaved_samples_are_put_together_and_repeated_ones_told_apart():
    picture, other = encoded(), encoded(size=(9, 9))
    interleaved = [("a.png", picture), ("b.png", other), ("b.txt", b"b"), ("a.txt", b"a")]
    data = tar_of(interleaved)
    samples = [inspected(entry, data) for entry in scan(data, "a.tar")]
    assert [(s.candidate.caption, s.candidate.sides()) for s in samples] == [("a", (24, 16)), ("b", (9, 9))]
    assert judged(("a.png", picture), ("a.txt", b"1"), ("a.png", other), ("a.txt", b"2")) == [("a", ""), ("a", "")]
    assert shortly(("a.png", picture), ("a.png", other), ("a.txt", b"2")) == [("a", "missing caption"), ("a", "")]
    assert judged(("README", b"x"), (".hidden", b"x"), ("._a.png", b"x"), ("a.png", picture), ("a.txt", b"a")) == [
        ("a", "")
    ]


def test_compressed_tars_are_refused_before_they_are_unpacked(tmp_path):
    with gzip.open(tmp_path / "a.tar.gz", "wb") as file:
        for _ in range(64):
            file.write(bytes(2**20))
    with pytest.raises(UserError, match=r"compressed tars \(a\.tar\.gz\): unpack them"):
        tars_in(str(tmp_path))
    (tmp_path / "a.tar.gz").rename(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"a\.tar is compressed, .*unpack it"):
        scan(contents(str(tmp_path / "a.tar")), "a.tar")
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.tar is empty"):
        list(Tars(str(tmp_path)).items())


def test_the_same_samples_as_a_source_of_make_shards(tmp_path):
    failed = json.dumps({"caption": "gone", "status": "failed_to_download"}).encode()
    members = [("a.png", encoded()), ("a.txt", b" a cat "), ("b.json", failed), ("c.png", b""), ("c.txt", b"c"),
               ("d.png", encoded()), ("d.txt", b"\xff"), ("e.txt", b"e")]  # fmt: skip
    (tmp_path / "00000.tar").write_bytes(tar_of(members))
    (tmp_path / "00000_stats.json").write_text("{}")
    items = list(Tars(str(tmp_path)).items())
    assert [item.caption for item in items] == ["a cat", "gone", "c", None, "e"]
    assert [bool(item.absent) for item in items] == [False, True, False, False, False]
    assert items[0].sides() == (24, 16)
    assert items[0].load(Framing(8)).pixels.shape == (8, 8, 3)
    assert len({item.key for item in items}) == 5
    for damaged in (items[2], items[4]):
        with pytest.raises(UNDECODABLE):
            damaged.load(Framing(8))
