"""What a user asks of sample_images and evaluate_ldm: pictures as precompute reads them, classes, negative prompts."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from data_pipeline.common.errors import UserError
from data_pipeline.encode.conditions import Label, Layout
from data_pipeline.encode.size_condition import Size
from data_pipeline.encode.text_conditions import Text
from data_pipeline.images import decode
from data_pipeline.images.resize import fitted
from train.evaluate_ldm import as_trained_on, at_size, usable
from train.models.classifier import NoisyClassifier
from train.sample_images import guided_by, new_folder
from train.sampling.requests import (
    as_sample,
    load_picture,
    negative_rows,
    prompts_in,
    refuse_unused_options,
    request_rows,
    size_options,
    title,
    with_negative_size,
)
from train.sampling.trained_run import TrainedRun, open_run
from train.weights.saved import save_model


def drawn(height, width):
    ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    return Image.fromarray(ramp.astype(np.uint8))


def test_a_picture_is_the_centre_square_that_shards_hold(tmp_path):
    path = tmp_path / "wide.png"
    drawn(40, 100).save(path)
    got = load_picture(str(path), (16, 16)).astype(int)
    assert np.abs(got - fitted(np.array(drawn(40, 100)), (16, 16)).pixels).max() <= 2


def test_a_turned_picture_is_turned_back(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: its top is at the right
    image = drawn(16, 16)
    image.save(tmp_path / "turned.png", exif=turned)
    expected = image.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(load_picture(str(tmp_path / "turned.png"), (16, 16)), np.array(expected))


def test_16_bits_of_grey_keep_their_range(tmp_path):
    grey = np.linspace(0, 65535, 256).reshape(16, 16)
    Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "grey.png")
    got = load_picture(str(tmp_path / "grey.png"), (16, 16))
    assert np.abs(got[..., 0].astype(int) - np.round(grey / 257)).max() <= 1


def test_a_small_picture_is_enlarged_pixel_by_pixel(tmp_path):
    drawn(4, 4).save(tmp_path / "small.png")
    got = load_picture(str(tmp_path / "small.png"), (16, 16))
    assert np.array_equal(got, np.array(drawn(4, 4)).repeat(4, 0).repeat(4, 1))


def test_what_is_no_picture_is_said(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")  # runs a program
    drawn(16, 16).save(tmp_path / "large.png")
    monkeypatch.setattr(decode, "MAX_PIXELS", 200)
    for name, why in (
        ("text.png", "not a picture of a known format"), ("script.png", "EPS picture, a format that is not read"),
        ("large.png", "too large picture .16x16 pixels"), ("gone.png", "missing picture"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"images: .*{name} can't be used: {why}"):
            load_picture(str(tmp_path / name), (16, 16))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # twice as many are a bomb to Pillow itself
    with pytest.raises(UserError, match="too large picture"):
        load_picture(str(tmp_path / "large.png"), (16, 16))


@pytest.fixture
def by_layout():
    conditions = {"layout": Layout(classes=["fox", "3"])}
    return SimpleNamespace(conditions=conditions, config={"conditioning": {"layout": {}}})


@pytest.mark.parametrize("layouts", [3, "fox", ["fox", 0, 0, 1, 1], [["fox", 0, 0, 1]], [[["fox"], 3]]])
def test_a_layout_that_is_none_is_a_sentence(by_layout, layouts):
    (row, *_) = request_rows({"layouts": layouts}, 1)
    with pytest.raises(UserError, match="layouts: "):
        as_sample(by_layout, row)


def test_a_layout_is_named_by_its_classes(by_layout):
    (row,) = request_rows({"layouts": [["fox", 0, 0, 0.5, 1], [3, 0.5, 0, 1, 1]]}, 1)
    assert as_sample(by_layout, row)["key"] == "fox and 3"


def test_a_negative_prompt_is_one_text_for_a_run_of_prompts():
    rows = [{"prompts": "a", "images": "x.png"}, {"prompts": "b", "images": "x.png"}]
    assert negative_rows("bad", rows) == [{"prompts": "bad", "images": "x.png"}] * 2
    assert negative_rows(3, rows)[0]["prompts"] == "3"
    assert negative_rows("", rows)[0]["prompts"] == ""
    assert negative_rows(None, rows) == []
    with pytest.raises(UserError, match=r"not conditioned on prompts: leave negative_prompt= out"):
        negative_rows("bad", [{"labels": "fox"}])
    with pytest.raises(UserError, match="a single text"):
        negative_rows(["a", "b"], rows)


def test_a_class_whose_name_is_a_number_guides(tmp_path):
    arguments = {"in_channels": 4, "classes": 2, "channels": [16], "heads": 2, "norm_groups": 8}
    about = {"belongs_to": {"mean": [0.0], "fold": 1}, "class_names": ["3", "4"]}
    save_model(tmp_path, "NoisyClassifier", arguments, NoisyClassifier(**arguments).state_dict(), about)
    load = {"_target_": "train.weights.saved.load_classifier"}
    cfg = OmegaConf.create({"classifier": {"load": load, "path": str(tmp_path), "scale": 2}})
    run = SimpleNamespace(
        generator=SimpleNamespace(device=torch.device("cpu")),
        facts=SimpleNamespace(mean=[0.0], fold=1, fingerprints={}),
    )
    run.facts.fingerprints["autoencoder"] = "a"
    assert guided_by(cfg, run, [{"labels": 4}, {"labels": "3"}]).labels.tolist() == [1, 0]
    with pytest.raises(UserError, match="class 5 is unknown to the classifier: use one of 3, 4"):
        guided_by(cfg, run, [{"labels": 5}])
    run.facts.mean = [0.1]
    with pytest.raises(UserError, match=r"was trained with mean \[0.0\], this run with \[0.1\]"):
        guided_by(cfg, run, [{"labels": 3}])


def sample(**meta):
    return {"key": "a", "caption": "a fox", "image": np.zeros((4, 4, 3), np.uint8), "meta": meta}


def test_what_precompute_sets_aside_is_not_judged():
    box = ["fox", 0, 0, 1, 1]
    conditions = {"text": Text(), "label": Label(classes=["fox"]), "layout": Layout(1, classes=["fox"])}
    good = sample(group="fox", boxes=[box])
    bad = [
        sample(), sample(group="fox"), sample(boxes=[box]), sample(group="car", boxes=[box]),
        sample(group="fox", boxes=[box, box]), sample(group="fox", boxes=3), {**good, "caption": ""},
        {name: value for name, value in good.items() if name != "image"},
    ]  # fmt: skip
    assert usable(SimpleNamespace(conditions=conditions), [bad[0], good, *bad[1:], good]) == [good, good]


def test_a_call_does_not_draw_over_the_last_ones(tmp_path):
    folders = [new_folder(tmp_path / "run/drawn") for _ in range(3)]
    assert [folder.name for folder in folders] == ["drawn", "drawn-2", "drawn-3"]
    assert all(folder.is_dir() for folder in folders)


def test_prompts_of_a_file(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffit's (a:1.2) fox\r\n\n  [fox #1], \u7ea2  \n\u2028x".encode())
    assert prompts_in(str(tmp_path / "a.txt")) == ["it's (a:1.2) fox", "[fox #1], \u7ea2", "x"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "a\\nb", "seed": 1}\n"c"\n{"caption": "d"}\n')
    assert prompts_in(str(tmp_path / "a.jsonl")) == ["a\nb", "c", "d"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b" \n", "is empty: write one prompt a line"), ("a.txt", b"caf\xe9", "it is not UTF-8"),
        ("a.jsonl", b'"a"\nb', "line 2 is not JSON"), ("a.jsonl", b"[1]", "line 1 has no text as prompt, caption"),
        ("a.jsonl", b'{"prompt": 5}', "line 1 has no text as prompt"), ("none.txt", None, "No such file or directory"),
    ],
)  # fmt: skip
def test_a_file_without_prompts_is_a_sentence(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        prompts_in(str(tmp_path / name))


@pytest.mark.parametrize("kind", ["train_autoencoder", "train_clip", "train_classifier"])
def test_a_run_of_another_kind_draws_nothing(tmp_path, kind):
    (tmp_path / "run_id").write_text(f"{kind} 0123abcd\n")
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match=rf"is a run of {kind}\.py: use the output= of train_ldm\.py"):
        open_run(str(tmp_path), "latest")


# Sizes.

MEAN = [500.5, 600.0, 1.25, 2.0, 64.0, 48.0]


def sized(drop=False, mean=MEAN):
    conditions = {"text": Text(), "size": Size(mean)}
    return SimpleNamespace(conditions=conditions, config={"conditioning": {"text": {}, "size": {"drop": drop}}})


def asked_of(run, rows):
    return run.conditions["size"].encode([as_sample(run, row) for row in rows], None, None)["size"].tolist()


def test_a_size_is_what_is_given_and_else_the_mean():
    options = {"prompts": "fox", **size_options({"original": [[512, 512], [64, 32]], "crop": [0, 0], "target": None})}
    rows = request_rows(options, 1)
    for row in (*rows, {"prompts": "fox"}):
        refuse_unused_options(sized(), row)
    assert asked_of(sized(), [*rows, {"prompts": "fox"}]) == [[512, 512, 0, 0, 64, 48], [64, 32, 0, 0, 64, 48], MEAN]
    assert [title(row) for row in rows] == ["fox, original 512x512, crop 0x0", "fox, original 64x32, crop 0x0"]


@pytest.mark.parametrize("wrong", [7, [1], [1, 2, 3], ["a", 2], [-1, 2], [True, 1]])
def test_what_is_no_size_is_said(wrong):
    (row, *_) = request_rows({"prompts": "fox", **size_options({"crop": wrong})}, 1)
    with pytest.raises(UserError, match=r"size\.crop=.* not two numbers of pixels: write them as size\.crop="):
        as_sample(sized(), row)
    with pytest.raises(UserError, match=r"negative_size\.crop=.* not two numbers"):
        with_negative_size(size_options({"crop": wrong}, "negative_size"), sized(), [], [{"prompts": "fox"}])


def test_a_size_that_can_not_be_asked_for_is_refused():
    by_text = SimpleNamespace(conditions={"text": Text()}, config={"conditioning": {"text": {}}})
    with pytest.raises(UserError, match=r"only on prompts: leave size\.crop= out"):
        refuse_unused_options(by_text, {"prompts": "a", "size.crop": [0, 0]})
    with pytest.raises(UserError, match="not conditioned on sizes: leave negative_size out"):
        with_negative_size({"size.crop": [0, 0]}, by_text, [], [{"prompts": "a"}])
    with pytest.raises(UserError, match=r"size\.drop=true: leave negative_size out"):
        with_negative_size({"size.crop": [0, 0]}, sized(drop=True), [], [{"prompts": "a"}])
    for given in (512, [512, 512], {"width": 3}):
        with pytest.raises(UserError, match=r"is no size: set size\.original=, size\.crop=, size\.target="):
            size_options(given)
    for mean in (MEAN[:4], [*MEAN[:5], "a"], [*MEAN, 3.0]):
        with pytest.raises(UserError, match="not six numbers of pixels"):
            Size(mean)


def test_a_negative_size_goes_with_the_negative_prompt_or_the_empty_one():
    rows = [{"prompts": "a", "size.crop": [3, 4], "size.original": [9, 9]}]
    given = {"size.crop": [0, 0], "size.original": None}
    assert with_negative_size(given, sized(), [], rows) == [{**rows[0], "prompts": "", "size.crop": [0, 0]}]
    away = negative_rows("bad", rows)
    assert with_negative_size(given, sized(), away, rows) == [{**rows[0], "prompts": "bad", "size.crop": [0, 0]}]
    assert with_negative_size(size_options(None), sized(), away, rows) == away


def test_evaluation_draws_at_the_mean_whatever_the_jsons_say():
    told = [{**sample(group="fox"), "meta": {"original_size": [1, 1], "group": "fox"}}]
    for size, expected in (({}, MEAN), ({"size.original": [7, 8]}, [7, 8, *MEAN[2:]])):
        (seen,) = at_size(sized(), told, size)
        assert sized().conditions["size"].encode([seen], None, None)["size"].tolist() == [expected]
        assert seen["meta"]["group"] == "fox"
    assert at_size(SimpleNamespace(conditions={}), told, {}) is told


@pytest.mark.parametrize(
    ("stored", "online", "expected"),
    [
        ({}, None, "red fox, b, c"),
        ({"caption_edits": '{"prefix": "a drawing of ", "first_tags": 2, "tag_orders": 3}'}, {"prefix": ""},
         "a drawing of red fox, b"),
        ({}, {"prefix": "", "suffix": " on white", "shuffle_tags": True, "weights": None}, "red fox, b, c on white"),
    ],
)  # fmt: skip
def test_a_run_is_evaluated_with_captions_as_it_was_trained_on(make_facts, stored, online, expected):
    """Edits of precompute_latents.py (captions.prefix=) and of training on pictures (data.captions.suffix=)."""
    facts = make_facts(fingerprints=stored)
    run = TrainedRun(None, None, None, {}, facts, {"data": {"captions": online}} if online else {}, "ema")
    samples = as_trained_on(run, [{"key": "k", "caption": "red fox, b, c"}, {"key": "l", "caption": ""}])
    assert [sample["caption"] for sample in samples] == [expected, ""]
