"""Writing and reading shards: plain WebDataset, the same bytes each time, and damage is named."""

import hashlib
import io
import os
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, UserError
from data_pipeline.images import decode
from data_pipeline.images.decode import UNDECODABLE, to_rgb
from data_pipeline.images.resize import fitted
from data_pipeline.shards import codec
from data_pipeline.shards.input_option import Input
from data_pipeline.shards.manifest import Manifest, find_splits, refuse_latents, refuse_no_heldout
from data_pipeline.shards.reader import read_shard, read_whole
from data_pipeline.shards.tar_index import read_index


def test_webdataset_reads_what_we_write(tmp_path, make_images, picture):
    root = make_images(tmp_path / "set", [3, 2])
    names = [f"{root}/shards/{i:06d}.tar" for i in range(2)]
    samples = list(wds.WebDataset(names, shardshuffle=False, empty_check=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [f"key{i:04d}" for i in range(5)]
    for i, sample in enumerate(samples):
        np.testing.assert_array_equal(sample["png"], picture(i))
        assert (sample["txt"], sample["json"]) == (f"thing {i % 5}", {"number": i})


def test_the_same_samples_give_the_same_bytes(tmp_path, make_images):
    one, two = make_images(tmp_path / "one", [3, 2]), make_images(tmp_path / "two", [3, 2])
    for name in ("shards/000000.tar", "shards/000000.idx", "shards/000001.tar", "manifest.json"):
        assert storage.read_bytes(f"{one}/{name}") == storage.read_bytes(f"{two}/{name}")
    more, larger = make_images(tmp_path / "more", [3, 3]), make_images(tmp_path / "larger", [3, 2], size=9)
    assert len({Manifest.load(root).fingerprint for root in (one, two, more, larger)}) == 3
    assert not list(tmp_path.rglob("*.tmp*"))


def test_index_points_at_members_and_is_rebuilt_without_its_file(tmp_path, make_images):
    root = make_images(tmp_path / "set", [4])
    shard = Manifest.load(root).shards[0]
    entries = read_index(root, shard)
    offset, size = entries[2].members["txt"]
    assert storage.read_bytes(f"{root}/{shard.name}", offset, size) == b"thing 2"
    storage.remove(f"{root}/{shard.index_name}")
    assert read_index(root, shard) == entries


@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_a_cut_shard_is_named(tmp_path, make_images, keep):
    root = make_images(tmp_path / "set", [4])
    path = tmp_path / "set" / "shards" / "000000.tar"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(DataError, match=r"000000\.tar has \d+ bytes, but .* copy it again"):
        read_index(root, Manifest.load(root).shards[0])


def test_a_damaged_picture_and_a_damaged_index_are_named(tmp_path, make_images):
    root = make_images(tmp_path / "set", [4])
    shard = Manifest.load(root).shards[0]
    path = tmp_path / "set" / shard.name
    data = bytearray(path.read_bytes())
    offset, size = read_index(root, shard)[1].members["png"]
    data[offset : offset + size] = b"x" * size
    path.write_bytes(data)
    for read in (read_shard, read_whole):
        with pytest.raises(DataError, match=r"000000\.tar is damaged \(its sha256"):
            read(root, shard)
    shard = replace(shard, sha256=hashlib.sha256(data).hexdigest())
    assert read_whole(root, shard) == data
    with pytest.raises(DataError, match=r"key0001 of shard .*000000\.tar"):
        read_shard(root, shard)
    (tmp_path / "set" / shard.index_name).write_text("not json\n")
    with pytest.raises(DataError, match=r"000000\.idx is damaged .*: delete it"):
        read_index(root, shard)
    shard = replace(shard, index="")  # of an earlier version
    with pytest.raises(DataError, match=r"000000\.idx is damaged: delete it"):
        read_index(root, shard)


def test_manifest_says_what_is_wrong(tmp_path, make_images):
    with pytest.raises(UserError, match=r"nowhere is not a data set .*make_shards\.py"):
        Manifest.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="contains no data set"):
        find_splits(tmp_path)
    root = make_images(tmp_path / "sets" / "train", [2])
    assert find_splits(root) == {"": root}
    assert find_splits(tmp_path / "sets") == {"train": root}
    with pytest.raises(UserError, match="image-text shards, but latents"):
        Manifest.load(root, "latents")
    (tmp_path / "sets" / "train" / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        Manifest.load(root)


@pytest.mark.parametrize("url", ["pipe:echo hello", "http://example.org/x.tar", "gs://bucket/x"])
def test_other_schemes_are_refused(url):
    for use in (storage.read_bytes, storage.exists, storage.size, storage.sizes):
        with pytest.raises(UserError, match="only local paths and s3://"):
            use(url)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    storage.write_atomically(tmp_path / "file", b"old")
    with pytest.raises(TypeError):
        storage.write_atomically(tmp_path / "file", "text, not bytes")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_what_is_written_is_synced_and_then_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    storage.write_atomically(tmp_path / "file", b"data")
    assert synced == [str(tmp_path / f"file.tmp.{storage.HOST}.{os.getpid()}"), str(tmp_path)]


def test_16_bits_of_grey_keep_their_shades():
    grey = np.array([[0, 257, 128 * 257 + 100], [200 * 257 - 100, 65534, 65535]], np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, format="PNG")
    expected = np.array([[0, 1, 128], [200, 255, 255]], np.uint8)
    np.testing.assert_array_equal(codec.decode("png", buffer.getvalue()), np.stack([expected] * 3, -1))
    np.testing.assert_array_equal(to_rgb(Image.fromarray(grey.astype(np.int32))), np.stack([expected] * 3, -1))


@pytest.mark.parametrize("shape", [(40, 40), (300, 40), (41, 997), (7, 30), (1, 64), (123, 8), (33, 100)])
@pytest.mark.parametrize("size", [8, 33, 64])
def test_centre_square_is_the_middle_of_the_whole_resized(shape, size):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    width, height = (max(size, round(side * size / min(shape))) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    whole = picture.resize((width, height), Image.Resampling.LANCZOS)
    expected = np.array(whole.crop((left, top, left + size, top + size)))
    got = fitted(np.array(picture), (size, size)).pixels
    np.testing.assert_allclose(got.astype(int), expected, atol=1)  # the box's corners are rounded to float32
    assert (got != expected).mean() < 1e-3


def test_a_slender_picture_takes_no_more_memory_than_its_square():
    """Resized as a whole, 1 x 200,000 pixels would be 256 x 51 million."""
    line = Image.fromarray(np.full((1, 200_000, 3), 77, np.uint8))
    np.testing.assert_array_equal(fitted(np.array(line), (256, 256)).pixels, np.full((256, 256, 3), 77))
    assert issubclass(MemoryError, UNDECODABLE)


def test_codec_returns_what_it_was_given(picture):
    image, array = picture(1), np.arange(6, dtype=np.float16).reshape(2, 3)
    for name, value in (("png", image), ("moments.npy", array), ("moments.npy", np.asfortranarray(array))):
        np.testing.assert_array_equal(codec.decode(name, codec.encode(name, value)), value)
    for name, value in (("txt", "größer"), ("json", {"a": [1, None]})):
        assert codec.decode(name, codec.encode(name, value)) == value


def npy_that_claims(shape, dtype="<f4", body=b"1234"):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + body


def pickled_npy():
    buffer = io.BytesIO()
    np.save(buffer, np.array([print], dtype=object), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("npy", npy_that_claims((10**12,))),  # must not be allocated first
        ("npy", npy_that_claims((2,))),
        ("npy", pickled_npy()),
        ("npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((( "),  # its tokens never end
        ("npy", b"\x80\x04K\x01."),
        ("png", b"nonsense"),
        ("png", b""),
        ("json", b"[" * 100_000),
        ("json", b"[1]"),
        ("json", b"null"),
        ("txt", b"\xff\xfe\xff"),
    ],
)
def test_what_is_not_what_its_name_says_is_a_data_error(name, data):
    with pytest.raises(DataError, match="not a picture" if name == "png" else f"undecodable .{name}"):
        codec.decode(name, data)


def test_too_many_pixels_and_transparency(monkeypatch):
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(buffer, format="PNG")
    np.testing.assert_array_equal(codec.decode("png", buffer.getvalue()), np.full((4, 4, 3), 255))
    monkeypatch.setattr(decode, "MAX_PIXELS", 15)
    with pytest.raises(DataError, match="4x4 pixels are more than 15"):
        codec.decode("png", buffer.getvalue())


def test_scan_refuses_a_tar_cut_at_a_block(tmp_path, make_images):
    from data_pipeline.shards.tar_index import scan

    root = make_images(tmp_path / "set", [4])
    data = storage.read_bytes(f"{root}/shards/000000.tar")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        picture_at = tar.getmembers()[3].offset_data
    with pytest.raises(DataError, match="a shard is damaged"):
        scan(data[: picture_at + 10], "a shard")


def test_buckets_and_missing_held_out_samples_are_named(tmp_path):
    for bucket in ("32x32", "48x16"):
        Manifest("latents", ()).save(tmp_path / "all" / bucket / "train")
    with pytest.raises(UserError, match=r"all holds the buckets 32x32, 48x16: use one of them, as .*all/32x32\."):
        Manifest.load(tmp_path / "all/train")
    with pytest.raises(
        UserError, match=r"32x32 has no held-out .* make_shards\.py with heldout_every=10 .*then its lat"
    ):
        refuse_no_heldout(tmp_path / "all/32x32")
    with pytest.raises(UserError, match=r"32x32 has no held-out .* make_shards\.py with heldout_every=10"):
        Input.of(str(tmp_path / "all")).split("heldout")  # no bucket has any
    Manifest("latents", ()).save(tmp_path / "all/48x16/heldout")
    with pytest.raises(UserError, match=r"are in other buckets: train on all buckets together with input=.*/all\."):
        refuse_no_heldout(tmp_path / "all/32x32/")
    refuse_no_heldout(tmp_path / "nowhere")  # said otherwise
    Manifest("latents", ()).save(tmp_path / "all/32x32/heldout")
    refuse_no_heldout(tmp_path / "all/32x32")


def test_a_split_and_latents_where_others_are_needed(tmp_path, monkeypatch):
    for name, kind in (("pictures", "image-text"), ("latents", "latents"), ("buckets/32x32", "latents")):
        Manifest(kind, ()).save(tmp_path / name / "train")
    with pytest.raises(UserError, match=r"pictures/train is one split of a data set: use .*, .*/pictures\."):
        Manifest.load(tmp_path / "pictures/train/train")
    monkeypatch.chdir(tmp_path / "pictures")
    with pytest.raises(UserError, match="train is one split of a data set"):
        Manifest.load("train/train")
    Manifest("latents", ()).save(tmp_path / "single")
    with pytest.raises(UserError, match="single is a data set without train/ and heldout/"):
        Manifest.load(tmp_path / "single/train")
    for name in ("latents", "latents/train", "buckets", "buckets/32x32", "single"):
        with pytest.raises(UserError, match=rf"{name} holds latents already: train_ldm\.py takes them"):
            refuse_latents(tmp_path / name)
    refuse_latents(tmp_path / "pictures")
