"""Checkpoints in a bucket: whatever the store does, and wherever a save is killed, a whole one is gone on from."""

from __future__ import annotations

import itertools
import json
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load
from synthetic import NO_ENCODERS, TINY_LATENTS, TINY_UNET, losses, run, started, write_splits

from data_pipeline.common import s3 as s3
from data_pipeline.common import storage
from data_pipeline.common.errors import UserError
from train.checkpointing import checkpoints as checkpoint
from train.checkpointing import writer
from train.checkpointing.checkpoints import CheckpointConfig, Checkpoints
from train.checkpointing.ema_weights import ema_weights
from train.checkpointing.files import CheckpointPaths, complete_checkpoints
from train.checkpointing.posthoc_ema import find_snapshots, rebuilt
from train.checkpointing.stores import BucketStore
from train.distributed.ranks import Ranks
from train.engine.config import EngineConfig
from train.engine.ema import Ema
from train.engine.param_shards import Fragment
from train.engine.train_state import TrainState
from train.runs.run_folder import RunFolder

pytestmark = pytest.mark.xdist_group("s3")  # one server for them all

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
LENGTH = 3000  # of the one parameter
WRITES = 2 * 3 + 2 + 2 + 5  # two parts and notes, which go again; EMA, state; manifest, latest; the step before
FAULTS = ["slow down", "500", "reset", "stall before", "stall", "short"]


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch):
    monkeypatch.setenv("STORE_DEADLINE_S", "10")
    monkeypatch.setattr(s3, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(BucketStore, "pause", 0.02)


class Slice:
    """An engine with a rank's part of one parameter."""

    config, shapes = EngineConfig(), {"weight": [LENGTH]}

    def __init__(self, rank, world_size):
        edges = [LENGTH * i // world_size for i in range(world_size + 1)]
        self.start, self.length = edges[rank], edges[rank + 1] - edges[rank]
        self.weight = torch.zeros(self.length)

    def fragments(self):
        return [Fragment("weight", self.start, self.length, 0, 0)]

    fragments_to_save = fragments

    def tensors(self):
        return {"weight": [self.weight]}

    def scalars(self):
        return {}

    def after_loading(self, scalars):
        pass


class Collectives:
    """Of ranks that are threads: each gives a value, and gets those of all."""

    def __init__(self, world_size):
        self.meeting, self.values = threading.Barrier(world_size, timeout=60), [None] * world_size

    def gathered(self, rank, value):
        self.values[rank] = value
        self.meeting.wait()
        values = list(self.values)
        self.meeting.wait()
        return values


@pytest.fixture
def together(monkeypatch):
    """together(world_size, do): the results of do(rank) of ranks that are threads."""
    own = threading.local()

    def gathered(value=None):
        return own.collectives.gathered(own.rank, value) if getattr(own, "collectives", None) else [value]

    for module in (checkpoint, writer):
        monkeypatch.setattr(module, "broadcast_object", lambda value: gathered(value)[0])
    monkeypatch.setattr(checkpoint, "gathered_objects", gathered)
    monkeypatch.setattr(checkpoint, "barrier", gathered)

    def go(world_size, do):
        collectives, results = Collectives(world_size), [None] * world_size

        def of_rank(rank):
            own.rank, own.collectives = rank, collectives
            try:
                results[rank] = do(rank)
            except BaseException as error:
                results[rank] = error
                collectives.meeting.abort()

        threads = [threading.Thread(target=of_rank, args=(rank,)) for rank in range(world_size)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        errors = [e for e in results if isinstance(e, BaseException)]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return results

    return go


@pytest.fixture
def place(bucket):
    return f"s3://{bucket}/runs/a"


@pytest.fixture
def start(place, tmp_path, together):
    """start(ranks=2).save(10, 20), .resume(): as a run that is started anew. Each rank has scratch of its own: no file
    is handed on but through the bucket."""

    def make(ranks=2, run_id="one", keep=2, power=(), **options):
        def one(rank):
            config = CheckpointConfig(keep, scratch=str(tmp_path / f"scratch{rank}"), **options)
            own, places = Ranks(rank, ranks, rank, torch.device("cpu")), CheckpointPaths.of(tmp_path / "run", place)
            checkpoints = Checkpoints(tmp_path / "run/checkpoints", own, {"seed": 0}, "", config, places)
            engine = Slice(rank, ranks)
            return SimpleNamespace(
                checkpoints=checkpoints, engine=engine, ema=Ema([engine.weight], 0.9, power),
                state=TrainState(1000, run_id=run_id),
            )  # fmt: skip

        each = together(ranks, one)

        def save(*steps):
            def of_rank(rank):
                own = each[rank]
                for own.state.step in steps:
                    own.engine.weight.copy_(content(own))
                    own.checkpoints.save(own.engine, own.ema, own.state)
                own.checkpoints.finish()

            together(ranks, of_rank)

        def resume(how="auto"):
            def of_rank(rank):
                own = each[rank]
                there = own.checkpoints.resume(how, own.engine, own.ema, own.state)
                if there:
                    torch.testing.assert_close(own.engine.weight, content(own), rtol=0, atol=0)
                return own.state.step if there else None

            found = set(together(ranks, of_rank))
            assert len(found) == 1  # all ranks the same
            assert not list(tmp_path.glob("scratch*/*"))
            return found.pop()

        return SimpleNamespace(save=save, resume=resume, each=each, together=together)

    def content(own):
        at = torch.arange(own.engine.start, own.engine.start + own.engine.length)
        return at * 0.25 + own.state.step * 1000

    return make


def steps(place):
    return [int(name[5:]) for name in complete_checkpoints(place)]


def test_two_nodes_that_share_no_file_system(start, place, tmp_path):
    first = start()
    assert first.resume() is None
    first.save(10, 20, 30)
    assert steps(place) == [20, 30]
    assert sorted(storage.sizes(f"{place}/step-00000030")) == [
        "ema.safetensors", "manifest.json", "part-00000.safetensors", "part-00001.safetensors", "state.json",
    ]  # fmt: skip
    assert storage.read_bytes(f"{place}/latest") == b"step-00000030"
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-00000030"  # for restarts.sh
    averaged = load(storage.read_bytes(f"{place}/step-00000030/ema.safetensors"))["weight"]
    assert averaged.shape == (LENGTH,)
    assert start().resume("must") == 30
    assert not list(tmp_path.glob("scratch*/*"))


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_any_number_of_ranks_resumes_and_fetches_what_it_needs(start, place, proxy, ranks):
    run = start()
    run.resume()
    run.save(10)
    proxy.clear()
    assert start(ranks=ranks).resume() == 10
    size = storage.sizes(f"{place}/step-00000010")["part-00000.safetensors"]
    readers = {1: (1, 1), 3: (2, 2), 4: (2, 2)}[ranks]  # of three ranks the second needs a piece of both
    for part, times in enumerate(readers):
        read = proxy.bytes_read(f"part-0000{part}.safetensors")
        assert times * size <= read < (times + 0.9) * size  # headers beside it
    assert proxy.bytes_read("ema.safetensors") == 0


def test_one_ranks_damage_sends_all_to_the_one_before(start, place, caplog):
    run = start()
    run.resume()
    run.save(10, 20)
    path = f"{place}/step-00000020/part-00001.safetensors"
    data = bytearray(storage.read_bytes(path))
    data[-3] ^= 1
    storage.write_atomically(path, bytes(data))
    assert start().resume() == 10
    assert "step-00000020 is damaged (part-00001.safetensors); trying the one before" in caplog.text
    assert steps(place) == [10]


@pytest.mark.parametrize("name", ["part-00000.safetensors", "state.json", "manifest.json"])
def test_what_is_cut_or_gone_is_found_before_anything_is_fetched(start, place, proxy, name):
    run = start()
    run.resume()
    run.save(10, 20, 30)
    storage.write_atomically(f"{place}/step-00000030/{name}", b"{")
    proxy.clear()
    assert start().resume() == 20
    assert not [r for r in proxy.requests if r.method == "GET" and "00030/part" in r.path]
    storage.remove(f"{place}/step-00000020/{name}")
    again = start()
    if name == "manifest.json":  # what was never published looks so, too
        assert again.resume() is None
    else:
        with pytest.raises(UserError, match=r"every checkpoint in s3://.* is damaged"):
            again.resume()


def test_swapped_parts_are_damage(start, place):
    run = start()
    run.resume()
    run.save(10, 20)
    one, other = (f"{place}/step-00000020/part-0000{rank}.safetensors" for rank in (0, 1))
    a, b = storage.read_bytes(one), storage.read_bytes(other)
    storage.write_atomically(one, b)
    storage.write_atomically(other, a)
    assert start().resume() == 10


def test_a_part_of_another_rank_that_is_as_long_is_damage(start, place):
    """Only its digest tells."""
    run = start()
    run.resume()
    run.save(10, 20)
    part = storage.read_bytes(f"{place}/step-00000010/part-00000.safetensors")
    storage.write_atomically(f"{place}/step-00000020/part-00000.safetensors", part)
    assert start().resume() == 10


def test_the_user_decides(start, place):
    with pytest.raises(UserError, match=r"resume=must, but s3://.* has no intact checkpoint"):
        start().resume("must")
    run = start()
    assert run.resume("never") is None
    run.save(10)
    with pytest.raises(UserError, match=r"s3://.*/step-00000010 exists and resume=never"):
        start().resume("never")


def test_retention_and_rollback(start, place):
    run = start(keep=1, keep_every=20, power=[0.1])
    run.resume()
    run.save(10, 20, 30, 40, 50)
    assert steps(place) == [20, 40, 50]
    for own in run.each:
        own.state.step = 57

    def roll_back(rank):
        own = run.each[rank]
        assert own.checkpoints.roll_back(own.engine, own.ema, own.state, before=45)
        return own.state.step, own.state.passed_over, own.state.rollbacks

    assert run.together(2, roll_back) == [(40, 17, 1)] * 2
    assert steps(place) == [20, 40]
    again = start(power=[0.1])
    assert again.resume() == 40
    assert [(own.state.passed_over, own.state.rollbacks) for own in again.each] == [(17, 1)] * 2
    snapshots = storage.files(f"{place}/ema_snapshots", ".safetensors")
    assert snapshots == [f"step-000000{step}.safetensors" for step in (10, 20, 30, 40)]


def test_who_was_taken_over_publishes_nothing_more(start, place):
    """A process that was given up, but lives, publishes nothing more."""
    old = start()
    old.resume()
    old.save(10)
    new = start(run_id="two")  # as training.allow_mismatch=[run_id] allows
    assert new.resume() == 10
    assert storage.read_bytes(f"{place}/owner").split()[0] == b"two"
    assert new.each[0].state.run_id == "two"
    with pytest.raises(UserError, match="now belongs to another process"):
        old.save(20)
    new.save(20)
    assert steps(place) == [10, 20]


@pytest.mark.parametrize("fault", FAULTS)
def test_saves_and_resumes_heal(start, place, proxy, monkeypatch, fault):
    """Every third answer is spoilt."""
    if "stall" in fault:
        monkeypatch.setenv("STORE_DEADLINE_S", "0.5")
        monkeypatch.setenv("STORE_ATTEMPTS", "20")  # a busy machine may miss that deadline, too
    run = start()
    run.resume()
    proxy.faults += ["", "", fault] * 3
    run.save(10)
    assert not proxy.faults
    assert steps(place) == [10]
    proxy.faults += ["", "", fault] * 3
    assert start().resume("must") == 10
    assert not proxy.faults


def test_killed_between_any_two_requests_of_a_save(start, place, proxy, monkeypatch):
    """Nothing from its n-th write on reaches the store: what it reads between two of them leaves no trace. Who comes
    after finds the step before, or this one."""
    run, found, step = start(keep=1), [], 1
    run.resume()
    run.save(step)
    for number in itertools.count():
        proxy.clear()
        proxy.writes_left = number
        try:
            with monkeypatch.context() as dead:
                dead.setenv("STORE_ATTEMPTS", "1")
                run.save(step + 1)
        except UserError:
            proxy.clear()
            run = start(keep=1)
            found.append(run.resume("must") - step)
        else:
            break
        if found[-1]:  # a whole save, which removes what that one could not
            run.save(step := step + 2)
            assert steps(place) == [step]
    proxy.clear()
    assert len(found) == WRITES
    assert found == sorted(found)
    assert set(found) == {0, 1}
    assert steps(place) == [step + 1]


def test_a_save_that_was_killed_is_overwritten_at_the_same_step(start, place, proxy, monkeypatch):
    """Its notes are of another save: rank 0, which is done first, does not take them for those that it waits for."""
    run = start()
    run.resume()
    run.save(10)
    part = storage.read_bytes(f"{place}/step-00000010/part-00001.safetensors")
    note = json.dumps({"save": "another-1", "bytes": 1, "sha256": ""}).encode()
    storage.write_atomically(f"{place}/step-00000020/part-00000.json", note)
    storage.write_atomically(f"{place}/step-00000020/part-00001.json", note)
    storage.write_atomically(f"{place}/step-00000020/part-00001.safetensors", part)

    saved = writer.save_tensors

    def slow_on_rank_1(tensors, path, *more):
        time.sleep(0.5 * (path.name == "part-00001.safetensors"))
        return saved(tensors, path, *more)

    monkeypatch.setattr(writer, "save_tensors", slow_on_rank_1)
    run.save(20)
    assert start().resume() == 20


SETTINGS = [
    *TINY_UNET, *NO_ENCODERS, "training.steps=24", "training.save_every=4", "training.batch_size=16",
    "training.log_every=1", "engine=zero2", "validate_every=null", "training.power_ema=[0.1]",
]  # fmt: skip


@pytest.mark.processes
def test_a_run_on_two_ranks_is_killed_and_goes_on_on_one(place, tmp_path, monkeypatch):
    """As users type it; then drawn from, and its averages rebuilt."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    latents, output = write_splits(tmp_path / "latents", TINY_LATENTS), tmp_path / "run"
    arguments = [f"input={latents}", f"output={output}", *SETTINGS, f"training.checkpoints={place}"]
    process = started(tmp_path / "log", "train/train_ldm.py", *arguments, ranks=2)
    deadline = time.monotonic() + 120
    while len(losses(output)) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    [one.kill() for one in everyone]
    psutil.wait_procs(everyone, timeout=30)
    process.wait()
    assert 10 <= len(losses(output)) < 24
    before = steps(place)[-1]
    done = run("train/train_ldm.py", *arguments, "training.resume=must")
    assert f"resumed from step {before} of 24" in done.stdout
    assert "was saved with 2 rank(s) and ZeRO stage 2: it is resharded for this run" in done.stderr
    assert sorted(losses(output)) == list(range(1, 25))
    assert steps(place) == [20, 24]
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["latest"]
    assert not list((tmp_path / "scratch").glob("*checkpoints*"))

    path, tensors = ema_weights(output)
    assert path == f"{place}/step-00000024/ema.safetensors"
    snapshots = find_snapshots(output)
    assert len(snapshots) == 6
    assert rebuilt(snapshots, snapshots[-1].profile).keys() == tensors.keys()
    with pytest.raises(UserError, match=f"training.checkpoints={place} belongs to run .* this is a new one"):
        RunFolder(tmp_path / "other", "train_ldm", {"training": {"checkpoints": place}}, ALONE)
    assert not (tmp_path / "other").exists()
    may = {"checkpoints": place, "allow_mismatch": ["run_id"]}
    assert RunFolder(tmp_path / "other", "train_ldm", {"training": may}, ALONE).paths.checkpoints == place


def test_wrong_keys_are_said_before_a_folder_is_made(place, tmp_path, monkeypatch, new_client):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match="check AWS_SECRET_ACCESS_KEY"):
        RunFolder(tmp_path / "run", "train_ldm", {"training": {"checkpoints": place}}, ALONE)
    assert not (tmp_path / "run").exists()
