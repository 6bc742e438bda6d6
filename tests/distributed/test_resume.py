"""Killed and started again: the same losses, bit for bit.

What a checkpoint may suffer, and what may not differ on resume, is under tests/unit/train: here, that a run heeds it.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from forked import Forked
from synthetic import (
    NO_ENCODERS,
    ROOT,
    TINY_UNET,
    command,
    environment,
    losses,
    metric_rows,
    run,
    started,
)

from train.checkpointing.files import complete_checkpoints, step_of

pytestmark = pytest.mark.processes

STEPS = 60
SETTINGS = [
    *TINY_UNET, *NO_ENCODERS, f"training.steps={STEPS}", "training.save_every=30", "training.batch_size=16",
    "training.log_every=1", "engine=zero2", "validate_every=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    run("train/train_ldm.py", f"input={latents}", f"output={output}", *SETTINGS, ranks=2)
    return output


def kill_with_children(process: Forked | subprocess.Popen) -> None:
    """SIGKILL to torchrun and to its ranks, which have sessions of their own."""
    everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in everyone:
        one.kill()
    psutil.wait_procs(everyone, timeout=30)
    process.wait()


def killed(process: Forked | subprocess.Popen, output: Path, moments: random.Random, most: float, start: float) -> str:
    """SIGKILL to a rank: a quarter of the kills as they start, which takes about `start` seconds, the others up to
    `most` steps on. Says where it was."""
    starting, seconds, more = moments.random() < 0.25, moments.uniform(0, start), moments.uniform(0, most)
    target = max(map(step_of, complete_checkpoints(output / "checkpoints")), default=0) + more
    began, old = time.monotonic(), identity_of(output)
    while process.poll() is None and time.monotonic() - began < 120:
        resumed = identity_of(output) != old
        if time.monotonic() - began > seconds if starting else resumed and max(losses(output), default=0) > target:
            break
        time.sleep(0.002)
    time.sleep(moments.uniform(0, 0.05))
    moments.choice(ranks_of(process)).kill()
    saving = ", ".join(path.name for path in (output / "checkpoints").glob("*.tmp"))
    return f"killed at {f'step {max(losses(output), default=0)}' if resumed else 'its start'}, saving {saving or None}"


def identity_of(output: Path) -> int | None:
    """Of metrics.jsonl: once a run is resumed it is another file, cut at the checkpoint."""
    rows = output / "metrics.jsonl"
    return rows.stat().st_ino if rows.exists() else None


def ranks_of(process: Forked | subprocess.Popen) -> list[psutil.Process]:
    """Waits until there are two."""
    while process.poll() is None:
        ranks = psutil.Process(process.pid).children()
        if len(ranks) == 2:
            return ranks
        time.sleep(0.002)
    raise AssertionError("it ended by itself")


@pytest.mark.timeout(2000)
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_random_ranks_killed_at_random_moments(latents: Path, undisturbed: Path, tmp_path: Path, kills: int) -> None:
    """Each time one rank of two, wherever it is: loading, training, saving; and at last all. Twenty under torchrun."""
    settings, output = [*SETTINGS, "training.save_every=4", f"input={latents}"], tmp_path / "run"
    steps = STEPS
    if real := kills >= 20:
        steps, undisturbed = 200, tmp_path / "straight"
        settings.append(f"training.steps={steps}")
        run("train/train_ldm.py", *settings, f"output={undisturbed}", ranks=2)
    moments = random.Random(58)  # of its first three kills the second is at a start
    for number in range(kills):
        arguments = ["train/train_ldm.py", *settings, f"output={output}"]
        if real:
            process = subprocess.Popen(
                command(*arguments, ranks=2), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
        else:
            process = started(tmp_path / "log", *arguments, ranks=2)
        try:
            where = killed(process, output, moments, steps / kills, start=8 if real else 2)
            print(f"{number + 1}: {where}", flush=True)
            if number + 1 < kills:
                assert process.wait(90) != 0  # torchrun takes the other down
        finally:
            kill_with_children(process) if process.poll() is None else None
    assert 0 < max(losses(output)) < steps, "the kills were not spread over the run"
    before = complete_checkpoints(output / "checkpoints")[-1]
    done = run("train/train_ldm.py", *settings, f"output={output}", "training.resume=must", ranks=2)
    assert f"resumed from step {step_of(before)} of {steps}" in done.stdout
    assert [row["step"] for row in metric_rows(output) if "loss" in row] == list(range(1, steps + 1))
    assert losses(output) == losses(undisturbed)
    last = f"checkpoints/step-{steps:08d}"
    for name in ("ema.safetensors", "part-00000.safetensors", "part-00001.safetensors"):
        assert (output / last / name).read_bytes() == (undisturbed / last / name).read_bytes()


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_begun_where_there_is_bf16_a_run_goes_on_in_it_elsewhere_bit_for_bit(
    latents: Path, tmp_path: Path, stage: int
) -> None:
    """engine.dtype=auto. Of both kinds of CPU one is a stand-in, by an environment variable."""
    settings = [*SETTINGS, f"input={latents}", f"engine=zero{stage}", "training.save_every=6", "training.steps=12"]
    straight, has, lacks = tmp_path / "straight", {"LDT_CPU_BF16": "1"}, {"LDT_CPU_BF16": "0"}
    done = run("train/train_ldm.py", *settings, f"output={straight}", variables=has)
    assert done.stdout.count("dtype: bf16 (auto: LDT_CPU_BF16=1") == 1
    stopped = shutil.copytree(straight, tmp_path / "stopped")
    shutil.rmtree(stopped / "checkpoints/step-00000012")
    done = run("train/train_ldm.py", *settings, f"output={stopped}", variables=lacks)
    assert "resumed from step 6 of 12" in done.stdout
    assert done.stdout.count("dtype: ") == 1
    assert f"dtype: bf16 (auto: as in {stopped}/checkpoints/step-00000006; a new run would use fp32" in done.stdout
    assert f"ZeRO stage {stage}, bf16, 1 rank" in done.stdout
    for folder, why in ((straight, "LDT_CPU_BF16=1"), (stopped, "step-00000006; a new run")):
        engine = yaml.safe_load((folder / "config.yaml").read_text())["engine"]
        assert engine["dtype"] == "bf16"
        assert why in engine["dtype_because"]
    assert losses(stopped) == losses(straight)
    part = "checkpoints/step-00000012/part-00000.safetensors"
    assert (stopped / part).read_bytes() == (straight / part).read_bytes()


def flip_a_byte(folder: Path) -> None:
    with (folder / "part-00000.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-4, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def swap_two_parts(folder: Path) -> None:
    parts = [folder / f"part-0000{rank}.safetensors" for rank in (0, 1)]
    parts[0].rename(folder / "other")
    parts[1].rename(parts[0])
    (folder / "other").rename(parts[1])


@pytest.mark.parametrize("damage", [flip_a_byte, swap_two_parts])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    latents: Path, undisturbed: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    output = shutil.copytree(undisturbed, tmp_path / "run")
    damage(output / "checkpoints/step-00000060")
    done = run("train/train_ldm.py", f"input={latents}", f"output={output}", *SETTINGS, "training.steps=32")
    assert "resumed from step 30 of 32" in done.stdout
    assert "step-00000060 is damaged (part-0000" in done.stderr
    assert sorted(losses(output)) == list(range(1, 33))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory with room for one checkpoint, and for half of another."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount one")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_disk_that_is_full_ends_it_with_a_sentence_and_room_mends_it(
    latents: Path, undisturbed: Path, small_disk: Path
) -> None:
    output = small_disk / "run"
    arguments = [f"input={latents}", f"output={output}", *SETTINGS]
    done = run("train/train_ldm.py", *arguments, ranks=2, check=False)
    assert re.search(
        r"error: .*No space left on device.*: make (room|some), and start again to (go on|continue)", done.stderr
    )
    assert re.search(r"exitcode +: 2 ", done.stderr)
    assert complete_checkpoints(output / "checkpoints") == ["step-00000030"]
    subprocess.run(["mount", "-o", "remount,size=99m", small_disk], check=True)
    again = run("train/train_ldm.py", *arguments, ranks=2)
    assert "resumed from step 30 of 60" in again.stdout
    assert losses(output) == losses(undisturbed)


def test_resume_refuses_what_differs_and_says_what(latents: Path, undisturbed: Path) -> None:
    arguments = [f"input={latents}", *SETTINGS]
    kept = (undisturbed / "config.yaml").read_bytes()
    others = {
        "seed=1": "seed was 0 and is now 1",
        "engine.dtype=bf16": "dtype was fp32 and is now bf16",
        "unet.norm_groups=2": "unet.norm_groups was 4 and is now 2",
    }
    done = run("train/train_ldm.py", *arguments, f"output={undisturbed}", *others, check=False)
    assert done.returncode == 2, done.stderr
    assert [sentence for sentence in others.values() if sentence not in done.stderr] == []
    assert "Traceback" not in done.stderr
    assert (undisturbed / "config.yaml").read_bytes() == kept


def test_sigterm_saves_and_asks_to_be_started_again(latents: Path, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = [f"input={latents}", f"output={output}", *SETTINGS]
    process = started(tmp_path / "log", "train/train_ldm.py", *arguments)
    deadline = time.monotonic() + 120
    while len(losses(output)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    step = json.loads(next(output.glob("checkpoints/*/state.json")).read_text())["state"]["step"]
    assert 3 <= step < 60
    done = run("train/train_ldm.py", *arguments)
    assert f"resumed from step {step} of 60" in done.stdout
    assert sorted(losses(output)) == list(range(1, 61))


def test_lost_checkpoints_are_not_begun_anew_in_silence(latents: Path, undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    line = [f"input={latents}", f"output={tmp_path / 'run'}", *SETTINGS, "training.save_every=10"]
    done = run("train/train_ldm.py", *line, check=False)
    assert done.returncode == 2
    assert "has logged 60 steps but has no checkpoint: restore its checkpoints" in done.stderr
    assert len(losses(tmp_path / "run")) == 60
