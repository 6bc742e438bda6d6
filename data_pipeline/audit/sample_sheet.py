"""Some samples of a data set on a sheet of pictures; latents are decoded, beside their originals, with PSNR."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from data_pipeline.audit.shard_checks import Findings
from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.images import pixels
from data_pipeline.images.formats import IMAGES
from data_pipeline.images.grid import grid
from data_pipeline.images.resize import fitted
from data_pipeline.shards import codec
from data_pipeline.shards.manifest import Manifest, Shard
from data_pipeline.shards.samples import (
    as_sample,
    captions_of,
    collated,
    fields_of,
    picture_in,
    size_of,
    without_other_pictures,
)
from data_pipeline.shards.tar_index import IndexEntry, read_index

APART_DB = 0.1  # how far the PSNR of stored latents may differ from that of the autoencoder's own reconstruction
BEST_DB = 45.0  # above this, latents stored in few bits may differ by more without being visible
SIDE, LARGEST = 128, 320  # pixels of the longer side of a picture on the sheet: about the least, and the most
ALIKE_DB = 30.0  # PSNR between the two; float16 gives over 50


class Drawing(NamedTuple):
    """The autoencoder (posterior_of, decode, reconstruct) where there is one."""

    image: Any
    device: torch.device

    def can_decode(self, manifest: Manifest) -> bool:
        return self.image is not None or "pixels.npy" in manifest.fields

    @torch.no_grad()
    def decoded(self, sample: dict[str, Any]) -> np.ndarray:
        """The picture of a latent sample, (H, W, 3) uint8: its posterior's mean, decoded."""
        if self.image is None:
            return pixels.to_uint8(collated([{"pixels": sample["pixels"]}])["pixels"].numpy())[0]
        name = self.image.stored_as
        if name not in sample:
            raise DataError(f"it has no {name}, which this autoencoder decodes")
        try:
            mean, _ = self.image.posterior_of(collated([{name: sample[name]}])[name].to(self.device))
            return pixels.to_uint8(self.image.decode(mean).float().cpu().numpy())[0]
        except (RuntimeError, IndexError) as error:
            raise DataError(f"its {name} don't fit this autoencoder ({str(error).splitlines()[0]})") from error

    @torch.no_grad()
    def reconstructed(self, picture: np.ndarray) -> np.ndarray:
        """The autoencoder's own reconstruction of a picture (H, W, 3) uint8."""
        if self.image is None:
            return picture
        image = collated([{"image": picture}])["image"].to(self.device)
        return pixels.to_uint8(self.image.reconstruct(image).float().cpu().numpy())[0]


class SampleInspection(NamedTuple):
    """A sheet (PNG); where latents were decoded beside their originals, the mean PSNR to them of the stored latents and
    of the autoencoder's own reconstructions."""

    sheet: bytes
    psnr: float | None = None
    own_psnr: float | None = None


def inspect_samples(
    root: str, manifest: Manifest, source: str | None, count: int, drawing: Drawing, findings: Findings
) -> SampleInspection | None:
    """Draw `count` evenly spaced samples; None if none of them can be drawn. source: the data set of the originals."""
    findings.checks_run.add("decoding")
    pictures, labels, psnr, own, alike = [], [], [], [], []
    originals = Originals(source) if source else None
    for shard, number in evenly(manifest, count):
        try:
            sample = sample_at(root, manifest, shard, number)
            if manifest.kind == "image-text":
                side = size_of(manifest) or SIDE
                pictures.append(fitted(sample["image"], (side, side)).pixels)
                labels.append(label_of(sample))
                continue
            picture = drawing.decoded(sample)
            if originals:
                original = originals.of(shard, sample, picture.shape[:2])
                psnr.append(float(pixels.psnr(picture[None], original[None])[0]))
                reconstructed = drawing.reconstructed(original)
                own.append(float(pixels.psnr(reconstructed[None], original[None])[0]))
                alike.append(float(pixels.psnr(picture[None], reconstructed[None])[0]))
                pictures += [picture, original]
                labels += [f"{label_of(sample)} ({psnr[-1]:.1f} dB)", "(original)"]
            else:
                pictures.append(picture)
                labels.append(label_of(sample))
        except (DataError, OSError) as error:
            findings.add("decoding", f"sample {number} of {storage.join(root, shard.name)}: {str(error).rstrip('.')}.")
    if not pictures:
        return None
    if psnr:
        refuse_others(root, *(float(np.minimum(each, BEST_DB).mean()) for each in (psnr, own, alike)), findings)
    means = (float(np.mean(psnr)), float(np.mean(own))) if psnr else (None, None)
    return SampleInspection(sheet_of(pictures, labels), *means)


def label_of(sample: dict[str, Any]) -> str:
    """The first caption, and how many more there are."""
    more = len(captions_of(sample)) - 1
    return f"{sample['caption']} (+{more} more)" if more > 0 else sample["caption"]


def evenly(manifest: Manifest, count: int) -> list[tuple[Shard, int]]:
    """(shard, sample in it) of `count` samples, evenly spaced."""
    ends = np.cumsum([shard.samples for shard in manifest.shards])
    chosen = np.linspace(0, manifest.samples, min(count, manifest.samples), endpoint=False).astype(int)
    shards = np.searchsorted(ends, chosen, side="right")
    return [
        (manifest.shards[i], int(n - ends[i] + manifest.shards[i].samples)) for i, n in zip(shards, chosen, strict=True)
    ]


def sample_at(root: str, manifest: Manifest, shard: Shard, number: int) -> dict[str, Any]:
    """One sample, read without the rest of its shard."""
    entry = without_other_pictures(read_index(root, shard)[number])
    names = [name for name in entry.members if name in fields_of(manifest)]
    members = {name: codec.decode(name, member(root, shard, entry, name)) for name in names}
    if manifest.kind == "image-text" and not any(name in IMAGES for name in members):
        raise DataError("missing picture")
    return as_sample(entry.key, members)


def member(root: str, shard: Shard, entry: IndexEntry, name: str) -> bytes:
    at, size = entry.members[name]
    return storage.read_bytes(storage.join(root, shard.name), at, size)


class Originals:
    """The pictures that latents were made from, by key: in the shard of the same name."""

    def __init__(self, root: str) -> None:
        self.root, self.manifest = root, Manifest.load(root, "image-text")
        self.shards = {shard.name: shard for shard in self.manifest.shards}

    def of(self, shard: Shard, sample: dict[str, Any], sides: Sequence[int]) -> np.ndarray:
        """(H, W, 3) uint8 at `sides`, as precompute saw it. DataError: it is missing, or not the encoded picture."""
        source = self.shards.get(shard.name)
        entries = {entry.key: entry for entry in read_index(self.root, source)} if source else {}
        found = entries.get(sample["key"])
        if found is None or (name := picture_in(found)) is None:
            raise DataError(f"{sample['key']} is not in {self.root}: set shards= to the data set that it was made from")
        data = member(self.root, source, found, name)
        noted = sample["meta"].get("image_sha256")
        if noted and noted != hashlib.sha256(data).hexdigest()[:16]:
            raise DataError(f"{sample['key']} was made from another picture than that in {self.root}: encode it again")
        return fitted(codec.decode(name, data), tuple(sides)).pixels


def refuse_others(root: str, psnr: float, own: float, alike: float, findings: Findings) -> None:
    """Report latents that don't decode to the autoencoder's own reconstructions: another autoencoder made them."""
    if abs(psnr - own) > APART_DB or alike < ALIKE_DB:
        findings.add(
            "decoding",
            f"latents of {root} decode with a PSNR of {psnr:.2f} dB, but the autoencoder's own reconstructions have "
            f"{own:.2f} dB ({alike:.2f} dB between the two): encode them again.",
        )


def sheet_of(pictures: Sequence[np.ndarray], labels: Sequence[str]) -> bytes:
    """A PNG of up to eight pictures a row, captions below; small pictures are enlarged, large ones reduced."""
    buffer, longest = io.BytesIO(), max(pictures[0].shape[:2])
    if longest > LARGEST:
        pictures = [reduced(picture, LARGEST / longest) for picture in pictures]
    scale, columns = max(1, SIDE // longest), min(8, len(pictures))
    grid(pictures, labels, columns=columns, scale=scale, narrowest=SIDE).save(buffer, format="PNG")
    return buffer.getvalue()


def reduced(picture: np.ndarray, by: float) -> np.ndarray:
    """A picture (H, W, 3) whose sides are scaled by `by`."""
    height, width = (max(1, round(side * by)) for side in picture.shape[:2])
    return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))
