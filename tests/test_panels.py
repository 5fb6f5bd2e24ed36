"""Figures of photos: every text, bar, frame and photo is there, in its place, inside the figure."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from minivit import Preprocess
from minivit.data.prepared import LARGE, SMALL, panel_shape
from minivit.figures import canvas, mpl, panels
from minivit.figures.canvas import BLACK, GREEN, GREY, RED, Canvas, fit, text_height, text_width
from minivit.figures.panels import HEAT, SIGNED, AttentionFigure, Panel, Row
from minivit.tools.score.gallery import CaptionedStrip, draw_gallery

HOSTILE = "$x^2 <b>\x1b[31m\u202eevil\n" + "long " * 80
RNG = np.random.default_rng(0)


class Written(NamedTuple):
    """A text on a canvas, and the pixels that it covers."""

    text: str
    left: float
    top: float
    right: float
    bottom: float
    colour: tuple[int, int, int]
    bold: bool


@pytest.fixture
def written(monkeypatch) -> list[Written]:
    """All texts that are written on canvases."""
    texts = []
    write = Canvas.write

    def record(self, x, y, text, size, *, align="left", colour=BLACK, bold=False):
        width = text_width(text, size, bold=bold)
        left = x - {"left": 0, "center": width / 2, "right": width}[align]
        if text:
            bottom = y + text_height(text, size)
            texts.append(Written(text, left, y, left + width, bottom, colour, bold))
        write(self, x, y, text, size, align=align, colour=colour, bold=bold)

    monkeypatch.setattr(Canvas, "write", record)
    return texts


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def attention_figure(size=(500, 375), limits=LARGE, **changes) -> AttentionFigure:
    """Return a figure of two blocks before and after training, with their difference."""
    h, w = panel_shape(size, limits)
    photo = RNG.integers(0, 256, (h, w, 3), np.uint8)
    rows = []
    for label, signed in (("base\ncat 0.900", False), ("run\ndog 0.800", False), ("less", True)):
        row = []
        for block in (8, 9):
            values = RNG.random((14, 14)).astype(np.float32) * block - 4 * signed
            note = "" if signed else f"keeps {block}% · top patch 40%"
            row.append(Panel(f"block {block}", values, note, warn=block == 9 and not signed))
        rows.append(Row(label, row, signed))
    figure = AttentionFigure(
        photo, size, Preprocess(), rows, ["cat.jpg", "dog 0.800"], "What it means."
    )
    return replace(figure, **changes)


def assert_apart_and_inside(texts, shape) -> None:
    """Check that no text touches another one or an edge."""
    height, width = shape[:2]
    for i, one in enumerate(texts):
        assert one.left >= 0 and one.right <= width, one
        assert one.top >= 0 and one.bottom <= height, one
        for other in texts[:i]:
            across = min(one.right, other.right) - max(one.left, other.left)
            down = min(one.bottom, other.bottom) - max(one.top, other.top)
            assert across <= 0 or down <= 2, (one, other)


def test_a_map_is_brought_onto_the_photo_as_torchs_grid_sample_does():
    values = torch.from_numpy(RNG.random((7, 14)).astype(np.float32))
    ours = Preprocess().to_photo(values, (500, 375), (75, 100))
    y, x = (torch.arange(n).add(0.5).mul(2 / n).sub(1) for n in (75, 100))
    positions = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)
    settings = {"mode": "bicubic", "padding_mode": "border", "align_corners": False}
    theirs = torch.nn.functional.grid_sample(values[None, None], positions[None], **settings)
    theirs = theirs[0, 0].clamp(values.min(), values.max())
    torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=0, atol=1e-5)


# The canvas


@pytest.mark.parametrize("align, left", [("left", 100), ("center", 75), ("right", 50)])
def test_text_is_written_where_it_should_be_and_in_its_colour(align, left):
    drawn = Canvas(200, 60)
    width = text_width("block", 9)
    assert 35 < width < 60
    drawn.write(100, 20, "block\nblock", 9, align=align, colour=RED)
    ys, xs = (drawn.pixels < 250).any(-1).nonzero()
    start = {"left": 100, "center": 100 - width / 2, "right": 100 - width}[align]
    assert start - 1 <= xs.min() <= start + 3 and abs(xs.max() - start - width) <= 3
    assert 20 <= ys.min() <= 23 and ys.max() <= 20 + text_height("block\nblock", 9)
    assert ys.max() > 20 + text_height("block", 9) + 5
    assert (np.abs(drawn.pixels - np.array(RED, int)).max(-1) < 20).any()
    assert (drawn.pixels >= np.array(RED)).all()  # Each pixel lies between the colour and white.


def test_bold_text_has_more_ink_and_text_across_an_edge_is_cut_off():
    ink = {}
    for bold in (False, True):
        drawn = Canvas(200, 30)
        drawn.write(5, 5, "keeps 60%", 9, bold=bold)
        ink[bold] = (255 - drawn.pixels.astype(int)).sum()
    assert ink[True] > 1.2 * ink[False]
    for x, y in ((-20, 5), (190, 5), (50, -8), (50, 25), (500, 500), (-500, -500)):
        Canvas(200, 30).write(x, y, "keeps 60%", 9)
        Canvas(200, 30).frame((x, y, x + 100, y + 100), RED, 7)


@pytest.mark.parametrize("text", [HOSTILE, "猫" * 300, "i" * 5000, "a\u0301" * 400, "W" * 99])
@pytest.mark.parametrize("width", [30, 160, 531])
def test_a_text_that_is_too_wide_keeps_both_its_ends(text, width):
    text += " 0.987"
    fitted = fit(text, width, 9)
    assert text_width(fitted, 9) <= width
    assert "\n" not in fitted and "\x1b" not in fitted and "…" in fitted
    if width > 100:
        assert fitted.endswith("0.987") and fitted[0] == text[0]
        longer = fit(text, width + 30, 9)
        assert len(longer) > len(fitted)
    assert fit("cat 0.5", width + 40, 9) == "cat 0.5"


def test_a_png_has_the_pixels_of_the_canvas_and_says_that_minivit_drew_it(tmp_path):
    for height, width in ((1, 1), (7, 3), (40, 61)):
        drawn = Canvas(width, height)
        drawn.pixels[:] = RNG.integers(0, 256, (height, width, 3))
        drawn.save(tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as image:
            image.verify()
        with Image.open(tmp_path / "a.png") as image:
            assert image.mode == "RGB"
            assert image.info["Software"] == "minivit"
            assert np.array_equal(np.asarray(image), drawn.pixels)


# Where a model looks


def test_each_text_of_an_attention_figure_is_in_its_place(written, tmp_path):
    figure = attention_figure()
    panels.draw_attention(tmp_path / "a.png", figure)
    shape = pixels(tmp_path / "a.png").shape
    layout = panels._lay_out(figure)
    h, w = figure.photo.shape[:2]
    assert_apart_and_inside(written, shape)
    texts = {(each.text, round(each.left), round(each.top)): each for each in written}
    assert len(texts) == len(written) == 1 + 1 + 3 + 6 * 3 + 4

    (title,) = (each for each in written if each.text == "cat.jpg: dog 0.800")
    assert title.left + title.right == pytest.approx(shape[1], abs=2) and title.top == 8
    (caption,) = (each for each in written if each.text == "What it means.")
    assert caption.left == 14 and caption.top == shape[0] - 16 and caption.colour == GREY
    for r, row in enumerate(figure.rows):
        x, y = layout.position(r, 0)
        (label,) = (each for each in written if each.text == row.label)
        assert label.left == x and y - 8 < label.bottom < y
        for column, panel in enumerate(row.panels, start=1):
            x, y = layout.position(r, column)
            here = [each for each in written if x <= each.left < x + w and y - 40 < each.top]
            here = sorted((e for e in here if e.top < y + h + 50), key=lambda e: (e.top, e.left))
            values = figure.preprocess.to_photo(panel.values, figure.photo_size, (h, w))
            low, high = values.min(), values.max()
            if row.signed:
                maps = [figure.preprocess.to_photo(p.values, (w, h)) for p in row.panels]
                high = max(abs(m).max() for m in maps)
                ends = [f"{-high:+.1f}", f"{high:+.1f} points"]
            else:
                ends = [f"{low:.1f}", f"{high:.1f} %"]
            assert [each.text for each in here] == [panel.title, *ends, *filter(None, [panel.note])]
            assert here[0].left == x and y - 8 < here[0].bottom < y
            assert (here[1].left, here[2].right) == (x, x + w)
            assert y + h + 14 <= here[1].top == here[2].top < y + h + 17
            for note in here[3:]:
                assert note.left == x and note.top > here[1].top + 10
                assert (note.colour, note.bold) == ((RED, True) if panel.warn else (GREY, False))


def test_each_row_has_its_photo_its_maps_and_their_colour_bars(tmp_path):
    figure = attention_figure(size=(375, 500))
    panels.draw_attention(tmp_path / "a.png", figure)
    drawn = pixels(tmp_path / "a.png")
    layout = panels._lay_out(figure)
    h, w = figure.photo.shape[:2]
    for r, row in enumerate(figure.rows):
        x, y = layout.position(r, 0)
        cell = drawn[y : y + h, x : x + w]
        assert np.array_equal(cell, figure.photo) if not row.signed else (cell == 255).all()
        colours = SIGNED if row.signed else HEAT
        maps = [figure.preprocess.to_photo(p.values, figure.photo_size, (h, w)) for p in row.panels]
        for column, values in enumerate(maps, start=1):
            x, y = layout.position(r, column)
            limits = panels.value_range(maps if row.signed else [values], row.signed)
            expected = panels.overlay(figure.photo, values, *limits, colours)
            assert np.array_equal(drawn[y : y + h, x : x + w], expected)
            bar = drawn[y + h + 5 : y + h + 14, x : x + w]
            assert np.abs(bar[:, 0] - colours[0]).max() < 2
            assert np.abs(bar[:, -1] - colours[-1]).max() < 2
            assert (np.diff(bar.sum(-1), axis=1) >= -3).all()  # from dark to light
            assert (drawn[y + h : y + h + 5, x : x + w] == 255).all()


def test_maps_of_a_row_share_a_scale_if_they_should(written, tmp_path):
    values = [np.eye(4), 5 * np.eye(4)]
    row = Row("photo", [Panel(f"block {i}", each) for i, each in enumerate(values)])
    for shared, ends in ((False, {"1.0 %", "5.0 %"}), (True, {"5.0 %"})):
        written.clear()
        panels.draw_attention(tmp_path / "a.png", attention_figure(rows=[row], shared_scale=shared))
        assert {each.text for each in written if each.text.endswith(" %")} == ends


SIZES = [
    (500, 375),
    (375, 500),
    (24, 18),
    (8000, 6000),
    (900, 100),
    (100, 900),
    (1, 8000),
    (9000, 1),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("limits", [LARGE, SMALL], ids=["mean", "heads"])
def test_no_text_leaves_its_place_whatever_the_names(written, tmp_path, size, limits):
    """Range and note are as wide as they get; model and class have hostile names."""
    note = "to class token 100% · top patch 100%"
    row = [Panel("block 10, head 11", np.full((4, 4), 1e-3), note, warn) for warn in (0, 1)]
    rows = [
        Row(f"{HOSTILE.replace(chr(10), ' ')}\n{'猫' * 90} 0.987", row),
        Row("difference", [Panel("block 10, head 11", np.eye(4) * 1e-3)] * 2, signed=True),
    ]
    title = [HOSTILE, f"{HOSTILE} 0.987"]
    figure = attention_figure(size, limits, rows=rows, title=title, caption="word " * 99)
    panels.draw_attention(tmp_path / "a.png", figure)
    drawn = pixels(tmp_path / "a.png")
    assert_apart_and_inside(written, drawn.shape)
    assert written[0].text.count("\n") == 1  # the name, then the prediction
    assert written[0].text.endswith("0.987")
    for edge in (drawn[:2], drawn[-2:], drawn[:, :2], drawn[:, -2:]):
        assert (edge == 255).all()


def test_one_block_and_twelve_are_drawn_side_by_side(written, tmp_path):
    for number in (1, 12):
        written.clear()
        row = Row("photo", [Panel(f"block {i}", np.eye(4), "keeps 1%") for i in range(number)])
        panels.draw_attention(tmp_path / "a.png", attention_figure(rows=[row]))
        titles = [each for each in written if each.text.startswith("block ")]
        assert [each.text for each in titles] == [f"block {i}" for i in range(number)]
        assert len({each.top for each in titles}) == 1
        assert_apart_and_inside(written, pixels(tmp_path / "a.png").shape)


# Predictions and galleries


def test_predictions_are_framed_and_named_above_their_photos(written, tmp_path):
    Image.new("RGB", (300, 200), "blue").save(tmp_path / "wide.png")
    Image.new("RGB", (10, 400), "blue").save(tmp_path / "high.png")
    photos = [tmp_path / "wide.png", tmp_path / "high.png"] * 4
    captions = [("cat", "cat", 0.91), ("cat", HOSTILE, 0.82)] * 4
    panels.draw_predictions(tmp_path / "p.png", photos, captions, "Test photos")
    drawn = pixels(tmp_path / "p.png")
    assert_apart_and_inside(written, drawn.shape)
    assert written[0].text == "Test photos"
    right, wrong = written[1], written[2]
    assert (right.text, right.colour, right.bold) == ("✓ cat 0.91", GREEN, False)
    first, second = wrong.text.split("\n")
    assert first.startswith("✗ $x^2") and first.endswith(" 0.82") and second == "true: cat"
    assert (wrong.colour, wrong.bold) == (RED, True)
    for text, frame, thickness in ((right, GREEN, 2), (wrong, RED, 5)):
        middle = round((text.left + text.right) / 2)
        column = drawn[:, middle]
        top = next(y for y in range(round(text.bottom), len(drawn)) if (column[y] == frame).all())
        assert 0 <= top - text.bottom < 6
        assert (column[top : top + thickness] == frame).all()
        assert (column[top + thickness] == (0, 0, 255)).all()


def test_a_map_is_laid_over_the_grey_photo_pixel_by_pixel():
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    values = rng.uniform(2, 4, (6, 5)).astype(np.float32)
    values[0, 0], values[0, 1], values[5, 4] = 2, 4, np.nan
    drawn = panels.overlay(photo, values, 2.0, 4.0, HEAT)
    for y, x in np.ndindex(6, 5):
        grey = photo[y, x].mean()
        if np.isnan(values[y, x]):
            expected = np.full(3, 190 + 0.25 * grey)  # The model has not seen this pixel.
        else:
            colour = HEAT[min(int(256 * (values[y, x] - 2) / 2), 255)]
            expected = 0.7 * colour + 0.3 * grey
        assert np.abs(drawn[y, x] - np.floor(expected)).max() <= 1, (y, x)  # They may round apart.


def test_letters_are_fitted_to_pixels_as_matplotlib_does():
    from matplotlib.backends.backend_agg import get_hinting_flag

    with mpl.default_settings():
        assert get_hinting_flag() == mpl.HINTING


def test_a_gallery_has_headings_and_a_caption_above_each_strip(written, tmp_path):
    strips = [
        CaptionedStrip(Image.new("RGB", size, colour), f"{colour}.jpg\n{colour} {'cat ' * 40} 0.9")
        for size, colour in (((728, 180), "red"), ((300, 240), "lime"), ((90, 60), "blue"))
    ]
    sections = {"wrong": [*strips, strips[0]], "right": [], "worse": strips[2:]}
    draw_gallery(tmp_path / "g.png", sections, "Each strip shows a photo.\nThe brighter.")
    drawn = pixels(tmp_path / "g.png")
    assert_apart_and_inside(written, drawn.shape)
    headings = [each.text for each in written if each.bold]
    assert headings == ["wrong", "right: none", "worse"]
    captions = [each for each in written if ".jpg\n" in each.text]
    assert [each.text[:4] for each in captions] == ["red.", "lime", "blue", "red.", "blue"]
    assert all(each.text.endswith(" 0.9") for each in captions)
    for each in captions:
        name = each.text.split(".")[0]
        colour = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}[name]
        below = drawn[round(each.bottom) + 6, round(each.left) + 2]
        assert (below == colour).all()
    assert drawn.shape[1] < 1400


def test_texts_that_come_again_are_drawn_once():
    before = canvas._draw_line.cache_info().misses
    for _ in range(3):
        Canvas(300, 20).write(0, 0, "the same for all photos", 9)
    assert canvas._draw_line.cache_info().misses <= before + 2  # it, and the one for its height
