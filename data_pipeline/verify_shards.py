"""Check a data set of pictures or latents, and draw some of it for a person to look at. Exit code 0, or 3 if wrong."""

from __future__ import annotations

from data_pipeline.common.entry import start_entry

if __name__ == "__main__":
    start_entry("data_pipeline.verify_shards")  # checks the options, runs main() and exits

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from data_pipeline.audit.sample_sheet import Drawing, SampleInspection, inspect_samples
from data_pipeline.audit.shard_checks import (
    AGAIN,
    CHECKS,
    Codes,
    Findings,
    check_accounting,
    check_claims,
    check_constants,
    check_shard,
)
from data_pipeline.common import storage
from data_pipeline.common.device import chosen_device
from data_pipeline.common.errors import DataError, UserError
from data_pipeline.common.finite_json import json_of
from data_pipeline.common.progress import Progress
from data_pipeline.common.saved_names import named
from data_pipeline.encode.encoders import TEXT_ENCODERS, TextEncoder
from data_pipeline.shards.key_set import KnownKeys
from data_pipeline.shards.manifest import Manifest, find_splits


class DataSet(NamedTuple):
    """A split (or a bucket's split) to check, and what was found; source: where its pictures come from."""

    name: str
    root: str
    manifest: Manifest
    findings: Findings
    source: str | None = None

    @property
    def title(self) -> str:
        return self.name or "samples"


def main(cfg: DictConfig) -> None:
    if cfg.every < 1 or cfg.samples < 0:
        raise UserError(f"every={cfg.every} must be 1 or more, and samples={cfg.samples} must be 0 or more.")
    if storage.absolute(cfg.output) == storage.absolute(cfg.input):
        raise UserError(f"output={cfg.output} is the same folder as input=: choose another one for the report.")
    device = chosen_device(cfg.device)
    image = instantiate(cfg.autoencoder).to(device) if cfg.autoencoder.get("path") else None
    texts = {name: instantiate(cfg[name]) for name in TEXT_ENCODERS if cfg[name].path}
    sets = opened(cfg.input, cfg.shards)
    known, seen = KnownKeys(), {}
    with Progress("verify_shards", sum(each.manifest.samples for each in sets), "samples") as bar:
        for each in sets:
            check_set(each, cfg.every, known, bar)
    agree(sets)
    check_buckets(sets, cfg.input)
    for each in sets:
        check_encoders(each, image and image.fingerprint, texts)
        if cfg.samples:
            seen[each.name] = drawn(each, cfg, Drawing(image, device))
    report(sets, seen, cfg)


def opened(root: str, shards: str | None) -> list[DataSet]:
    """The splits of a data set; or those of its buckets, one folder deeper. A damaged manifest is a finding."""
    try:
        found = find_splits(root)
    except UserError:
        found = {}
        for bucket in storage.subfolders(root):
            below = storage.join(root, bucket)
            splits = {name: storage.join(below, name) for name in storage.subfolders(below)}
            found |= {
                f"{bucket}/{name}": path
                for name, path in splits.items()
                if storage.exists(storage.join(path, "manifest.json"))
            }
        if not found:
            raise
    sources = find_splits(shards) if shards else {}
    sets = []
    for name, path in sorted(found.items(), reverse=True):  # train before heldout
        split = name.rpartition("/")[2]
        if shards and split not in sources:
            raise UserError(f"shards={shards} has no {split or 'manifest'}: use the data set {path} was made from.")
        manifest, findings = Manifest("damaged", ()), Findings()
        try:
            manifest = Manifest.load(path)
        except DataError as error:
            findings.add("manifest", str(error))
        source = sources.get(split) if manifest.kind == "latents" else None
        sets.append(DataSet(name, path, manifest, findings, source))
    return sets


def check_set(data: DataSet, every: int, known: KnownKeys, bar: Progress) -> None:
    """Check everything that the files say of themselves; `known`: the keys of all splits so far."""
    manifest, findings, codes = data.manifest, data.findings, Codes()
    if manifest.kind == "damaged":
        return
    check_claims(data.root, manifest, findings)
    if manifest.kind == "latents":
        codes = check_constants(data.root, manifest, findings)
    for number, shard in enumerate(manifest.shards):
        if number % every == 0:
            keys = check_shard(data.root, shard, manifest, codes, findings)
            findings.checks_run.add("keys")
            for key, again in zip(keys, known.contains(keys), strict=True):
                if again:
                    where = storage.join(data.root, shard.name)
                    findings.add("keys", f"{key} of {where} is a duplicate key: rename it in the source, and {AGAIN}.")
        bar.advance(shard.samples, wrong=str(findings.counts.total()))
    if data.source:
        source = Manifest.load(data.source, "image-text")
        refuse_others(data, {"images": source.fingerprint}, "shards=")
        if "/" not in data.name:  # a bucket holds only a part of the samples: check_buckets adds them up
            check_accounting(data.root, manifest.samples, source, findings)


def agree(sets: list[DataSet]) -> None:
    """Check that all splits were made by the same encoders."""
    latents = [each for each in sets if each.manifest.kind == "latents"]
    for each in latents[1:]:
        first = {name: mark for name, mark in latents[0].manifest.fingerprints.items() if name != "images"}
        other = {name: mark for name, mark in each.manifest.fingerprints.items() if name != "images"}
        each.findings.checks_run.add("fingerprints")
        if first != other:
            differing = ", ".join(sorted(name for name in {**first, **other} if first.get(name) != other.get(name)))
            each.findings.add("fingerprints", f"{each.root} differs from {latents[0].root} in {differing}: {AGAIN}.")


def check_buckets(sets: Sequence[DataSet], root: str) -> None:
    """For latents in buckets, check the samples of all buckets of a split against those of its source."""
    splits = {each.name.rpartition("/")[2]: each for each in sets if "/" in each.name and each.source}
    for split, first in splits.items():
        parts = [each for each in sets if each.name.rpartition("/")[2] == split]
        source = Manifest.load(first.source, "image-text")
        work = storage.join(root, "work", split)
        check_accounting(work, sum(each.manifest.samples for each in parts), source, first.findings)
        for each in parts:
            each.findings.checks_run.add("accounting")


def check_encoders(data: DataSet, autoencoder: str | None, texts: Mapping[str, TextEncoder]) -> None:
    """Check that latents and text states are the given encoders'; for their states of "", compare all values. texts: by
    their groups in conf/."""
    if data.manifest.kind != "latents":
        return
    given = {"autoencoder": autoencoder} | {TEXT_ENCODERS[name]: text.fingerprint for name, text in texts.items()}
    options = "autoencoder.path=, clip.path=, text_encoder.path="
    refuse_others(data, {name: mark for name, mark in given.items() if mark}, options)
    conditions = named(data.manifest.info.get("conditions") or {})
    for name, usual in (("text", "clip"), ("text_t5", "text_encoder")):
        text = texts.get(conditions.get(name, {}).get("encoder", usual))
        if text is not None and f"{name}.npy" in data.manifest.fields:
            check_null(data, name, text)


def check_null(data: DataSet, name: str, text: TextEncoder) -> None:
    """Compare the stored states of the empty prompt with the encoder's."""
    from safetensors.torch import load

    null = load(storage.read_bytes(storage.join(data.root, "null.safetensors")))
    data.findings.checks_run.add("constants")
    states = text.encode_text([""])
    count = int(null.get(f"{name}_length", len(null[name])))  # those of padding may be masked
    if null[name].shape != states.tokens[0].shape or not torch.allclose(
        null[name][:count], states.tokens[0, :count].cpu(), atol=1e-4
    ):
        data.findings.add(
            "constants", f"the null of {data.root} is not this text encoder's state of the empty prompt: {AGAIN}."
        )


def refuse_others(data: DataSet, given: Mapping[str, str], options: str) -> None:
    """Add a finding for each fingerprint that differs from the given one."""
    for name, mark in given.items():
        data.findings.checks_run.add("fingerprints")
        has = data.manifest.fingerprints.get(name)
        if has != mark:
            data.findings.add(
                "fingerprints",
                f"{data.root} was made with {name} {has}, not {mark}: use what made it ({options}), or {AGAIN}.",
            )


def drawn(data: DataSet, cfg: DictConfig, drawing: Drawing) -> SampleInspection | None:
    """Write the sheet of pictures <output>/<name>.png; returns what was measured on it."""
    if data.manifest.kind == "damaged" or (data.manifest.kind == "latents" and not drawing.can_decode(data.manifest)):
        return None
    seen = inspect_samples(data.root, data.manifest, data.source, cfg.samples, drawing, data.findings)
    if seen is not None:
        storage.write_atomically(storage.join(cfg.output, data.title.replace("/", "_") + ".png"), seen.sheet)
    return seen


def report(sets: list[DataSet], seen: Mapping[str, SampleInspection | None], cfg: DictConfig) -> None:
    """Write <output>/report.json, print the findings and a table; DataError if anything is wrong."""
    about = {each.title: described(each, seen.get(each.name)) for each in sets}
    wrong = sum(each.findings.counts.total() for each in sets)
    content = {"input": cfg.input, "every": cfg.every, "wrong": wrong, "sets": about}
    storage.write_atomically(storage.join(cfg.output, "report.json"), json_of(content))
    for each in sets:
        for check, sentences in each.findings.sentences.items():
            more = each.findings.counts[check] - len(sentences)
            for sentence in [*sentences, *([f"and {more} more like these"] if more else [])]:
                print(f"{each.title}, {check}: {sentence}")
    print(table(sets, seen))
    if wrong:
        raise DataError(f"{wrong} faults in {cfg.input}: the list above and {cfg.output}/report.json say what to do.")
    print(f"verify_shards: no faults; report.json in {cfg.output}")


def described(data: DataSet, seen: SampleInspection | None) -> dict[str, Any]:
    manifest, findings = data.manifest, data.findings
    return {
        "kind": manifest.kind,
        "samples": manifest.samples,
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "fields": manifest.fields,
        "fingerprints": {"data": manifest.fingerprint, **manifest.fingerprints},
        "checks": {check: findings.state(check) for check in CHECKS},
        "findings": findings.sentences,
        "psnr_db": seen.psnr if seen else None,
        "autoencoders_own_psnr_db": seen.own_psnr if seen else None,
    }


def table(sets: list[DataSet], seen: Mapping[str, SampleInspection | None]) -> str:
    """One column per data set, one row per fact or check."""
    rows = [["", *(each.title for each in sets)]]
    rows.append(["kind", *(each.manifest.kind for each in sets)])
    rows.append(["samples", *(f"{each.manifest.samples:,}" for each in sets)])
    rows.append(["shards", *(f"{len(each.manifest.shards):,}" for each in sets)])
    sizes = [sum(shard.bytes for shard in each.manifest.shards) / 2**20 for each in sets]
    rows.append(["MiB", *(f"{size:,.1f}" for size in sizes)])
    rows += [[check, *(each.findings.state(check) for each in sets)] for check in CHECKS]
    if any(each and each.psnr is not None for each in seen.values()):
        shown = [seen.get(each.name) for each in sets]
        rows.append(["PSNR", *(f"{each.psnr:.2f} dB" if each and each.psnr is not None else "-" for each in shown)])
    widths = np.array([[len(cell) for cell in row] for row in rows]).max(0)
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
