"""Who may write to a run's folder, how ranks find each other and part, and W&B where it can't be reached."""

import fcntl
import logging
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import wandb

from data_pipeline.common.errors import UserError
from train.distributed import ranks
from train.distributed.ranks import Ranks, closing_distributed, find_ranks
from train.runs import run_folder, wandb_reporter
from train.runs.run_folder import RunFolder
from train.runs.wandb_reporter import WeightsAndBiases

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


def hold_as_a_run(folder, told):
    run = RunFolder(folder, "train_ldm", {}, ALONE)
    told.send(run.run_id)
    time.sleep(600)


@pytest.mark.processes
def test_one_process_at_a_time(tmp_path):
    first = RunFolder(tmp_path / "run", "train_ldm", {}, ALONE)
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run/lock"], stdout=subprocess.PIPE) as other:
        first.lock.close()
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="is in use by another process: stop it first"):
            RunFolder(tmp_path / "run", "train_ldm", {}, ALONE)
        other.kill()
        other.wait()
        assert RunFolder(tmp_path / "run", "train_ldm", {}, ALONE).run_id == first.run_id


@pytest.mark.processes
def test_who_holds_it_is_named(tmp_path):
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    other = context.Process(target=hold_as_a_run, args=(tmp_path / "run", theirs), daemon=True)
    other.start()
    assert ours.recv()
    for _ in range(2):  # who is refused leaves the name there
        with pytest.raises(UserError, match=f"in use by process {other.pid} on {socket.gethostname()}: stop it"):
            RunFolder(tmp_path / "run", "train_ldm", {}, ALONE)
    other.kill()
    other.join()
    RunFolder(tmp_path / "run", "train_ldm", {}, ALONE)
    assert (tmp_path / "run/lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


@pytest.fixture
def held(tmp_path):
    """A run that another process holds; killed to let it go."""
    RunFolder(tmp_path / "run", "train_ldm", {}, ALONE).lock.close()
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run/lock"], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        yield other
        other.kill()


def test_a_job_that_slurm_restarted_waits_for_the_lock_of_a_dead_node(tmp_path, held, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    tries = []
    monkeypatch.setattr("time.sleep", lambda seconds: (tries.append(seconds), held.kill(), held.wait()))
    assert RunFolder(tmp_path / "run", "train_ldm", {}, ALONE).run_id
    assert tries == [1.0]


def test_in_vain_it_asks_to_be_started_again(tmp_path, held, monkeypatch, caplog):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(run_folder, "LOCK_PATIENCE_S", 0.5)
    with pytest.raises(SystemExit) as left:
        RunFolder(tmp_path / "run", "train_ldm", {}, ALONE)
    assert left.value.code == 75
    assert "is in use by another process" in caplog.text
    assert "Slurm is asked to try again later" in caplog.text


def test_where_a_file_system_knows_no_locks_the_run_goes_on(tmp_path, monkeypatch, caplog):
    def refuse(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with caplog.at_level(logging.WARNING):
        RunFolder(tmp_path / "run", "train_ldm", {}, ALONE)
    assert "can't be locked" in caplog.text


@pytest.mark.parametrize("place", ["s3://bucket/run", "pipe:cat", "gs://bucket/run"])
def test_a_run_is_on_a_file_system(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"must be on a file system|only local paths"):
        RunFolder(place, "train_ldm", {}, ALONE)
    assert not list(tmp_path.iterdir())


SECRETS = [
    {"training": {"wandb_api_key": "0123"}},
    {"read": {"storage": {"aws_secret_access_key": "0123"}}},
    {"password": "x"},
    {"hf_token": "x"},
    {"input": "s3://key:secret@bucket/latents"},
]
HARMLESS = {"key": "group", "tokens": 4, "api_key": None, "token": "", "input": "s3://bucket/a:b", "context": "a@b"}


@pytest.mark.parametrize("config", SECRETS, ids=lambda config: next(iter(config)))
def test_a_secret_in_the_configuration_is_refused(tmp_path, config):
    with pytest.raises(UserError, match=r"contains a secret, .*: set it in the environment"):
        RunFolder(tmp_path / "run", "train_ldm", config, ALONE)
    assert not list(tmp_path.iterdir())


def test_what_only_sounds_like_a_secret_is_not(tmp_path):
    RunFolder(tmp_path / "run", "train_ldm", HARMLESS, ALONE)


@pytest.fixture
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID"):
        monkeypatch.setenv(name, "")  # so that what is set below is undone, too
        monkeypatch.delenv(name)


SEVERAL = [
    {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "node1"},
    {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"},
]


@pytest.mark.parametrize("environment", SEVERAL)
def test_several_ranks_need_a_place_to_meet(no_launcher, monkeypatch, environment):
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("it would wait for ever"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"start them with torchrun or slurm/\*\.sbatch"):
        find_ranks()


def test_a_kill_while_the_folder_is_made_is_gone_on_from(tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("lock", "run_id.tmp.node.17"):
        (tmp_path / "run" / name).touch()
    assert RunFolder(tmp_path / "run", "train_ldm", {}, ALONE).run_id
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").touch()
    with pytest.raises(UserError, match="contains something other than a run"):
        RunFolder(tmp_path / "other", "train_ldm", {}, ALONE)


def test_who_does_not_come_to_the_meeting_is_named(no_launcher, monkeypatch):
    place = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "MEETING_TIMEOUT", timedelta(seconds=0.5))
    with pytest.raises(TimeoutError, match=r"rank\(s\) 1, 2 did not connect to 127.0.0.1"):
        find_ranks()


@pytest.mark.parametrize(("ends_with", "left"), [(None, 1), (SystemExit, 1), (UserError, 0), (RuntimeError, 0)])
def test_the_group_is_left_in_order_but_not_after_an_error(monkeypatch, ends_with, left):
    calls = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append(1))

    def body():
        with closing_distributed():
            if ends_with:
                raise ends_with(75)

    if ends_with:
        with pytest.raises(ends_with):
            body()
    else:
        body()
    assert len(calls) == left


@pytest.mark.parametrize("fails", ["login", "init"])
def test_wandb_out_of_reach_is_kept_offline(tmp_path, monkeypatch, caplog, fails):
    tried = []

    def login(**ignored):
        if fails == "login":
            raise wandb.errors.AuthenticationError("no such key")
        return True

    def init(mode, **about):
        tried.append((mode, about["resume"], about["id"]))
        if mode == "online":
            raise wandb.errors.CommError("unreachable")
        return SimpleNamespace(finish=lambda: None)

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "login", login)
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb_reporter, "_kill_service", lambda: tried.append("the service's end"))
    with caplog.at_level(logging.WARNING):
        WeightsAndBiases(tmp_path, "abc", {}, "project").close()
    # A service that still tries to reach W&B has the id in use, and would refuse it.
    assert tried[-2:] == ["the service's end", ("offline", None, "abc")]
    assert "logged offline" in caplog.text
    assert os.environ.get("WANDB_MODE") is None
