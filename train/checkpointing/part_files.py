"""A rank's flat tensors as pieces of named parameters: any layout of ranks and ZeRO stage loads what another saved.

A part file (safetensors) holds one vector per piece, named <kind>/<parameter>@<start>: kind is weight, exp_avg,
exp_avg_sq or an EMA's name; start is the piece's offset in the flattened parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from data_pipeline.common.errors import DataError
from train.engine.param_shards import Fragment, Shards

Copies = dict[tuple[str, int], Tensor]  # by kind and shard number, on the CPU


def copied_pieces(fragments: Sequence[Fragment], kinds: Mapping[str, Shards], copies: Copies) -> dict[str, Tensor]:
    """The contents of a part file, copied to the CPU so that training can go on. One copy per shard, not per piece.

    Reuses the memory in `copies` from the last save: clearing new memory would take several times as long.
    """
    used = {fragment.shard for fragment in fragments}
    pieces = {}
    for kind, shards in kinds.items():
        for i in used:
            flat = shards[i].detach().view(-1)
            if (kind, i) not in copies:
                copies[kind, i] = torch.empty_like(flat, device="cpu", pin_memory=flat.is_cuda)
            copies[kind, i].copy_(flat)
        for f in fragments:
            pieces[f"{kind}/{f.name}@{f.start}"] = copies[kind, f.shard].narrow(0, f.offset, f.length)
    return pieces


def fill(fragments: Sequence[Fragment], kinds: Mapping[str, Shards], files: Sequence[Path]) -> None:
    """Read each fragment of each kind from part files, which may be cut differently; DataError if one is missing.

    Files are opened in the given order, and only as many as needed.
    """
    with ExitStack() as stack:
        parts = PartFiles(files, stack)
        for kind, shards in kinds.items():
            for fragment in fragments:
                target = fragment.of(shards)
                for at, values in parts.read(kind, fragment.name, fragment.start, fragment.length):
                    target.narrow(0, at - fragment.start, len(values)).copy_(values)


def gathered(kind: str, shapes: Mapping[str, Sequence[int]], files: Sequence[Path]) -> dict[str, Tensor]:
    """Full parameters of a kind, by name."""
    whole = {name: torch.empty(tuple(shape)) for name, shape in shapes.items()}
    names = list(whole)
    fill([Fragment(name, 0, whole[name].numel(), names.index(name), 0) for name in names],
         {kind: list(whole.values())}, files)  # fmt: skip
    return whole


def files_needed(
    fragments: Sequence[Fragment],
    kinds: Iterable[str],
    files: Sequence[str],
    pieces_of: Callable[[str], Mapping[str, int] | None],
) -> list[str]:
    """The part files that hold any of the fragments; files are inspected in the given order until nothing is missing.

    pieces_of: a file's pieces and their lengths; None if unknown: the file then counts as needed. Returns all files if
    the pieces do not add up: reading them finds what is wrong.
    """
    spans: dict[str, list[tuple[int, int]]] = {}
    for kind in kinds:
        for f in fragments:
            spans.setdefault(f"{kind}/{f.name}", []).append((f.start, f.start + f.length))
    missing = sum(end - begin for found in spans.values() for begin, end in found)
    needed = []
    for file in files:
        if missing <= 0:
            return needed
        pieces = pieces_of(file)
        held = None if pieces is None else sum(_overlap(spans, *piece) for piece in pieces.items())
        if held != 0:
            needed.append(file)
        missing -= held or 0
    return needed if missing == 0 else list(files)


def _overlap(spans: Mapping[str, list[tuple[int, int]]], key: str, length: int) -> int:
    name, _, start = key.rpartition("@")
    begin = int(start) if start.isdigit() else 0
    return sum(max(0, min(end, begin + length) - max(at, begin)) for at, end in spans.get(name, ()))


class PartFiles:
    """Pieces by kind and parameter. A file is opened only if the files before it do not hold the requested piece."""

    def __init__(self, files: Sequence[Path], stack: ExitStack) -> None:
        self.unopened, self.stack = list(files), stack
        self.pieces: dict[str, list[tuple[int, int, Any]]] = {}  # kind/name -> (start, length, slice)

    def read(self, kind: str, name: str, start: int, length: int) -> Iterator[tuple[int, Tensor]]:
        """(offset in the parameter, values) of the pieces that together cover [start, start + length)."""
        at, end = start, start + length
        while at < end:
            piece_start, piece_length, piece = self._holding(f"{kind}/{name}", at)
            stop = min(end, piece_start + piece_length)
            yield at, piece[at - piece_start : stop - piece_start]
            at = stop

    def _holding(self, key: str, at: int) -> tuple[int, int, Any]:
        while True:
            for start, length, piece in self.pieces.get(key, ()):
                if start <= at < start + length:
                    return start, length, piece
            if not self.unopened:
                raise DataError(
                    f"the checkpoint has no values of {key} at {at}, as it belongs to another model: choose another "
                    "output=."
                )
            self._open(self.unopened.pop(0))

    def _open(self, path: Path) -> None:
        file = self.stack.enter_context(safe_open(path, "pt"))
        for key in file.keys():  # noqa: SIM118  (no mapping)
            name, _, start = key.rpartition("@")
            piece = file.get_slice(key)
            self.pieces.setdefault(name, []).append((int(start), piece.get_shape()[0], piece))
