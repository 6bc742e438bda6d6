"""A folder of pictures, and a table (CSV, TSV, JSON lines or Parquet) with their file names or the pictures
themselves, captions and any other columns."""

from __future__ import annotations

import functools
import io
import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import UserError
from data_pipeline.images.decode import Decoding, Picture, PictureError, decode_picture, open_image
from data_pipeline.images.framing import Framing
from data_pipeline.images.resize import upright_sides
from data_pipeline.shards.captions import ONE, kind_of
from data_pipeline.sources.captions import Captions, brief, caption_names, chosen, known_encoding, of_object
from data_pipeline.sources.folder import PictureFile, in_file, why_unusable
from data_pipeline.sources.source import SourceItem
from data_pipeline.sources.table_rows import ENDINGS, LINES, Row, number_in, rows_of


class Table:
    """One item per row of `table` (a name below `path`, or a pattern for several; None: the only table there), by row
    number.

    Columns `file` and `caption` (or several); numbers in all other columns go to the sample's json. A file is a name
    or, in a Parquet, the picture itself: bytes, or {bytes, path} as data sets on the hub have it. Several rows may name
    one file. Rows whose file is missing, or lies outside the folder, are set aside.
    """

    def __init__(
        self,
        path: str,
        table: str | None = None,
        file: str = "file",
        caption: str | Sequence[str] = "caption",
        limit: int | None = None,
        encoding: str | None = None,
        background: Any = "white",
        animated: str = "first",
    ) -> None:
        self.path, self.table, self.file, self.limit = Path(path), table, file, limit
        self.how = Decoding.of(background, animated)
        self.names, self.encoding = caption_names(caption) or (ONE,), known_encoding(encoding)

    def items(self) -> Iterator[SourceItem]:
        number = -1
        for number, row in enumerate(itertools.islice(self._rows(), self.limit)):
            yield self._item(number, row)
        if number < 0:
            raise UserError(f"{self.table or self._tables()[0]} has no rows: check source.table.")

    def _rows(self) -> Iterator[Row]:
        for table in self._tables():
            for number, row in enumerate(rows_of(table, (self.file, *self.names), self.encoding)):
                if number == 0:
                    self._refuse_without_columns(table, row.cells)
                yield row

    def _tables(self) -> list[Path]:
        if not self.path.is_dir():
            raise UserError(f"input={self.path} is not a folder: use one that holds pictures and a table of them.")
        if self.table is not None:
            found = matching(self.path, self.table)
            if not found:
                raise UserError(f"source.table={self.table} is not in {self.path}: use the name of a file there.")
            return found
        found = sorted(p for p in self.path.iterdir() if p.suffix.lower() in ENDINGS and p.is_file())
        found = [p for p in found if p.suffix.lower() not in LINES] or found
        if len(found) != 1:
            names = ", ".join(p.name for p in found[:3]) or "none"
            raise UserError(
                f"input={self.path} should hold one .csv, .tsv, .parquet or .jsonl ({names}): set source.table=, to a "
                "name or a pattern such as train-*.parquet."
            )
        return found

    def _refuse_without_columns(self, table: Path, row: Mapping[str, Any]) -> None:
        """Refuse a table by its first row; in JSON lines, a row without a caption may omit the column."""
        names = {self.file: "file"} | dict.fromkeys(() if table.suffix.lower() in LINES else self.names, "caption")
        for name, option in names.items():
            if name not in row:
                columns = ", ".join(brief(str(column)) for column in row)
                raise UserError(f"{table} has no column {name}: set source.{option}= to one of {columns}.")

    def _item(self, number: int, row: Row) -> SourceItem:
        data, name = picture_of(row.cells.get(self.file))
        unusable, tried = (row.fault, "") if row.fault or data is not None else self._why_unusable(row, name)
        path = self.path / name
        if data is not None:
            given = embedded(data, Path(name).suffix[1:], self.how)
        elif unusable:
            given = {"load": absent, "sides": absent}
        else:
            given, tried = in_file(path, self.how), str(path)
        others = {n: number_in(v) for n, v in row.cells.items() if n not in (self.file, *self.names)}
        captions = self._captions(row)
        return PictureFile(
            f"{number:09d}",
            caption=captions.first,
            meta={"file": name} | {column: found for column, found in others.items() if found is not None},
            unusable=unusable,
            where=f"{tried}, {row.where}" if tried else row.where,
            **captions.as_fields(),
            **given,
        )

    def _why_unusable(self, row: Row, name: str) -> tuple[str, str]:
        """Why no file of this name can be opened, and the path that was tried; "" and "" if one can."""
        value = row.cells.get(self.file)
        if not name and value is not None and not isinstance(value, str | float | dict):
            return f"{self.file} is no name of a picture (but {kind_of(value)})", ""
        inside = name and not Path(name).is_absolute() and ".." not in Path(name).parts
        unusable = why_unusable(self.path / name, self.path, True) if inside else "no name of a picture in the folder"
        return unusable, f"{self.file}={name[:200]}, tried as {str(self.path / name)[:200]}" if unusable else ""

    def _captions(self, row: Row) -> Captions:
        place = of_object("the row", row.cells, self.names)
        if row.cells.keys() >= set(self.names) and place.none != "is empty":
            place = place._replace(none=f"has no {' or '.join(self.names)}: empty, or a spelling of NaN, None or null")
        return chosen([place], "")


def matching(folder: Path, pattern: str) -> list[Path]:
    """The files that match a name, or a pattern such as data/train-*.parquet, sorted."""
    if (folder / pattern).is_file() or not set(pattern) & set("*?["):
        return [folder / pattern] if (folder / pattern).is_file() else []
    return [] if Path(pattern).is_absolute() else sorted(p for p in folder.glob(pattern) if p.is_file())


def picture_of(value: Any) -> tuple[bytes | None, str]:
    """A picture's bytes, if the cell has them (directly, or as {"bytes", "path"}), and the name of its file, or ""."""
    data, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, value)
    return (data if isinstance(data, bytes) else None), (name if isinstance(name, str) else "")


def embedded(data: bytes, extension: str, how: Decoding) -> dict[str, Any]:
    """load, sides and stamp for a picture that the table contains."""
    look = functools.partial(framed, data, extension, how=how)
    return {"load": look, "sides": functools.partial(sides_of, data, extension), "stamp": (len(data), zlib.crc32(data))}


def framed(data: bytes, extension: str, framing: Framing, how: Decoding) -> Picture:
    """A picture in memory, resized by its framing."""
    return framing.applied(decode_picture(io.BytesIO(data), extension, how))


def sides_of(data: bytes, extension: str) -> tuple[int, int]:
    """A picture's width and height, from its header."""
    with open_image(io.BytesIO(data), extension) as image:
        return upright_sides(image)


def absent(framing: Framing | None = None) -> Any:
    """The `load` and `sides` of a picture that the table names but the folder lacks."""
    raise PictureError("missing picture")
