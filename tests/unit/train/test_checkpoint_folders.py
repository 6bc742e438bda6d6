"""Which checkpoint is taken, and what is said of one that is damaged."""

import hashlib
import json
import logging

import pytest

from data_pipeline.errors import DataError, UserError
from train.checkpoint_files import complete_checkpoints, damaged_files, ema_weights_path, newest_intact


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of steps 5, 10 and 100, one half written and one that a kill left without manifest."""

    def write(name):
        folder = tmp_path / "checkpoints" / name
        files = {
            "ema.safetensors": b"weights " * 10,
            "engine/zero/rank_0.pt": b"moments",
            "engine/zero/rank_1.pt": b"MOMENTS",
            "state.json": b"{}",
        }
        for file, data in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(data)
        facts = {n: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for n, data in files.items()}
        (folder / "manifest.json").write_text(json.dumps(facts))

    for step in (100, 5, 10):
        write(f"step-{step:08d}")
    write("step-00000200.tmp")
    write("step-00000300")
    (tmp_path / "checkpoints" / "step-00000300" / "manifest.json").unlink()
    (tmp_path / "checkpoints" / "latest").write_text("step-00000300")
    return tmp_path


@pytest.fixture
def newest(run):
    return run / "checkpoints" / "step-00000100"


def test_only_published_checkpoints_count(run, newest):
    assert [int(p.name[5:]) for p in complete_checkpoints(run / "checkpoints")] == [5, 10, 100]
    assert newest_intact(run / "checkpoints") == newest
    assert damaged_files(newest) == []
    assert newest_intact(run / "no checkpoints") is None


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "changed": lambda path: path.write_bytes(b"W" + path.read_bytes()[1:]),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", ["ema.safetensors", "engine/zero/rank_0.pt"])
def test_the_one_before_is_taken_when_the_newest_is_damaged(run, newest, caplog, damage, name):
    damage(newest / name)
    assert damaged_files(newest) == [name]
    with caplog.at_level(logging.WARNING):
        assert newest_intact(run / "checkpoints").name == "step-00000010"
    assert "step-00000100" in caplog.text
    assert name in caplog.text


def test_two_ranks_parts_swapped_are_damage(run, newest, caplog):
    """Each is whole, and of the size that it should be."""
    parts = [newest / f"engine/zero/rank_{rank}.pt" for rank in (0, 1)]
    contents = [part.read_bytes() for part in parts]
    for part, content in zip(parts, reversed(contents), strict=True):
        part.write_bytes(content)
    assert newest_intact(run / "checkpoints").name == "step-00000010"
    assert "rank_0.pt, engine/zero/rank_1.pt" in caplog.text


@pytest.mark.parametrize("content", ["", '{"ema.safetensors": {"by'])
def test_a_damaged_manifest_is_damage_too(run, newest, content):
    (newest / "manifest.json").write_text(content)
    assert newest_intact(run / "checkpoints").name == "step-00000010"


def test_none_is_intact(run):
    for path in complete_checkpoints(run / "checkpoints"):
        (path / "state.json").unlink()
    assert newest_intact(run / "checkpoints") is None


def test_weights_to_sample_from(run, newest):
    assert ema_weights_path(run) == newest / "ema.safetensors"
    assert ema_weights_path(run, "10") == ema_weights_path(run, 10)
    assert ema_weights_path(run, 10).parent.name == "step-00000010"


def test_weights_that_are_not_there(run, tmp_path):
    with pytest.raises(UserError, match="has no checkpoint of step 7: there are 5, 10, 100"):
        ema_weights_path(run, 7)
    with pytest.raises(UserError, match="has no checkpoint of step 300"):
        ema_weights_path(run, 300)
    with pytest.raises(UserError, match=r"holds no checkpoint: give the output= of a train_ldm\.py run"):
        ema_weights_path(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_weights_that_are_damaged(run, newest, damage):
    damage(newest / "ema.safetensors")
    with pytest.raises(DataError, match=r"step-00000100/ema\.safetensors is damaged: take another step="):
        ema_weights_path(run)
    assert ema_weights_path(run, 10).exists()
