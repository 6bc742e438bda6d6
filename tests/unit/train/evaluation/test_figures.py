"""Distances and what is shown to a person."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from data_pipeline.images.grid import fitted, grid, save_png
from data_pipeline.images.pixels import psnr, to_uint8
from train.evaluation.distances import squared_distances, thumbnails, training_recall
from train.runs.curves import curve_line, plot_curves, sparkline


def pictures(count, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_psnr_is_its_formula():
    a, b = pictures(3, seed=1), pictures(3, seed=2)
    mse = ((a.astype(float) - b.astype(float)) ** 2).reshape(3, -1).mean(1)
    np.testing.assert_allclose(psnr(a, b), 20 * np.log10(255) - 10 * np.log10(mse))
    white, grey = np.full((1, 4, 4, 3), 255, np.uint8), np.full((1, 4, 4, 3), 254, np.uint8)
    assert psnr(grey, white)[0] == psnr(white, grey)[0] == pytest.approx(48.1308, abs=1e-4)
    assert np.isfinite(psnr(a, a)).all()


def test_shrunk_is_a_box_average():
    images = pictures(2, 64)
    expected = F.avg_pool2d(torch.from_numpy(images).permute(0, 3, 1, 2).float(), 4).permute(0, 2, 3, 1)
    np.testing.assert_allclose(thumbnails(images).reshape(2, 16, 16, 3), expected, rtol=1e-6)


def test_squared_distances():
    a, b = np.random.default_rng(0).random((3, 7)), np.random.default_rng(1).random((5, 7))
    np.testing.assert_allclose(squared_distances(a, b), ((a[:, None] - b[None]) ** 2).mean(2))


def test_recall_finds_what_was_copied_and_nothing_when_shuffled():
    real = pictures(40)
    right = np.random.default_rng(5).permutation(40)[:20]
    noise = np.random.default_rng(6).integers(-8, 9, (20, 32, 32, 3))
    drawn = np.clip(real[right].astype(int) + noise, 0, 255).astype(np.uint8)
    assert training_recall(drawn, real, right) == (1.0, 1.0)
    shuffled = np.roll(right, 1)
    recall = training_recall(drawn, real, shuffled)
    assert recall.top1 == 0.0
    assert recall.top5 < 0.5


def flat(*values):
    return np.stack([np.full((16, 16, 3), value, np.uint8) for value in values])


def test_recall_counts_what_is_nearer():
    real = flat(0, 10, 20, 30, 40, 50, 60)
    # Drawn 0: the right one nearest; second; fifth; sixth.
    recall = training_recall(flat(0, 0, 0, 0), real, np.array([0, 1, 4, 5]))
    assert recall == (0.25, 0.75)
    # As near as the right one is no nearer: pictures that are there twice count for either.
    assert training_recall(flat(10), flat(10, 10, 99), np.array([1])).top1 == 1.0


def test_to_uint8():
    values = np.array([-2.0, -1.0, -1 + 1.2 / 127.5, 0.9999, 1.0, 3.0]).reshape(1, 1, 1, 6).repeat(3, 1)
    out = to_uint8(values)
    assert out.shape == (1, 1, 6, 3)
    assert out[0, 0, :, 0].tolist() == [0, 0, 1, 255, 255, 255]
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    np.testing.assert_array_equal(to_uint8(every.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1), every)


@pytest.mark.parametrize(("count", "columns", "scale"), [(5, 3, 1), (6, 3, 2), (1, 8, 1)])
def test_grid_shows_each_picture_in_its_place(count, columns, scale):
    images, gap = pictures(count, 16), 4
    sheet = np.asarray(grid(images, columns=columns, scale=scale, gap=gap))
    side, rows = 16 * scale, -(-count // columns)
    assert sheet.shape == (rows * (side + gap) + gap, columns * (side + gap) + gap, 3)
    for i, image in enumerate(images):
        y, x = (gap + k * (side + gap) for k in divmod(i, columns))
        shown = sheet[y : y + side, x : x + side]
        np.testing.assert_array_equal(shown, image.repeat(scale, 0).repeat(scale, 1))
        sheet = sheet.copy()
        sheet[y : y + side, x : x + side] = 255
    assert (sheet == 255).all()


def test_grid_gives_labels_the_room_they_take():
    images = pictures(2, 64)
    plain, short = grid(images, columns=2), grid(images, ["cat", "dog"], columns=2)
    long = grid(images, ["cat", "a dog that runs along the beach"], columns=2)
    assert plain.size[0] == short.size[0] == long.size[0]
    assert plain.size[1] < short.size[1] < long.size[1]
    below = np.asarray(short)[8 + 64 : -8]
    assert (below[:, 8:72] < 128).any()  # something is written under either
    assert (below[:, 80:144] < 128).any()
    with pytest.raises(ValueError, match="zip"):
        grid(images, ["one label for two pictures"])


def test_a_caption_is_cut_after_a_word():
    text = "a very long caption that goes on about many things which nobody would read to its end"
    label = fitted(text, 70)
    assert len(label.lines) == 4
    assert label.lines[-1].endswith(" …")
    assert " ".join(label.lines).removesuffix(" …") == text[: len(" ".join(label.lines)) - 2]
    assert text[len(" ".join(label.lines)) - 2] == " "  # the next word is left out whole
    assert all(label.font.getlength(line) <= 70 for line in label.lines)
    assert fitted("internationalisation", 70).lines == ["internationalisation"]  # in a smaller font
    assert fitted("Christmas tree", 70).lines == ["Christmas", "tree"]
    (cut,) = fitted("a" * 100, 70).lines  # no font is that small
    assert cut.endswith("a…")


def test_a_title_is_above_all_pictures():
    images = pictures(2, 64)
    plain, titled = grid(images, columns=2), grid(images, columns=2, title="step 5, seed 0")
    assert plain.size[0] == titled.size[0]
    added = titled.size[1] - plain.size[1]
    above, below = np.asarray(titled)[:added], np.asarray(titled)[added:]
    assert (above < 128).any()
    np.testing.assert_array_equal(below[8:], np.asarray(plain)[8:])


def test_a_single_point_is_seen(tmp_path):
    blue = (31, 119, 180)
    for rows, seen in (([], False), ([{"step": 3, "loss": 1.0}], True)):
        plotted = np.asarray(Image.open(plot_curves(rows, ["loss"], tmp_path / "curves.png")).convert("RGB"))
        assert (plotted == blue).all(-1).any() == seen


def test_sparkline():
    assert sparkline([]) == ""
    assert sparkline([1.0, 8.0]) == "▁█"
    assert sparkline(list(range(8))) == "▁▂▃▄▅▆▇█"
    falling = sparkline([1 / (1 + n) for n in range(1000)], width=30)
    assert len(falling) == 30
    assert (falling[0], falling[-1]) == ("█", "▁")
    assert len(set(sparkline([3.0] * 5))) == 1


def test_curve_line():
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "other": 1.0}, {"step": 3, "loss": 0.5}]
    assert curve_line("loss", rows, "loss") == "loss █▁ 2 -> 0.5"
    assert curve_line("x", rows, "x") == "x: no figures"


def test_pictures_on_disk(tmp_path):
    image = Image.fromarray(pictures(1)[0])
    path = save_png(image, tmp_path / "new" / "a.png")
    np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(image))
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    curves = plot_curves([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], ["loss", "none"], tmp_path / "c.png")
    assert Image.open(curves).size[0] > 400
