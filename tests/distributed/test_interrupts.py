"""Ctrl-C: the first one leaves with 75 and a sentence, the second one at once with 130; never with a traceback."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from forked import Forked
from synthetic import NO_ENCODERS, TINY_UNET, run, started

from data_pipeline.common.stop_request import SAME_S

pytestmark = pytest.mark.processes

# The main thread is held in C, as by a collective whose other ranks are gone.
HELD = """
import sys, threading
from data_pipeline.common.stop_request import InterruptWatch, StopRequest
InterruptWatch.begin("program")
stop = StopRequest().hear_interrupts() if sys.argv[1] == "asks" else None
print("ready", flush=True)
lock = threading.Lock()
lock.acquire()
while not (stop and stop.requested):
    lock.acquire(timeout=60 if sys.argv[2] == "stuck" else 0.05)
print("saved", flush=True)
"""
AGAIN = "start the same command again to continue"


def when(log: Path, words: str, process: Forked) -> Forked:
    """The process, once it has said these words."""
    deadline = time.monotonic() + 60
    while words not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert words in log.read_text(), log.read_text()
    return process


@pytest.mark.parametrize(
    ("kind", "presses", "code", "said"),
    [
        (("never", "stuck"), 1, 75, f"ready\nprogram: stopped by Ctrl-C; {AGAIN}\n"),
        (("asks", "polls"), 1, 0, "ready\nsaved\n"),
        (("asks", "stuck"), 2, 130, f"ready\nprogram: ended by a second Ctrl-C; {AGAIN} from what was saved\n"),
    ],
)
def test_what_one_and_two_do(tmp_path: Path, kind: tuple[str, str], presses: int, code: int, said: str) -> None:
    script, log = tmp_path / "program.py", tmp_path / "log"
    script.write_text(HELD)
    process = when(log, "ready\n", started(log, str(script), *kind))
    for _ in range(presses):
        process.send_signal(signal.SIGINT)
        time.sleep(2 * SAME_S)
    assert process.wait(30) == code
    assert log.read_text() == said


def test_a_signal_that_a_launcher_passes_on_is_not_a_second_one(tmp_path: Path) -> None:
    script, log = tmp_path / "program.py", tmp_path / "log"
    script.write_text(HELD)
    process = when(log, "ready\n", started(log, str(script), "asks", "polls"))
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(30) == 0
    assert log.read_text() == "ready\nsaved\n"


def test_an_entry_that_has_nothing_to_save(tmp_path: Path) -> None:
    """It waits for its prompts, so that it is certainly in its main function."""
    os.mkfifo(tmp_path / "prompts")
    (tmp_path / "run").mkdir()
    asked = [f"input={tmp_path}/run", f"prompts_file={tmp_path}/prompts"]
    process = started(tmp_path / "log", "train/sample_images.py", *asked)
    with (tmp_path / "prompts").open("w"):  # opens once the other side does
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 75
    assert (tmp_path / "log").read_text() == f"sample_images: stopped by Ctrl-C; {AGAIN}\n"


def test_the_launcher_passes_on_the_ranks_code_and_their_one_sentence(tiny_latents: Path, tmp_path: Path) -> None:
    asked = [f"input={tiny_latents}", f"output={tmp_path}/run", *TINY_UNET, *NO_ENCODERS, "training.batch_size=12"]
    done = run("train/train_ldm.py", *asked, ranks=2, check=False, variables={"LAUNCHER": "ours"})
    assert done.returncode == 2
    assert done.stderr.count("data.streams=8") == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_second_one_ends_the_launcher_and_its_ranks(tiny_latents: Path, tmp_path: Path) -> None:
    """Each step waits: nobody saves in time."""
    asked = [f"input={tiny_latents}", f"output={tmp_path}/run", *TINY_UNET, *NO_ENCODERS]
    asked += ["training.steps=1000000", "training.batch_size=8", "validate_every=null", "training.log_every=1"]
    log = tmp_path / "log"
    process = when(log, "2 rank(s)", started(log, "train/train_ldm.py", *asked, ranks=2, LAUNCHER="ours"))
    ranks = psutil.Process(process.pid).children(recursive=True)
    for rank in ranks:
        rank.suspend()
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert not psutil.wait_procs(ranks, timeout=30)[1]
    assert "Traceback" not in log.read_text()


def test_a_stop_of_quickstart_stops_its_stage(tmp_path: Path) -> None:
    script, log = tmp_path / "program.py", tmp_path / "log"
    stage = "import time; print('begun', flush=True); time.sleep(60)"
    script.write_text(
        f"import sys; from train.quickstart import finished_code; finished_code([sys.executable, '-c', {stage!r}])"
    )
    process = when(log, "begun\n", started(log, str(script)))
    process.terminate()
    assert process.wait(30) == 75
    assert log.read_text() == f"begun\nquickstart: stopped by a signal; {AGAIN}\n"
