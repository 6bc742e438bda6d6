"""Killed anywhere and started again from what it saved: the same ids. And a worker that is killed ends the run."""

import itertools
import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from fractions import Fraction

import pytest
from loaders import loader_of

from data_pipeline.loading.batch import DataCursor
from data_pipeline.loading.worker_pool import WorkerDied
from data_pipeline.shards.data_sets import DataSet, DataSets
from data_pipeline.shards.manifest import Manifest

SIZES = [7, 5, 9, 6, 12]  # 39 samples
STEPS = 120  # of 8: 24 epochs and a bit


def train(root, folder, workers):
    """What a run does with its data: note what a step is trained on, then save where it stands."""
    saved = folder / "cursor.json"
    start = DataCursor(**json.loads(saved.read_text())) if saved.exists() else DataCursor()
    loader = loader_of(root, 8, 4, seed=3, num_workers=workers, window_shards=1, start=start)
    with open(folder / "trained.txt", "a") as trained:
        for batch in itertools.islice(loader, STEPS - start.step):
            time.sleep(0.004)
            trained.write(f"{batch.step} {' '.join(batch.keys)}\n")
            trained.flush()
            (folder / "cursor.tmp").write_text(json.dumps(batch.cursor.state_dict()))
            (folder / "cursor.tmp").rename(saved)
    os._exit(0)


def lines(folder):
    path = folder / "trained.txt"
    return path.read_text().splitlines() if path.exists() else []


def live(root, folder, workers, until):
    """One life, from fork to SIGKILL: it ends a few milliseconds after `until` more steps, or by itself at the end."""
    process = multiprocessing.get_context("fork").Process(target=train, args=(root, folder, workers))
    before = len(lines(folder))
    process.start()
    while process.is_alive() and len(lines(folder)) < before + until:
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.008))
    process.kill()
    process.join()
    return process.exitcode


WITH_WORKERS = {6: {3: 2}, 20: {7: 1, 13: 3}}  # kills -> in which lives there are worker processes, and how many


@pytest.mark.processes
@pytest.mark.timeout(120)
@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_random_kills_change_no_batch(tmp_path, make_images, kills):
    """Real processes and SIGKILLs."""
    root = make_images(tmp_path / "set", SIZES)
    steps = steps_of_killed_lives(root, tmp_path, kills)
    undisturbed = loader_of(root, 8, 4, seed=3, window_shards=1)
    assert steps == [list(b.keys) for b in itertools.islice(undisturbed, STEPS)]
    plan = undisturbed.plan
    for epoch in range(3):
        came = Counter()
        for stream in range(4):
            for at in range(plan.stream_start(stream, epoch), plan.stream_start(stream, epoch + 1)):
                came[steps[at // 2][2 * stream + at % 2]] += 1
        assert len(came) == sum(SIZES)
        assert set(came.values()) == {1}


@pytest.mark.processes
@pytest.mark.exhaustive
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["mix", "buckets"])
def test_random_kills_change_no_batch_of_several_sets(tmp_path, make_images, kind):
    sets = [SIZES, [11, 3], [2]]
    data = DataSets(
        tuple(
            DataSet(f"{i}", root, Manifest.load(root), Fraction(i + 1, 6))
            for i, root in enumerate(make_images(tmp_path / str(i), sizes) for i, sizes in enumerate(sets))
        ),
        kind,
    )
    steps = steps_of_killed_lives(data, tmp_path, 20)
    undisturbed = loader_of(data, 8, 4, seed=3, window_shards=1)
    assert steps == [list(b.keys) for b in itertools.islice(undisturbed, STEPS)]


def steps_of_killed_lives(root, tmp_path, kills):
    """The keys of each step, over `kills` lives that are killed, and a last one."""
    random.seed(0)
    lives = 0
    for life in range(kills):
        workers = WITH_WORKERS[kills].get(life, 0)
        lives += live(root, tmp_path, workers, random.randint(0, 6)) == -signal.SIGKILL
    assert lives == kills
    assert live(root, tmp_path, 0, STEPS) == 0
    steps = {}
    for line in lines(tmp_path):
        number, *keys = line.split()
        assert steps.setdefault(int(number), keys) == keys  # noted twice where it was killed before it saved
    return [steps[i] for i in range(STEPS)]


@pytest.mark.processes
@pytest.mark.timeout(60)
def test_a_killed_worker_is_named(tmp_path, make_images):
    batches = iter(loader_of(make_images(tmp_path / "set", SIZES), 8, 4, num_workers=2, prefetch=1))
    next(batches)
    victim = next(p for p in multiprocessing.active_children() if p.name == "loader worker 1")
    victim.kill()
    with pytest.raises(WorkerDied, match=rf"loader worker 1 of 2 \(process {victim.pid}\) was killed by SIGKILL"):
        list(itertools.islice(batches, 50))
    assert not [p for p in multiprocessing.active_children() if p.name.startswith("loader worker")]


@pytest.mark.processes
@pytest.mark.timeout(60)
def test_workers_end_with_a_process_that_is_killed(tmp_path, make_images):
    root = make_images(tmp_path / "set", SIZES)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=tell_workers, args=(root, theirs))
    process.start()
    pids = ours.recv()
    process.kill()
    process.join()
    assert len(pids) == 2
    while any(running(pid) for pid in pids):
        time.sleep(0.05)


def tell_workers(root, connection):
    batches = iter(loader_of(root, 8, 4, num_workers=2))
    next(batches)
    connection.send([p.pid for p in multiprocessing.active_children()])
    time.sleep(60)


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
