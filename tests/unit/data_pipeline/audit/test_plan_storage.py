"""The storage planner against what is really written, and against closed forms."""

import json

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from synthetic import run

from data_pipeline.audit.storage_cost import (
    HEADINGS,
    Rates,
    Row,
    StorageLayout,
    array_bytes,
    deduplicated,
    duration,
    field_bytes,
    index_bytes,
    json_of,
    shard_bytes,
    tar_bytes,
    words,
)
from data_pipeline.common.entry import CONF
from data_pipeline.common.errors import UserError
from data_pipeline.encode.batch_encoder import Encoders
from data_pipeline.encode.caption_cache import CaptionCache
from data_pipeline.encode.latent_dataset import SplitToEncode
from data_pipeline.encode.latent_shard import OutputPaths
from data_pipeline.encode.shard_reader import ShardReader
from data_pipeline.encode.split_encoder import encode_split
from data_pipeline.images.aspect_buckets import sizes_of
from data_pipeline.plan_storage import compare_with_measured, encoders_of, layouts_of, refuse_impossible, table
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.writer import ShardWriter

SIDES = (64, 64)


def composed(*options):
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("plan_storage", list(options))


def encoders(cfg, device, dtype="float16", flips=False):
    with torch.device(device):
        image, clip = instantiate(cfg.autoencoder), instantiate(cfg.clip)
    image.fingerprint = clip.fingerprint = "random"
    conditions = instantiate(cfg.conditions, _convert_="all")
    return Encoders(image.eval(), CaptionCache(clip.eval(), 4), conditions, torch.device(device), 4, dtype, flips)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten pictures in two shards, with all that conditions ask for."""
    root, shards = tmp_path_factory.mktemp("images"), []
    for count in (7, 3):
        writer = ShardWriter()
        for i in range(count):
            picture = np.random.default_rng(i).integers(0, 256, (*SIDES, 3), dtype=np.uint8)
            meta = {"group": "a", "boxes": [["thing", 0.0, 0.0, 1.0, 1.0]]}
            writer.add(f"{len(shards)}{i:08d}", {"png": picture, "txt": f"thing {i}", "json": meta})
        shards.append(writer.publish(root, f"shards/{len(shards):06d}.tar"))
    Manifest("image-text", tuple(shards), {}, {"size": SIDES[0]}).save(root)
    return root


def written(images, output, using):
    """What precompute makes of the pictures."""
    source, sizes = Manifest.load(images), sizes_of(None, None, 64, using.image.factor)
    for condition in using.conditions.values():
        condition.learn([{"meta": {"group": "a", "boxes": [["thing", 0.0, 0.0, 1.0, 1.0]]}}])
    encode_split(SplitToEncode("", source, OutputPaths(str(output)), ShardReader(str(images), using, sizes)))
    return Manifest.load(output)


CHOICES = [
    ("kl_f4_demo", "[text]", "float16", False),
    ("kl_f4_demo", "[text,label,layout,image_embedding,low_resolution,hole]", "bfloat16", True),
    ("vq_f4_demo", "[text,image_embedding]", "float32", True),
    ("identity", "[]", "float32", False),
]


@pytest.mark.parametrize(("autoencoder", "conditions", "dtype", "flips"), CHOICES)
def test_planned_is_what_precompute_writes(images, tmp_path, autoencoder, conditions, dtype, flips):
    cfg = composed(f"autoencoder={autoencoder}", "clip=demo", f"conditions={conditions}")
    manifest = written(images, tmp_path, encoders(cfg, "cpu", dtype, flips))
    members = field_bytes(encoders(cfg, "meta", dtype, flips), SIDES) | {"json": json_of(7, 60, SIDES)}
    assert members.keys() == manifest.fields.keys()
    planned = [shard_bytes(tar_bytes(members), shard.samples) for shard in manifest.shards]
    assert planned == [shard.bytes for shard in manifest.shards]
    indices = sum((tmp_path / shard.index_name).stat().st_size for shard in manifest.shards)
    on_disk = sum(shard.bytes for shard in manifest.shards) + indices
    assert sum(planned) + manifest.samples * index_bytes(members) == pytest.approx(on_disk, rel=0.02)


def test_several_captions_are_planned_as_they_are_written(tmp_path):
    captions, writer = {str(i): f"thing {i}" for i in range(3)}, ShardWriter()
    for i in range(5):
        picture = np.random.default_rng(i).integers(0, 256, (*SIDES, 3), dtype=np.uint8)
        writer.add(f"{i:09d}", {"png": picture, "txt": "thing 0", "json": {"captions": captions}})
    shard = writer.publish(tmp_path / "images", "shards/000000.tar")
    Manifest("image-text", (shard,), {}, {"size": SIDES[0]}).save(tmp_path / "images")
    options = ["autoencoder=kl_f4_demo", "clip=demo", "captions=3", "caption_bytes=7", "beside=[]", "size=64"]
    cfg = composed(*options, f"input={tmp_path}/latents")
    manifest = written(tmp_path / "images", tmp_path / "latents", encoders(cfg, "cpu"))
    planned = layouts_of(cfg, encoders_of(cfg, "kl_f4_demo"), 5)
    assert [shard_bytes(planned[0].sample, 5)] == [each.bytes for each in manifest.shards]
    assert {name for name in planned[0].members if name.startswith("text")} == {"text.npy", "text.1.npy", "text.2.npy"}
    assert compare_with_measured(cfg, planned[0])["planned_bytes"] == manifest.shards[0].bytes
    assert planned[1].looked_up == sum(planned[0].members[name] for name in ("text.npy", "pooled.npy"))
    assert planned[1].shared == 5 * 3 * planned[1].looked_up
    cfg.captions = 2
    with pytest.raises(UserError, match="has 3 captions per picture: set captions=3"):
        compare_with_measured(cfg, planned[0])


@pytest.mark.parametrize("seed", range(4))
def test_tars_to_the_byte(tmp_path, seed):
    """Members of any size, any number of samples: headers, filled-up blocks, the end's mark and the last record."""
    random = np.random.default_rng(seed)
    sizes = {f"{letter}.txt": int(random.integers(0, 3000)) for letter in "abc"[: seed + 1]}
    sizes |= {"edge.txt": 512 * seed}
    for samples in (1, 2, 17, 40):
        writer = ShardWriter()
        for i in range(samples):
            writer.add(f"{i:09d}", {name: "x" * size for name, size in sizes.items()})
        shard = writer.publish(tmp_path, f"{samples}.tar")
        assert shard_bytes(tar_bytes(sizes), samples) == shard.bytes


def test_stable_diffusions_layout():
    """4 x 64 x 64 latents, means and log-variances, 77 x 768 text states; a .npy's header has 128 bytes."""
    cfg = composed()
    fields = field_bytes(encoders(cfg, "meta"), (512, 512))
    assert fields == {
        "moments.npy": 128 + 2 * 2 * 4 * 64 * 64,
        "text.npy": 128 + 2 * 77 * 768,
        "pooled.npy": 128 + 2 * 768,
    }
    vq = field_bytes(encoders(composed("autoencoder=vq_f8", "conditions=[]"), "meta"), (512, 512))
    assert vq == {"indices.npy": 128 + 4 * 64 * 64}
    assert array_bytes((3, 5), "bfloat16", True) == 128 + 2 * 15
    assert array_bytes((3, 5), "float16", False) == 128 + 4 * 15


def test_shards_and_bytes_of_a_layout():
    layout = StorageLayout("a", {"npy": 1000, "json": 40})  # 512 + 1024 and 512 + 512 in the tar
    assert layout.sample == 2560
    assert layout.per_shard(256_000) == (256_000 - 1024) // 2560 == 99
    full, last = -(-(99 * 2560 + 1024) // 10240) * 10240, 10240
    assert layout.total(2 * 99 + 2, 256_000) == 2 * full + last + 200 * index_bytes(layout.members)
    assert layout.per_shard(100) == 1
    figures = Row(layout, 200, 256_000, Rates(10.0, 8, 3)).figures
    assert figures["shards"] == 3
    assert (figures["bytes_per_s_of_a_node"], figures["bytes_per_s_of_all"]) == (80 * 2560, 240 * 2560)


def test_text_once_a_caption_saves_room_and_no_bandwidth():
    members = {"moments.npy": 4096, "text.npy": 8192, "json": 100}
    layout = deduplicated("a", members, ["text.npy"], images=1000, unique=0.25)
    assert layout.members == {"moments.npy": 4096, "json": 100, "row.npy": 132}
    assert layout.shared == 250 * 8192
    assert layout.read == layout.sample + 8192


def test_numbers_to_be_read():
    assert [words(n) for n in (999, 1000, 66_560, 132_000, 6.66e12, 2.5e18)] == [
        "999 B", "1 kB", "66.6 kB", "132 kB", "6.66 TB", "2.5e+03 PB"]  # fmt: skip
    assert [duration(s) for s in (3, 119, 120, 7199, 7200, 172_800)] == [
        "3.0 s", "119.0 s", "2.0 min", "120.0 min", "2.0 h", "2.0 days"]  # fmt: skip
    lines = table([Row(StorageLayout("a", {"txt": 1}), 10, 1000, Rates(1.0, 1, 1))]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.count("|") for line in lines] == [len(HEADINGS) + 1] * 3


@pytest.mark.parametrize(
    ("option", "said"),
    [("images=0", "images=0"), ("images=many", "images=many"), ("dtype=int8", "use one of"), ("size=-1", "size=-1"),
     ("unique_captions=0", "at most 1"), ("training.nodes=0", r"training\.nodes"), ("shard_mb=0", "shard_mb=0")],
)  # fmt: skip
def test_what_can_not_be_planned(option, said):
    with pytest.raises(UserError, match=said):
        refuse_impossible(composed(option))


@pytest.mark.processes
def test_the_entry_point_beside_a_data_set_that_was_written(images, tmp_path):
    cfg = composed("autoencoder=kl_f4_demo", "clip=demo")
    manifest = written(images, tmp_path / "latents", encoders(cfg, "cpu"))
    done = run("data_pipeline/plan_storage.py", "images=1e6", "size=64", "autoencoder=kl_f4_demo", "clip=demo",
               "beside=[vq_f4_demo]", f"input={tmp_path}/latents", f"output={tmp_path}/plan")  # fmt: skip
    plan = json.loads((tmp_path / "plan/plan.json").read_text())
    assert plan["measured"]["bytes"] == sum(shard.bytes for shard in manifest.shards)
    assert plan["measured"]["planned_bytes"] == pytest.approx(plan["measured"]["bytes"], rel=0.02)
    assert "+0.00%" in done.stdout
    first, *others = plan["layouts"]
    assert first["bytes"] == pytest.approx(1e6 * first["bytes_per_sample"], rel=0.03)  # indices, and ends of tars
    assert first["bytes_per_s_of_a_node"] == 60 * 8 * first["bytes_per_sample"]
    assert {layout["layout"].partition(":")[0] for layout in others} >= {"vq_f4_demo"}
    assert "an epoch takes 8.7 min" in done.stdout  # 10^6 / (60 x 8 x 4)
    assert (tmp_path / "plan/plan.md").read_text() in done.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["beside=[nosuch]"], "beside=nosuch is not a first stage"),
        (["beside=[trained]"], "beside=trained is loaded from a path"),
        (["size=100"], "size=100 must be a multiple of 8, the downsampling factor of kl_f8"),
        (["clip=trained"], r"clip\.path must be given"),
    ],
)
def test_encoders_that_can_not_be_had(options, said):
    with pytest.raises(UserError, match=said):
        encoders_of(composed(*options), "kl_f8")


def test_a_plan_is_held_against_latents_of_the_same_fields(images, tmp_path):
    manifest = written(images, tmp_path, encoders(composed("autoencoder=kl_f4_demo", "clip=demo"), "cpu"))
    with pytest.raises(UserError, match=r"differ in pooled\.npy, text\.npy: use the autoencoder, clip and conditions"):
        compare_with_measured(composed(f"input={tmp_path}"), StorageLayout("a", {"moments.npy": 1, "json": 1}))
    assert manifest.samples == 10
    with pytest.raises(UserError, match="image-text shards, but latents"):
        compare_with_measured(composed(f"input={images}"), StorageLayout("a", {}))
