"""The opener's local half; buckets are in tests/s3."""

import pytest

from data_pipeline.common import storage


def test_sizes_files_and_folders_directly_below(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "deeper").write_bytes(b"1")
    (tmp_path / "b.tar").write_bytes(b"22")
    (tmp_path / "a.tar").write_bytes(b"")
    assert storage.sizes(tmp_path) == {"a.tar": 0, "b.tar": 2}
    assert storage.files(tmp_path, ".tar") == ["a.tar", "b.tar"]
    assert storage.subfolders(tmp_path) == ["folder"]
    for none in (tmp_path / "none", tmp_path / "b.tar"):
        assert (storage.sizes(none), storage.files(none, ""), storage.subfolders(none)) == ({}, [], [])


def test_what_is_not_there_is_none(tmp_path):
    (tmp_path / "file").write_bytes(b"0123")
    assert (storage.size_if_there(tmp_path / "file"), storage.read_if_there(tmp_path / "file")) == (4, b"0123")
    for none in (tmp_path / "none", tmp_path / "file" / "below"):
        assert storage.size_if_there(none) is None
        assert storage.read_if_there(none) is None
    with pytest.raises(FileNotFoundError):
        storage.size(tmp_path / "none")


def test_nothing_is_read_short(tmp_path):
    (tmp_path / "file").write_bytes(b"0123")
    assert storage.read_bytes(tmp_path / "file", 1, 3) == b"123"
    with pytest.raises(OSError, match="only 3 of 4 bytes could be read from byte 1"):
        storage.read_bytes(tmp_path / "file", 1, 4)
