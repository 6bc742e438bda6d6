"""W&B for real: an endpoint that swallows everything, an offline run over a requeue, and the replay of metrics.jsonl.

The endpoint's part takes half a minute: as long as the run's end may.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from synthetic import NO_ENCODERS, ROOT, TINY_UNET, environment, metric_rows, run, started

pytestmark = pytest.mark.processes

SETTINGS = [
    *TINY_UNET, *NO_ENCODERS, "training.batch_size=16", "training.log_every=1", "training.save_every=10",
    "validate_every=10", "validation_samples=8", "training.wandb_project=test",
]  # fmt: skip


@pytest.fixture
def latents(tiny_latents: Path) -> Path:
    return tiny_latents


@pytest.fixture
def swallower() -> Iterator[str]:
    """A port of this machine that takes connections and what they say, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def take() -> None:
            try:
                while True:
                    held.append(server.accept()[0])
            except OSError:  # closed
                return

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        assert held, "nobody called"
        for connection in held:
            connection.close()


def told(folder: Path) -> list[dict[str, Any]]:
    """What the W&B runs of a folder hold, step by step, oldest run first; read by W&B's own tool."""
    rows = []
    tool = str(Path(sys.executable).with_name("wandb"))
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        said = subprocess.run([tool, "leet", "inspect", "--json", path], capture_output=True, text=True, check=True)
        records = [json.loads(line) for line in said.stdout.splitlines()]
        rows += [record["history"]["item"] for record in records if record["type"] == "history"]
    return rows


def test_an_endpoint_that_swallows_everything_holds_nothing_up(latents: Path, tmp_path: Path, swallower: str) -> None:
    """All of the training is over before W&B has so much as begun; then the end waits for it, but not for long."""
    account = {"WANDB_BASE_URL": swallower, "WANDB_API_KEY": "0123456789" * 4, "WANDB_MODE": "online"}
    output = tmp_path / "run"
    arguments = [f"input={latents}", f"output={output}", *SETTINGS, "training.steps=60", "training.save_every=null"]
    process, log = started(tmp_path / "log", "train/train_ldm.py", *arguments, **account), tmp_path / "log"
    last = output / "checkpoints/latest"
    while not last.exists() and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None, "it ended without waiting for W&B: was it asked at all?"
    trained = time.monotonic()
    assert process.wait(100) == 0, log.read_text()
    said = log.read_text()
    assert time.monotonic() - trained < 60, said  # ten seconds, half a minute, and Python's end
    assert "logged offline" in said
    assert [row["_step"] for row in told(output)] == list(range(1, 61))  # it really is
    assert [row["step"] for row in metric_rows(output) if "loss" in row] == list(range(1, 61))


ANSWERS = {404: "W&B can't be reached (", 401: "W&B refuses the key (", 0: "W&B refuses the key ("}
TELL = """
import pathlib, sys
from train.runs.wandb_reporter import WeightsAndBiases
reporter = WeightsAndBiases(pathlib.Path(sys.argv[1]), "0a1b2c3d", {}, "project", patience_s=60.0)
for step in range(1, 6):
    reporter.log(step, {"loss": 1.0})
reporter.close()
"""


@pytest.fixture
def answering(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server that answers everything with a status."""

    class Answer(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_error(request.param or 404)

        do_GET = do_POST = answer

        def log_message(self, *ignored: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("answering", ANSWERS, indirect=True, ids=str)
def test_refused_by_the_server_the_run_lies_there_offline(
    answering: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """0: a key that is none, which is not even asked about."""
    status = request.node.callspec.params["answering"]
    account = {"WANDB_BASE_URL": answering, "WANDB_API_KEY": "0123456789" * 4 if status else "0123"}
    done = subprocess.run(
        [sys.executable, "-c", TELL, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=100,
        env={**environment(), **account, "WANDB_MODE": "online", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ANSWERS[status] in done.stderr, done.stderr
    assert "logged offline" in done.stderr
    assert "logging to W&B has stopped" not in done.stderr
    assert [row["_step"] for row in told(tmp_path)] == [1, 2, 3, 4, 5]


def test_offline_it_holds_what_was_logged_over_a_requeue(latents: Path, tmp_path: Path) -> None:
    """Killed after step 20, and resumed from there: those in between are logged twice, and told once."""
    output = tmp_path / "run"
    offline = {"WANDB_MODE": "offline"}
    arguments = [f"input={latents}", f"output={output}", *SETTINGS, "training.steps=30"]
    process = started(tmp_path / "log", "train/train_ldm.py", *arguments, "training.save_every=20", **offline)
    while len(metric_rows(output)) < 25 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = max(row["step"] for row in metric_rows(output))
    assert before < 30, "it was not killed before its end"
    time.sleep(3)  # W&B's process sees that it is alone, and writes down the rest
    os.environ.update(offline)
    try:
        done = run("train/train_ldm.py", *arguments, "training.save_every=20")
        replayed = run("train/replay_metrics.py", f"input={output}", f"output={tmp_path / 'replay'}", fresh=True)
    finally:
        del os.environ["WANDB_MODE"]
    assert "resumed from step 20 of 30" in done.stdout
    logged = {row["step"]: row for row in metric_rows(output) if "loss" in row}
    steps = [row["_step"] for row in told(output)]
    assert steps == sorted(set(steps))  # none twice
    assert set(steps) == set(logged)  # what the kill kept from it, too
    for row in told(output):
        assert row["loss"] == pytest.approx(logged[row["_step"]]["loss"], rel=1e-12)

    assert "replay: 30 steps sent to W&B" in replayed.stdout
    again = told(tmp_path / "replay")
    assert [row["_step"] for row in again] == list(range(1, 31))
    assert [row["loss"] for row in again] == pytest.approx([logged[step]["loss"] for step in range(1, 31)], rel=1e-12)
    assert [row["_step"] for row in again if "heldout_loss" in row] == [10, 20, 30]
