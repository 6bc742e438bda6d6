"""make_shards.py buckets= and resize=: each picture at the size of its bucket, as crop, pad and stretch say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from entered import entered
from PIL import Image

from data_pipeline.common.errors import UserError
from data_pipeline.images.decode import Picture
from data_pipeline.images.framing import Framing
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reader import read_shard

SIDES = {"square": (40, 40), "wide": (32, 80), "tall": (61, 30)}  # height, width
CROPS = {"square": [0, 0], "wide": [0, 10], "tall": [4, 0]}  # of 24x60 and 49x24
BUCKETS = ["buckets=auto", "size=32", "bucket_step=8"]  # 32x32, 24x40 and 40x24


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A left half in red, a right half in blue, of three shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, (height, width) in SIDES.items():
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[:, : width // 2, 0], pixels[:, width // 2 :, 2] = 255, 255
        Image.fromarray(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    return folder


def made(pictures: Path, output: Path, *options: str) -> dict[str, dict]:
    done = entered("data_pipeline/make_shards", "source=folder", f"input={pictures}", f"output={output}",
                   "heldout_every=null", *options)  # fmt: skip
    assert done.code == 0, done.error
    assert ("buckets with pictures (height x width, number): 24x40 (1), 32x32 (1), 40x24 (1)" in done.said) == (
        "buckets=auto" in options
    )
    (shard,) = Manifest.load(output / "train").shards
    return {sample["__key__"]: sample for sample in read_shard(output / "train", shard)}


def test_each_picture_gets_the_size_of_its_bucket_and_keeps_it(pictures: Path, tmp_path: Path) -> None:
    samples = made(pictures, tmp_path / "shards", *BUCKETS)
    shapes = {key: sample["png"].shape[:2] for key, sample in samples.items()}
    assert shapes == {"square": (32, 32), "wide": (24, 40), "tall": (40, 24)}
    sides = {key: (s["json"]["original_height"], s["json"]["original_width"]) for key, s in samples.items()}
    assert sides == SIDES
    encode = ["data_pipeline/precompute_latents", f"input={tmp_path}/shards", "autoencoder=identity", "conditions=[]"]
    done = entered(*encode, f"output={tmp_path}/latents", *BUCKETS)
    assert done.code == 0, done.error
    assert "squares" not in done.said
    squares = entered(*encode, f"output={tmp_path}/squares")
    assert (
        "without buckets= they are all cut to squares now; to keep them whole, add buckets=auto size=32 bucket_step=8"
        in (squares.said)
    )
    for key, (height, width) in shapes.items():
        root = tmp_path / f"latents/{height}x{width}/train"
        (sample,) = read_shard(root, Manifest.load(root).shards[0])
        assert (sample["__key__"], sample["json"]["crop_top_left"]) == (key, CROPS[key])
        assert tuple(sample["json"]["original_size"]) == SIDES[key]


@pytest.mark.parametrize("resize", ["pad", "stretch"])
def test_nothing_of_a_picture_is_lost(pictures: Path, tmp_path: Path, resize: str) -> None:
    wide = made(pictures, tmp_path, f"resize={resize}", "size=40", "source.background=00ff00")["wide"]["png"]
    inner = wide[12:28] if resize == "pad" else wide
    assert wide.shape == (40, 40, 3)
    assert (inner[:, :16] == (255, 0, 0)).all()
    assert (inner[:, 24:] == (0, 0, 255)).all()
    if resize == "pad":
        assert (np.concatenate([wide[:12], wide[28:]]) == (0, 255, 0)).all()


def test_by_default_the_middle_is_kept_and_nothing_is_written_beside_it(pictures: Path, tmp_path: Path) -> None:
    wide = made(pictures, tmp_path, "size=32")["wide"]
    assert wide["png"].shape == (32, 32, 3)
    assert (wide["png"][:, 0] == (255, 0, 0)).all()
    assert wide["json"].keys() == {"file"}


def test_a_picture_of_the_right_size_stays_as_it_is() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    for resize in ("crop", "pad", "stretch"):
        assert np.array_equal(Framing(8, resize=resize).applied(Picture(pixels)).pixels, pixels)


def test_an_unknown_way_is_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="resize=fit is not valid: use crop, pad or stretch"):
        Framing(8, resize="fit")
    done = entered("data_pipeline/make_shards", "source=folder", f"input={pictures}", f"output={tmp_path}", "size=32",
                   "buckets=auto")  # fmt: skip
    assert (done.code, "leave no bucket but the square: lower bucket_step" in done.error) == (2, True)
    assert not list(tmp_path.iterdir())
