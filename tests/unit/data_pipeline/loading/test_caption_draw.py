"""Which of several captions a step takes: by weight, and a function of seed, step, stream and position alone."""

import itertools
from collections import Counter

import pytest

from data_pipeline.common.errors import UserError
from data_pipeline.loading.caption_draw import CaptionOptions, draws_of
from data_pipeline.shards.caption_edits import CaptionEdits, StoredEdits
from data_pipeline.shards.manifest import Manifest

DRAWS = [draw for step in range(2500) for draw in draws_of(7, step, range(4), 2)]
PAIR, LISTED = {"short": "s", "long": "l"}, {"short": "s", "long.0": "a", "long.1": "b"}


@pytest.mark.parametrize(
    ("captions", "weights", "expected"),
    [
        (PAIR, {"short": 0.3, "long": 0.7}, {"s": 0.3, "l": 0.7}),
        (PAIR, {"short": 3, "long": 7}, {"s": 0.3, "l": 0.7}),
        (PAIR, None, {"s": 0.5, "l": 0.5}),
        ({str(i): str(i) for i in range(5)}, None, {str(i): 0.2 for i in range(5)}),
        (LISTED, {"short": 0.3, "long": 0.7}, {"s": 0.3, "a": 0.35, "b": 0.35}),  # a name shares its weight
        (LISTED, {"long": 0.4, "long.1": 0.6}, {"a": 0.4, "b": 0.6}),  # but not with what has a weight of its own
        (LISTED, {"short": 0.3, "long": 0.3, "tags": 0.4}, {"s": 0.5, "a": 0.25, "b": 0.25}),  # it has no tags
        (PAIR, {"short": 0, "long": 1}, {"l": 1.0}),
        (PAIR, {"tags": 1}, {"s": 0.5, "l": 0.5}),  # none of them has a weight
        ({"caption": "only"}, {"short": 0.3, "long": 0.7}, {"only": 1.0}),
    ],
)
def test_captions_come_as_often_as_their_weights_say(captions, weights, expected):
    options = CaptionOptions(weights=weights)
    counts = Counter(options.chosen(captions, draw).text for draw in DRAWS)
    assert counts.keys() == expected.keys()
    for text, share in expected.items():
        assert abs(counts[text] - share * len(DRAWS)) <= 3 * (len(DRAWS) * share * (1 - share)) ** 0.5


def test_a_draw_depends_on_seed_step_stream_and_position():
    each = {(seed, step): draws_of(seed, step, range(4), 3) for seed in (0, 1, -1) for step in range(50)}
    assert len(set(itertools.chain(*each.values()))) == 3 * 50 * 12
    assert draws_of(0, 9, [2, 3], 3) == each[0, 9][6:]  # a rank or worker has some of the streams


def test_without_a_draw_it_is_the_first():
    first = CaptionOptions(weights={"long": 1}).chosen(PAIR)
    assert (first.text, first.name) == ("s", "")
    assert CaptionOptions(weights={"long": 1}).chosen(PAIR, 0).name == "long"


@pytest.mark.parametrize(
    ("options", "kind", "names", "sentence"),
    [
        ({"weights": {"tall": 1}}, "latents", {"short": 3, "long": 2}, "data has no caption tall, but of short, long"),
        ({"weights": {0: 1}}, "image-text", {}, "no caption 0, but one caption a sample"),
        ({"prefix": "a "}, "latents", {}, r"precompute_latents.py with captions.prefix"),
        ({"shuffle_tags": True}, "latents", {}, r"precompute_latents.py with captions.tag_orders=4"),
    ],
)
def test_what_a_data_set_does_not_have_is_refused(options, kind, names, sentence):
    manifest = Manifest(kind, (), info={"captions": names})
    with pytest.raises(UserError, match=sentence):
        CaptionOptions(**options).refuse_unfit("data", [manifest])
    if "tall" in options.get("weights", {}):
        with pytest.raises(UserError, match="A and B have no caption tall, but of short, long"):
            CaptionOptions(**options).refuse_unfit("A and B", [manifest, manifest])
    CaptionOptions(weights={"short": 1}).refuse_unfit(
        "data", [manifest, Manifest(kind, (), info={"captions": {"short.0": 1}})]
    )


@pytest.mark.parametrize(
    "wrong", [{"weights": {"a": -1}}, {"weights": {"a": 0}}, {"weights": {"a": "b"}}, {"first_tags": 0}, {"prefix": 3}]
)
def test_options_that_cannot_be_get_a_sentence(wrong):
    with pytest.raises(UserError, match=r"captions.* is not valid"):
        CaptionOptions(**wrong)


def test_edits_of_words_and_tags():
    text = "fox,  red , night sky,snow"
    assert CaptionEdits().edited(text) == text
    assert CaptionEdits("a photo of ", ", art").edited(text) == f"a photo of {text}, art"
    assert CaptionEdits(first_tags=2).edited(text) == "fox, red"
    assert CaptionEdits(first_tags=9).edited(text) == text
    orders = {CaptionEdits(fixed_tags=1).edited(text, str(i)) for i in range(50)}
    assert len(orders) == 6
    assert all(sorted(each.split(", ")) == ["fox", "night sky", "red", "snow"] for each in orders - {text})
    assert all(each.startswith("fox") for each in orders)
    assert CaptionEdits().edited("fox, red, snow, sky", "0") == "snow, red, fox, sky"  # on every machine


def test_orders_of_tags_are_captions_of_their_own():
    edits = StoredEdits(prefix="p ", first_tags=3, tag_orders=4)
    found = edits.applied({"tags": "a, b, c, d", "long": "a sentence"})
    assert list(found) == [*(f"tags.{i}" for i in range(len(found) - 1)), "long"]  # orders that are alike come once
    assert found["tags.0"] == "p a, b, c"
    assert found["long"] == "p a sentence"
    assert len(set(found.values())) == len(found) >= 3
    assert edits.applied({"tags": "a, b, c, d"}) == {k: v for k, v in found.items() if k != "long"}
    other = StoredEdits(prefix="p ", first_tags=3, tag_orders=4, seed=1).applied({"tags": "a, b, c, d"})
    assert list(other.values()) != list(found.values())[: len(other)]
    assert edits.changed() == {"prefix": "p ", "first_tags": 3, "tag_orders": 4}
    assert StoredEdits().changed() == {}
