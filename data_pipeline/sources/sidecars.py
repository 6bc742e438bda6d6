"""Captions in files beside pictures: cat.txt, cat.caption, cat.json; or in a folder's metadata.jsonl (.csv, .parquet),
as for diffusers and datasets' ImageFolder."""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from data_pipeline.common.errors import DataError
from data_pipeline.shards import codec
from data_pipeline.shards.captions import ONE
from data_pipeline.sources.captions import Captions, Place, brief, chosen, of_object
from data_pipeline.sources.table_rows import Row, number_in, rows_of

TEXTS = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAME = "file_name"
USUAL = (ONE, "text")  # usual names of the caption in metadata


class About(NamedTuple):
    """What belongs to a picture: its captions, and the other entries of its json or of its row in the metadata."""

    captions: Captions
    meta: dict[str, Any]


class Metadata(NamedTuple):
    """A folder's metadata: its rows, by the picture's path below the folder; or why it can't be read."""

    name: str
    rows: Mapping[str, list[Row]]
    fault: str = ""


class Sidecars:
    """Looks for captions below `root`. The names of one folder, and the metadata that was needed, are kept in
    memory."""

    def __init__(self, root: Path, names: tuple[str, ...], encoding: str | None) -> None:
        self.root, self.names, self.encoding = root, names, encoding
        self.metadata: dict[Path, Metadata | None] = {}
        self.listed: tuple[Path, list[str]] = (root.parent, [])

    def about(self, path: Path) -> About:
        """The captions of a picture: from its .txt, its .caption, its .json, then the metadata of its folder or of one
        above it. If source.caption= names entries, the json comes first."""
        facts, json_place = self._json(path)
        texts = [place for ending in TEXTS if (place := self._text(path, ending)) is not None]
        fields = [json_place] if json_place is not None else []
        places = [*fields, *texts] if self.names else [*texts, *fields]
        captions = chosen(places, "")
        meta = {name: value for name, value in facts.items() if name not in (ONE, *self.names)}
        if json_place is not None and json_place.fault and captions.texts:
            captions = captions._replace(converted=(*captions.converted, f"json left out ({json_place.fault})"))
        if not captions.texts and captions.why.startswith("missing"):
            more, place = self._row(path)
            places += [place] if place is not None else []
            if not places:
                places = [self._text_in(file) for file in self._texts_in_mixed_case(path)]
            captions, meta = chosen(places, "" if places else self._looked_for(path)), more | meta
        return About(captions, meta)

    def _file(self, path: Path, ending: str) -> Path | None:
        """The file beside a picture with this ending, in upper or lower case; None if there is none."""
        for each in (ending, ending.upper()):
            if os.path.lexists(found := path.with_suffix(each)):
                return found
        return None

    def _read(self, file: Path, kind: str) -> Any:
        """A caption or json. DataError, with the file's name, if it can't be read."""
        try:
            return codec.decode(kind, file.read_bytes(), self.encoding)
        except DataError as error:
            _, _, why = str(error).partition(" (")
            raise DataError(f"undecodable caption ({file.name}: {why.removesuffix(')')})") from error
        except OSError as error:
            raise DataError(f"undecodable caption ({file.name}: {error.strerror})") from error

    def _text(self, path: Path, ending: str) -> Place | None:
        file = self._file(path, ending)
        return None if file is None else self._text_in(file)

    def _text_in(self, file: Path) -> Place:
        if reason := why_unreadable(file, self.root):
            return Place(file.name, {}, none=f"is {reason}")
        try:
            return Place(file.name, {ONE: self._read(file, "txt")})
        except DataError as error:
            return Place(file.name, {}, str(error))

    def _json(self, path: Path) -> tuple[dict[str, Any], Place | None]:
        """The json beside a picture, and the place for captions in it."""
        file = self._file(path, ".json")
        if file is None:
            return {}, None
        if reason := why_unreadable(file, self.root):
            return {}, Place(file.name, {}, none=f"is {reason}")
        try:
            facts = self._read(file, "json")
            return facts, of_object(file.name, facts, self.names or (ONE,))
        except DataError as error:
            return {}, Place(file.name, {}, str(error))

    def _looked_for(self, path: Path) -> str:
        """For a message: the files that were looked for and not found, and what exists instead."""
        *names, last = [path.with_suffix(ending).name for ending in (*TEXTS, ".json")]
        beside = self._beside(path)
        faults = [each.fault for folder in self._folders(path) if (each := self._metadata_of(folder)) and each.fault]
        there = [f"beside it: {', '.join(brief(name) for name in beside[:3])}"] if beside else []
        return "; ".join([f"no {', '.join(names)} or {last}, and no {METADATA[0]} names it", *there, *faults])

    def _beside(self, path: Path) -> list[str]:
        """Some other names that begin as the picture's does: for a message, or to find a name in mixed case."""
        all_names = self._names(path.parent)
        first = bisect.bisect_left(all_names, f"{path.stem}.")
        return [n for n in all_names[first : first + 5] if n.startswith(f"{path.stem}.") and n != path.name]

    def _texts_in_mixed_case(self, path: Path) -> list[Path]:
        """Caption files such as cat.Txt."""
        known = {(path.stem + ending).lower() for ending in TEXTS}
        return [path.with_name(name) for name in self._beside(path) if name.lower() in known]

    def _names(self, folder: Path) -> list[str]:
        if self.listed[0] != folder:
            self.listed = folder, sorted(os.listdir(folder))
        return self.listed[1]

    def _folders(self, path: Path) -> Iterator[Path]:
        """The picture's folder and those above it, up to the root."""
        folder = path.parent
        yield folder
        while folder != self.root and folder != folder.parent:
            folder = folder.parent
            yield folder

    def _metadata_of(self, folder: Path) -> Metadata | None:
        """The metadata in a folder, read once; None if there is none."""
        if folder not in self.metadata:
            found = [folder / name for name in METADATA if not why_unreadable(folder / name, self.root)]
            self.metadata[folder] = self._metadata_in(found[0]) if found else None
        return self.metadata[folder]

    def _metadata_in(self, file: Path) -> Metadata:
        rows: dict[str, list[Row]] = {}
        for row in rows_of(file, (FILE_NAME,), self.encoding):
            name = row.cells.get(FILE_NAME)
            if FILE_NAME not in row.cells and not rows:
                columns = ", ".join(brief(str(column)) for column in row.cells)
                return Metadata(file.name, {}, f"{file.name} has no {FILE_NAME} (but {columns})")
            if isinstance(name, str):
                rows.setdefault(str(PurePosixPath(name.replace("\\", "/"))), []).append(row)
        return Metadata(file.name, rows)

    def _row(self, path: Path) -> tuple[dict[str, Any], Place | None]:
        """A picture's rows in the nearest metadata: their other entries, and the place for captions in them."""
        for folder in self._folders(path):
            data = self._metadata_of(folder)
            rows = data.rows.get(path.relative_to(folder).as_posix(), []) if data else []
            if faulty := next((row for row in rows if row.fault), None):
                return {}, Place(data.name, {}, f"{faulty.fault.removesuffix(')')}; {faulty.where})")
            if rows:
                cells = [row.cells for row in rows]
                return self._facts(data.name, cells[0]), self._place_of(data.name, cells)
        return {}, None

    def _place_of(self, name: str, rows: list[dict[str, Any]]) -> Place:
        """The place for the captions of one row; several rows of one picture make a list."""
        names = self.names or tuple(each for each in USUAL if each in rows[0])[:1] or (ONE,)
        if len(rows) == 1:
            return of_object(f"its row of {name}", rows[0], names)
        return of_object(f"its {len(rows)} rows of {name}", {n: [row.get(n) for row in rows] for n in rows[0]}, names)

    def _facts(self, name: str, row: dict[str, Any]) -> dict[str, Any]:
        """The other entries of a picture's row; in a text table or a Parquet, only numbers."""
        left_out = (FILE_NAME, *USUAL, *self.names)
        cells = {name: value for name, value in row.items() if name not in left_out}
        if name == METADATA[0]:
            return cells
        numbers = {name: number_in(value) for name, value in cells.items()}
        return {name: value for name, value in numbers.items() if value is not None}

    def unmatched(self) -> Iterator[tuple[Path, str]]:
        """(path, where) of each picture that is listed in metadata but missing."""
        for folder, data in self.metadata.items():
            for name, rows in (data.rows if data else {}).items():
                if not os.path.lexists(folder / name):
                    yield folder / name, rows[0].where


def why_unreadable(file: Path, root: Path) -> str:
    """Why a file can't be read: it is missing, not a file, or a link that leads out of `root`; "" if it can."""
    try:
        if not file.is_file():
            return "a link to nothing" if file.is_symlink() else "no file"
        if file.is_symlink() and not file.resolve().is_relative_to(root.resolve()):
            return "a link that leads out of the folder"
    except (OSError, RuntimeError, ValueError):
        return "a name that can't be opened"
    return ""
