"""A folder of pictures, and a table (CSV, TSV or Parquet) with their file names, captions and any other columns."""

from __future__ import annotations

import csv
import functools
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import DataError, UserError
from data_pipeline.images.decode import Decoding, PictureError
from data_pipeline.sources.filters import as_number
from data_pipeline.sources.folder import PictureFile, load, sides, why_unusable
from data_pipeline.sources.source import SourceItem
from data_pipeline.sources.tars import readable

DELIMITERS = {".csv": ",", ".tsv": "\t"}


class Table:
    """One item per row of `table` (a name below `path`; None: the only table there), by row number.

    Columns `file` and `caption`; numbers in all other columns go to the sample's json. Several rows may name one file.
    Rows whose file is missing, or lies outside the folder, are set aside.
    """

    def __init__(
        self,
        path: str,
        table: str | None = None,
        file: str = "file",
        caption: str = "caption",
        limit: int | None = None,
        background: Any = "white",
        animated: str = "first",
    ) -> None:
        self.how = Decoding.of(background, animated)
        self.path, self.table, self.file, self.caption, self.limit = Path(path), table, file, caption, limit

    def items(self) -> Iterator[SourceItem]:
        table = self._table()
        rows = parquet_rows(table) if table.suffix.lower() == ".parquet" else text_rows(table)
        number = -1
        for number, row in enumerate(itertools.islice(rows, self.limit)):
            if number == 0:
                self._refuse_without_columns(table, row)
            yield self._item(number, row)
        if number < 0:
            raise UserError(f"{table} has no rows: check source.table.")

    def _table(self) -> Path:
        if not self.path.is_dir():
            raise UserError(f"input={self.path} is not a folder: give one that holds pictures and a table of them.")
        if self.table is not None:
            if not (self.path / self.table).is_file():
                raise UserError(f"source.table={self.table} is not in {self.path}: give a file's name there.")
            return self.path / self.table
        found = sorted(p for p in self.path.iterdir() if p.suffix.lower() in (*DELIMITERS, ".parquet"))
        if len(found) != 1:
            names = ", ".join(p.name for p in found[:3]) or "none"
            raise UserError(f"input={self.path} should hold one .csv, .tsv or .parquet ({names}): set source.table=.")
        return found[0]

    def _refuse_without_columns(self, table: Path, row: Mapping[str, Any]) -> None:
        for option, name in (("file", self.file), ("caption", self.caption)):
            if name not in row:
                columns = ", ".join(str(column) for column in row)
                raise UserError(f"{table} has no column {name}: set source.{option}= to one of {columns}.")

    def _item(self, number: int, row: Mapping[str, Any]) -> SourceItem:
        name = str(row[self.file] or "")
        others = {column: as_number(value) for column, value in row.items() if column not in (self.file, self.caption)}
        meta = {"file": name} | {column: value for column, value in others.items() if value is not None}
        path = self.path / name
        inside = name and not Path(name).is_absolute() and ".." not in Path(name).parts
        unusable = why_unusable(path, self.path, True) if inside else "no name of a picture in the folder"
        facts = None if unusable else path.stat()
        look, stamp = (load, (facts.st_size, facts.st_mtime_ns)) if facts else (absent, (0, 0))
        tried = f"{self.file}={name[:200]}, tried as {str(path)[:200]}"
        return PictureFile(
            f"{number:09d}",
            functools.partial(look, path, how=self.how),
            caption_in(row[self.caption]),
            meta,
            functools.partial(sides if facts else absent, path),
            unusable=unusable,
            where=tried if unusable else str(path),
            stamp=stamp,
        )


def absent(path: Path, size: int = 0, how: Decoding | None = None) -> Any:
    """Stands in for a picture that the table names and the folder does not have."""
    raise PictureError("missing picture")


def caption_in(value: Any) -> str | None:
    """A cell's text; None if there is none."""
    try:
        return readable(value) or None if isinstance(value, str) else None
    except DataError:
        return None


def text_rows(table: Path) -> Iterator[dict[str, Any]]:
    """Rows of a CSV or TSV in UTF-8 with a header, one at a time."""
    csv.field_size_limit(2**24)
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file, delimiter=DELIMITERS.get(table.suffix.lower(), ",")):
                row.pop(None, None)  # cells beyond the header's columns
                yield row
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table} can't be read ({error}): save it as UTF-8 text with a header.") from error


def parquet_rows(table: Path) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file, a few thousand at a time."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("a Parquet table needs pyarrow: run pip install -e '.[parquet]'.") from error
    try:
        with parquet.ParquetFile(table) as file:
            for batch in file.iter_batches(4096):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{table} can't be read ({type(error).__name__}): write it again.") from error
