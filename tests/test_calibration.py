"""Calibrated probabilities: the temperature, its error, and a run whose head holds it."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_trainable, run_train
from torch.testing import assert_close

from minivit import load_pretrained, open_photo
from minivit.checkpoints.weights import differences
from minivit.figures import plots
from minivit.model import working_copy
from minivit.training import calibration
from minivit.training.model_card import model_card


def drawn_logits(n, factor, seed=0):
    """Return logits that are `factor` times what would be calibrated, and labels drawn from it."""
    generator = torch.Generator().manual_seed(seed)
    honest = 2 * torch.randn(n, 4, generator=generator)
    labels = torch.multinomial(honest.softmax(1), 1, generator=generator)[:, 0]
    return factor * honest, labels


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_the_temperature_is_what_the_logits_were_multiplied_by(factor):
    logits, labels = drawn_logits(20_000, factor)
    temperature = calibration.fit_temperature(logits, labels)
    assert temperature == pytest.approx(factor, rel=0.05)
    losses = [
        F.cross_entropy(logits / (temperature * change), labels).item()
        for change in (1, 0.98, 1.02)
    ]
    assert losses[0] == min(losses)


def test_photos_that_are_all_right_give_no_endless_confidence():
    """Two classes, a margin of 1: by hand, the wrong class has half of 1 / (n + 2) of the share."""
    n = 100
    logits = torch.tensor([[1.0, 0.0]]).expand(n, 2)
    temperature = calibration.fit_temperature(logits, torch.zeros(n, dtype=torch.long))
    share = 1 / (2 * (n + 2))
    assert temperature == pytest.approx(1 / math.log((1 - share) / share), rel=1e-6)


@pytest.mark.parametrize("wrong", [0.0, 1.0])
def test_the_temperature_stays_within_its_limits(wrong):
    labels = torch.zeros(200, dtype=torch.long)
    logits = torch.tensor([[1e-3, 0.0]]).expand(200, 2) * (1 - 2 * wrong)
    expected = calibration.HIGHEST if wrong else 1 / calibration.HIGHEST
    assert calibration.fit_temperature(logits, labels) == pytest.approx(expected)


def test_auto_calibrates_from_100_validation_photos_on():
    logits, labels = drawn_logits(100, 3.0)
    choose = calibration.choose_temperature
    assert choose("auto", logits, labels) == choose("on", logits, labels) > 1
    assert choose("auto", logits[1:], labels[1:]) is None
    assert choose("on", logits[1:], labels[1:]) is not None
    assert choose("off", logits, labels) is None


def test_a_folded_temperature_divides_the_logits_in_any_precision(pixels):
    model = make_trainable()
    copies = [
        working_copy(model, torch.device("cpu"), dtype, train=False)
        for dtype in (None, torch.bfloat16)
    ]
    images = model.preprocess.normalize(pixels[0])
    with torch.no_grad():
        before = [copy(images) for copy in copies]
        calibration.fold_temperature(2.0, model, *copies)  # exact in binary
        assert torch.equal(model(images), before[0] / 2)
        for copy, logits in zip(copies, before):
            assert torch.equal(copy(images), logits / 2)


def test_the_calibration_error_is_the_gap_weighted_by_photos():
    """By hand: 3 photos at confidence 0.9, of which 2 are right, and 1 at 0.55, which is right."""
    odds = torch.tensor([0.9, 0.9, 0.9, 0.55])
    logits = torch.stack([odds, 1 - odds], 1).log()
    bins = calibration.reliability(logits, torch.tensor([0, 0, 1, 0]))
    assert [each.num_photos for each in bins] == [1, 3]
    assert calibration.calibration_error(bins) == pytest.approx(
        (3 * abs(2 / 3 - 0.9) + 1 * abs(1 - 0.55)) / 4
    )
    # A confidence of 1 belongs to the last bin.
    sure = calibration.reliability(torch.tensor([[100.0, -100.0]]), torch.tensor([0]))
    assert sure == [(1, 1.0, 1.0)]


@pytest.fixture(scope="module")
def runs(tiny_saved, shapes_data, tmp_path_factory):
    """Two runs that differ in --calibrate only, on the CPU in float32."""
    from conftest import leave_figures_empty

    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        leave_figures_empty(patch)
        for calibrate in ("off", "on"):
            out = folders[calibrate] = tmp_path_factory.mktemp(calibrate)
            flags = ("--epochs", "1", "--calibrate", calibrate, "--cache-views", "0")
            assert run_train(tiny_saved, shapes_data, out, *flags) == 0
    return folders


def read(path):
    return json.loads((path / "summary.json").read_text())


def test_a_calibrated_run_predicts_the_same_with_other_probabilities(runs, shapes_data):
    off, on = read(runs["off"]), read(runs["on"])
    assert off["temperature"] is None
    temperature = on["temperature"]
    assert abs(temperature - 1) > 0.01
    for name in ("test_accuracy", "test_f1", "best_epoch", "confused"):
        assert on[name] == off[name]
    assert on["test_loss"] != off["test_loss"]
    assert on["test_calibration_error_before"] == pytest.approx(off["test_calibration_error"])
    assert on["test_calibration_error"] != on["test_calibration_error_before"]
    assert on["val_photos"] == 3
    # metrics.jsonl is of training, so it knows nothing of the calibration.
    rows = [(runs[name] / "metrics.jsonl").read_text().splitlines() for name in runs]
    losses = [[json.loads(line)["val_loss"] for line in lines] for lines in rows]
    assert losses[0] == losses[1]

    models = {name: load_pretrained(folder) for name, folder in runs.items()}
    assert differences(models["on"], load_pretrained(runs["on"] / "tail.safetensors")) == []
    photo = open_photo(next(shapes_data.glob("test/red/*.png")))
    with torch.no_grad():
        logits = {name: model(model.preprocess(photo)[None]) for name, model in models.items()}
    assert_close(logits["on"], logits["off"] / temperature, rtol=1e-5, atol=1e-6)


def test_the_pipeline_of_transformers_gives_the_calibrated_probabilities(runs, shapes_data):
    from transformers import pipeline

    path = next(shapes_data.glob("test/red/*.png"))
    model = load_pretrained(runs["on"])
    with torch.no_grad():
        logits = model(model.preprocess(open_photo(path))[None])[0]
    ours = logits.softmax(0)
    uncalibrated = (logits * read(runs["on"])["temperature"]).softmax(0)
    assert (ours - uncalibrated).abs().max() > 0.02
    theirs = pipeline("image-classification", str(runs["on"]))(str(path))
    for answer in theirs:
        index = model.labels.index(answer["label"])
        # The drawn photo is enlarged by other code, which rounds pixels differently at times.
        assert answer["score"] == pytest.approx(ours[index].item(), abs=2e-3)


def test_a_finished_run_is_not_resumed_with_another_calibration(
    runs, tiny_saved, shapes_data, capsys
):
    flags = ("--epochs", "1", "--calibrate", "off", "--cache-views", "0", "--resume")
    assert run_train(tiny_saved, shapes_data, runs["on"], *flags) == 2
    assert "--calibrate was on, now off" in capsys.readouterr().err


def test_the_head_alone_is_calibrated_too(tiny_saved, shapes_data, tmp_path, no_figures):
    flags = ("--blocks", "none", "--calibrate", "on")
    assert run_train(tiny_saved, shapes_data, tmp_path, *flags) == 0
    assert read(tmp_path)["temperature"] is not None


def test_the_card_says_what_was_calibrated(runs):
    card = model_card(read(runs["on"]), name="x", pets=False)
    assert "Its probabilities are calibrated: a temperature of" in card
    assert "fitted to the 3\nvalidation photos" in card
    error = read(runs["off"])["test_calibration_error"]
    card = model_card(read(runs["off"]), name="x", pets=False)
    assert "Its probabilities are not calibrated." in card
    assert f"| expected calibration error | {error:.4f} |\n" in card


def test_the_reliability_figure_is_drawn_for_one_line_and_for_two(tmp_path):
    logits, labels = drawn_logits(500, 3.0)
    lines = [
        (name, calibration.reliability(logits / t, labels)) for name, t in (("a", 1), ("b", 3))
    ]
    for count in (1, 2):
        assert plots.draw_calibration(tmp_path / "c.png", lines[:count]) == ""
        assert (tmp_path / "c.png").stat().st_size > 5000
