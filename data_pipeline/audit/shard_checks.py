"""What can be wrong with a data set, by shard and by sample; each finding is a sentence with the remedy."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.images.formats import IMAGES
from data_pipeline.shards import codec
from data_pipeline.shards.arrays import differing, unusable
from data_pipeline.shards.caption_members import line_of, member_of, others_of
from data_pipeline.shards.captions import caption_in
from data_pipeline.shards.manifest import Manifest, Shard, check_size, refuse_other_claims
from data_pipeline.shards.samples import as_sample, captions_of
from data_pipeline.shards.tar_index import IndexEntry, TarRules, parse_index, refuse_other_bytes, scan

CHECKS = (
    "manifest", "sizes", "digests", "index", "webdataset", "fields", "values", "keys", "constants", "fingerprints",
    "accounting", "decoding",
)  # fmt: skip
KEPT = 20  # sentences kept of each check
AGAIN = "make the data set again with another output="
COPY = "copy it again, or make the data set again"


class Findings:
    """The number of findings of each check, and the first KEPT sentences of each; `checks_run`: the checks made."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.sentences: dict[str, list[str]] = {}
        self.checks_run: set[str] = set()

    def add(self, check: str, sentence: str) -> None:
        self.checks_run.add(check)
        self.counts[check] += 1
        if self.counts[check] <= KEPT:
            self.sentences.setdefault(check, []).append(sentence)

    def state(self, check: str) -> str:
        """ "ok", how many are wrong, or "-" where there was nothing to check."""
        return f"{self.counts[check]} wrong" if self.counts[check] else "ok" if check in self.checks_run else "-"


class Codes(NamedTuple):
    """What the values of samples are checked against: the first stage's codebook (N, C), if it has one."""

    codebook: np.ndarray | None = None


def check_claims(root: str, manifest: Manifest, findings: Findings) -> None:
    """Check the manifest's own sums, the sizes of the shards, and tars that are not in the manifest."""
    findings.checks_run |= {"manifest", "sizes"}
    try:
        refuse_other_claims(root, manifest)
    except DataError as error:
        findings.add("manifest", str(error))
    for shard in manifest.shards:
        try:
            check_size(root, shard)
        except DataError as error:
            findings.add("sizes", str(error))
    if "index" not in manifest.info:  # shards that others wrote are not listed if no sample of them is usable
        listed = {shard.name for shard in manifest.shards}
        for name in storage.files(storage.join(root, "shards"), ".tar"):
            if f"shards/{name}" not in listed:
                findings.add(
                    "manifest",
                    f"{storage.join(root, 'shards', name)} is not in the manifest: delete it; another run left it.",
                )


def check_shard(root: str, shard: Shard, manifest: Manifest, codes: Codes, findings: Findings) -> list[str]:
    """Run all checks of a shard on one read of it; returns the keys of its samples."""
    path = storage.join(root, shard.name)
    if not storage.exists(path):
        return []  # check_claims has reported it
    findings.checks_run |= {"digests", "index", "fields", "values"}
    data = storage.read_bytes(path)
    try:
        refuse_other_bytes(data, path, shard)
    except DataError as error:
        findings.add("digests", str(error))
    try:
        inside = scan(data, path, TarRules.from_info(manifest.info))
    except DataError as error:
        findings.add("sizes", str(error))
        return []
    foreign = "index" in manifest.info
    entries = check_index(root, shard, inside, foreign, findings)
    if not foreign:  # others' tars are read by their index, so their members may have any order
        check_webdataset(path, data, inside, entries, findings)
    for entry in entries:
        for check, reason in wrong_in_sample(entry, data, manifest, codes):
            findings.add(check, f"sample {entry.key} of shard {path}: {reason}: {AGAIN}.")
    return [entry.key for entry in entries]


def check_index(
    root: str, shard: Shard, inside: list[IndexEntry], foreign: bool, findings: Findings
) -> list[IndexEntry]:
    """The samples that readers take, by the .idx if there is one, checked against those of the tar. foreign: the index
    of a tar that others wrote, which may leave samples out and put the shard's name before their keys."""
    path, entries = storage.join(root, shard.index_name), inside
    if storage.exists(path):
        try:
            entries = parse_index(storage.read_bytes(path), path)
            wrong = [entry.key for entry in entries_not_in(entries, inside, foreign)]
        except (DataError, TypeError) as error:
            damaged = f"index {path} is damaged: delete it, and the tar will be scanned instead."
            findings.add("index", str(error) if isinstance(error, DataError) else damaged)
            return inside
        if wrong or (not foreign and len(entries) != len(inside)):
            first = f", first {wrong[0]}" if wrong else ""
            findings.add(
                "index",
                f"{path} does not match its tar ({len(wrong)} of {len(entries)} entries differ{first}): "
                + ("run index_shards.py again." if foreign else "delete it, and the tar will be scanned instead."),
            )
            entries = [] if foreign else inside
    elif foreign:
        findings.add("index", f"index {path}, which records what was filtered, is missing: run index_shards.py again.")
    if len(entries) != shard.samples:
        findings.add(
            "manifest",
            f"{storage.join(root, shard.name)} has {len(entries)} samples, but its manifest says {shard.samples}: "
            f"{COPY}.",
        )
    return entries


def entries_not_in(entries: list[IndexEntry], inside: list[IndexEntry], foreign: bool) -> list[IndexEntry]:
    """Index entries that match no sample of the tar. foreign: an entry may list only the members that are read."""
    keys = {place: entry.key for entry in inside for place in entry.members.items()}
    whole = {places_of(entry) for entry in inside}
    wrong = []
    for entry in entries:
        found = {keys.get(place) for place in entry.members.items()}
        key = found.pop() if len(found) == 1 else None
        named = key is not None and (entry.key == key or (foreign and entry.key.endswith("/" + key)))
        if not named or (not foreign and places_of(entry) not in whole):
            wrong.append(entry)
    return wrong


def places_of(entry: IndexEntry) -> frozenset:
    return frozenset(entry.members.items())


def check_webdataset(
    path: str, data: bytes, inside: list[IndexEntry], entries: list[IndexEntry], findings: Findings
) -> None:
    """Check that a plain wds.WebDataset reads the same samples: its own two stages, on the tar in memory."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    findings.checks_run.add("webdataset")
    taken = {places_of(entry) for entry in entries}
    expected = {entry.key: entry for entry in inside if places_of(entry) in taken}
    try:
        for sample in group_by_keys(tar_file_expander([{"url": path, "stream": io.BytesIO(data)}])):
            entry = expected.get(sample["__key__"])
            if entry is not None and all(
                sample.get(name) == data[at : at + size] for name, (at, size) in entry.members.items()
            ):
                del expected[entry.key]
        odd = next(iter(expected), None)
    except (ValueError, OSError, EOFError, tarfile.TarError) as error:
        odd = f"({type(error).__name__})"
    if odd is not None:
        findings.add(
            "webdataset",
            f"wds.WebDataset does not read {path} as its index does, starting at {odd}: the members of a sample must "
            f"be adjacent and occur once; {AGAIN}.",
        )


def wrong_in_sample(entry: IndexEntry, data: bytes, manifest: Manifest, codes: Codes) -> Iterator[tuple[str, str]]:
    """(check, reason) for everything wrong in one sample: its key, members, arrays and missing fields."""
    if entry.key.startswith("/") or ".." in entry.key.split("/"):
        yield "keys", "its key leads out of the data set's folder"
    values: dict[str, Any] = {}
    for name, (at, size) in entry.members.items():
        member = data[at : at + size]
        try:
            values[name] = codec.decode(name, member)
        except DataError as error:
            yield "fields", str(error)
            continue
        if name.endswith(".npy"):
            line = manifest.fields.get(line_of(name, manifest.fields), {})
            yield from wrong_in_array(name, member, values[name], line, codes)
    if manifest.kind == "latents":
        yield from wrong_members(entry, as_sample(entry.key, values), manifest)
    elif not any(name in IMAGES for name in entry.members) or not caption_in(values):
        yield "fields", "missing picture or caption"


def wrong_members(entry: IndexEntry, sample: dict[str, Any], manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(check, reason) where the members of a latent sample are not those of the manifest and of its captions."""
    several = [name for name, line in manifest.fields.items() if line.get("captions")]
    others = {
        f"{member_of(name.removesuffix('.npy'), caption)}.npy"
        for caption in others_of(captions_of(sample))
        for name in several
    }
    if missing := sorted((set(manifest.fields) | others) - set(entry.members)):
        yield "fields", f"it lacks {', '.join(missing)}"
    of_captions = {name for name in entry.members if line_of(name, manifest.fields) != name}
    if surplus := sorted(of_captions - others):
        yield "fields", f"its json has no caption for {', '.join(surplus)}"


def wrong_in_array(
    name: str, member: bytes, value: np.ndarray, field: Mapping[str, Any], codes: Codes
) -> Iterator[tuple[str, str]]:
    """(check, reason) for an array that does not match its line in the manifest: stored dtype, order, shape, values."""
    header, claimed = codec.array_header(member), field.get("dtype")
    yield from (("fields", reason) for reason in differing(name, header, field))
    if not header.dtype.isnative:
        yield "fields", f"{name} is {header.dtype.str}, not in the byte order of this machine"
    if header.fortran_order and len(header.shape) > 1:
        yield "fields", f"{name} is in Fortran order"
    if value.dtype.kind in "iuf":
        batch, known = {name.removesuffix(".npy"): value[None]}, None if codes.codebook is None else len(codes.codebook)
        yield from (("values", reason) for _, reason in unusable(batch, known, str(claimed)))


def check_constants(root: str, manifest: Manifest, findings: Findings) -> Codes:
    """Check null.safetensors and codebook.safetensors of latents: present, finite, of the fields' shapes."""
    findings.checks_run.add("constants")
    needed = ["null"] + ["codebook"] * ("indices.npy" in manifest.fields)
    found = {}
    for name in needed:
        path = storage.join(root, f"{name}.safetensors")
        try:
            found[name] = load(storage.read_bytes(path))
        except (SafetensorError, OSError):
            findings.add("constants", f"{path} is missing or damaged: {COPY}.")
    for name, value in found.get("null", {}).items():
        field = manifest.fields.get(f"{name}.npy", {})
        if list(value.shape) != list(field.get("shape", value.shape)) or not np.isfinite(value).all():
            findings.add(
                "constants", f"the null of {name} in {root} is not finite or not of its field's shape: {COPY}."
            )
    return Codes(found.get("codebook", {}).get("codebook"))


def check_accounting(root: str, processed: int, source: Manifest, findings: Findings) -> None:
    """Check a split of latents (its buckets together): processed + set aside = listed. root: where its aside/ lies."""
    path, aside = storage.join(root, "aside", "precompute.jsonl"), 0
    findings.checks_run.add("accounting")
    if storage.exists(path):
        aside = len([json.loads(line) for line in storage.read_bytes(path).splitlines()])
    if processed + aside != source.samples:
        findings.add(
            "accounting",
            f"{root} has {processed} samples and {aside} set aside, but {source.samples} were listed: {AGAIN}.",
        )
