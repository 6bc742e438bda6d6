"""A run's folder: its configuration, its identity, and whether it may be written to."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import yaml

from data_pipeline.common import storage
from data_pipeline.common.errors import UserError
from data_pipeline.common.saved_names import named
from data_pipeline.common.storage import is_s3, write_atomically
from train.checkpointing.files import CheckpointPaths
from train.checkpointing.stores import refuse_other_owner
from train.distributed.collectives import broadcast_object
from train.distributed.preemption import Preempted
from train.distributed.ranks import Ranks
from train.runs.metrics import JsonLines, Reporters, read_metrics
from train.runs.wandb_reporter import WeightsAndBiases

log = logging.getLogger(__name__)
LOCK_PATIENCE_S = 90.0  # how long a job restarted by Slurm waits for the lock
_SECRET_NAME = re.compile(r"secret|passw(or)?d|credential|(^|_)token$|(api|access|private|auth)_?key")
_URL_WITH_SECRET = re.compile(r"://[^/@\s]*:[^/@\s]+@")


class InUse(UserError):
    """Another process has locked the run."""


class RunFolder:
    """<run>/config.yaml metrics.jsonl samples/ checkpoints/. Made by rank 0; one id for all ranks and resumptions."""

    def __init__(self, path: str | Path, what: str, config: dict[str, Any], ranks: Ranks) -> None:
        if is_s3(path):
            raise UserError(f"output={path}: a run's folder must be on a file system; choose a local path.")
        if secrets_in_it := secret_names(config):
            raise UserError(
                f"{', '.join(secrets_in_it)} contains a secret, but a run's configuration is saved and may be shared: "
                "set it in the environment (WANDB_API_KEY, AWS_SECRET_ACCESS_KEY) instead."
            )
        # Saved with short names, not Python paths: otherwise the code could not be moved (saved_names.py).
        self.path, self.what, self.config, self.ranks = Path(path), what, named(config), ranks
        if elsewhere := self._training.get("checkpoints"):  # absolute, as sampling finds them from any folder
            self._training["checkpoints"] = storage.absolute(elsewhere)
        self.paths = CheckpointPaths.of(self.path, self._training.get("checkpoints"))
        self.lock: TextIO | None = None  # on rank 0, held until its process ends
        self.run_id = str(broadcast_object(self._claimed() if ranks.is_main else None))
        if not self.run_id:
            raise Preempted  # on every rank, so that Slurm starts all of them again
        self.samples, self.checkpoints = self.path / "samples", self.path / "checkpoints"

    @property
    def _training(self) -> dict[str, Any]:
        return self.config.get("training", {})

    def _claimed(self) -> str:
        """The run's id; "" if Slurm has restarted the job and the run's last process still seems to hold the lock.

        A network file system keeps the lock of a dead node until it notices, which takes a minute or more.
        """
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                return self._claim()
            except InUse as error:
                if int(os.environ.get("SLURM_RESTART_COUNT", "0")) == 0:
                    raise
                if time.monotonic() > deadline:
                    log.error("%s The lock may be from a node that died: Slurm is asked to try again later.", error)
                    return ""
                time.sleep(1.0)

    def _claim(self) -> str:
        marker = self.path / "run_id"
        if marker.exists():
            what, _, run_id = marker.read_text().strip().partition(" ")
            if what != self.what:
                raise UserError(f"output={self.path} is a run of {what}: choose another folder for {self.what}.")
            self._lock()
            self._refuse_anothers_checkpoints(run_id)
            return run_id
        if self.path.exists() and any(not _left_by_a_kill(path) for path in self.path.iterdir()):
            raise UserError(f"output={self.path} contains something other than a run: choose a new or empty folder.")
        self._refuse_anothers_checkpoints(None)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        run_id = secrets.token_hex(4)
        write_atomically(marker, f"{self.what} {run_id}\n".encode())
        (self.path / "samples").mkdir(exist_ok=True)
        return run_id

    def _refuse_anothers_checkpoints(self, run_id: str | None) -> None:
        if self._training.get("checkpoints"):
            refuse_other_owner(self.paths.checkpoints, run_id, self._training.get("allow_mismatch", ()))

    def _lock(self) -> None:
        """Lock the folder until this process ends in any way: two writers would damage each other's checkpoints."""
        self.lock = (self.path / "lock").open("a+")  # not "w": that would erase the holder's name
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                self.lock.seek(0)
                holder = self.lock.read().strip() or "another process"
                raise InUse(f"output={self.path} is in use by {holder}: stop it first.") from error
            log.warning("%s can't be locked (%s): make sure that no other process writes to it", self.path, error)
        else:
            self.lock.truncate(0)
            self.lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self.lock.flush()

    def last_step_logged(self) -> int:
        """The last step in metrics.jsonl, over all starts of the run; 0: none."""
        metrics = self.path / "metrics.jsonl"
        return max((row["step"] for row in read_metrics(metrics)), default=0) if metrics.exists() else 0

    def reporters(self, from_step: int, wandb_project: str | None) -> Reporters:
        """metrics.jsonl, continued after `from_step`, and W&B if a project is given; none on ranks other than 0."""
        if not self.ranks.is_main:
            return Reporters()
        write_atomically(self.path / "config.yaml", yaml.safe_dump(self.config, sort_keys=False).encode())
        metrics = self.path / "metrics.jsonl"
        lines = JsonLines(metrics, from_step)
        if not wandb_project:
            return Reporters(lines)
        wandb = WeightsAndBiases(self.path, self.run_id, self.config, wandb_project, read_metrics(metrics))
        return Reporters(lines, wandb)


def _left_by_a_kill(path: Path) -> bool:
    """Whether this file may be left by a kill while the folder was made."""
    return path.name == "lock" or path.name.startswith("run_id.tmp.")


def secret_names(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of options that look like secrets: by their name, or as a URL that contains a password."""
    found = []
    for name, value in config.items():
        if isinstance(value, Mapping):
            found += secret_names(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            found += secret_names({f"{name}[{i}]": item for i, item in enumerate(value)}, prefix)
        elif isinstance(value, str) and value and (_SECRET_NAME.search(name.lower()) or _URL_WITH_SECRET.search(value)):
            found.append(prefix + name)
    return found
