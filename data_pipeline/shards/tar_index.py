"""Where each sample lies in a tar: from its .idx, or by one pass over it."""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.shards.manifest import Shard, check_size

END_OF_ARCHIVE = 2 * tarfile.BLOCKSIZE  # bytes, all zero


class Member(NamedTuple):
    """Where a member's bytes lie in its tar."""

    offset: int
    size: int


class IndexEntry(NamedTuple):
    """A sample: its key, its members by extension, and the extensions of those that are links, devices or sparse."""

    key: str
    members: dict[str, Member]
    links: tuple[str, ...] = ()


class TarRules(NamedTuple):
    """How to read tars written by others. full_keys: a key ends at the last dot of a file's name (webdataset: at the
    first); its own dots become "_". unended: accept tars without the empty blocks that end an archive."""

    full_keys: bool = False
    unended: bool = False

    def as_info(self) -> dict[str, bool]:
        """Its entry in a manifest; empty for the defaults."""
        return {name: True for name, value in self._asdict().items() if value}

    @classmethod
    def from_info(cls, info: Mapping[str, Any]) -> TarRules:
        """From a manifest's info."""
        held = info.get("tars")
        return cls(*(isinstance(held, dict) and held.get(name) is True for name in cls._fields))


USUAL = TarRules()


def scan(
    data: bytes | mmap.mmap, name: str, rules: TarRules = USUAL, passed_over: Counter[str] | None = None
) -> list[IndexEntry]:
    """The samples of a tar in memory or mapped, in order; if a key comes twice in full, there are two samples.

    Extensions are in lower case; a file without one is not part of a sample. Links and devices are never followed and
    are not members. passed_over: counts files that are part of no sample.
    """
    samples: list[IndexEntry] = []
    current: dict[str, int] = {}
    passed_over = Counter() if passed_over is None else passed_over
    for path, place in members_of(data, name, rules.unended):
        key, extension = split_name(path, rules.full_keys)
        if not extension:
            passed_over["hidden or system file" if of_a_system(path) else "file without an extension"] += 1
            continue
        at = current.get(key)
        if at is None or extension in samples[at].members:
            at = current[key] = len(samples)
            samples.append(IndexEntry(key, {}))
        if place is not None:
            samples[at].members[extension] = place
        else:
            samples[at] = samples[at]._replace(links=(*samples[at].links, extension))
    return samples


def split_name(path: str, full: bool = False) -> tuple[str, str]:
    """Key and extension (in lower case) of a file in a tar; ("", "") for a file that is part of no sample."""
    folder, slash, base = path.rpartition("/")
    stem, dot, extension = base.rpartition(".") if full else base.partition(".")
    if not stem or not dot or of_a_system(path):
        return "", ""
    return folder + slash + stem.replace(".", "_"), extension.lower()


def of_a_system(path: str) -> bool:
    """Whether a file in a tar is hidden, or was added by macOS."""
    *folders, base = path.split("/")
    return base.startswith(".") or "__MACOSX" in folders


def members_of(data: bytes | mmap.mmap, name: str, unended: bool = False) -> Iterator[tuple[str, Member | None]]:
    """(name, place) of each file of a tar; the place of a link or device is None. A truncated tar is a DataError:
    unlike tarfile, this requires the two empty blocks that end an archive (unless `unended`). What follows them must be
    another tar, as `cat` joins them."""
    if not len(data):
        raise DataError(f"shard {name} is damaged (it is empty): make or copy it again.")
    if data[:2] == b"\x1f\x8b":
        raise DataError(f"shard {name} is compressed, but samples are read by their offset: unpack it with gunzip.")
    file, start, end = io.BytesIO(data) if isinstance(data, bytes) else data, 0, 0
    try:
        while start < len(data):
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                yield from _members_of_one(tar, start, len(data))
                end = tar.offset
            start = _next_archive(data, start, end, unended)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(f"shard {name} is damaged ({error}): make or copy it again.") from error


def _members_of_one(tar: tarfile.TarFile, start: int, length: int) -> Iterator[tuple[str, Member | None]]:
    """The part of members_of for the archive that begins at `start`, in a file of `length` bytes."""
    at = start - 1
    for member in tar:
        if member.offset <= at or member.size < 0:
            raise tarfile.ReadError("a size below zero")  # tarfile would loop forever
        if member.isreg() and member.offset_data + member.size > length:
            raise tarfile.ReadError(f"it is cut within {member.name}")
        at = member.offset
        if not member.isdir():
            plain = member.isreg() and not member.issparse()
            yield member.name, Member(member.offset_data, member.size) if plain else None


def _next_archive(data: bytes | mmap.mmap, start: int, end: int, unended: bool) -> int:
    """Where the next tar begins, after the one from `start` to its last member's `end`; the file's length if there is
    none. It follows the two empty blocks directly, or after padding to a full record; any other gap is damage."""
    at = end
    while at < len(data) and data[at : at + tarfile.BLOCKSIZE].count(0) == len(data[at : at + tarfile.BLOCKSIZE]):
        at = min(at + tarfile.BLOCKSIZE, len(data))
    if at >= len(data):
        if at - end < END_OF_ARCHIVE and not unended:
            raise tarfile.ReadError(
                f"it has no end mark: two empty blocks are missing after its last member, which ends at byte {end}; it "
                "was cut there or never closed; if it is whole all the same, unended=true reads it (make_shards.py: "
                "source.unended=true)"
            )
        return len(data)
    filled = at - end >= END_OF_ARCHIVE and ((at - start) % tarfile.RECORDSIZE == 0 or at - end == END_OF_ARCHIVE)
    if not filled or not _is_header(data[at : at + tarfile.BLOCKSIZE]):
        raise tarfile.ReadError(f"no member begins at byte {end}, where one should")
    return at


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


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
            f"index {path} is damaged (its digest is not that of the manifest): delete it, and the tar will be scanned "
            "instead; for shards that others wrote, run index_shards.py again."
        )


def parse_index(data: bytes, path: str) -> list[IndexEntry]:
    """Parse the lines of an .idx."""
    try:
        rows = [json.loads(line) for line in data.splitlines()]
        return [IndexEntry(key, {name: Member(*m) for name, m in members.items()}) for key, members in rows]
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"index {path} is damaged: delete it, and the tar will be scanned instead.") from error


def digest_of(data: bytes | mmap.mmap) -> str:
    """sha256 in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def refuse_other_bytes(data: bytes | mmap.mmap, path: str, shard: Shard) -> None:
    """DataError for bytes that changed since they were written, even if each sample can still be decoded."""
    refuse_other_digest(digest_of(data), path, shard)


def refuse_other_digest(digest: str, path: str, shard: Shard) -> None:
    """As `refuse_other_bytes`, given the digest of a shard's bytes."""
    if digest != shard.sha256:
        raise DataError(
            f"shard {path} is damaged (its sha256 is not that of the manifest): copy it again, or delete it together "
            "with the data set's manifest.json and run the script that made it."
        )
