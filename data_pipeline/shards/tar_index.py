"""Where each sample lies in a tar: from its .idx, or by one pass over it."""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.shards.manifest import Shard, check_size

END_OF_ARCHIVE = 2 * tarfile.BLOCKSIZE  # bytes, all zero


class Member(NamedTuple):
    """Where a member's bytes lie in its tar."""

    offset: int
    size: int


class IndexEntry(NamedTuple):
    """A sample: its key, and its members by extension."""

    key: str
    members: dict[str, Member]


def scan(data: bytes | mmap.mmap, name: str, passed_over: Counter[str] | None = None) -> list[IndexEntry]:
    """The samples of a tar in memory or mapped, in order; a key that comes twice in full gives two of them.

    Extensions are in lower case; a file without one is not part of a sample. Links and devices are never followed and
    are not members. passed_over: counts hidden and system files there.
    """
    samples: list[IndexEntry] = []
    current: dict[str, IndexEntry] = {}
    for path, place in members_of(data, name):
        folder, slash, base = path.rpartition("/")
        stem, dot, extension = base.partition(".")
        if passed_over is not None and (base.startswith(".") or "__MACOSX/" in path):
            passed_over["hidden or system file"] += 1
        if not stem or not dot or path.startswith("__MACOSX/"):
            continue
        key, extension = folder + slash + stem, extension.lower()
        entry = current.get(key)
        if entry is None or extension in entry.members:
            entry = current[key] = IndexEntry(key, {})
            samples.append(entry)
        if place is not None:
            entry.members[extension] = place
    return samples


def members_of(data: bytes | mmap.mmap, name: str) -> Iterator[tuple[str, Member | None]]:
    """(name, place) of each file of a tar; the place of a link or device is None. A truncated tar is a DataError:
    unlike tarfile, this requires the two empty blocks that end an archive, and nothing after them."""
    if data[:2] == b"\x1f\x8b":
        raise DataError(f"shard {name} is compressed: unpack it by gunzip, as samples are read by their place.")
    try:
        with tarfile.open(fileobj=io.BytesIO(data) if isinstance(data, bytes) else data, mode="r:") as tar:
            at = -1
            for member in tar:
                if member.offset <= at or member.size < 0:
                    raise tarfile.ReadError("a size below zero")  # tarfile would loop forever
                if member.isreg() and member.offset_data + member.size > len(data):
                    raise tarfile.ReadError("unexpected end of data")
                at = member.offset
                if not member.isdir():
                    plain = member.isreg() and not member.issparse()
                    yield member.name, Member(member.offset_data, member.size) if plain else None
            rest = bytes(data[tar.offset :])
        if len(rest) < END_OF_ARCHIVE:
            raise tarfile.ReadError("it ends before its end is marked: it was cut")
        if rest.strip(b"\0"):
            raise tarfile.ReadError(f"no member begins at byte {tar.offset}, where one should")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(f"shard {name} is damaged ({error}): make or copy it again.") from error


def read_index(root: str | Path, shard: Shard) -> list[IndexEntry]:
    """Where each sample of a shard lies: from its .idx, else by one pass over the tar."""
    check_size(root, shard)
    path = storage.join(root, shard.index_name)
    if not shard.bytes:
        raise DataError(f"shard {storage.join(root, shard.name)} is empty: make or copy it again.")
    index = storage.read_if_there(path)
    if index is not None:
        refuse_other_index(index, path, shard)
        entries = parse_index(index, path)
    else:
        entries = scan(storage.read_bytes(storage.join(root, shard.name)), shard.name)
    if len(entries) != shard.samples:
        raise DataError(
            f"{storage.join(root, shard.name)} holds {len(entries)} samples, not {shard.samples}: make it again."
        )
    return entries


def index_digest(index: bytes) -> str:
    """An .idx's digest as manifests hold it: short, as there may be 10^5 of them."""
    return digest_of(index)[:16]


def refuse_other_index(index: bytes, path: str, shard: Shard) -> None:
    """Refuse an .idx that changed since it was written: it could give one sample another's arrays."""
    if shard.index and index_digest(index) != shard.index:
        raise DataError(
            f"index {path} is damaged (its digest is not its manifest's): delete it, and it is read from the tar "
            "instead; of shards that others wrote, run index_shards.py again."
        )


def parse_index(data: bytes, path: str) -> list[IndexEntry]:
    """Parse the lines of an .idx."""
    try:
        rows = [json.loads(line) for line in data.splitlines()]
        return [IndexEntry(key, {name: Member(*m) for name, m in members.items()}) for key, members in rows]
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"index {path} is damaged: delete it, and it is read from the tar instead.") from error


def digest_of(data: bytes | mmap.mmap) -> str:
    """sha256 in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def refuse_other_bytes(data: bytes | mmap.mmap, path: str, shard: Shard) -> None:
    """DataError for bytes that changed since they were written, even if each sample can still be decoded."""
    if digest_of(data) != shard.sha256:
        raise DataError(
            f"shard {path} is damaged (its sha256 is not its manifest's): copy it again, or delete it together with "
            "the data set's manifest.json and run what made it."
        )
