"""Workers that compute differently share an output: a tar and the note beside it are always one worker's."""

import json

import pytest
from test_precompute_work import Counted, precompute, samples_of, using, write

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.encode import latent_shard
from data_pipeline.encode.latent_shard import OutputPaths, read_done_marker, verify_done_markers
from data_pipeline.encode.workers import Worker
from data_pipeline.loading.loader import read_dataset
from data_pipeline.shards.manifest import Manifest, Shard
from data_pipeline.shards.tar_index import digest_of


class OtherMachine(Counted):
    """The same encoder where its last bits come out otherwise."""

    def encode_stored(self, images):
        return super().encode_stored(images) + 2**-8


@pytest.fixture
def images(tmp_path, picture):
    return write(tmp_path / "images", samples_of(picture, 9), 3)


def digests(root):
    """Of each shard: of its tar's bytes, by its note, and by the manifest."""
    manifest, places = Manifest.load(str(root)), OutputPaths(str(root))
    notes = [read_done_marker(places, shard)["sets"][""]["shard"]["sha256"] for shard in manifest.shards]
    tars = [digest_of((root / shard.name).read_bytes()) for shard in manifest.shards]
    return list(zip(tars, notes, [shard.sha256 for shard in manifest.shards], strict=True))


TIMES = {"write_first": 6, "write_atomically": 3, "size_if_there": 4}  # of three shards: tar and note, index, looks


@pytest.mark.parametrize(("name", "call"), [(name, call) for name, count in TIMES.items() for call in range(count)])
def test_whoever_comes_between(images, tmp_path, monkeypatch, name, call):
    """While one worker is at its `call`-th look or write, another makes all shards."""
    monkeypatch.setattr(latent_shard, "MARKER_WAIT_S", 0.2)
    real, calls = getattr(storage, name), []

    def interrupted(path, *data):
        if "shards" in str(path) and "out" in str(path):
            calls.append(path)
            if len(calls) == call + 1:
                precompute(images, tmp_path / "out", using(OtherMachine()), worker=Worker(1, 2))
        return real(path, *data)

    monkeypatch.setattr(storage, name, interrupted)
    precompute(images, tmp_path / "out", using(), worker=Worker(0, 2))
    assert len(calls) > call
    monkeypatch.undo()
    assert all(len(set(each)) == 1 for each in digests(tmp_path / "out"))
    assert len(read_dataset(str(tmp_path / "out"))) == 9


def test_a_tar_whose_worker_died_before_its_note_is_replaced(images, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_shard, "MARKER_WAIT_S", 0.2)
    precompute(images, tmp_path / "other", using(OtherMachine()))
    precompute(images, tmp_path / "whole", using())
    for ending in ("tar", "idx"):
        data = (tmp_path / f"other/shards/000001.{ending}").read_bytes()
        storage.write_atomically(tmp_path / f"out/shards/000001.{ending}", data)
    precompute(images, tmp_path / "out", using())
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_what_a_bucket_can_not_prevent_is_said(images, tmp_path):
    """One worker's tar beside another's note, found by the first: in a bucket there is no first writer."""
    precompute(images, tmp_path / "other", using(OtherMachine()))
    precompute(images, tmp_path / "out", using())
    shard = Shard("shards/000001.tar", 3, 0, "")
    places, note = OutputPaths(str(tmp_path / "out")), tmp_path / "out/shards/000001.tar.done.json"
    mine = {shard.name: json.loads(note.read_text())}
    assert verify_done_markers(places, [shard], mine) == mine
    note.write_bytes((tmp_path / "other/shards/000001.tar.done.json").read_bytes())
    with pytest.raises(DataError, match=r"000001\.tar was made by two workers .*: delete .*000001\.tar\.done\.json"):
        verify_done_markers(places, [shard], mine)
    (tmp_path / "out/shards/000001.tar").write_bytes((tmp_path / "other/shards/000001.tar").read_bytes())
    assert verify_done_markers(places, [shard], mine) == {shard.name: json.loads(note.read_text())}


def test_the_first_of_two_writers_stays(tmp_path):
    assert storage.write_first(tmp_path / "a/b", b"one")
    assert not storage.write_first(tmp_path / "a/b", b"two")
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "a").iterdir()] == [("b", b"one")]


def test_the_first_of_two_writers_stays_where_there_are_no_links(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr("os.link", refused)
    test_the_first_of_two_writers_stays(tmp_path)
