"""Nothing around a command changes its result: the user's matplotlib, fonts, variables, streams."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, draw_photo, run_train
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image
from safetensors.torch import load_file

from minivit import Preprocess, cli
from minivit.figures import canvas, drawing, fonts, panels, plots
from minivit.figures.mpl import font_manager, matplotlib
from minivit.tools.score import figure as score_figure
from minivit.tools.score.gallery import CaptionedStrip, draw_gallery
from minivit.tools.score.statistics import Estimate, Score, ScoreKey
from minivit.tools.study import figure as study_figure
from minivit.tools.study.summary import Spread, Summary

ROWS = [
    {
        "epoch": epoch,
        "train_loss": 1 / epoch,
        "val_loss": 0.5 + 1 / epoch,
        "train_accuracy": 1 - 0.5 / epoch,
        "val_accuracy": 0.9 - 0.5 / epoch,
    }
    for epoch in (1, 2, 3)
]


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# matplotlib's settings


def draw_curves(path):
    plots.draw_curves(path, ROWS, 2, 3, "overfitting from epoch 3")


def draw_confusion(path):
    counts = np.array([[5, 1], [0, 4]])
    plots.draw_confusion(path, counts, ["cat", "dog"], "9 of 10", [("cat", "dog", 1)])


def draw_predictions(path):
    photo = path.with_name("photo.png")
    Image.new("RGB", (90, 60), "green").save(photo)
    panels.draw_predictions(path, [photo] * 2, [("a", "a", 0.9), ("a", "b", 0.8)], "Test photos")


def draw_attention(path):
    photo = np.full((60, 90, 3), 128, np.uint8)
    panel = panels.Panel("block 0", np.linspace(0, 1, 16).reshape(4, 4), "top patch 2%")
    rows = [panels.Row("photo", [panel, panel])]
    figure = panels.AttentionFigure(photo, (90, 60), Preprocess(), rows, ["title"], "caption")
    panels.draw_attention(path, figure)


def draw_scores(path):
    estimate = Estimate(1.5, 1.2, 1.8)
    score = Score(4, estimate, estimate, estimate, estimate)
    scores = {}
    for block in (0, 1):
        for head in (0, 1, "mean"):
            scores[ScoreKey("model", "pet", "all", "attention", block, head)] = score
    score_figure.draw_scores(path, scores, {"model": "runs/pets"}, "a sentence")


def draw_study(path):
    fields = {"photos": 10, "seeds": 2, "test": Spread(0.5, 0.4, 0.6), "gap": Spread(0.1, 0, 0.2)}
    fields |= {name: 0 for name in Summary._fields if name not in fields}
    fields |= {"validation": Spread(0.5, 0.4, 0.6)} if "validation" in Summary._fields else {}
    study_figure.draw_study(path, {"the head alone": {"5": Summary(**fields)}}, "a sentence")


def draw_strips(path):
    strip = CaptionedStrip(Image.new("RGB", (80, 40), "red"), "cat.jpg")
    draw_gallery(path, {"wrong": [strip], "right": []}, "photos worth a look")


FIGURES = (
    draw_curves,
    draw_confusion,
    draw_predictions,
    draw_attention,
    draw_scores,
    draw_study,
    draw_strips,
)
HOSTILE = {
    "text.usetex": True,
    "savefig.dpi": 300,
    "figure.dpi": 33,
    "savefig.bbox": "tight",
    "savefig.transparent": True,
    "savefig.facecolor": "green",
    "figure.facecolor": "red",
    "figure.autolayout": True,
    "font.size": 30,
    "font.family": ["serif"],
    "axes.spines.top": False,
    "axes.unicode_minus": False,
    "axes.prop_cycle": matplotlib.cycler("color", ["r", "g"]),
    "image.cmap": "jet",
    "image.origin": "lower",
    "lines.linewidth": 9.0,
    "path.sketch": (1.0, 100.0, 2.0),
    "legend.loc": "upper left",
    "xtick.labelsize": 30.0,
    "grid.color": "red",
}


@pytest.mark.parametrize("draw", FIGURES)
def test_a_figure_is_the_same_whatever_the_users_settings(draw, tmp_path):
    draw(tmp_path / "own.png")
    with matplotlib.rc_context(HOSTILE):
        draw(tmp_path / "hostile.png")
        assert matplotlib.rcParams["font.size"] == 30  # The user's settings are left alone.
    assert np.array_equal(pixels(tmp_path / "own.png"), pixels(tmp_path / "hostile.png"))


def draw_in_a_process(path, cwd, **variables) -> subprocess.CompletedProcess:
    """Do what draw_curves does in a process of its own, without torch."""
    code = f"""
import sys
from pathlib import Path
from minivit.figures import plots
plots.draw_curves(Path(sys.argv[1]), {ROWS}, 2, 3, "overfitting from epoch 3")
"""
    return subprocess.run(
        [sys.executable, "-c", code, path],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
    )


def test_a_wrong_backend_and_settings_of_other_bytes_change_no_figure(tmp_path):
    settings = tmp_path / "settings"
    settings.write_bytes(b"\xff\xfe")
    done = draw_in_a_process(
        tmp_path / "drawn.png",
        tmp_path,
        MPLBACKEND="module://not_installed.backend_inline",
        MATPLOTLIBRC=str(settings),
        MPLCONFIGDIR="/dev/null/none",
    )
    assert (done.returncode, done.stderr) == (0, "")
    draw_curves(tmp_path / "own.png")
    assert np.array_equal(pixels(tmp_path / "own.png"), pixels(tmp_path / "drawn.png"))


def test_settings_in_this_folder_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "matplotlibrc").write_bytes(b"\xff\xfe")
    done = draw_in_a_process(tmp_path / "drawn.png", tmp_path)
    assert done.stderr.splitlines()[-1].startswith(
        "minivit.errors.UserError: matplotlib cannot read its settings ('utf-8' codec"
    )


def test_matplotlib_is_imported_by_mpl_alone_and_by_what_comes_after_it():
    """Its import fails with a wrong MPLBACKEND, which this module takes care of."""
    for path in (ROOT / "minivit").rglob("*.py"):
        if path.name == "mpl.py":
            continue
        if path.name == "mpl_charts.py":
            assert path.read_text().index("import mpl ") < path.read_text().index("matplotlib.axes")
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            assert not any(name.split(".")[0] == "matplotlib" for name in names), path


# Names in all scripts


def make_font(path: Path, characters: str) -> None:
    """Write a font in which each of these characters is a black square."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 900), (900, 900), (900, 0)):
        pen.lineTo(point)
    pen.closePath()
    square = pen.glyph()
    names = {ord(character): f"u{ord(character):04X}" for character in characters}
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap(names)
    builder.setupGlyf(
        {".notdef": TTGlyphPen(None).glyph(), **dict.fromkeys(names.values(), square)}
    )
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *names.values()], (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


CACHES = (fonts.fallback_families, canvas._draw_line, canvas._open_font)


def clear_caches():
    for cached in CACHES:
        cached.cache_clear()


@pytest.fixture
def installed(monkeypatch):
    """A list of the fonts that are installed besides DejaVu Sans."""
    paths: list[str] = []
    manager = font_manager.fontManager
    dejavu = [entry for entry in manager.ttflist if entry.name == "DejaVu Sans"]
    monkeypatch.setattr(manager, "ttflist", dejavu)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: paths)
    monkeypatch.setattr(fonts, "_reported", set())
    clear_caches()
    yield paths
    clear_caches()


NAMES = ["猫", "犬 dog"]


def draw_names(path) -> str:
    counts = np.array([[5, 0], [0, 4]])
    return plots.draw_confusion(path, counts, NAMES, "猫と犬", [("猫", "犬", 1)])


def test_names_are_drawn_in_a_font_that_has_their_characters(installed, tmp_path, capsys):
    for name, characters in (("Squares One", "猫犬"), ("Squares Two", "とx"), ("Three", "x")):
        make_font(tmp_path / f"{name}.ttf", characters)
        installed.append(str(tmp_path / f"{name}.ttf"))
    assert draw_names(tmp_path / "names.png") == ""
    assert capsys.readouterr().err == ""
    with_squares = (pixels(tmp_path / "names.png") == 0).sum()
    fonts.fallback_families.cache_clear()
    installed.clear()
    font_manager.fontManager.ttflist = [
        entry for entry in font_manager.fontManager.ttflist if entry.name == "DejaVu Sans"
    ]
    draw_names(tmp_path / "boxes.png")
    assert with_squares > 1.5 * (pixels(tmp_path / "boxes.png") == 0).sum()


def test_a_canvas_draws_a_name_in_a_font_that_has_its_characters(installed, tmp_path):
    boxes = canvas._draw_line("猫犬", 9, False)
    assert boxes.missing == {"猫", "犬"}
    make_font(tmp_path / "Squares One.ttf", "猫")
    make_font(tmp_path / "Squares Two.ttf", "犬")
    installed += [str(tmp_path / "Squares One.ttf"), str(tmp_path / "Squares Two.ttf")]
    clear_caches()
    squares = canvas._draw_line("猫犬", 9, False)
    assert not squares.missing
    assert (squares.opacity == 255).sum() > 2 * (boxes.opacity == 255).sum()


def test_characters_that_no_font_has_are_said_once_with_what_helps(installed, tmp_path, capsys):
    assert draw_names(tmp_path / "boxes.png") == "と犬猫"
    assert draw_names(tmp_path / "boxes.png") == "と犬猫"
    assert capsys.readouterr().err == (
        "no installed font has と犬猫: figures show boxes in their place; install a font that has "
        "them, such as Noto Sans CJK (apt install fonts-noto-cjk)\n"
    )
    fonts.report_lacking("बि")
    assert "such as Noto Sans (apt install fonts-noto-core)" in capsys.readouterr().err


@pytest.mark.parametrize("draw", [draw_predictions, draw_attention, draw_scores, draw_strips])
def test_no_figure_shows_boxes_without_a_word(draw, installed, tmp_path, capsys, monkeypatch):
    real_text, real_line = matplotlib.text.Text.set_text, canvas._draw_line
    monkeypatch.setattr(matplotlib.text.Text, "set_text", lambda text, s: real_text(text, f"{s}猫"))
    monkeypatch.setattr(canvas, "_draw_line", lambda text, *style: real_line(f"{text}猫", *style))
    draw(tmp_path / "figure.png")
    assert capsys.readouterr().err.startswith("no installed font has 猫: ")


def test_older_matplotlib_is_said_to_write_arabic_letter_by_letter(
    installed, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(matplotlib, "__version_info__", (3, 10, 0, "final", 0))
    counts = np.array([[5, 0], [0, 4]])
    plots.draw_confusion(tmp_path / "names.png", counts, ["قطة", "dog"], "9 of 10")
    assert "draws Arabic letter by letter; install matplotlib 3.11" in capsys.readouterr().err


def test_a_font_with_bitmaps_of_small_sizes_or_a_broken_one_is_not_used(installed, tmp_path):
    make_font(tmp_path / "LastResort.ttf", "猫")
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    installed += [str(tmp_path / "LastResort.ttf"), str(tmp_path / "broken.ttf")]
    assert fonts.fallback_families(frozenset("猫")) == ([], {"猫"})


def test_a_chinese_name_is_shortened_to_the_same_width_as_a_latin_one():
    assert plots.shorten("abcdefgh", 8) == "abcdefgh"
    assert plots.shorten("abcdefghi", 8) == "abcdefg…"
    assert plots.shorten("猫犬鳥魚", 8) == "猫犬鳥魚"
    assert plots.shorten("猫犬鳥魚馬", 8) == "猫犬鳥…"


@pytest.mark.parametrize("num_classes", [2, 5, 37])
def test_nothing_of_a_confusion_matrix_is_cut_off(num_classes, tmp_path, monkeypatch):
    """At its edges a figure is white, because no text and no bar reaches them."""
    names = [f"Staffordshire Bull Terrier {i}" for i in range(num_classes)]
    counts = np.eye(num_classes, dtype=int) * 100
    pairs = [(names[0], names[1], 3)] * 8
    plots.draw_confusion(tmp_path / "confusion.png", counts, names, "3429 of 3669 right", pairs)
    image = pixels(tmp_path / "confusion.png")
    for edge in (image[:2], image[-2:], image[:, :2], image[:, -2:]):
        assert (edge == 255).all()
    assert image.shape[1] < 1700


def test_a_figure_says_that_minivit_drew_it(tmp_path):
    with drawing.new_figure((1, 1)) as figure:
        drawing.save(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["Software"] == "minivit"


# Sessions, streams and interpreters


def test_a_session_goes_on_after_a_command(monkeypatch):
    """`%run infer.py` in a notebook must not end its kernel."""
    monkeypatch.setattr(sys, "ps1", "In [1]: ", raising=False)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for code in (0, 2):
        assert cli.start(lambda code=code: code) is None
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_command_in_another_thread_does_not_end_the_program():
    codes = []
    thread = threading.Thread(target=lambda: codes.append(cli.start(lambda: 0)))
    thread.start()
    thread.join()
    assert codes == [None]


STREAMS = """
import os, sys
from minivit import cli
def main():
    print("lost")
    print("lost", file=sys.stderr)
    with open("file", "w") as file:
        os.write(1, b"lost")
        os.write(2, b"lost")
        file.write("kept")
    return 3
cli.start(main)
"""


def test_what_is_printed_to_closed_streams_lands_in_no_file(tmp_path):
    command = f"exec {sys.executable} -c '{STREAMS}' <&- >&- 2>&-"
    done = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 3
    assert (tmp_path / "file").read_text() == "kept"


ODD = {
    "PYTHONOPTIMIZE": "2",
    "PYTHONWARNINGS": "error",
    "PYTHONIOENCODING": "ascii",
    "LC_ALL": "C",
    "TZ": "Nowhere/None",
    "COLUMNS": "1",
    "TERM": "dumb",
    "TMPDIR": "/nonexistent",
    "CUDA_VISIBLE_DEVICES": "none",
    "MPLBACKEND": "garbage",
    "RANK": "1",
    "LOCAL_RANK": "7",
}


def test_odd_variables_change_no_answer_and_no_figure(tiny_saved, tmp_path):
    photo = tmp_path / "café.png"
    draw_photo(60, 50).save(photo)
    answers = []
    for name, variables in (("plain", {}), ("odd", ODD)):
        flags = ["--model", tiny_saved, "--layers", "11", "--device", "cpu", "--amp", "off"]
        done = subprocess.run(
            [sys.executable, ROOT / "infer.py", photo, *flags, "--out", tmp_path / name, "--json"],
            capture_output=True,
            text=True,
            env={key: value for key, value in os.environ.items() if key not in ODD} | variables,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        answers.append(json.loads(done.stdout)["predictions"])
    assert answers[0] == answers[1]
    plain, odd = (tmp_path / name / "café.png" for name in ("plain", "odd"))
    assert plain.read_bytes() == odd.read_bytes()
    assert done.stderr.count("ignored, because torchrun sets all of them") == 1


HELP = """
import contextlib, io
from minivit import __main__
assert not __main__.__doc__
for name in __main__.COMMANDS:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        __main__.main([name, "--help"])
    usage, description, *_ = printed.getvalue().split("\\n\\n")
    assert usage.startswith("usage: ") and len(description.split()) > 5, printed.getvalue()
"""


def test_help_is_whole_without_docstrings():
    command = [sys.executable, "-OO", "-c", HELP]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_promise_hangs_on_an_assert():
    """python -O leaves them out; those that are left only tell a type checker what is known."""
    count = 0
    for path in (ROOT / "minivit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assert):
                test = ast.unparse(node.test)
                assert test.endswith("is not None") or test.startswith("isinstance("), (path, test)
                count += 1
    assert count > 0


# torch's settings


@pytest.mark.usefixtures("no_figures")
def test_the_calling_programs_defaults_of_torch_change_no_run(tiny_saved, shapes_data, tmp_path):
    assert run_train(tiny_saved, shapes_data, tmp_path / "plain", "--epochs", "2") == 0
    try:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")
        torch.set_grad_enabled(False)
        assert run_train(tiny_saved, shapes_data, tmp_path / "odd", "--epochs", "2") == 0
        assert torch.get_default_dtype() == torch.bfloat16
        assert torch.get_default_device().type == "meta"
        assert not torch.is_grad_enabled()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.set_grad_enabled(True)
    plain, odd = (tmp_path / name / "tail.safetensors" for name in ("plain", "odd"))
    assert load_file(plain)["head.weight"].equal(load_file(odd)["head.weight"])
