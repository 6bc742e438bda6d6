"""Saving and resuming over damage and kills, by a stand-in for the engine that keeps one file."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from data_pipeline.errors import UserError
from train.checkpoint import Checkpoints, damaged_files, newest_intact, published
from train.ema import Ema
from train.engine import EngineConfig
from train.fitting import Recipe, Training
from train.optim import AdamW, Schedule
from train.ranks import Ranks
from train.train_state import TrainState


class OneFile:
    """An engine with a single weight."""

    config = EngineConfig()

    def __init__(self):
        self.weight = torch.zeros(3)

    def save(self, folder):
        (folder / "engine").mkdir()
        torch.save(self.weight, folder / "engine" / "weight.pt")

    def load(self, folder):
        self.weight = torch.load(folder / "engine" / "weight.pt")

    def full_state_dict(self, shards, prefix):
        return {"weight": self.weight}


@pytest.fixture
def start(tmp_path):
    """start(keep=2): as a process that is started in the same run folder; save(step) and resume(how) as it would."""

    def make(keep=2, world_size=1):
        ranks = Ranks(0, world_size, 0, torch.device("cpu"))
        checkpoints = Checkpoints(tmp_path / "checkpoints", ranks, {"seed": 0}, "", keep)
        engine, state = OneFile(), TrainState(1000)
        ema = Ema([engine.weight], 0.9)

        def save(*steps):
            for state.step in steps:
                engine.weight = torch.full((3,), float(state.step))
                checkpoints.save(engine, ema, state)

        def resume(how="auto"):
            return state.step if checkpoints.resume(how, engine, ema, state) else None

        return SimpleNamespace(save=save, resume=resume, engine=engine)

    return make


@pytest.fixture
def steps(tmp_path):
    """steps(): of all that is published."""
    return lambda: [int(path.name.removeprefix("step-")) for path in published(tmp_path / "checkpoints")]


@pytest.fixture
def damage(tmp_path):
    def spoil(*steps):
        for step in steps:
            (tmp_path / f"checkpoints/step-{step:08d}/engine/weight.pt").write_bytes(b"")

    return spoil


def test_the_newest_are_kept(start, steps):
    start(keep=2).save(10, 20, 30)
    assert steps() == [20, 30]
    start(keep=1).resume()
    assert steps() == [20, 30]


def test_a_damaged_one_is_written_anew_and_costs_no_good_one(start, steps, damage, tmp_path):
    start(keep=3).save(10, 20, 30)
    damage(20, 30)
    again = start(keep=3)
    assert again.resume() == 10
    assert steps() == [10]
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000010"
    again.save(20, 30)
    assert steps() == [10, 20, 30]
    assert not any(damaged_files(path) for path in published(tmp_path / "checkpoints"))


def test_what_a_killed_save_left_is_removed_once_resumed(start, steps, tmp_path):
    start().save(10, 20)
    left = tmp_path / "checkpoints" / "step-00000025.tmp"
    shutil.copytree(tmp_path / "checkpoints" / "step-00000020", left)
    assert start().resume() == 20
    assert not left.exists()
    assert steps() == [10, 20]


def test_nothing_is_removed_where_the_run_may_not_go_on(start, steps, damage, tmp_path):
    start().save(10, 20)
    damage(20)
    with pytest.raises(UserError, match="ranks was 1 and is 2"):
        start(world_size=2).resume()
    assert steps() == [10, 20]


def test_the_step_resumed_from_is_not_saved_again(start, tmp_path):
    start().save(10)
    stamp = (tmp_path / "checkpoints/step-00000010").stat().st_ino
    again = start()
    assert again.resume() == 10
    again.save(10)
    assert (tmp_path / "checkpoints/step-00000010").stat().st_ino == stamp
    assert again.engine.weight.tolist() == [10.0] * 3


@pytest.mark.parametrize("how", ["auto", "must", "never"])
def test_where_all_are_damaged_the_user_decides(start, steps, damage, how):
    start().save(10, 20)
    damage(10, 20)
    with pytest.raises(UserError, match=r"every checkpoint in .*checkpoints is damaged: remove that folder"):
        start().resume(how)
    assert steps() == [10, 20]


def test_where_there_is_none(start):
    assert start().resume("auto") is None
    assert start().resume("never") is None
    with pytest.raises(UserError, match="no intact checkpoint"):
        start().resume("must")


def test_a_checkpoint_that_lacks_a_ranks_part_is_not_published(start, steps, tmp_path):
    with pytest.raises(
        UserError, match="lacks the part of rank 1: output= must be on a file system that all nodes share"
    ):
        start(world_size=2).save(10)
    assert steps() == []
    assert newest_intact(tmp_path / "checkpoints") is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"keep_checkpoints": 0}, "training.keep_checkpoints=0"),
        ({"accumulation": 0}, "training.accumulation=0"),
        ({"accumulation": -2}, "training.accumulation=-2"),
        ({"resume": "perhaps"}, "training.resume=perhaps is unknown: take one of auto, must, never"),
    ],
)
def test_what_training_can_not_be(options, sentence):
    with pytest.raises(UserError, match=sentence):
        Training(10, 8, **options)


def test_identity_holds_what_may_not_change_on_resume():
    def identity(streams=8, **optimizer):
        order = {"streams": streams, "window_shards": 4}
        return Recipe(
            Training(10, 8), AdamW(**{"lr": 0.1, "schedule": Schedule(), **optimizer}), None, None, order
        ).identity

    assert identity() == {
        "batch_size": 8, "accumulation": 1, "streams": 8, "window_shards": 4,
        "optimizer": {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
    }  # fmt: skip
    assert identity(lr=0.2, schedule=Schedule("cosine")) == identity()
    for changed in ({"streams": 4}, {"betas": (0.9, 0.99)}, {"eps": 1e-6}, {"weight_decay": 0.0}):
        assert identity(**changed) != identity()
