"""What is stored to be conditioned on, and the same again from what a user asks for."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data_pipeline.common.errors import UserError
from data_pipeline.common.saved_objects import build
from data_pipeline.encode.conditions import Hole, ImageEmbedding, Label, Layout, LowResolution, well_formed
from data_pipeline.encode.encoders import TextStates
from data_pipeline.encode.text_conditions import Text


class Tools:
    """A first stage that averages 4x4 pixels, and a CLIP of sums."""

    class image:
        factor = 4

        @staticmethod
        def encode_stored(images):
            return F.avg_pool2d(images, 4)

        @staticmethod
        def posterior_of(stored):
            return stored, torch.zeros_like(stored)

    class text:
        asked: ClassVar[list] = []

        @classmethod
        def encode_text(cls, captions):
            cls.asked += captions
            rows = torch.tensor([float(len(caption)) for caption in captions])
            return TextStates(rows[:, None, None].expand(-1, 3, 2), rows[:, None].expand(-1, 4))

        @staticmethod
        def encode_image(images):
            return images.sum((2, 3))


def sample(key="a", caption="a cat", **meta):
    return {"key": key, "caption": caption, "meta": meta}


def pictures(count, size=16):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def again(condition):
    """The same condition from its saved configuration, as sampling builds it."""
    return build(condition.config(), "conditions", "a condition")


def test_text_encodes_each_caption_once_and_knows_its_null():
    Tools.text.asked = []
    fields = again(Text()).encode([sample(caption=c) for c in ("cat", "horse", "cat")], None, Tools)
    assert Tools.text.asked == ["cat", "horse"]
    assert fields["text"][:, 0, 0].tolist() == fields["pooled"][:, 0].tolist() == [3, 5, 3]
    assert again(Text()).null(Tools)["text"].shape == (3, 2)
    assert float(again(Text()).null(Tools)["pooled"].abs().sum()) == 0


def test_labels_are_learnt_in_order_and_kept():
    label = Label("group")
    label.learn(sample(group=group) for group in ("flags", "animals", "", "flags"))
    label = again(label)
    assert label.classes == ["animals", "flags"]
    assert label.encode([sample(group="flags"), sample(group="animals")], None, Tools)["label"].tolist() == [1, 0]
    assert label.reason_against(sample()) == "no group in its json"
    assert label.reason_against(sample(group="food")) == "group is not one of the classes"
    assert label.reason_against(sample(group="flags")) is None
    assert label.as_sample(labels="flags") == {"meta": {"group": "flags"}}
    with pytest.raises(UserError, match="class food is unknown: use one of animals, flags"):
        label.encode([sample(group="food")], None, Tools)
    with pytest.raises(UserError, match="no sample names a class"):
        Label("group").learn([sample()])


def test_given_classes_are_not_learnt_anew():
    label = Label("group", classes=["b", "a"])
    label.learn([sample(group="c")])
    assert label.classes == ["b", "a"]


def test_a_layout_is_boxes_and_numbers_padded():
    layout = Layout(max_boxes=3, classes=["cat", "dog"])
    boxes = [["dog", 0, 0, 0.5, 1], ["cat", 0.5, 0.25, 1, 0.75]]
    fields = again(layout).encode([sample(boxes=boxes), sample(boxes=boxes[1:])], None, Tools)
    assert fields["box_label"].tolist() == [[1, 0, -1], [0, -1, -1]]
    assert fields["boxes"][0].tolist() == [[0, 0, 0.5, 1], [0.5, 0.25, 1, 0.75], [0, 0, 0, 0]]
    assert layout.as_sample(layouts=boxes) == {"meta": {"boxes": boxes}}
    assert layout.reason_against(sample()) == "no boxes in its json"
    assert "more than max_boxes=3" in layout.reason_against(sample(boxes=boxes * 2))
    assert "is not one of the classes" in layout.reason_against(sample(boxes=[["cow", 0, 0, 1, 1]]))
    with pytest.raises(UserError, match="a box is not"):
        layout.as_sample(layouts=[["dog", 0.5, 0, 0.5, 1]])


@pytest.mark.parametrize("box", [["a", 0, 0, 1], ["a", 0, 0, 1, 2], ["a", 0.5, 0, 0.2, 1], ["a", 0, "0", 1, 1]])
def test_a_malformed_box_is_seen(box):
    assert not well_formed(box)


def test_pictures_shrunk_and_embedded():
    images = pictures(2)
    small = again(LowResolution(4)).encode([sample(), sample()], images, Tools)["low_resolution"]
    torch.testing.assert_close(small[1, 2, 3, 0], images[1, 2, 12:16, 0:4].mean())
    embedded = again(ImageEmbedding()).encode([sample(), sample()], images, Tools)["image_embedding"]
    assert torch.equal(embedded, images.sum((2, 3)))


def test_a_small_picture_enlarged_pixel_by_pixel_is_itself_again():
    small = pictures(1, 4)
    large = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(LowResolution(4).encode([sample()], large, Tools)["low_resolution"], small)


def test_a_given_hole_is_cut_out_before_encoding():
    images = pictures(1)
    fields = again(Hole()).encode([sample(hole=[0.5, 0.0, 1.0, 0.25])], images, Tools)
    assert fields["hole"][0, 0].tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    expected = F.avg_pool2d(images, 4)
    expected[:, :, 0, 2:] = 0
    torch.testing.assert_close(fields["masked_latents"], expected)
    with pytest.raises(UserError, match="is not \\[x0, y0, x1, y1\\]"):
        Hole().as_sample(images=np.zeros((4, 4, 3)), holes=[0, 0, 2, 1])


def test_drawn_holes_depend_on_the_key_alone_and_keep_their_bounds():
    hole = Hole(0.25, 0.5)
    boxes = np.array([hole.drawn(f"key{i}") for i in range(200)])
    assert np.array_equal(boxes[7], hole.drawn("key7"))
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides.min() >= 0.25
    assert sides.max() <= 0.5
    assert boxes.min() >= 0
    assert boxes.max() <= 1
    assert boxes.std(0).min() > 0.05


def test_a_hole_at_the_far_edge_covers_a_cell():
    sample = {"key": "a", "caption": "", "meta": {"hole": [0.95, 0.95, 1, 1]}}
    hole = Hole().encode([sample], torch.zeros(1, 3, 32, 32), Tools)["hole"]
    assert hole[0, 0].nonzero().tolist() == [[7, 7]]


@pytest.mark.parametrize("boxes", [3, "fox", {"a": 1}, [3], [["fox", 0, 0, 1]]])
def test_boxes_that_are_none_are_set_aside(boxes):
    layout = Layout(classes=["fox"])
    assert layout.named_in({"meta": {"boxes": boxes}}) == []
    assert layout.reason_against({"meta": {"boxes": boxes}})


@pytest.mark.parametrize("asked", [["fox", 0, 0, 1, 1], "fox", 3])
def test_what_is_no_layout_or_hole_is_said(asked):
    with pytest.raises(UserError, match="is not a list of boxes"):
        Layout(classes=["fox"]).as_sample(layouts=asked)
    with pytest.raises(UserError, match=r"holes: .* is not"):
        Hole().as_sample(images=np.zeros((8, 8, 3), np.uint8), holes=asked if asked == 3 else [asked])


def test_an_unknown_class_gets_the_nearest_names():
    label = Label(classes=[f"thing {i}" for i in range(30)] + ["grinning face"])
    with pytest.raises(UserError, match=r"class grining face is unknown: use one of grinning.*another of 31"):
        label.numbers(["grining face"])


@pytest.mark.parametrize("asked", ["", None, "cars"])
def test_an_asked_label_that_is_none_is_said(asked):
    with pytest.raises(UserError, match="is unknown: use one of 1, fox"):
        Label(classes=["1", "fox"]).as_sample(labels=asked)
    assert Label(classes=["1", "fox"]).as_sample(labels=1)["meta"]


def test_a_text_encoder_alone_has_no_image_embedding():
    class WithoutPictures:
        image, text = Tools.image, object()

    with pytest.raises(UserError, match="use clip=trained"):
        ImageEmbedding().encode([], torch.zeros(1, 3, 8, 8), WithoutPictures)
