"""Rows of users' tables: CSV and TSV with any encoding and delimiter, JSON lines, Parquet."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.common.errors import DataError, UserError
from data_pipeline.shards.captions import marked_encoding, probable_encoding
from data_pipeline.shards.codec import object_once

DELIMITERS = {".csv": ",", ".tsv": "\t"}
LINES = (".jsonl", ".ndjson")
ENDINGS = (*DELIMITERS, ".parquet", *LINES)
PICTURE_ROWS = 64  # rows of a Parquet with pictures in memory at a time; without pictures, a few thousand
# CSV cells that mean a missing value: those that pandas writes and reads as missing.
MISSING = frozenset(
    ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
     "NULL", "NaN", "None", "n/a", "nan", "null"]
)  # fmt: skip
SPACED = re.compile(r'[,;|] +["\w]')  # a header with blanks after delimiters: its rows may have them before quotes
NUMBER = re.compile(r"[+-]?(0|[1-9]\d{0,300})(\.\d*)?([eE][+-]?\d{1,3})?|[+-]?\.\d+")
OTHER_KINDS = {
    b"PK\x03\x04": "is a spreadsheet or a zip: export it as CSV in UTF-8",
    b"\xd0\xcf\x11\xe0": "is a spreadsheet: export it as CSV in UTF-8",
    b"\x1f\x8b": "is compressed: unpack it by gunzip",
}


class Row(NamedTuple):
    """A row's cells by column, its place in the table, and why it can't be used."""

    cells: dict[str, Any]
    where: str
    fault: str = ""


def rows_of(table: Path, wanted: Sequence[str] = (), encoding: str | None = None) -> Iterator[Row]:
    """The rows of a table in order; its contents decide its kind. wanted: columns that will be used, by which a CSV's
    delimiter is recognised."""
    with table.open("rb") as file:
        start = file.read(4096)
    for magic, words in OTHER_KINDS.items():
        if start.startswith(magic):
            raise UserError(f"{table} {words}.")
    if start.startswith(b"PAR1"):
        return parquet_rows(table)
    if table.suffix.lower() == ".parquet":
        raise DataError(f"{table} can't be read (it does not begin as a Parquet file does): write it again.")
    encoding = text_encoding(table, start, encoding)
    first = start.decode(encoding, "replace").lstrip("\ufeff \t\r\n")
    if table.suffix.lower() in LINES:
        return json_rows(table, encoding)
    if first.startswith(("{", "[{")):
        raise UserError(f"{table} holds JSON, not a table of text: name it .jsonl, with one object on each line.")
    return text_rows(table, wanted, encoding)


def text_encoding(table: Path, start: bytes, encoding: str | None) -> str:
    """The encoding of a text with these first bytes: that of its byte-order mark, else the given one, else UTF-8."""
    marked = marked_encoding(start)
    if marked is None and encoding is None and (probable := probable_encoding(start)).startswith("utf-16"):
        raise DataError(f"{table} is probably UTF-16, not UTF-8: set source.encoding={probable}, or save it as UTF-8.")
    return marked or encoding or "utf-8"


def text_rows(table: Path, wanted: Sequence[str], encoding: str) -> Iterator[Row]:
    """Rows of a CSV or TSV with a header. A cell that means a missing value is None. A row with more cells than the
    header is faulty, as an unquoted delimiter has split one of them."""
    csv.field_size_limit(2**24)
    line = 0
    try:
        first, skipped = header_line(table, encoding)
        delimiter, spaced = delimiter_of(first, table, wanted), SPACED.search(first) is not None
        with table.open(encoding=encoding, newline="") as file:
            for _ in range(skipped):
                file.readline()
            reader = csv.reader(file, delimiter=delimiter, strict=True, skipinitialspace=spaced)
            header = [name.strip() for name in next(reader, [])]
            refuse_twice(table, header)
            for cells in reader:
                line = skipped + reader.line_num
                if cells:
                    yield text_row(header, cells, f"line {line} of {table}")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{table} can't be read as {encoding} ({error.reason}{first_not_in(table, encoding)}): save it as UTF-8, "
            "or set source.encoding= to what it is, perhaps cp1252."
        ) from error
    except csv.Error as error:
        raise DataError(
            f"{table} can't be read ({error}, in or after line {line + 1}): put quotes around a cell with quotes in "
            "it, and double those: save it again from what made it."
        ) from error


def first_not_in(table: Path, encoding: str) -> str:
    """The place of the first line that is not in an encoding whose line ends are one byte; "" for other encodings."""
    with table.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError:
                return f" in line {number}"
    return ""


def header_line(table: Path, encoding: str) -> tuple[str, int]:
    """The line with a table's columns, and how many lines come before it: empty ones, and Excel's sep=;."""
    with table.open(encoding=encoding, newline="") as file:
        for number, line in enumerate(iter(lambda: file.readline(2**20), "")):
            if line.strip() and not line.lower().startswith("sep="):
                return line, number
    return "", 0


def delimiter_of(line: str, table: Path, wanted: Sequence[str]) -> str:
    """The delimiter with which the header has the wanted columns; else the usual one for the file's extension."""
    usual = DELIMITERS.get(table.suffix.lower(), ",")
    headers = {each: next(csv.reader(io.StringIO(line, newline=""), delimiter=each), []) for each in (usual, *",;\t|")}
    for delimiter, header in headers.items():
        if set(wanted) <= {name.strip() for name in header}:
            return delimiter
    return max(headers, key=lambda each: len(headers[each])) if len(headers[usual]) < 2 else usual


def refuse_twice(table: Path, columns: Sequence[str]) -> None:
    """Refuse a table with two columns of one name, as one of them would be lost."""
    twice = [name for name, count in Counter(columns).items() if count > 1 and name]
    if twice:
        raise UserError(f"{table} has two columns named {twice[0]}: rename one of them.")


def text_row(header: Sequence[str], cells: Sequence[str], where: str) -> Row:
    """A line's cells by column; if it has fewer cells than the header, the others are None."""
    values = [None if cell.strip() in MISSING else cell for cell in cells]
    row = dict.fromkeys(header) | dict(zip(header, values, strict=False))
    fault = ""
    if any(cell.strip() for cell in cells[len(header) :]):
        fault = f"row with too many cells ({len(cells)} under {len(header)} columns: is a cell with the delimiter in it"
        fault += " not in quotes?)"
    elif len(cells) < len(header):
        where += f", which has {len(cells)} cells under {len(header)} columns"
    return Row(row, where, fault)


def json_rows(table: Path, encoding: str) -> Iterator[Row]:
    """Rows of JSON lines: one object per line."""
    number = 0
    try:
        with table.open(encoding=encoding) as file:
            for number, line in enumerate(file, 1):
                if line.strip("\ufeff \t\r\n"):
                    cells = json.loads(line, object_pairs_hook=object_once, parse_constant=lambda _: None)
                    if not isinstance(cells, dict):
                        raise ValueError("it is no object")
                    yield Row(cells, f"line {number} of {table}")
    except (ValueError, RecursionError) as error:  # includes UnicodeDecodeError and JSONDecodeError
        raise DataError(
            f"{table} can't be read ({error}, in or after line {max(number, 1)}): it must have one JSON object on each "
            "line, in UTF-8."
        ) from error


def parquet_rows(table: Path) -> Iterator[Row]:
    """Rows of a Parquet file, a few at a time."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("a Parquet table needs pyarrow: run pip install -e '.[parquet]'.") from error
    number = 0
    try:
        with parquet.ParquetFile(table) as file:
            refuse_twice(table, file.schema_arrow.names)
            pictures = any(holds_bytes(field.type) for field in file.schema_arrow)
            for batch in file.iter_batches(PICTURE_ROWS if pictures else 4096):
                for cells in batch.to_pylist():
                    yield Row(cells, f"row {number} of {table}")
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{table} can't be read ({type(error).__name__}): write it again.") from error


def holds_bytes(kind: Any) -> bool:
    """Whether a column's type is bytes or contains bytes."""
    parts = [kind.field(i).type for i in range(kind.num_fields)]
    return "binary" in str(kind) or any(holds_bytes(part) for part in parts)


def number_in(value: Any) -> int | float | bool | None:
    """A finite number unchanged; a text table's cell as a number, if it is written as numbers usually are."""
    if isinstance(value, str):
        text = value.strip()
        if not NUMBER.fullmatch(text):
            return None
        value = int(text) if text.lstrip("+-").isdigit() else float(text)
    if isinstance(value, bool | int):
        return value
    number = float(value) if isinstance(value, float | Decimal) else math.nan
    return number if math.isfinite(number) else None
