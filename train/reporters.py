"""Where metrics go: metrics.jsonl, which is the truth, and W&B beside it. Rank 0 only; the others report to no one."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.storage import write_atomically

log = logging.getLogger(__name__)


class Reporter(Protocol):
    """Values and pictures by step."""

    def log(self, step: int, values: dict[str, float]) -> None: ...
    def image(self, step: int, name: str, path: Path) -> None: ...
    def rewind(self, step: int) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line, flushed at once. Rows past the step resumed from are cut: they come again."""

    def __init__(self, path: Path, from_step: int = 0) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= from_step] if path.exists() else []
        write_atomically(path, "".join(map(_line, kept)).encode())
        self.path, self.file = path, path.open("a")

    def _write(self, row: dict[str, Any]) -> None:
        self.file.write(_line(row))
        self.file.flush()

    def rewind(self, step: int) -> None:
        """Drop what comes after `step`: the run has gone back to it."""
        self.file.close()
        self.__init__(self.path, step)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._write({"step": step, **values})

    def image(self, step: int, name: str, path: Path) -> None:
        self._write({"step": step, name: path.name})

    def close(self) -> None:
        self.file.close()


class WeightsAndBiases:
    """W&B in the run folder; offline where no account is set up, or it can't be reached (`wandb sync <folder>` uploads
    it later)."""

    def __init__(self, folder: Path, run_id: str, config: dict[str, Any], project: str) -> None:
        import wandb

        self.wandb = wandb
        about = {"project": project, "dir": str(folder), "id": run_id, "name": folder.name, "config": config}
        try:
            mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
            self.run = self._begin(mode, about)
        except wandb.errors.Error as error:
            log.warning("W&B can't be reached (%s): the run is kept offline; `wandb sync` uploads it later", error)
            self.run = self._begin("offline", about)

    def _begin(self, mode: str, about: dict[str, Any]) -> Any:
        return self.wandb.init(
            **about,
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=self.wandb.Settings(console="off", silent=True, x_disable_stats=mode == "offline"),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def rewind(self, step: int) -> None:
        """W&B knows no way back: it goes on when the run has come to its last step again."""

    def image(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


class Reporters:
    """Several as one; with none, a reporter that says nothing."""

    def __init__(self, *reporters: Reporter) -> None:
        self.reporters = reporters

    def log(self, step: int, values: dict[str, float]) -> None:
        for reporter in self.reporters:
            reporter.log(step, values)

    def rewind(self, step: int) -> None:
        for reporter in self.reporters:
            reporter.rewind(step)

    def image(self, step: int, name: str, path: Path) -> None:
        for reporter in self.reporters:
            reporter.image(step, name, path)

    def close(self) -> None:
        for reporter in self.reporters:
            reporter.close()


def _line(row: dict[str, Any]) -> str:
    """JSON knows no NaN: null."""
    known = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
    return json.dumps(known, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, None for what was not finite; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
