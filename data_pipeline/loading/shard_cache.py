"""Opens shards through a cache on the node's own disk; without one, shards in a bucket are read in part, to memory.

All processes of a node share the cache, for all data sets in buckets and on file systems: a shard is stored there under
its sha256; one process fetches it while the others wait, and it is then mapped like a local file. The least recently
used shards are evicted first.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data_pipeline.common import storage
from data_pipeline.common.errors import UserError
from data_pipeline.common.s3 import CACHE, CACHE_GB
from data_pipeline.common.temp_files import abandoned
from data_pipeline.shards.manifest import Shard
from data_pipeline.shards.reader import copy_whole, read_whole
from data_pipeline.shards.tar_index import IndexEntry, digest_of

LOCKS = 64  # lock files: two shards may share one and wait for each other, and nothing needs to be cleaned up
Piece = tuple[int, int]  # of a shard: first sample and one past the last

seen: set[str] = set()  # digests of cached files that this process has checked


def refuse_little_room(shards: Sequence[Shard]) -> None:
    """UserError, before anything is read, if this node's disk lacks room for the part of these shards to be cached."""
    if cache := ShardCache.configured():
        cache.refuse_little_room(shards)


def fits_cache(shard: Shard) -> bool:
    """Whether there is a cache that may hold this shard."""
    cache = ShardCache.configured()
    return cache is not None and shard.bytes <= cache.capacity


def open_shard(
    root: str, shard: Shard, entries: Sequence[IndexEntry], pieces: Callable[[], Sequence[Piece]]
) -> mmap.mmap | RemoteShard:
    """An object whose `data[begin:end]` gives a shard's bytes; `pieces`: the samples that are needed now, if known."""
    cache = ShardCache.configured()
    if cache and shard.bytes <= cache.capacity:
        return cache.mapped(root, shard)
    return RemoteShard(root, shard, entries, pieces)


class RemoteShard:
    """A shard in memory. If it is needed as a whole, it is fetched in one go and checked by its sha256.

    If two streams share it, each reader fetches only its own samples, so that an epoch reads no byte twice; those are
    checked only by decoding them, and by their length.
    """

    def __init__(
        self, root: str, shard: Shard, entries: Sequence[IndexEntry], pieces: Callable[[], Sequence[Piece]]
    ) -> None:
        self.root, self.shard, self.entries, self.pieces = root, shard, entries, pieces
        self.held: list[tuple[int, bytes]] = []  # where it begins, bytes

    def __getitem__(self, place: slice) -> bytes:
        for begin, data in self.held:
            if begin <= place.start and place.stop <= begin + len(data):
                return data[place.start - begin : place.stop - begin]
        self.held.append(self._fetched(place))
        return self[place]

    def _fetched(self, place: slice) -> tuple[int, bytes]:
        """The needed piece that holds an offset; the whole shard, if none does or a piece is all of it."""
        for piece in self.pieces():
            begin, end = self._bytes_of(piece)
            if begin <= place.start and place.stop <= end and piece != (0, len(self.entries)):
                return begin, storage.read_bytes(storage.join(self.root, self.shard.name), begin, end - begin)
        return 0, read_whole(self.root, self.shard)

    def _bytes_of(self, piece: Piece) -> tuple[int, int]:
        places = [member for entry in self.entries[slice(*piece)] for member in entry.members.values()]
        return min((m.offset for m in places), default=0), max((m.offset + m.size for m in places), default=0)


class ShardCache(NamedTuple):
    """A folder that holds at most `capacity` bytes of shards."""

    folder: Path
    capacity: int

    @classmethod
    def configured(cls) -> ShardCache | None:
        """The cache of the environment's settings; None if there are none."""
        folder = os.environ.get(CACHE)
        try:
            capacity = float(os.environ.get(CACHE_GB) or 0) * 1e9
        except ValueError:
            raise UserError(f"{CACHE_GB} must be a number of gigabytes.") from None
        place = storage.on_this_node(folder, "store.cache") if folder and capacity > 0 else None
        return cls(place, int(capacity)) if place else None

    def refuse_little_room(self, shards: Sequence[Shard]) -> None:
        """UserError if the disk has no room for the shards that are not cached yet, at most `capacity` in all. Shards
        that other ranks are fetching count as cached, as their space is allocated already."""
        free = storage.free_bytes(self.folder)  # before the listing: what is allocated in between counts only as cached
        files = self._files()
        held = {path.name.partition(".")[0] for _, path in files}
        missing = sum(s.bytes for s in shards if s.bytes <= self.capacity and s.sha256 not in held)
        needed = min(missing, max(self.capacity - sum(status.st_size for status, _ in files), 0))
        if needed > free:
            raise UserError(
                f"store.cache={self.folder} on {storage.HOST} needs {needed} bytes for shards, and {free} are free: "
                "make room there, or lower store.cache_gb."
            )

    def mapped(self, root: str, shard: Shard) -> mmap.mmap:
        """A mapped shard, fetched if it is not cached whole and undamaged; each process checks it once."""
        path = self.folder / f"{shard.sha256}.tar"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(f"shard-{int(shard.sha256[:8], 16) % LOCKS:02d}"):
                data = self._opened(path, shard)
                if data is None:
                    self._fetch(root, shard, path)
                    data = self._opened(path, shard)
        except OSError as error:
            raise UserError(
                f"the shard cache {self.folder} can't be used ({error.strerror}): use another store.cache, or lower "
                "store.cache_gb."
            ) from error
        if data is None:  # evicted at once by other processes, or the disk returns other bytes than were written
            raise UserError(f"the shard cache {self.folder} lost a shard just written to it: raise store.cache_gb.")
        return data

    def _opened(self, path: Path, shard: Shard) -> mmap.mmap | None:
        """None if it is missing or damaged."""
        try:
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (FileNotFoundError, ValueError):  # an empty file can't be mapped
            return None
        if len(data) != shard.bytes or (shard.sha256 not in seen and digest_of(data) != shard.sha256):
            data.close()
            return None
        seen.add(shard.sha256)
        with contextlib.suppress(FileNotFoundError):  # evicted meanwhile; the mapping stays valid
            os.utime(path)
        return data

    def _fetch(self, root: str, shard: Shard, path: Path) -> None:
        temporary = path.with_name(f"{path.name}.tmp.{storage.HOST}.{os.getpid()}")
        seen.discard(shard.sha256)
        path.unlink(missing_ok=True)
        try:
            with self._locked("room"), temporary.open("wb") as file:
                self._make_room(shard.bytes)
                os.posix_fallocate(file.fileno(), 0, shard.bytes)  # space that is not allocated yet counts, too
            with temporary.open("r+b") as file:
                copy_whole(root, shard, file)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, needed: int) -> None:
        for _, path in self._files():
            if ".tmp." in path.name and abandoned(path):
                path.unlink(missing_ok=True)
        found = self._files()
        used = sum(status.st_size for status, _ in found)
        for status, path in sorted(found, key=lambda one: one[0].st_mtime_ns):
            if used + needed <= self.capacity:
                return
            if ".tmp." not in path.name:
                path.unlink(missing_ok=True)
                used -= status.st_size

    def _files(self) -> list[tuple[os.stat_result, Path]]:
        """The files of cached shards, and of those being fetched."""
        found = []
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                if path.suffix != ".lock":
                    found.append((path.stat(), path))
        return found

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Lock against other processes of this node; released when a process ends."""
        with (self.folder / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
