"""Which checkpoints a run has, and the weights that it is sampled with."""

import hashlib
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save

from data_pipeline.common.errors import DataError, UserError
from train.checkpointing.ema_weights import ema_weights
from train.checkpointing.files import CheckpointPaths, complete_checkpoints, is_as_written, step_of


def write_run(folder):
    """Checkpoints of steps 5, 10 and 100, one half written and one that lost its manifest."""
    for step in (100, 5, 10):
        write(folder / f"step-{step:08d}", step)
    write(folder / "step-00000200.tmp", 200)
    write(folder / "step-00000300", 300)
    (folder / "step-00000300" / "manifest.json").unlink()
    (folder / "latest").write_text("step-00000300")


def write(folder, step):
    files = {"ema.safetensors": save({"w": torch.full((3,), float(step))}), "state.json": b"{}"}
    folder.mkdir(parents=True)
    for file, data in files.items():
        (folder / file).write_bytes(data)
    facts = {n: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for n, data in files.items()}
    (folder / "manifest.json").write_text(json.dumps(facts))


@pytest.fixture(params=["in the run's folder", "elsewhere"])
def run(tmp_path, request):
    folder = tmp_path / "run"
    folder.mkdir()
    if request.param == "elsewhere":
        training = {"checkpoints": str(tmp_path / "another disk")}
        (folder / "config.yaml").write_text(yaml.safe_dump({"training": training}))
    write_run(tmp_path / "another disk" if request.param == "elsewhere" else folder / "checkpoints")
    return folder


@pytest.fixture
def ema_file(run):
    """ema_file(step)"""
    return lambda step: CheckpointPaths.of_run(run).checkpoints + f"/step-{step:08d}/ema.safetensors"


def test_only_published_checkpoints_count(run):
    assert [step_of(name) for name in complete_checkpoints(CheckpointPaths.of_run(run).checkpoints)] == [5, 10, 100]
    assert complete_checkpoints(run / "no checkpoints") == []


def test_weights_to_sample_from(run, ema_file):
    for step, expected in (("latest", 100), ("10", 10), (10, 10)):
        path, tensors = ema_weights(run, step)
        assert path == ema_file(expected)
        assert tensors["w"].tolist() == [expected] * 3


def test_weights_of_a_file_of_their_own(run, tmp_path):
    (tmp_path / "rebuilt.safetensors").write_bytes(save({"w": torch.ones(2)}))
    assert ema_weights(run, f"{tmp_path}/rebuilt.safetensors").tensors["w"].tolist() == [1, 1]
    with pytest.raises(UserError, match=r"make this file with train/rebuild_ema\.py"):
        ema_weights(run, f"{tmp_path}/another.safetensors")


def test_weights_that_are_not_there(run, tmp_path):
    with pytest.raises(UserError, match="has no checkpoint of step 7: use one of 5, 10, 100"):
        ema_weights(run, 7)
    with pytest.raises(UserError, match="has no checkpoint of step 300"):
        ema_weights(run, 300)
    with pytest.raises(UserError, match=r"has no checkpoint: use the output= of a train_ldm\.py run"):
        ema_weights(tmp_path / "nowhere")


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "changed": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
    "gone": lambda path: path.unlink(),
    "manifest cut": lambda path: (path.parent / "manifest.json").write_text('{"ema.safetensors": {"by'),
    "manifest empty": lambda path: (path.parent / "manifest.json").write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_weights_that_are_damaged(run, ema_file, tmp_path, damage):
    damage(type(tmp_path)(ema_file(100)))
    with pytest.raises(DataError, match=r"step-00000100/ema\.safetensors is damaged: use another step="):
        ema_weights(run)
    assert ema_weights(run, 10).tensors.keys() == load_file(ema_file(10)).keys()


def test_a_file_is_as_written_by_size_and_digest(tmp_path):
    data, path = b"12345", tmp_path / "file"
    facts = {"bytes": 5, "sha256": hashlib.sha256(data).hexdigest()}
    assert not is_as_written(path, facts)
    for content, expected in ((data, True), (data[:4], False), (b"12346", False)):
        path.write_bytes(content)
        assert is_as_written(path, facts) is expected
