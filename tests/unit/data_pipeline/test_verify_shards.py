"""Every kind of damage to a data set is found, named once, and says what to do; latents of every bad kind."""

import hashlib
import io
import json
import re
import tarfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from data_pipeline.errors import DataError
from data_pipeline.loader import Loader
from data_pipeline.manifest import Manifest, Shard
from data_pipeline.shard_writer import ShardWriter
from data_pipeline.verify import Findings, check_shard
from data_pipeline.verify_shards import Belongings, check_split

NOTHING = Belongings(None, None, {})
SHAPE = (8, 4, 4)


def npy(array):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def moments(number):
    return np.random.default_rng(number).standard_normal(SHAPE).astype(np.float16)


@pytest.fixture
def make_latents(tmp_path):
    """make_latents(odd): a data set of 6 latents, the third of which has `odd` bytes as its moments."""

    def make(odd=None, members=()):
        buffer, root = io.BytesIO(), tmp_path / "set"
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for i in range(6):
                data = odd if odd is not None and i == 2 else npy(moments(i))
                for name, content in ((f"k{i}.moments.npy", data), (f"k{i}.json", b'{"caption": "c"}')):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
            for info in members:
                tar.addfile(info)
        return published(root, buffer.getvalue())

    return make


def published(root, data, samples=6):
    """`data` as the only shard of a data set, as if it had been written so: sizes and digest agree."""
    writer = ShardWriter()
    shard = writer.publish(root, "shards/000000.tar")
    (root / shard.index_name).unlink()
    (root / shard.name).write_bytes(data)
    shard = Shard(shard.name, samples, len(data), hashlib.sha256(data).hexdigest())
    fields = {"moments.npy": {"dtype": "float16", "shape": list(SHAPE)}, "json": {}}
    Manifest("latents", (shard,), fields, {"latents": {"mean": [0] * 4, "std": [1] * 4}}).save(root)
    save_file({"text": np.zeros(1, np.float32)}, root / "null.safetensors")
    return str(root)


def found(root):
    return " | ".join(check_split("", root, NOTHING)["findings"])


def trained_on(root):
    """What a training would get."""
    batches = iter(Loader(root, 6, 1, shuffle=False))
    return next(batches).tensors["moments"]


def test_an_intact_set_has_no_findings(make_latents, make_images, tmp_path):
    assert found(make_latents()) == ""
    assert found(make_images(tmp_path / "images", [3, 4])) == ""


HEADER = b"{'descr': '<f2', 'fortran_order': False, 'shape': (1000000, 1000000), }"
HUGE = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + HEADER.ljust(117) + b"\n"
NAN, INF = moments(2), moments(2)
NAN[0, 0, 0], INF[7, 3, 3] = np.nan, -np.inf
BAD = {
    "empty": (b"", "undecodable"),
    "cut": (npy(moments(2))[:-2], "undecodable"),
    "no array": (b"not an array at all", "undecodable"),
    "claims too much": (HUGE, r"0 bytes can't be float16 of shape \(1000000, 1000000\)"),
    "pickled": (npy(np.array([{"a": 1}], dtype=object)), "undecodable"),
    "another shape": (npy(np.zeros((8, 8, 8), np.float16)), r"float16 \[8, 8, 8\], not float16 \[8, 4, 4\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_latents_are_named_by_verify_and_never_trained_on(make_latents, name):
    odd, why = BAD[name]
    root = make_latents(odd)
    findings = found(root)
    assert re.search(why, findings)
    assert "first: k2 in" in findings
    with pytest.raises(DataError, match="k2"):
        trained_on(root)


@pytest.mark.parametrize("odd", [NAN, INF], ids=["nan", "inf"])
def test_what_is_not_finite_is_found(make_latents, odd):
    assert "1 x moments.npy is not finite" in found(make_latents(npy(odd)))


@pytest.mark.parametrize(
    "same",
    [moments(2).astype(">f2"), np.asfortranarray(moments(2))],
    ids=["big-endian", "fortran order"],
)
def test_another_notation_of_the_same_numbers_is_the_same(make_latents, same):
    root = make_latents(npy(same))
    assert found(root) == ""
    np.testing.assert_array_equal(trained_on(root)[2].numpy(), moments(2).astype(np.float32))


def test_another_dtype_is_found(make_latents):
    assert "float64 [8, 4, 4], not float16 [8, 4, 4]" in found(make_latents(npy(moments(2).astype(np.float64))))


def test_cut_at_any_block_it_is_named(make_latents, tmp_path):
    """Sizes and digest are those of the cut tar, as if it had been made so: the end that is missing tells."""
    whole = (tmp_path / "set" / "shards/000000.tar") if make_latents() else None
    data = whole.read_bytes().rstrip(b"\0")
    data += b"\0" * (-len(data) % 512)
    for end in range(0, len(data) + 512, 512):
        root = published(tmp_path / f"cut{end}", data[:end])
        assert found(root), end
        with pytest.raises(DataError):
            trained_on(root)


def test_links_and_ways_out_are_no_members(make_latents, tmp_path):
    link = tarfile.TarInfo("k0.text.npy")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    out = tarfile.TarInfo("../../k9.json")
    root = make_latents(members=[link, out])
    manifest = Manifest.load(root)
    findings = Findings()
    check_shard(root, manifest, manifest.shards[0], {}, findings)
    text = " ".join(findings.sentences())
    assert "leads out of the data set" in text
    assert "passwd" not in text
    assert not (tmp_path / "k9.json").exists()


def test_other_damage_to_a_set(make_images, tmp_path, picture):
    root = make_images(tmp_path / "set", [4, 4, 4])
    shards = tmp_path / "set" / "shards"
    (shards / "000002.tar").unlink()
    data = bytearray((shards / "000001.tar").read_bytes())
    data[data.index(b"thing") : data.index(b"thing") + 5] = b"thorn"
    (shards / "000001.tar").write_bytes(data)
    lines = (shards / "000000.idx").read_text().splitlines()
    row = json.loads(lines[0])
    row[1]["png"][0] += 512
    (shards / "000000.idx").write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n")
    text = found(root)
    assert "000002.tar is missing" in text
    assert "not those of its manifest" in text
    assert "an index names places where the tar has no such member: delete it" in text


def test_keys_that_come_twice_and_other_encoders(make_images, make_latents, tmp_path):
    root = tmp_path / "twice"
    first = ShardWriter()
    second = ShardWriter()
    for writer in (first, second):
        writer.add("same", {"txt": "a", "png": np.zeros((8, 8, 3), np.uint8)})
    shards = (first.publish(root, "shards/000000.tar"), second.publish(root, "shards/000001.tar"))
    Manifest("image-text", shards, {}, {"size": 8}).save(root)
    assert "a key comes twice" in found(str(root))

    class Other:
        fingerprint = "ffff"

    latents = make_latents()
    manifest = Manifest.load(latents)
    Manifest("latents", manifest.shards, manifest.fields, manifest.info, {"autoencoder": "aaaa"}).save(latents)
    report = check_split("", latents, Belongings(Other(), None, {}))
    assert "made of autoencoder aaaa, but ffff was given" in report["findings"][0]
