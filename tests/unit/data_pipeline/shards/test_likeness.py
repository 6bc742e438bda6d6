"""Data sets that can't be read as one: the sentence names two of them, every difference, and what to make both with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common.errors import UserError
from data_pipeline.shards.data_sets import DataSets
from data_pipeline.shards.input_option import Input
from data_pipeline.shards.manifest import Manifest, Shard

FIELDS = {"moments.npy": [8, 4, 4], "text.npy": [77, 768], "label.npy": [], "json": None}
CONDITIONS = {"text": {"name": "text"}, "label": {"name": "label", "classes": ["cat", "dog"], "key": "group"}}
TWO = {"captions": {"short": 5, "long": 5}}


def fields(dtype: str = "float16", **changed: Any) -> dict[str, Any]:
    """The lines of FIELDS; a changed shape, or None: without the field."""
    shapes = FIELDS | {f"{name}.npy": shape for name, shape in changed.items()}
    lines = {name: {} if name == "json" else {"dtype": dtype, "shape": shape} for name, shape in shapes.items()}
    return {name: line for name, line in lines.items() if shapes[name] is not None or name == "json"}


def saved(root: Path, changed: dict[str, Any]) -> None:
    given = {"kind": "latents", "fields": fields(), "info": {}, "fingerprints": {}} | changed
    given["info"] = {"conditions": CONDITIONS} | given["info"]
    given["fingerprints"] = {"autoencoder": "aa", "text_encoder": "cc"} | given["fingerprints"]
    Manifest(shards=(Shard("shards/0.tar", 5, 10, "0" * 64),), **given).save(root / "train")


def joined(folder: Path, layout: str, *changes: dict[str, Any]) -> DataSets:
    """The training split of sets with these changes."""
    names = ("32x32", "32x16", "16x32") if layout == "buckets" else ("one", "two", "three")
    roots = [folder / layout / name for name in names[: len(changes)]]
    for root, changed in zip(roots, changes, strict=True):
        saved(root, changed)
    return Input.of(str(folder / "buckets") if layout == "buckets" else [str(root) for root in roots]).split("train")


DIFFERENT: dict[str, tuple[dict[str, Any], str, str]] = {
    "first stage": ({"fingerprints": {"autoencoder": "bb"}}, "the autoencoder is aa in the first and bb in the second",
                    "precompute_latents.py with the same autoencoder.path="),
    "text encoder": ({"fingerprints": {"text_encoder": "dd"}}, "the text_encoder is cc in the first and dd in the",
                     "with the same clip.path="),
    "tokens": ({"fields": fields(text=[6, 768])}, "text.npy is float16 [77, 768] in the first and float16 [6, 768] in",
               "with the same clip.path="),
    "dtype": ({"fields": fields("float32")}, "label.npy is float16 [] in the first and float32 [] in the second",
              "with the same dtype="),
    "a field": ({"fields": fields(hole=[1, 4, 4])}, "hole.npy is none in the first and float16 [1, ",
                "with the same conditions="),
    "flips": ({"fields": fields(moments_flip=[8, 4, 4])}, "moments_flip.npy is none in the first", "the same flips="),
    "channels": ({"fields": fields(moments=[32, 4, 4])}, "moments.npy is float16 [8, ", "with the same size="),
    "classes": ({"info": {"conditions": CONDITIONS | {"label": {**CONDITIONS["label"], "classes": ["dog"]}}}},
                "conditions.label.classes is ['cat', 'dog'] in the first and ['dog'] in the second",
                "with the same conditions.label.classes="),
    "a condition": ({"info": {"conditions": {"text": {"name": "text"}}}}, "the condition label is there in the first",
                    "with the same conditions="),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["mix", "buckets"])
@pytest.mark.parametrize("different", DIFFERENT)
def test_each_difference_is_named_with_its_remedy(tmp_path: Path, layout: str, different: str) -> None:
    changed, what, remedy = DIFFERENT[different]
    with pytest.raises(UserError) as refused:
        joined(tmp_path, layout, {}, {}, changed)
    said = str(refused.value)
    first, third = ("16x32", "32x32") if layout == "buckets" else ("one", "three")
    if layout == "mix":
        assert said.startswith(f"{tmp_path}/mix/{first}/train and {tmp_path}/mix/{third}/train can't be read as one: ")
        assert what in said
    else:  # sorted by name, the one that differs is the first
        assert said.startswith(f"{tmp_path}/buckets/{first}/train and {tmp_path}/buckets/32x16/train")
    assert remedy in said
    assert len(said) < 600


def test_all_differences_come_in_one_sentence(tmp_path: Path) -> None:
    other = {"fingerprints": {"autoencoder": "bb"}, "fields": fields(text=[6, 768]), "info": {"conditions": {}}}
    with pytest.raises(UserError, match=r"with the same autoencoder.path= clip.path= conditions=.$"):
        joined(tmp_path, "mix", {}, other)


def test_pictures_of_two_sizes(tmp_path: Path) -> None:
    pictures = {"kind": "image-text", "fields": {}}
    with pytest.raises(UserError, match=r"the size of pictures is 64 .* and 32 .*make_shards.py with the same size=.$"):
        joined(tmp_path, "mix", pictures | {"info": {"size": 64}}, pictures | {"info": {"size": 32}})
    with pytest.raises(UserError, match=r"the kind is image-text .* use sets of one kind.$"):
        joined(tmp_path / "kinds", "mix", pictures, {})


def test_sizes_of_buckets_and_numbers_of_captions_may_differ(tmp_path: Path) -> None:
    several = {name: {**line, "captions": True} if name == "text.npy" else line for name, line in fields().items()}
    joined(tmp_path, "mix", {}, {"fields": several, "info": TWO})
    wide = fields(moments=[8, 4, 8], hole=[1, 4, 8], low_resolution=[3, 8, 16])
    high = fields(moments=[8, 8, 4], hole=[1, 8, 4], low_resolution=[3, 16, 8])
    joined(tmp_path, "buckets", {"fields": wide}, {"fields": high, "info": TWO})
