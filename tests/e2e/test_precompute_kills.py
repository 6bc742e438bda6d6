"""Precompute killed and stopped at any moment, and shared by several workers: the same bytes as undisturbed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import precompute_process
import pytest
from synthetic import run

from data_pipeline.loading.loader import read_dataset
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.writer import ShardWriter

pytestmark = pytest.mark.processes

SHARDS, SAMPLES = 6, 16
USABLE = SHARDS * SAMPLES - SHARDS // 2


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six shards of 16 pictures of 32x32, of which one in every other can't be decoded; captions repeat."""
    root, shards, generator = tmp_path_factory.mktemp("images"), [], np.random.default_rng(0)
    for number in range(SHARDS):
        writer = ShardWriter()
        for i in range(SAMPLES):
            picture = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            sample = {"png": picture} if i or number % 2 else {"txt": "no picture"}
            writer.add(f"{number:02d}{i:04d}", {"txt": f"thing {i * i % 7}", "json": {"n": i}} | sample)
        shards.append(writer.publish(root, f"shards/{number:06d}.tar"))
    Manifest("image-text", tuple(shards), {}, {"size": 32}).save(root)
    return str(root)


def contents(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def stamps(root: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of the tars whose note is written."""
    notes = root.glob("shards/*.done.json")
    return {n.name: (os.stat(str(n)[:-10]).st_ino, os.stat(str(n)[:-10]).st_mtime_ns) for n in notes}


@pytest.fixture(scope="module")
def undisturbed(images: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], float]:
    """The bytes of a run that nobody disturbs, and how long it takes."""
    root = tmp_path_factory.mktemp("undisturbed")
    process, began = precompute_process.started(images, root), time.monotonic()
    precompute_process.finished(process)
    made = contents(root)
    assert len([name for name in made if name.endswith(".tar")]) == SHARDS
    assert Manifest.load(root).samples == USABLE
    return made, time.monotonic() - began


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_killed_at_random_moments_and_started_again(
    images: str, undisturbed: tuple[dict[str, str], float], tmp_path: Path, kills: int
) -> None:
    """Nothing half-written under a final name; what was finished is not made again; the same bytes in the end."""
    whole, duration = undisturbed
    moments, hits = random.Random(0), 0
    for attempt in range(4 * kills):
        root = tmp_path / str(attempt)
        process = precompute_process.started(images, root)
        time.sleep(moments.uniform(0, duration))
        process.kill()
        process.join()
        left = contents(root)
        hits += "manifest.json" not in left
        temporary = {name for name in left if ".tmp." in name}
        assert {name: mark for name, mark in left.items() if name not in temporary}.items() <= whole.items()
        before = stamps(root)
        precompute_process.finished(precompute_process.started(images, root))
        assert contents(root) == whole
        assert before.items() <= stamps(root).items()
        if hits == kills:
            break
    assert hits == kills


def at_once(images: str, output: Path, count: int) -> list[BaseProcess]:
    """Workers that begin at the same time."""
    workers = [precompute_process.prepared(images, output, i, count) for i in range(count)]
    for _, go in workers:
        go.set()
    return [worker for worker, _ in workers]


def test_four_workers_make_what_one_makes(
    images: str, undisturbed: tuple[dict[str, str], float], tmp_path: Path
) -> None:
    workers = at_once(images, tmp_path / "four", 4)
    for worker in workers:
        precompute_process.finished(worker)
    assert contents(tmp_path / "four") == undisturbed[0]


def test_the_share_of_a_killed_worker_is_made_by_the_others(
    images: str, undisturbed: tuple[dict[str, str], float], tmp_path: Path
) -> None:
    workers = at_once(images, tmp_path / "three", 3)
    workers[1].kill()
    for worker in (workers[0], workers[2]):
        precompute_process.finished(worker)
    made = contents(tmp_path / "three")
    assert {name: mark for name, mark in made.items() if ".tmp." not in name} == undisturbed[0]


def test_asked_to_stop_it_leaves_with_75_and_goes_on_later(
    images: str, undisturbed: tuple[dict[str, str], float], tmp_path: Path
) -> None:
    for attempt in range(10):  # on a busy machine it may be done before it is asked
        root = tmp_path / str(attempt)
        process = precompute_process.started(images, root)
        while not list(root.glob("shards/*.done.json")):
            time.sleep(0.002)
        process.terminate()
        process.join(60)
        if process.exitcode:
            break
    assert process.exitcode == 75
    made = stamps(root)
    assert 0 < len(made) < SHARDS
    assert not [name for name in contents(root) if ".tmp." in name]
    precompute_process.finished(precompute_process.started(images, root))
    assert contents(root) == undisturbed[0]
    assert made.items() <= stamps(root).items()


def test_torchrun_and_buckets_by_the_command_line(images: str, tmp_path: Path) -> None:
    """Two ranks of torchrun share the shards; a run with other sizes into the same output is refused."""
    arguments = [f"input={images}", "autoencoder=identity", "conditions=[low_resolution]", "buckets=[32x32,48x16]"]
    run("data_pipeline/precompute_latents.py", *arguments, f"output={tmp_path}/one")
    done = run("data_pipeline/precompute_latents.py", *arguments, f"output={tmp_path}/two", ranks=2)
    assert " of 2)" in done.stderr  # of one of them: the other may have come too late for any
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert json.loads((tmp_path / "one/work/buckets.json").read_text()) == {"32x32": USABLE}
    first = read_dataset(f"{tmp_path}/one/32x32", 1)[0]
    assert first["meta"]["target_size"] == [32, 32]
    for other, sentence in (("size=16", "was begun with buckets"), ("buckets=[32x32]", "sizes was 32x32,48x16")):
        refused = run(
            "data_pipeline/precompute_latents.py", *arguments[:-1], other, f"output={tmp_path}/one", check=False
        )
        assert (refused.returncode, "Traceback" in refused.stderr) == (2, False), refused.stderr
        assert sentence in refused.stderr
