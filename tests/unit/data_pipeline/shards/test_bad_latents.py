"""Whatever is in a shard of latents: a named error, or the right numbers; nothing runs, or is written outside."""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import tarfile
import types

import numpy as np
import pytest
from loaders import loader_of
from synthetic import tar_of, write_latents

from data_pipeline.audit.shard_checks import Codes, Findings, check_claims, check_constants, check_shard
from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.loading.epoch_plan import Place
from data_pipeline.loading.loader import read_dataset
from data_pipeline.loading.sample_reader import SampleReader
from data_pipeline.shards import codec
from data_pipeline.shards.data_sets import DataSets
from data_pipeline.shards.manifest import Manifest, Shard
from data_pipeline.shards.tar_index import scan

SHAPES = {"moments.npy": (4, 2, 2), "text.npy": (2, 3), "pooled.npy": (3,)}
COUNT = 3


@pytest.fixture
def latents(tmp_path):
    write_latents(tmp_path / "latents", COUNT, SHAPES)
    return tmp_path / "latents"


def findings_in(root):
    """By check: the sentences of all that verify_shards would say."""
    manifest, findings = Manifest.load(str(root)), Findings()
    check_claims(str(root), manifest, findings)
    codes = check_constants(str(root), manifest, findings)
    for shard in manifest.shards:
        check_shard(str(root), shard, manifest, codes, findings)
    return findings.sentences


def epoch(root):
    """All samples as training would get them, by key."""
    batches = itertools.islice(loader_of(str(root), 1, 1, shuffle=False), Manifest.load(str(root)).samples)
    return {
        batch.keys[0]: {"caption": batch.captions[0], **{name: v[0].numpy() for name, v in batch.tensors.items()}}
        for batch in batches
    }


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def members_in(root):
    """(name, bytes) of the first shard's tar."""
    data = (root / "shards/000000.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def put(root, data, index=None, samples=None):
    """`data` as the first shard, and a manifest that was written for it; its index: none, or what is given."""
    manifest = Manifest.load(str(root))
    (root / "shards/000000.tar").write_bytes(data)
    (root / "shards/000000.idx").unlink(missing_ok=True)
    if index is not None:
        (root / "shards/000000.idx").write_text(index)
    shard = Shard("shards/000000.tar", samples or COUNT, len(data), hashlib.sha256(data).hexdigest())
    dataclasses.replace(manifest, shards=(shard,)).save(root)


def changed(root, name, data):
    """The second sample's member `name` becomes `data`."""
    put(root, tar_of([(n, data if n == f"000001.{name}" else content) for n, content in members_in(root)]))


# Cut.


def test_a_tar_that_was_cut_at_any_block_is_named(latents):
    whole = (latents / "shards/000000.tar").read_bytes()
    for length in range(0, len(whole), 512):
        (latents / "shards/000000.tar").write_bytes(whole[:length])
        for use in (epoch, lambda root: read_dataset(str(root))):
            with pytest.raises(DataError, match=rf"000000\.tar has {length} bytes, but .* copy it again"):
                use(latents)
        assert set(findings_in(latents)) >= {"sizes", "digests"}


@pytest.mark.parametrize("indexed", [False, True])
def test_a_cut_tar_with_a_manifest_of_its_own_gives_no_wrong_sample(latents, indexed):
    """As if it had been cut before it was described: every sample that can be read is whole, else it is named."""
    whole, good = (latents / "shards/000000.tar").read_bytes(), epoch(latents)
    index = (latents / "shards/000000.idx").read_text() if indexed else None
    end = whole.rstrip(b"\0")  # of the last member's text; behind it its block is filled up, and the end is marked
    for length in range(0, len(whole), 512):
        put(latents, whole[:length], index)
        marked = length >= -(-len(end) // 512) * 512 + 1024
        got, error = outcome(latents)
        if marked or (got is not None and indexed):  # by its index, all that is missing may be the end's mark
            assert same_samples(got, good)
        else:
            assert "000000.tar" in error
        assert bool(findings_in(latents)) != marked


def outcome(root):
    """All samples, or the sentence that says why not."""
    try:
        return epoch(root), None
    except DataError as error:
        return None, str(error)


def same_samples(one, other):
    return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)


@pytest.mark.parametrize("data", [b"", b"\0" * 512, b"\0" * 1024, b"\0" * 10240, b"\x1f\x8b" + b"x" * 510, b"x" * 2048])
def test_what_is_no_tar_of_samples(latents, data):
    put(latents, data)
    with pytest.raises(DataError, match=r"000000\.tar"):
        epoch(latents)
    assert findings_in(latents)


# Samples in disorder.


def test_interleaved_members_come_together_and_webdataset_is_said_to_split_them(latents):
    good, members = epoch(latents), members_in(latents)
    mixed = [*members[0:8:4], *members[1:8:4], *members[2:8:4], *members[3:8:4], *members[8:]]
    put(latents, tar_of(mixed))
    assert same_samples(epoch(latents), good)
    (sentence,) = findings_in(latents)["webdataset"]
    assert "must be adjacent" in sentence


def test_a_sample_that_comes_twice_is_named(latents):
    members = members_in(latents)
    put(latents, tar_of([*members, *members[:4]]))
    with pytest.raises(DataError, match=f"holds {COUNT + 1} samples, not {COUNT}"):
        epoch(latents)
    assert "4 samples, but its manifest says 3" in findings_in(latents)["manifest"][0]


def test_a_member_that_is_missing_or_of_another_sample(latents):
    members = members_in(latents)
    put(latents, tar_of([member for member in members if member[0] != "000001.text.npy"]))
    with pytest.raises(DataError, match=r"000001.*text"):
        list(itertools.islice(loader_of(str(latents), COUNT, 1, shuffle=False), 1))
    assert "sample 000001" in findings_in(latents)["fields"][0]
    assert "lacks text.npy" in findings_in(latents)["fields"][0]


# Values.


def npy(array, version=(1, 0), **how):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version, **how)
    return buffer.getvalue()


def claiming(shape, dtype="<f4", body=b"1234", order=False):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": order, "shape": shape})
    return buffer.getvalue() + body


RAN = []
VALUES = np.arange(16, dtype=np.float32).reshape(4, 2, 2)
STRUCTURED = np.zeros(4, [("a", "<f4"), ("b", "<f4")])

UNREADABLE = {
    "empty": b"",
    "text": b"not an array",
    "pickle": b"\x80\x04K\x01.",
    "object array": npy(np.array([types.SimpleNamespace(), RAN.append], dtype=object), allow_pickle=True),
    "claims 10^12 elements": claiming((10**12,)),
    "claims 10^12 elements of no bytes": claiming((10**12,), "|V0", b""),
    "claims 2^64 elements": claiming((2**32, 2**32)),
    "claims a negative side": claiming((-1, -4), body=b"1234" * 4),
    "claims another type of side": claiming((True, 1)),
    "half": npy(VALUES)[:-8],
    "more": npy(VALUES) + b"1234",
    "header never ends": b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((( ",
    "header calls": b"\x93NUMPY\x01\x00\x1a\x00__import__('os').getpid()  ",
    "version 9": b"\x93NUMPY\x09\x00" + npy(VALUES)[8:],
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_array_is_named(latents, name):
    changed(latents, "moments.npy", UNREADABLE[name])
    with pytest.raises(DataError, match=r"sample 000001 of shard .*000000\.tar: undecodable \.moments\.npy"):
        epoch(latents)
    assert "sample 000001" in findings_in(latents)["fields"][0]


WRONG = {
    "shape": (VALUES[:, :1], "fields", r"has shape \[4, 1, 2\], not \[4, 2, 2\]"),
    "unsigned": (VALUES.astype(np.uint32), "fields", "is <u4, not <f4"),
    "turned": (VALUES.T.copy(), "fields", r"has shape \[2, 2, 4\], not \[4, 2, 2\]"),
    "one number": (VALUES[0, 0, 0], "fields", r"has shape \[\], not \[4, 2, 2\]"),
    "float64": (VALUES.astype(np.float64), "fields", "is <f8, not <f4"),
    "whole numbers": (VALUES.astype(np.int64), "fields", "is <i8, not <f4"),
    "complex": (VALUES.astype(np.complex64), "fields", "is <c8, not <f4"),
    "letters": (VALUES.astype("U4"), "fields", "is <U4, not <f4"),
    "dates": (VALUES.astype("M8[s]"), "fields", r"is <M8\[s\], not <f4"),
    "records": (np.zeros((4, 2, 2), [("a", "<f4")]), "fields", "not <f4"),
    "big-endian": (VALUES.astype(">f4"), "fields", "is >f4, not in the byte order"),
    "Fortran order": (np.asfortranarray(VALUES), "fields", "is in Fortran order"),
    "NaN": (np.where(VALUES == 3, np.nan, VALUES), "values", "moments is not finite"),
    "infinity": (np.where(VALUES == 3, -np.inf, VALUES), "values", "moments is not finite"),
    "too large": (VALUES * 1e6, "values", r"moments has values beyond 1e\+06"),
}


@pytest.mark.parametrize("name", WRONG)
def test_verify_names_what_is_not_as_the_manifest_says(latents, name):
    array, check, sentence = WRONG[name]
    changed(latents, "moments.npy", npy(array))
    found = findings_in(latents)
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError("\n".join(found[check]))
    assert set(found) == {check}


@pytest.mark.parametrize("batch", [1, COUNT])
@pytest.mark.parametrize("name", [name for name in WRONG if name not in ("big-endian", "Fortran order", "too large")])
def test_the_loader_names_what_is_not_as_the_manifest_says(latents, name, batch):
    """The second sample of three: alone in its batch, and beside good ones."""
    array, check, sentence = WRONG[name]
    changed(latents, "moments.npy", npy(array))
    sentence = sentence if check == "fields" else "not finite"
    named = rf"^sample 000001 of shard .*000000\.tar: moments\.npy .*{sentence}"
    with pytest.raises(DataError, match=named):
        read_dataset(str(latents))
    places = [Place(0, sample) for sample in range(COUNT)]
    reader = SampleReader(DataSets.of(str(latents)), 0)
    with pytest.raises(DataError, match=named):
        [reader.batch(places[i : i + batch]) for i in range(0, COUNT, batch)]
    with pytest.raises(DataError, match=named) if check == "fields" else contextlib.nullcontext():
        list(itertools.islice(loader_of(str(latents), batch, 1, shuffle=False), COUNT // batch))


def test_a_missing_member_is_named_where_a_sample_is_alone_in_its_batch(latents):
    put(latents, tar_of([member for member in members_in(latents) if member[0] != "000001.text.npy"]))
    with pytest.raises(DataError, match=r"sample 000001 of shard .*: it lacks text\.npy"):
        epoch(latents)


@pytest.mark.parametrize("dtype", ["float32", "complex64", "no dtype"])
def test_a_manifest_without_claims_leaves_numbers_and_one_with_odd_claims_nothing(latents, dtype):
    manifest = Manifest.load(str(latents))
    changed(latents, "moments.npy", npy(VALUES))
    claim = {} if dtype == "float32" else {"dtype": dtype, "shape": [4, 2, 2]}
    dataclasses.replace(Manifest.load(str(latents)), fields={**manifest.fields, "moments.npy": claim}).save(latents)
    if dtype == "float32":
        np.testing.assert_array_equal(epoch(latents)["000001"]["moments"], VALUES)
    else:
        with pytest.raises(DataError, match="not <c8 as" if dtype == "complex64" else "does not exist"):
            epoch(latents)


@pytest.mark.parametrize("name", ["big-endian", "Fortran order"])
def test_another_order_of_the_same_numbers_is_read_as_those(latents, name):
    changed(latents, "moments.npy", npy(WRONG[name][0]))
    np.testing.assert_array_equal(epoch(latents)["000001"]["moments"], VALUES)


def test_codes_that_the_codebook_has_not(latents):
    codes = np.array([[0, 7], [8, -1]], np.int32)
    data = tar_of([("a.indices.npy", npy(codes)), ("a.json", b'{"caption": "a"}')])
    shard = Shard("shards/000000.tar", 1, len(data), hashlib.sha256(data).hexdigest())
    fields = {"indices.npy": {"dtype": "int32", "shape": [2, 2]}, "json": {}}
    put(latents, data, samples=1)
    for size, wrong in ((8, True), (9, True)):
        findings = Findings()
        manifest = Manifest("latents", (shard,), fields)
        check_shard(str(latents), shard, manifest, Codes(np.zeros((size, 4), np.float32)), findings)
        assert ("values" in findings.sentences) == wrong
    assert "codes that are not in the codebook" in findings.sentences["values"][0]


# Names.


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_never_followed(latents, tmp_path, kind):
    (tmp_path / "secret.npy").write_bytes(npy(VALUES))
    members = [m for m in members_in(latents) if m[0] != "000001.moments.npy"]
    for target in ("/etc/passwd", str(tmp_path / "secret.npy"), "../../secret.npy", "000000.moments.npy"):
        put(latents, tar_of([*members[:7], link("000001.moments.npy", target, kind), *members[7:]]))
        with pytest.raises(DataError, match="000001"):
            list(itertools.islice(loader_of(str(latents), COUNT, 1, shuffle=False), 1))
        assert "lacks moments.npy" in findings_in(latents)["fields"][0]


@pytest.mark.parametrize("outside", ["../../../evil", "/evil", "a/../../evil"])
def test_names_that_lead_outside_write_nothing_there(latents, tmp_path, outside):
    before = sorted(tmp_path.rglob("*"))
    put(latents, tar_of([(n.replace("000001", outside), data) for n, data in members_in(latents)]))
    assert len(epoch(latents)) == COUNT  # names are but names here
    assert "leads out" in findings_in(latents)["keys"][0]
    assert [path for path in sorted(tmp_path.rglob("*")) if path.suffix != ".idx"] == [
        path for path in before if path.suffix != ".idx"
    ]


@pytest.mark.parametrize("name", ["../../elsewhere.tar", "/elsewhere.tar", "shards/../../elsewhere.tar"])
def test_a_manifest_that_names_shards_outside_is_refused(latents, name):
    about = json.loads((latents / "manifest.json").read_text())
    about["shards"][0]["name"] = name
    (latents / "manifest.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match="is outside the data set"):
        Manifest.load(latents)


@pytest.mark.parametrize("change", [{"shards": [{}]}, {"shards": None}, {"shards": 7}, {"more": 1}, {"kind": None}])
def test_a_manifest_of_other_content_is_named(latents, change):
    about = json.loads((latents / "manifest.json").read_text()) | change
    (latents / "manifest.json").write_text(json.dumps({k: v for k, v in about.items() if v is not None}))
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        Manifest.load(latents)


# The index, which no digest covers.


def rows_of(root):
    return [json.loads(line) for line in (root / "shards/000000.idx").read_text().splitlines()]


def swapped(rows):
    rows[0][1], rows[1][1] = rows[1][1], rows[0][1]


def renamed(rows):
    rows[0][0] = "other"


def shifted(rows):
    rows[0][1]["moments.npy"][0] -= 512


def negative(rows):
    rows[0][1]["moments.npy"][0] = -rows[0][1]["moments.npy"][0]


def beyond(rows):
    rows[0][1]["moments.npy"] = [10**15, 10**15]


def format_counts(rows):
    rows[0][1]["moments.npy"] = ["a", "b"]


@pytest.mark.parametrize("change", [swapped, renamed, shifted, negative, beyond, format_counts])
def test_an_index_that_lies_is_named_by_verify(latents, change):
    good, rows = epoch(latents), rows_of(latents)
    change(rows)
    (latents / "shards/000000.idx").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert set(findings_in(latents)) == {"index"}
    (latents / "shards/000000.idx").unlink()  # the remedy
    assert same_samples(epoch(latents), good)
    assert findings_in(latents) == {}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("change", [swapped, renamed, shifted, negative, beyond])
def test_an_index_that_leads_elsewhere_is_named_by_the_loader(latents, change, known):
    """By its digest; where a manifest of an earlier version knows none, by what is found there."""
    rows, manifest = rows_of(latents), Manifest.load(str(latents))
    change(rows)
    (latents / "shards/000000.idx").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if known:
        with pytest.raises(DataError, match=r"000000\.idx is damaged \(its digest .* delete it"):
            epoch(latents)
        return
    about = json.loads((latents / "manifest.json").read_text())
    assert about["shards"][0].pop("index")
    (latents / "manifest.json").write_text(json.dumps(about))
    assert Manifest.load(str(latents)).fingerprint == manifest.fingerprint
    if change in (swapped, renamed):
        assert len(epoch(latents)) == COUNT  # which nothing but a digest shows
    else:
        with pytest.raises(DataError, match="sample 000000 of shard"):
            epoch(latents)


# Bytes at random.


def test_any_flipped_byte_is_seen(latents):
    path, random = latents / "shards/000000.tar", np.random.default_rng(0)
    whole = path.read_bytes()
    for at in random.integers(0, len(whole), 64):
        data = bytearray(whole)
        data[at] ^= 1 << random.integers(8)
        path.write_bytes(bytes(data))
        with pytest.raises(DataError, match="its sha256"):
            epoch(latents)
        assert "digests" in findings_in(latents)


def test_flipped_bytes_with_a_digest_of_their_own_crash_nothing(latents):
    """Fuzzing: a byte of headers and values; it can be read, or a DataError is raised."""
    whole, random = (latents / "shards/000000.tar").read_bytes(), np.random.default_rng(1)
    outcomes = set()
    for at in random.integers(0, len(whole.rstrip(b"\0")), 400):
        data = bytearray(whole)
        data[at] = random.integers(256)
        try:
            for entry in scan(bytes(data), "a.tar"):
                for name, (start, size) in entry.members.items():
                    codec.decode(name, bytes(data[start : start + size]))
            outcomes.add("read")
        except DataError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_the_good_set_has_no_findings(latents):
    assert findings_in(latents) == {}
    assert RAN == []
    assert storage.files(latents / "shards", ".tar") == ["000000.tar"]
