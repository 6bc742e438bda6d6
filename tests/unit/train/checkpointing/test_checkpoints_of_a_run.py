"""Saving and resuming over damage and kills, by a stand-in for the engine that has one weight."""

import contextlib
import hashlib
import itertools
import json
import os
import resource
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data_pipeline.common import storage
from data_pipeline.common.errors import UserError
from train.checkpointing import safetensors_io, writer
from train.checkpointing.checkpoints import CheckpointConfig, Checkpoints
from train.checkpointing.compatibility import refuse_what_differs
from train.checkpointing.files import is_as_written
from train.distributed.ranks import Ranks
from train.engine.config import EngineConfig
from train.engine.ema import Ema
from train.engine.optimizer import AdamW, Schedule
from train.engine.param_shards import Fragment
from train.engine.train_state import TrainState
from train.loop.recipe import Recipe, Training


def published(folder):
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".tmp")


def damaged_files(path):
    files = json.loads((path / "manifest.json").read_text())
    return [name for name, facts in files.items() if not is_as_written(path / name, facts)]


class OneWeight:
    """An engine with a single weight."""

    config, shapes = EngineConfig(), {"weight": [3]}

    def __init__(self):
        self.weight, self.loaded = torch.zeros(3), None

    def fragments(self):
        return [Fragment("weight", 0, 3, 0, 0)]

    fragments_to_save = fragments

    def tensors(self):
        return {"weight": [self.weight]}

    def scalars(self):
        return {"adam_step": 7.0}

    def after_loading(self, scalars):
        self.loaded = scalars


@pytest.fixture
def start(tmp_path):
    """start(keep=2): as a process that is started in the same run folder; save(step) and resume(how) as it would."""

    def make(keep=2, world_size=1, seed=0, unet=None, **options):
        ranks, identity = (
            Ranks(0, world_size, 0, torch.device("cpu")),
            {"seed": seed} | ({"unet": unet} if unet else {}),
        )
        checkpoints = Checkpoints(tmp_path / "checkpoints", ranks, identity, "", CheckpointConfig(keep, **options))
        engine, state = OneWeight(), TrainState(1000)
        ema = Ema([engine.weight], 0.9)

        def save(*steps):
            for state.step in steps:
                engine.weight.fill_(float(state.step))
                checkpoints.save(engine, ema, state)
            checkpoints.finish()

        def resume(how="auto"):
            return state.step if checkpoints.resume(how, engine, ema, state) else None

        def save_without_waiting(step):
            state.step = step
            engine.weight.fill_(float(step))
            checkpoints.save(engine, ema, state)

        folder = tmp_path / "checkpoints"
        return SimpleNamespace(
            save=save, save_without_waiting=save_without_waiting, resume=resume, engine=engine, folder=folder,
            checkpoints=checkpoints, ema=ema, state=state,
        )  # fmt: skip

    return make


@pytest.fixture
def steps(tmp_path):
    """steps(): of all that is published."""
    return lambda: [int(path.name.removeprefix("step-")) for path in published(tmp_path / "checkpoints")]


@pytest.fixture
def damage(tmp_path):
    def spoil(*steps):
        for step in steps:
            (tmp_path / f"checkpoints/step-{step:08d}/part-00000.safetensors").write_bytes(b"")

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
    with pytest.raises(UserError, match=r"seed was 0 and is now 1\. .*training\.allow_mismatch=\[seed\]"):
        start(seed=1).resume()
    assert steps() == [10, 20]


def test_what_was_named_may_change_and_is_logged(start, caplog):
    start().save(10)
    assert start(seed=1, allow_mismatch=("seed",)).resume() == 10
    assert "resuming although seed was 0 and is now 1" in caplog.text


ONE, TWO = [["a", "11"], ["b", "22"]], [["x/a", "11"], ["x/b", "22"]]
OTHER_SETS = {
    "changed": ([["a", "11"], ["b", "33"]], "data set b was 22 and is now 33"),
    "exchanged": ([["a", "11"], ["c", "33"]], "data set b is gone; data set c is new"),
    "one more": ([*ONE, ["c", "33"]], "data set c is new"),
    "one less": ([["a", "11"]], "data set b is gone"),
    "order": (ONE[::-1], "the data sets were a, b and are now b, a"),
    "swapped names": ([["b", "11"], ["a", "22"]], "data set b was 22 and is now 11; data set a was 11 and is now 22"),
    "one set": (None, "data was before and is now after"),
}


@pytest.mark.parametrize("case", OTHER_SETS)
def test_the_data_sets_of_a_mix_that_changed_are_named(case):
    sets, said = OTHER_SETS[case]
    before, now = {"data": "before", "sets": ONE}, {"data": "after"} | ({"sets": sets} if sets else {})
    with pytest.raises(UserError, match=rf"from run: {said}\. Restore .* training\.allow_mismatch=\[data\]\.$"):
        refuse_what_differs(now, before, (), "run")
    assert refuse_what_differs(now, before, ("data",), "run") == [said]
    with pytest.raises(UserError, match="data was before and is now after"):  # a checkpoint of an earlier version
        refuse_what_differs(now, {"data": "before"}, (), "run")


def test_data_sets_may_move_and_checkpoints_of_before_do_not_name_them():
    for before in ({"data": "same"}, {"data": "same", "sets": ONE}):
        assert refuse_what_differs({"data": "same", "sets": TWO}, before, (), "run") == []


def test_the_step_resumed_from_is_not_saved_again(start, tmp_path):
    start().save(10)
    stamp = (tmp_path / "checkpoints/step-00000010").stat().st_ino
    again = start()
    assert again.resume() == 10
    again.save(10)
    assert (tmp_path / "checkpoints/step-00000010").stat().st_ino == stamp
    assert again.engine.weight.tolist() == [10.0] * 3
    assert again.engine.loaded == {"adam_step": 7.0}


def test_each_of_some_multiple_is_kept(start, steps):
    start(keep=1, keep_every=20).save(10, 20, 30, 40, 50)
    assert steps() == [20, 40, 50]


def test_training_goes_on_while_a_checkpoint_is_written(start, steps, monkeypatch):
    """What is saved is what was there when it was asked for, and the next save waits for it."""
    held, go_on = threading.Event(), threading.Event()
    save_tensors = writer.save_tensors

    def slow(tensors, path):
        held.set()
        assert go_on.wait(30)
        save_tensors(tensors, path)

    monkeypatch.setattr(writer, "save_tensors", slow)
    run = start()
    run.save_without_waiting(10)
    assert held.wait(30)
    run.engine.weight.fill_(99.0)  # training goes on
    assert steps() == []
    go_on.set()
    run.save(20)
    assert steps() == [10, 20]
    shutil.rmtree(published(run.folder)[1])
    again = start()
    assert again.resume() == 10
    assert again.engine.weight.tolist() == [10.0] * 3


@pytest.fixture
def no_room():
    """with no_room(): files can grow to 100 bytes only, and no signal ends the process for it."""

    @contextlib.contextmanager
    def limited():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


def test_a_full_disk_is_said_at_the_next_step(start, steps, no_room):
    run = start()
    run.save(10)
    with no_room(), pytest.raises(UserError, match=r"can't be written .*File too large.*: free disk space"):
        run.save(20)
    assert steps() == [10]
    assert start().resume() == 10


class Killed(BaseException):
    """In place of a SIGKILL: nothing after it runs."""


CALLS = [
    (os, "fsync"), (os, "rename"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir"), (shutil, "rmtree"),
    (writer, "save_tensors"), (storage, "write_atomically"),
]  # fmt: skip


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_write_sync_or_rename(start, steps, monkeypatch, after):
    """Whatever is there afterwards, the run goes on from a whole checkpoint: the one before, or the new one."""
    start(keep=1).save(10)
    found = []
    for number in itertools.count():
        calls = itertools.count()
        with monkeypatch.context() as patched:
            for owner, name in CALLS:
                patched.setattr(owner, name, dying(getattr(owner, name), calls, number, after))
            again = start(keep=1)
            assert again.resume() is not None
            try:
                again.save(20)
            except Killed:
                pass
            else:
                break
        resumed = start(keep=1)
        found.append(resumed.resume())
        assert resumed.engine.weight.tolist() == [float(found[-1])] * 3
        shutil.rmtree(resumed.folder)
        start(keep=1).save(10)
    assert set(found) == {10, 20}
    assert found == sorted(found)
    assert len(found) > 10


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_step_of_a_resume(start, steps, damage, tmp_path, monkeypatch, after):
    """Which sets aside what is damaged and clears what a killed save left."""
    folder, original = tmp_path / "checkpoints", tmp_path / "original"
    start(keep=3).save(10, 20, 30)
    damage(30)
    shutil.copytree(folder / "step-00000020", folder / "step-00000035.tmp")
    folder.rename(original)
    for number in itertools.count():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        calls = itertools.count()
        with monkeypatch.context() as patched:
            for owner, name in CALLS:
                patched.setattr(owner, name, dying(getattr(owner, name), calls, number, after, everywhere=True))
            try:
                start(keep=3).resume()
            except Killed:
                whole = False
            else:
                whole = True
        assert start(keep=3).resume("must") == 20
        assert sorted(path.name for path in folder.glob("*step*")) == ["damaged-step-00000030", *(
            f"step-000000{step}" for step in (10, 20))]  # fmt: skip
        if whole:
            break
    assert number > 3


def dying(function, calls, number, after, everywhere=False):
    def instead(*arguments, **options):
        here = everywhere or threading.current_thread() is not threading.main_thread()
        if not here or next(calls) != number:
            return function(*arguments, **options)
        if after:
            function(*arguments, **options)
        raise Killed

    return instead


def test_swapped_parts_are_damage(start, tmp_path, damage):
    start().save(10)
    folder = tmp_path / "checkpoints/step-00000010"
    shutil.copy(folder / "ema.safetensors", folder / "part-00000.safetensors")
    with pytest.raises(UserError, match="is damaged"):
        start().resume()


@pytest.mark.parametrize("how", ["auto", "must", "never"])
def test_where_all_are_damaged_the_user_decides(start, steps, damage, how):
    start().save(10, 20)
    damage(10, 20)
    with pytest.raises(UserError, match=r"every checkpoint in .*checkpoints is damaged: copy them there again"):
        start().resume(how)
    assert steps() == [10, 20]


def test_what_is_not_ours_is_left_alone(start, steps, tmp_path):
    start().save(10, 20)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-00000020", folder / "step-00000020-backup")
    (folder / "step-x").symlink_to("nowhere")
    assert start().resume() == 20
    start().save(30)
    assert {path.name for path in folder.glob("step-*")} >= {"step-00000020-backup", "step-x"}


def test_a_damaged_one_is_set_aside(start, steps, damage, tmp_path):
    start().save(10, 20)
    damage(20)
    assert start().resume() == 10
    assert steps() == [10]
    assert (tmp_path / "checkpoints/damaged-step-00000020/manifest.json").exists()


def test_names_that_may_change_are_known_ones(start):
    start().save(10)
    with pytest.raises(UserError, match=r"allow_mismatch contains unknown names: sead\. Use any of seed"):
        start(allow_mismatch=("sead",)).resume()


@pytest.mark.parametrize("manifest", ["{}", "null", "[]", '{"state.json": {"bites": 1, "sha256": "a"}}', '{"a'])
def test_a_manifest_that_says_something_else_is_damage(start, steps, tmp_path, manifest):
    start().save(10, 20)
    (tmp_path / "checkpoints/step-00000020/manifest.json").write_text(manifest)
    assert start().resume() == 10


@pytest.mark.parametrize("part", ["", "state", "state.passed_over", "layout", "layout.ranks", "ema", "identity"])
def test_a_state_that_lacks_something_is_damage(start, steps, tmp_path, part):
    """Whatever wrote it so: its digest is right."""
    start().save(10, 20)
    folder = tmp_path / "checkpoints/step-00000020"
    state, files = (json.loads((folder / name).read_text()) for name in ("state.json", "manifest.json"))
    above, _, last = part.rpartition(".")
    (state[above] if above else state).pop(last, None)
    text = json.dumps(state if part else [state]).encode()
    files["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (folder / "state.json").write_bytes(text)
    (folder / "manifest.json").write_text(json.dumps(files))
    assert start().resume() == 10


def test_a_manifest_without_a_part_is_damage(start, tmp_path):
    start().save(10, 20)
    path = tmp_path / "checkpoints/step-00000020/manifest.json"
    files = json.loads(path.read_text())
    del files["part-00000.safetensors"]
    path.write_text(json.dumps(files))
    assert start().resume() == 10


def test_an_old_one_that_can_not_be_removed_yet_ends_nothing(start, steps, monkeypatch, caplog):
    def busy(path, **options):
        if not options:
            raise OSError(39, "Directory not empty")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", busy)
        start(keep=1).save(10, 20)
    assert steps() == [20]
    assert "can't be removed now" in caplog.text
    assert start().resume() == 20


def test_what_is_refused_before_beginning_anew_removes_nothing(start, tmp_path):
    (tmp_path / "ema_snapshots").mkdir()
    for name in ("step-00000010.safetensors", "mine.safetensors"):
        (tmp_path / "ema_snapshots" / name).touch()
    run = start()

    def refuse():
        raise UserError("not in silence")

    with pytest.raises(UserError, match="not in silence"):
        run.checkpoints.resume("auto", run.engine, run.ema, run.state, refuse)
    assert len(list((tmp_path / "ema_snapshots").iterdir())) == 2
    assert run.resume() is None
    assert [path.name for path in (tmp_path / "ema_snapshots").iterdir()] == ["mine.safetensors"]


def test_rolled_back_past_a_damaged_one(start, steps, damage, tmp_path):
    run = start(keep=9)
    run.save(10, 20, 30)
    damage(20)
    assert run.checkpoints.roll_back(run.engine, run.ema, run.state, 25)
    assert (run.state.step, steps()) == (10, [10])
    assert (tmp_path / "checkpoints/damaged-step-00000020").exists()


def test_other_shapes_are_refused(start):
    """[2, 2] would take the first of [3]'s values, and one that is not there."""
    start().save(10)
    again = start()
    again.engine.shapes = {"weight": [2, 2]}
    with pytest.raises(UserError, match=r"1 parameter\(s\) .*weight, whose shape was \[3\] and is now \[2, 2\]"):
        again.resume()


def test_a_note_may_be_the_last_that_a_rank_does(start, steps, tmp_path, monkeypatch):
    """Rank 0 may publish at once: whoever then still looks into the folder under its temporary name finds none."""
    store = start().checkpoints.store
    with store.workplace("step-00000010") as folder:
        replace = Path.replace

        def and_published(path, target):
            replace(path, target)
            folder.rename(tmp_path / "checkpoints/step-00000010")

        monkeypatch.setattr(Path, "replace", and_published)
        store.note(b"{}", "step-00000010", "part-00001.json")
    assert steps() == [10]


def test_where_there_is_none(start):
    assert start().resume("auto") is None
    assert start().resume("never") is None
    with pytest.raises(UserError, match="no intact checkpoint"):
        start().resume("must")


def test_a_checkpoint_that_lacks_a_ranks_part_is_not_published(start, steps, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "PATIENCE_S", 0.0)
    with pytest.raises(UserError, match=r"has no part from rank 1: .* output= is on a file system that all"):
        start(world_size=2).save(10)
    assert steps() == []
    assert start().resume() is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"keep_checkpoints": 0}, "training.keep_checkpoints=0"),
        ({"accumulation": 0}, "training.accumulation=0"),
        ({"accumulation": -2}, "training.accumulation=-2"),
        ({"micro_batch": 3}, "batch_size=8 is not a multiple of 2 ranks x training.micro_batch=3"),
        ({"batch_size": 7}, "batch_size=7 can't be shared by 2 ranks"),
        ({"resume": "perhaps"}, "training.resume=perhaps is not valid: use one of auto, must, never"),
    ],
)
def test_what_training_can_not_be(options, sentence):
    with pytest.raises(UserError, match=sentence):
        Training(**{"steps": 10, "batch_size": 8, **options}).over(2)


def test_accumulation_follows_from_the_micro_batch():
    assert [Training(10, 16, micro_batch=2).over(ranks).accumulation for ranks in (1, 2, 4, 8)] == [8, 4, 2, 1]


def test_a_checkpoint_names_no_path_of_code_and_one_of_before_that_does_is_gone_on_from(start, tmp_path):
    unet = {"_target_": "train.models.unet.UNet", "channels": [8]}
    start(unet=unet).save(10)
    step = tmp_path / "checkpoints/step-00000010"
    state, manifest = (json.loads((step / name).read_text()) for name in ("state.json", "manifest.json"))
    assert state["identity"]["unet"] == {"name": "unet", "channels": [8]}
    state["identity"]["unet"] = unet
    data = json.dumps(state).encode()
    (step / "state.json").write_bytes(data)
    manifest["state.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (step / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"unet\._target_ was None and is now os\.system; unet\.name was unet"):
        start(unet={"_target_": "os.system", "channels": [8]}).resume()
    assert start(unet=unet).resume() == 10


def test_identity_holds_what_may_not_change_on_resume():
    def identity(streams=8, **optimizer):
        order = {"streams": streams, "window_shards": 4}
        adamw = AdamW(**{"lr": 0.1, "schedule": Schedule(), **optimizer})
        return Recipe(Training(10, 8), adamw, EngineConfig(), None, order).identity

    assert identity() == {
        "batch_size": 8, "streams": 8, "window_shards": 4, "dtype": "fp32", "ema_decay": 0.999,
        "power_ema": [],
        "optimizer": {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
    }  # fmt: skip
    assert identity(lr=0.2, schedule=Schedule("cosine")) == identity()
    for changed in ({"streams": 4}, {"betas": (0.9, 0.99)}, {"eps": 1e-6}, {"weight_decay": 0.0}):
        assert identity(**changed) != identity()


def test_files_are_for_all_whom_the_umask_lets(start):
    run = start()
    umask = os.umask(0o022)
    try:
        run.save(10)
    finally:
        os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (run.folder / "step-00000010").iterdir()}
    assert modes == dict.fromkeys(modes, 0o644)


def test_a_removal_that_was_killed_half_way_leaves_nothing_that_looks_published(start, steps, monkeypatch):
    start(keep=1).save(10)
    run = start(keep=1)
    run.resume()
    rmtree = shutil.rmtree

    def dies(path, **options):
        (Path(path) / "manifest.json").unlink(missing_ok=True)
        if threading.current_thread() is not threading.main_thread() and Path(path).exists():
            raise Killed
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", dies)
    with pytest.raises(Killed):
        run.save(20)
    assert steps() == [20]
    monkeypatch.undo()
    again = start(keep=1)
    assert again.resume("must") == 20
    assert sorted(path.name for path in again.folder.iterdir()) == ["latest", "step-00000020"]


def test_what_the_disk_gives_back_is_compared_with_what_was_to_be_saved(start, steps, monkeypatch):
    """A digest of the file alone would be that of the wrong bytes."""
    save_file = safetensors_io.save_file

    def flips(tensors, path, metadata):
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, path, metadata)

    run = start()
    run.save(10)
    monkeypatch.setattr(safetensors_io, "save_file", flips)
    with pytest.raises(OSError, match=r"part-00000\.safetensors: tensor \S+ differs after reading it back"):
        run.save(20)
    assert steps() == [10]


def test_what_is_not_a_number_is_saved_like_any_other(start):
    run = start()
    run.engine.weight = torch.full((3,), torch.nan)
    run.engine.weight.fill_ = lambda value: None
    run.save(10)
    again = start()
    assert again.resume() == 10
    assert again.engine.weight.isnan().all()


def test_rollbacks_are_counted_through_a_kill_before_the_next_save(start):
    run = start()
    run.save(10, 20)
    run.state.step = 27
    assert run.checkpoints.roll_back(run.engine, run.ema, run.state, before=20)
    assert (run.state.step, run.state.passed_over, run.state.rollbacks) == (20, 7, 1)
    again = start()  # nothing was saved meanwhile
    assert again.resume() == 20
    assert (again.state.passed_over, again.state.rollbacks) == (7, 1)
    again.save(30)
    later = start()
    assert later.resume() == 30
    assert (later.state.passed_over, later.state.rollbacks) == (7, 1)


def test_rollbacks_count_where_an_earlier_checkpoint_is_gone_on_from(start, damage):
    """But the data passed over lie behind the step gone back to, which it comes to again."""
    run = start()
    run.save(10, 20)
    run.state.step = 27
    run.checkpoints.roll_back(run.engine, run.ema, run.state, before=20)
    damage(20)
    again = start()
    assert again.resume() == 10
    assert (again.state.passed_over, again.state.rollbacks) == (0, 1)
