"""Reporters of metrics: metrics.jsonl, the authoritative copy, and W&B. On rank 0; other ranks report nothing."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol, TextIO

from data_pipeline.common.errors import DataError
from data_pipeline.common.storage import write_atomically

log = logging.getLogger(__name__)


class Reporter(Protocol):
    """Takes values and pictures by step."""

    def log(self, step: int, values: dict[str, float]) -> None: ...
    def image(self, step: int, name: str, path: Path) -> None: ...
    def rewind(self, step: int) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """One JSON object per line, flushed at once. Rows past the step resumed from are cut: they will be logged again."""

    def __init__(self, path: Path, from_step: int = 0) -> None:
        self.path, self.file = path, _cut_after(from_step, path)

    def _write(self, row: dict[str, Any]) -> None:
        self.file.write(_line(row))
        self.file.flush()

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`: the run has gone back to it."""
        self.file.close()
        self.file = _cut_after(step, self.path)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._write({"step": step, **values})

    def image(self, step: int, name: str, path: Path) -> None:
        self._write({"step": step, name: path.name})

    def close(self) -> None:
        self.file.close()


def _cut_after(from_step: int, path: Path) -> TextIO:
    """The file at `path` without the rows past that step, open for appending."""
    kept = [row for row in read_metrics(path) if row["step"] <= from_step] if path.exists() else []
    write_atomically(path, "".join(map(_line, kept)).encode())
    return path.open("a")


def rows_by_step(rows: Sequence[dict[str, Any]], samples: Path) -> Iterator[dict[str, Any]]:
    """One row per step with all its values; grids by path, if the files still exist."""
    for step, of_step in itertools.groupby(rows, itemgetter("step")):
        row = {"step": step}
        for name, value in itertools.chain.from_iterable(part.items() for part in of_step):
            if value is not None:
                grid = isinstance(value, str) and (samples / value).is_file()
                row[name] = samples / value if grid else value
        yield row


class Reporters:
    """Several reporters as one; without any, it does nothing."""

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
    """A row as JSON; null for NaN and infinity, which JSON does not have."""
    known = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
    return json.dumps(known, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, with None for non-finite values, without a last line that a kill cut short."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise DataError(f'{path}, line {number} is not a row of metrics ({{"step": ...}}): fix or remove it.')
        rows.append(row)
    return rows
