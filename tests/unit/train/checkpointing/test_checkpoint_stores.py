"""A folder as a store of checkpoints; and which part files, and what of them, a rank needs."""

import json

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.common.errors import DataError, UserError
from train.checkpointing.part_files import files_needed
from train.checkpointing.safetensors_io import Header, copy_some, save_tensors, verified_file_info
from train.checkpointing.stores import BucketStore, FolderStore, refuse_other_owner, store_of
from train.engine.param_shards import Fragment

STEP = "step-00000010"
KINDS = ("ema", "weight")


@pytest.fixture
def parts(tmp_path):
    """Four parts of two parameters of 8 values, each a quarter of both."""
    for rank in range(4):
        tensors = {f"{kind}/{n}@{2 * rank}": torch.arange(2.0) + rank for kind in KINDS for n in ("a", "b")}
        save_tensors(tensors, tmp_path / f"part-{rank}", {"updates": "3"})
    return [str(tmp_path / f"part-{rank}") for rank in range(4)]


def pieces_of(path):
    return {name: length for name, (length, *_) in Header.of(path).tensors.items()}


def needed(parts, *places, order=(0, 1, 2, 3), pieces=pieces_of):
    fragments = [Fragment(name, start, length, 0, 0) for name, start, length in places]
    looked = []

    def look(file):
        looked.append(parts.index(file))
        return pieces(file)

    found = files_needed(fragments, KINDS, [parts[i] for i in order], look)
    return [parts.index(file) for file in found], looked


def test_parts_needed_are_those_that_hold_a_piece(parts):
    assert needed(parts, ("a", 2, 2), ("b", 2, 2), order=(1, 0, 2, 3)) == ([1], [1])  # the same layout: its own
    assert needed(parts, ("a", 3, 2)) == ([1, 2], [0, 1, 2])
    assert needed(parts, ("a", 0, 8), ("b", 0, 8)) == ([0, 1, 2, 3], [0, 1, 2, 3])
    assert needed(parts, ("b", 7, 1)) == ([3], [0, 1, 2, 3])


def test_parts_that_do_not_tell_are_needed(parts):
    """Their digest is compared then."""
    unread = needed(parts, ("a", 6, 2), pieces=lambda path: None if path == parts[1] else pieces_of(path))
    assert unread == ([1, 3], [0, 1, 2, 3])
    renamed = needed(parts, ("a", 6, 2), pieces=lambda path: {} if path == parts[3] else pieces_of(path))
    assert renamed[0] == [0, 1, 2, 3]


def test_a_header_tells_what_is_where(parts):
    header = Header.of(parts[2])
    assert header.metadata == {"updates": "3"}
    with open(parts[2], "rb") as file:
        data = file.read()
    for name, value in load_file(parts[2]).items():
        length, begin, end = header.tensors[name]
        assert length == 2
        assert data[begin:end] == value.numpy().tobytes()


@pytest.mark.parametrize("data", [bytes(8), b"\xff" * 9, b"\x02" + bytes(7) + b"[]", b"\x09" + bytes(7) + b'{"a": {}}'])
def test_what_has_no_header_is_said(tmp_path, data):
    (tmp_path / "part").write_bytes(data)
    with pytest.raises(DataError, match="is not a safetensors file, or is damaged"):
        Header.of(str(tmp_path / "part"))


def test_some_of_a_file_reads_like_all_of_it(parts, tmp_path):
    copy_some(parts[3], tmp_path / "some", lambda name: name.startswith("ema/"))
    some, whole = load_file(tmp_path / "some"), load_file(parts[3])
    assert some.keys() == whole.keys()
    for name, value in whole.items():
        assert some[name].tolist() == (value.tolist() if name.startswith("ema/") else [0.0, 0.0])


def test_a_file_of_other_content_is_not_taken(tmp_path):
    tensors = {"a": torch.tensor([1.0, torch.nan]), "b": torch.ones(2, dtype=torch.bfloat16)}
    save_tensors(tensors, tmp_path / "part")
    assert verified_file_info(tmp_path / "part", tensors)["bytes"] == (tmp_path / "part").stat().st_size
    with pytest.raises(OSError, match="tensor b differs after reading it back"):
        verified_file_info(tmp_path / "part", {**tensors, "b": torch.zeros(2, dtype=torch.bfloat16)})


def test_a_folder_shows_a_step_once_it_is_published(tmp_path):
    store, tensors = FolderStore(str(tmp_path)), {"a": torch.ones(2)}
    with store.workplace(STEP) as workplace:
        save_tensors(tensors, workplace / "part")
        facts = store.add(STEP, workplace / "part", tensors)
    assert (store.steps(), store.published()) == ([f"{STEP}.tmp"], [])
    store.publish(STEP, json.dumps({"part": facts}).encode())
    assert store.published() == store.steps() == [STEP]
    assert store.check(STEP, "part", facts)
    store.local(STEP, "part").write_bytes(b"?" * facts["bytes"])
    assert not store.check(STEP, "part", facts)
    store.remove(STEP)
    assert store.steps() == []


def test_which_store_it_is_and_where_its_scratch_lies(tmp_path):
    assert isinstance(store_of(str(tmp_path)), FolderStore)
    here, there = (store_of(f"s3://bucket/{name}", str(tmp_path), rank=1) for name in ("a", "b"))
    assert isinstance(here, BucketStore)
    assert here.scratch.parent == tmp_path
    assert here.scratch != there.scratch
    with pytest.raises(UserError, match="only local paths and s3://"):
        store_of("gs://bucket/a")


def test_a_place_belongs_to_one_run(tmp_path):
    refuse_other_owner(str(tmp_path), None, ())
    (tmp_path / "owner").write_text("one abc\n")
    refuse_other_owner(str(tmp_path), "one", ())
    refuse_other_owner(str(tmp_path), "two", ("run_id",))
    with pytest.raises(UserError, match="belongs to run one, but this is two"):
        refuse_other_owner(str(tmp_path), "two", ())
