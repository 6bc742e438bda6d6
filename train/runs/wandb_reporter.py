"""Metrics to Weights & Biases; training is unaffected if it is down."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from train.runs.metrics import log, rows_by_step

_KEY_REFUSED = re.compile(r"API key|\b40[13]\b|unauthorized|forbidden|permission|logged in", re.IGNORECASE)


class WeightsAndBiases:
    """W&B in the run folder; offline if no account is set up or W&B can't be reached (`wandb sync <folder>` uploads it
    later). Training never waits for it: a thread sends values from a queue; if the queue is full, values are dropped
    and counted.

    rows: those in metrics.jsonl before this start; W&B gets those that it lacks, e.g. after a kill. No step is sent
    twice. patience_s: how long `close` waits; None: without limit.
    """

    def __init__(
        self,
        folder: Path,
        run_id: str,
        config: dict[str, Any],
        project: str,
        rows: Sequence[dict[str, Any]] = (),
        name: str | None = None,
        queue_size: int = 1000,
        patience_s: float | None = 10.0,
    ) -> None:
        about = {"project": project, "dir": str(folder), "id": run_id, "name": name or folder.name, "config": config}
        self.folder, self.run_id, self.last, self.patience_s, self.dropped = folder, run_id, 0, patience_s, 0
        self.error: Exception | None = None
        self.about = about
        self.queue: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue(queue_size)
        self.thread = threading.Thread(target=self._feed, args=(rows,), daemon=True, name="wandb")
        self.thread.start()

    def log(self, step: int, values: dict[str, Any]) -> None:
        if step < self.last:
            return
        self.last = step
        try:
            self.queue.put_nowait((step, values))
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                log.warning(
                    "W&B can't keep up, and values are dropped: train/replay_metrics.py can send them later from "
                    "metrics.jsonl"
                )

    def image(self, step: int, name: str, path: Path) -> None:
        self.log(step, {name: path})

    def rewind(self, step: int) -> None:
        """Does nothing: W&B can't go back. It gets values again once the run has reached its last step again."""

    def close(self) -> None:
        """Wait until everything is sent, at most patience_s; then at most three times that to save the rest offline."""
        if not self._ended(self.patience_s):
            if self.about.get("mode") != "offline":
                _kill_service()  # makes a thread that waits for the server fail, and continue offline
            if not self._ended(3 * self.patience_s):
                self.dropped += sum(entry is not None for entry in tuple(self.queue.queue))
                _kill_service()
            _teardown()  # now, as otherwise Python's exit does it, and prints its errors
        if self.dropped or self.thread.is_alive():
            log.warning(
                "W&B lacks part of the run (%d entries were dropped%s): train/replay_metrics.py can send all of "
                "metrics.jsonl", self.dropped, ", and it did not finish in time" * self.thread.is_alive(),
            )  # fmt: skip

    def _ended(self, patience_s: float | None) -> bool:
        """Whether the thread has sent everything and ended within patience_s seconds; None: without limit."""
        deadline = None if patience_s is None else time.monotonic() + patience_s
        try:
            self.queue.put(None, timeout=patience_s)
        except queue.Full:
            return False
        self.thread.join(None if deadline is None else max(deadline - time.monotonic(), 0.0))
        return not self.thread.is_alive()

    def _feed(self, rows: Sequence[dict[str, Any]]) -> None:
        """Runs in the thread: starts W&B, sends all values, finishes. Errors are logged and do not stop training."""
        try:
            run = _begin_run(self.about, self.patience_s)
            has = _last_step_told(run, self.folder, self.run_id)
            before = ((row["step"], row) for row in rows_by_step(rows, self.folder / "samples"))
            for step, values in itertools.chain(before, iter(self.queue.get, None)):
                if step > has:
                    told = {name: _for_wandb(value) for name, value in values.items() if name != "step"}
                    run.log(told, step=step)
            run.finish()
        except Exception as error:
            self.error = error
            log.warning(
                "logging to W&B has stopped (%s: %s): train/replay_metrics.py can send the rest later",
                type(error).__name__,
                error,
            )


def _kill_service() -> None:
    """Kill W&B's own process, for which Python would otherwise wait a minute and a half at exit."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "wandb-core" in child.name():
                child.kill()


def _teardown() -> None:
    """Forget the service; the next run starts a new one."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()


def _begin_run(about: dict[str, Any], patience_s: float | None) -> Any:
    """Start a run: online, or offline if there is no account or no server; sets about["mode"] accordingly."""
    import wandb

    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its error reports would delay Python's exit by 20 s
    about["mode"] = os.environ.get("WANDB_MODE")
    try:
        about["mode"] = about["mode"] or ("online" if wandb.login(prompt=False) else "offline")
        return _init(about, patience_s)
    except Exception as error:
        if about["mode"] == "offline":
            raise
        about["mode"] = "offline"
        log.warning("%s: the run is logged offline; `wandb sync` uploads it later", _why_not_online(error))
        _kill_service()  # it holds the run's id, and would keep requesting it
        _teardown()
        return _init(about, patience_s)


def _why_not_online(error: Exception) -> str:
    """The reason for a message: a wrong key, or W&B's own error, which may be empty."""
    import wandb

    said = str(error) or "no answer until the end of the run: check WANDB_API_KEY and WANDB_BASE_URL"
    if _KEY_REFUSED.search(said):
        return f"W&B refuses the key ({said}): set the right one with WANDB_API_KEY or `wandb login`"
    unknown = " with this key" if isinstance(error, wandb.errors.AuthenticationError) else ""
    return f"W&B can't be reached{unknown} ({said})"


def _init(about: dict[str, Any], patience_s: float | None) -> Any:
    import wandb

    settings = wandb.Settings(
        console="off", silent=True, x_disable_stats=about["mode"] == "offline", finish_timeout=patience_s or 0.0
    )
    return wandb.init(**about, resume="allow" if about["mode"] == "online" else None, settings=settings)


def _last_step_told(run: Any, folder: Path, run_id: str) -> int:
    """The last step of this run that W&B has from earlier starts, by its server or its offline files; 0: none."""
    last = run.step - 1 if run.resumed else 0
    keep_logs_there = {**os.environ, "WANDB_DIR": str(folder)}  # the command writes a log, by default to TMPDIR
    for path in folder.glob(f"wandb/offline-run-*-{run_id}/run-*.wandb"):
        if path.parent == Path(run.dir).parent:  # the run that has just begun
            continue
        line = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            said = subprocess.run(
                line, env=keep_logs_there, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=60
            ).stdout
            last = max([last, *map(int, re.findall(r'"_step":(\d+)', said))])
    return last


def _for_wandb(value: Any) -> Any:
    if not isinstance(value, Path):
        return value
    import wandb

    return wandb.Image(str(value))
