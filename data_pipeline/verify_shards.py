"""Check a data set, shard by shard, and draw samples of it for a person to look at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from data_pipeline import storage
from data_pipeline.encoders import ImageEncoder
from data_pipeline.entry import entry
from data_pipeline.errors import DataError, UserError
from data_pipeline.image_transforms import centre_square
from data_pipeline.manifest import Manifest, find_splits
from data_pipeline.picture_grid import grid, save_png
from data_pipeline.progress import Progress
from data_pipeline.verify import Findings, check_shard, chosen_samples


class Belongings(NamedTuple):
    """What a latent data set says it was made by, as far as it is at hand."""

    image: ImageEncoder | None
    text: Any | None
    pictures: Mapping[str, str]  # split -> root of the image-text shards


@entry("verify_shards")
def main(cfg: DictConfig) -> None:
    if storage.is_s3(cfg.output):
        raise UserError(f"output={cfg.output}: the report is for people to look at; choose a local folder.")
    splits, output = find_splits(cfg.input), Path(cfg.output)
    belongings = Belongings(
        instantiate(cfg.autoencoder) if cfg.autoencoder.get("path") else None,
        instantiate(cfg.clip) if cfg.clip.get("path") else None,
        find_splits(cfg.shards) if cfg.shards else {},
    )
    reports = {name or "all": check_split(name, root, belongings) for name, root in sorted(splits.items())}
    for (name, report), root in zip(reports.items(), [root for _, root in sorted(splits.items())], strict=True):
        if cfg.samples:
            report |= draw(root, Manifest.load(root), belongings, cfg.samples, output / f"{name}.png")
    storage.write_atomically(output / "report.json", json.dumps(reports, indent=1).encode())
    say(reports, output)
    wrong = sum(len(report["findings"]) for report in reports.values())
    if wrong:
        raise DataError(
            f"{wrong} kinds of fault in {cfg.input}: the list above, and {output}/report.json, say what to do."
        )


def check_split(name: str, root: str, belongings: Belongings) -> dict[str, Any]:
    """Everything that can be checked of one data set."""
    manifest, findings = Manifest.load(root), Findings()
    check_origin(root, manifest, belongings, belongings.pictures.get(name), findings)
    keys: dict[str, str] = {}
    with Progress(f"verify {name or 'data set'}", manifest.samples, "samples") as bar:
        for shard in manifest.shards:
            check_shard(root, manifest, shard, keys, findings)
            bar.advance(shard.samples)
    return {
        "kind": manifest.kind,
        "shards": len(manifest.shards),
        "samples": len(keys),
        "listed": manifest.samples,
        "gigabytes": round(sum(shard.bytes for shard in manifest.shards) / 1e9, 4),
        "findings": findings.sentences(),
    }


def check_origin(
    root: str, manifest: Manifest, belongings: Belongings, pictures: str | None, findings: Findings
) -> None:
    """The encoders and pictures that are given are those that the latents were made of; the constants are there."""
    if manifest.kind != "latents":
        return
    made_of = manifest.fingerprints
    at_hand = {
        "autoencoder": getattr(belongings.image, "fingerprint", None),
        "text_encoder": getattr(belongings.text, "fingerprint", None),
        "images": Manifest.load(pictures, "image-text").fingerprint if pictures else None,
    }
    for what, mark in at_hand.items():
        if mark is not None and made_of.get(what, mark) != mark:
            findings.add(
                f"made of {what} {made_of[what]}, but {mark} was given: give the one, or precompute again", root
            )
    for constant in ("null.safetensors", *(["codebook.safetensors"] if "indices.npy" in manifest.fields else [])):
        if not storage.exists(storage.join(root, constant)):
            findings.add(f"no {constant}: run precompute_latents.py again", root)


def draw(root: str, manifest: Manifest, belongings: Belongings, count: int, path: Path) -> dict[str, Any]:
    """A grid of samples as PNG: pictures, or what the first stage makes of latents, beside the pictures if given."""
    try:
        samples = list(chosen_samples(root, manifest, count))
    except (DataError, OSError):
        return {}
    if manifest.kind == "image-text":
        pictures = [sample["image"] for sample in samples]
    elif belongings.image is not None and samples:
        pictures = decoded(samples, belongings.image)
    else:
        return {}
    originals = pictures_by_key(belongings.pictures, {s["key"] for s in samples}) if manifest.kind == "latents" else {}
    shown, labels, errors = [], [], []
    side = max(max(picture.shape[:2]) for picture in pictures)
    for sample, picture in zip(samples, pictures, strict=True):
        shown.append(padded(picture, side))
        labels.append(sample["caption"])
        if sample["key"] in originals and picture.shape[0] == picture.shape[1]:
            original = centre_square(originals[sample["key"]], picture.shape[0])
            errors.append(float(np.square(picture.astype(float) - original).mean()))
            shown.append(padded(original, side))
            labels.append("(the picture)")
    if shown:
        save_png(grid(shown, labels, columns=8, scale=max(1, 96 // side)), path)
    psnr = [10 * np.log10(255.0**2 / max(error, 1e-9)) for error in errors]
    return {"grid": str(path), **({"psnr_db": round(float(np.mean(psnr)), 2)} if psnr else {})}


@torch.no_grad()
def decoded(samples: list[dict[str, Any]], image: ImageEncoder) -> list[np.ndarray]:
    """(H, W, 3) uint8 of the mean of each stored posterior."""
    pictures = []
    for sample in samples:
        stored = np.asarray(sample[image.stored_as])
        wide = stored.astype(np.float32 if stored.dtype.kind == "f" else np.int64)
        mean, _ = image.posterior_of(torch.from_numpy(wide)[None])
        pixels = image.decode(mean)[0].permute(1, 2, 0).clamp(-1, 1)
        pictures.append(((pixels + 1) * 127.5).round().to(torch.uint8).numpy())
    return pictures


def pictures_by_key(roots: Mapping[str, str], keys: set[str]) -> dict[str, Any]:
    """The pictures of some samples, wherever they lie."""
    from PIL import Image

    found = {}
    for root in roots.values():
        manifest = Manifest.load(root, "image-text")
        for sample in chosen_samples(root, manifest, manifest.samples):
            if sample["key"] in keys:
                found[sample["key"]] = Image.fromarray(sample["image"])
    return found


def padded(picture: np.ndarray, side: int) -> np.ndarray:
    """(side, side, 3), white around."""
    canvas = np.full((side, side, 3), 255, np.uint8)
    canvas[: picture.shape[0], : picture.shape[1]] = picture
    return canvas


def say(reports: Mapping[str, Mapping[str, Any]], output: Path) -> None:
    """A table, then each finding."""
    print(f"{'split':<10} {'kind':<11} {'shards':>7} {'samples':>9} {'GB':>9}  PSNR dB  findings")
    for name, report in reports.items():
        psnr = f"{report['psnr_db']:.2f}" if "psnr_db" in report else ""
        print(
            f"{name:<10} {report['kind']:<11} {report['shards']:>7} {report['samples']:>9} {report['gigabytes']:>9.4f}"
            f"  {psnr:>7}  {len(report['findings']) or 'none'}"
        )
    for name, report in reports.items():
        for sentence in report["findings"]:
            print(f"  {name}: {sentence}")
    print(f"verify_shards: report and pictures in {output}")


if __name__ == "__main__":
    main()
