"""The whole chain in buckets, as a user types it, through a proxy that spoils every fifth answer."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from synthetic import losses, run

from data_pipeline.common import storage
from data_pipeline.shards.manifest import Manifest

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("s3")]

FEW = ["training.steps=2", "training.batch_size=8", "training.log_every=1", "training.wandb_project=null"]
SMALL = ["unet.channels=[16,32]", "unet.heads=2", "unet.norm_groups=8", "unet.context_dim=32", "unet.vector_dim=128",
         "sampler.steps=2", "preview_samples=4", "preview_every=2", "validate_every=2"]  # fmt: skip
SPOILT = [*[""] * 4, "slow down", *[""] * 4, "short", *[""] * 4, "reset", *[""] * 4, "500"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(32):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"thing {number}")
    return folder


@pytest.mark.timeout(600)
def test_the_chain_runs_in_a_bucket_and_tells_no_key(bucket, proxy, server, pictures, tmp_path):
    proxy.faults.extend(itertools.chain.from_iterable(itertools.repeat(SPOILT, 500)))
    said, store = [], f"s3://{bucket}"
    clip = [f"clip.path={tmp_path}/clip"]
    outputs = {
        "data_pipeline/make_shards.py": ["source=folder", f"input={pictures}", f"output={store}/shards", "size=64",
                                         "shard_size=6", "heldout_every=5"],
        "train/train_clip.py": [f"input={store}/shards", f"output={tmp_path}/clip", *FEW, "clip.text.width=32",
                                "clip.text.layers=1", "clip.vision.layers=1"],
        "data_pipeline/precompute_latents.py": [f"input={store}/shards", f"output={store}/latents",
                                                "autoencoder=identity", *clip],
        "train/train_ldm.py": [f"input={store}/latents", f"output={tmp_path}/ldm", "experiment=pixel_space", *clip,
                               *FEW, *SMALL, "data.num_workers=1", f"store.cache={tmp_path}/cache", "store.cache_gb=1",
                               f"training.checkpoints={store}/runs/ldm", "training.power_ema=[0.05,0.1]"],
        "train/evaluate_ldm.py": [f"input={tmp_path}/ldm", f"shards={store}/shards", "captions=4",
                                  "heldout_captions=2"],
        "train/rebuild_ema.py": [f"input={tmp_path}/ldm", f"output={tmp_path}/rebuilt.safetensors", "sigma_rel=0.07"],
        "train/sample_images.py": [f"input={tmp_path}/ldm", f"step={tmp_path}/rebuilt.safetensors", "prompts=thing 1"],
    }  # fmt: skip
    for script, options in outputs.items():
        done = run(script, *options)
        said.append(done.stdout + done.stderr)
    assert set(losses(tmp_path / "ldm")) == {1, 2}
    assert not list((tmp_path / "ldm").rglob("*.safetensors.*")) + list((tmp_path / "ldm").rglob("part-*"))
    assert (tmp_path / "ldm/drawn/grid.png").exists()
    for name in ("shards", "latents"):
        assert sum(Manifest.load(f"{store}/{name}/{split}").samples for split in ("train", "heldout")) == 32
    assert len(list((tmp_path / "cache").glob("*.tar"))) > 1
    contents = said + [text(path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()]
    found = server.client().list_objects_v2(Bucket=bucket)["Contents"]
    proxy.faults.clear()
    contents += [text(storage.read_bytes(f"{store}/{entry['Key']}")) for entry in found]
    assert len(found) > 20
    assert not [content for content in contents if server.secret in content or server.key in content]


def text(data: bytes) -> str:
    return data.decode("latin-1")


def test_wrong_keys_end_a_run_with_one_sentence(bucket, server, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong" + server.secret)
    done = run("train/train_clip.py", f"input=s3://{bucket}/shards", f"output={tmp_path}/clip", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: s3://")
    assert done.stderr.count("\n") == 1
    assert "AWS_SECRET_ACCESS_KEY" in done.stderr
    assert server.secret not in done.stdout + done.stderr
    assert server.key not in done.stdout + done.stderr
    assert not (tmp_path / "clip").exists()
