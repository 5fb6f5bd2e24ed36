"""Metrics from confusion matrices, the figures of a run, and the verdict on overfitting."""

from __future__ import annotations

import csv
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from minivit.training.metrics import (
    KEEP,
    choose_kept,
    confused_pairs,
    confusion_matrix,
    overfits_from,
    per_class,
    standard_error,
    summarize,
    verdict,
)
from minivit.training.report import write_classes


def test_metrics_of_a_confusion_matrix_made_by_hand():
    true = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 0, 0, 1, 1, 0, 0])
    confusion = confusion_matrix(predicted, true, 3)
    assert confusion.tolist() == [[3, 1, 0], [1, 1, 0], [1, 0, 0]]
    precision, recall, f1 = per_class(confusion)
    assert precision.tolist() == pytest.approx([3 / 5, 1 / 2, 0])
    assert recall.tolist() == pytest.approx([3 / 4, 1 / 2, 0])
    assert f1.tolist() == pytest.approx([2 / 3, 1 / 2, 0])
    assert summarize(confusion) == pytest.approx(
        {
            "accuracy": 4 / 7,
            "precision": (4 * 3 / 5 + 2 * 1 / 2) / 7,
            "recall": (4 * 3 / 4 + 2 * 1 / 2) / 7,
            "f1": (4 * 2 / 3 + 2 * 1 / 2) / 7,
            "macro_f1": (2 / 3 + 1 / 2) / 3,
        }
    )


def test_macro_f1_leaves_out_a_class_that_is_absent_and_never_predicted():
    assert (
        summarize(confusion_matrix(torch.tensor([0, 1]), torch.tensor([0, 1]), 4))["macro_f1"] == 1
    )


def test_a_class_of_one_photo_that_was_predicted_once_is_all_right():
    confusion = confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 1]), 2)
    assert [scores.tolist() for scores in per_class(confusion)] == [[1, 1]] * 3


def test_a_class_that_was_predicted_but_never_is_counts_in_macro_f1():
    assert summarize(confusion_matrix(torch.tensor([0, 1]), torch.tensor([0, 0]), 3))[
        "macro_f1"
    ] == pytest.approx(2 / 3 / 2)


def drawn(path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).float()


HOSTILE = "$x^2 <b>\x1b[31m" + "long " * 50


def test_figures_show_their_contents_and_take_any_name(tmp_path):
    from minivit.figures import panels, plots

    name = HOSTILE.replace("\x1b", "")
    Image.new("RGB", (300, 200), "green").save(tmp_path / "green.png")
    panels.draw_predictions(
        tmp_path / "p.png",
        [tmp_path / "green.png"] * 7,
        [(name, "a", 0.5)] * 7,
        "title",
    )
    picture = drawn(tmp_path / "p.png")
    photos = (picture == torch.tensor([0.0, 128.0, 0.0])).all(-1)
    assert photos.float().mean() > 0.2
    plots.draw_confusion(tmp_path / "c.png", np.eye(40, dtype=int), [name] * 40, "title")
    pairs = [(name, "b", 3)] * 8
    plots.draw_confusion(tmp_path / "d.png", np.eye(40, dtype=int), ["a"] * 40, "title", pairs)
    row = {"train_loss": 1, "val_loss": 2, "train_accuracy": 0.5, "val_accuracy": 0.4}
    plots.draw_curves(tmp_path / "l.png", [row | {"epoch": i} for i in (1, 2)], 2)
    plots.draw_curves(tmp_path / "m.png", [row | {"epoch": i} for i in (1, 2)], 2, 2, "a verdict")
    plain, shaded = drawn(tmp_path / "l.png"), drawn(tmp_path / "m.png")
    shade = torch.tensor([254.0, 234.0, 208.0])  # #fdb863 at an opacity of 0.3
    assert (shaded - shade).abs().amax(-1).le(2).sum() > 10_000
    assert (plain - shade).abs().amax(-1).le(2).sum() == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "c.png",
        "d.png",
        "green.png",
        "l.png",
        "m.png",
        "p.png",
    ]


def rows_of(*losses):
    return [
        {
            "epoch": i,
            "train_loss": train,
            "val_loss": val,
            "train_accuracy": 0.998,
            "val_accuracy": 0.931 - 0.01 * (i > 3),
        }
        for i, (train, val) in enumerate(losses, 1)
    ]


OVERFITTING = {
    "rises while training falls": ([(1.0, 1.0), (0.5, 0.6), (0.2, 0.7), (0.1, 0.9)], 3),
    "falls": ([(1.0, 1.0), (0.5, 0.6), (0.2, 0.5)], None),
    "rises with training's": ([(1.0, 1.0), (0.5, 0.6), (0.8, 0.9)], None),
    "rises by noise": ([(1.0, 1.0), (0.5, 0.6), (0.2, 0.605)], None),
    "rose and came down": ([(1.0, 1.0), (0.5, 0.6), (0.4, 0.9), (0.1, 0.55)], None),
    "one epoch": ([(1.0, 1.0)], None),
}


@pytest.mark.parametrize("losses, epoch", OVERFITTING.values(), ids=OVERFITTING)
def test_overfitting_is_rising_validation_loss_with_falling_training_loss(losses, epoch):
    assert overfits_from(rows_of(*losses)) == epoch


def test_the_verdict_is_one_plain_sentence():
    rows = rows_of(*OVERFITTING["rises while training falls"][0])
    assert verdict(rows, choose_kept(rows, "best", 30)) == (
        "overfitting from epoch 3: training 99.8%, validation 92.1%; epoch 3 was kept, which has "
        "the highest validation accuracy; try fewer blocks or more photos"
    )
    head_alone = rows[0] | {"epoch": 0, "val_accuracy": 0.8}
    rows = [head_alone, *rows_of((1.0, 1.0), (0.5, 0.6))]
    assert verdict(rows, choose_kept(rows, "auto", 30)) == (
        "the validation loss has not risen: training 99.8%, validation 93.1%, a gap of 6.7 points, "
        "the head alone 80.0%; epoch 2 was kept, the last: none before it is better by more than 2 "
        "standard errors of 30 photos"
    )
    diverged = rows_of((1.0, 1.0), (0.5, 0.6), (2.0, 2.0))
    assert verdict(diverged, choose_kept(diverged, "auto", 30)).startswith("training 99.8%, ")
    assert verdict([head_alone], choose_kept([head_alone], "auto", 30)) == (
        "training 99.8%, validation 80.0%, a gap of 19.8 points; the head alone was trained"
    )


# A standard error of 0.5 on 98 photos is 0.05.


@pytest.mark.parametrize(
    "keep, accuracies, kept",
    [
        ("auto", [0.4, 0.45, 0.5], (2, "last")),
        ("auto", [0.4, 0.59, 0.5], (2, "last")),  # within two standard errors, 0.1
        ("auto", [0.4, 0.61, 0.5], (1, "earlier")),
        ("auto", [0.61, 0.4, 0.5], (0, "earlier")),  # the head alone
        ("auto", [0.59, 0.4, 0.5], (2, "last")),
        ("auto", [0.61, 0.61, 0.5], (1, "earlier")),  # Of equal ones, the later.
        ("auto", [0.9], (0, "last")),  # --blocks none
        ("auto", [0.25, 0.2], (1, "last")),
        ("auto", [0.9, 0.2], (0, "earlier")),
        ("best", [0.4, 0.51, 0.5], (1, "earlier")),
        ("best", [0.51, 0.4, 0.5], (0, "earlier")),
        ("best", [0.5, 0.5, 0.5], (2, "last")),
        ("last", [0.9, 0.9, 0.1], (2, "last")),
        ("last", [0.9], (0, "last")),
        ("average", [0.9, 0.9, 0.1], (2, "average")),
        ("average", [0.9, 0.1], (1, "average")),
        ("average", [0.9], (0, "last")),
    ],
    ids=str,
)
def test_each_rule_keeps_the_weights_it_says(keep, accuracies, kept):
    rows = [{"epoch": i, "val_accuracy": value} for i, value in enumerate(accuracies)]
    choice = choose_kept(rows, keep, 98)
    assert (choice.epoch, choice.weights) == kept


def test_a_run_that_ended_early_keeps_its_best_epoch_unless_asked_otherwise():
    rows = [{"epoch": i, "val_accuracy": value} for i, value in enumerate([0.4, 0.51, 0.5])]
    chosen = {keep: choose_kept(rows, keep, 98, ended_early=True).epoch for keep in KEEP}
    assert chosen == {"auto": 1, "best": 1, "last": 2, "average": 2}


def test_what_counts_as_clearly_better_depends_on_the_number_of_photos():
    rows = [{"epoch": i, "val_accuracy": value} for i, value in enumerate([0.4, 0.55, 0.5])]
    assert choose_kept(rows, "auto", 30).epoch == 2
    assert choose_kept(rows, "auto", 3000).epoch == 1


def test_the_standard_error_is_the_binomials_and_never_0():
    assert standard_error(0.5, 10_000) == pytest.approx(0.005, rel=1e-3)
    assert standard_error(1.0, 30) == pytest.approx(math.sqrt(31 / 32 / 32 / 30))
    assert standard_error(0.0, 30) == standard_error(1.0, 30)


def test_the_most_confused_pairs_come_first_and_right_ones_never():
    confusion = torch.tensor([[9, 0, 3], [5, 9, 0], [1, 0, 9]])
    assert confused_pairs(confusion, 2) == [(1, 0, 5), (0, 2, 3)]
    assert confused_pairs(confusion, 9) == [(1, 0, 5), (0, 2, 3), (2, 0, 1)]


def test_workers_that_draw_figures_do_not_import_torch():
    modules = "minivit.training.report, minivit.figures.plots, minivit.figures.panels"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_table_of_classes_is_scikit_learns(tmp_path):
    """The values are from scikit-learn 1.5: precision_recall_fscore_support, zero_division=0."""
    confusion = torch.tensor([[2, 1, 0], [0, 3, 0], [1, 0, 0]])
    write_classes(tmp_path / "classes.csv", confusion, ["a", 'b,"c"\n', "d"])
    assert list(csv.reader((tmp_path / "classes.csv").read_text().splitlines(keepends=True))) == [
        ["class", "photos", "precision", "recall", "f1"],
        ["a", "3", "0.6667", "0.6667", "0.6667"],
        ['b,"c"\n', "3", "0.7500", "1.0000", "0.8571"],
        ["d", "1", "0.0000", "0.0000", "0.0000"],
    ]


def test_curves_leave_room_above_for_their_markers(monkeypatch):
    from minivit.figures import plots

    figures = []
    row = {"train_loss": 1.78, "val_loss": 1.79, "train_accuracy": 1.0, "val_accuracy": 0.0}
    monkeypatch.setattr(plots, "save", lambda figure, _: figures.append(figure))
    plots.draw_curves(None, [row | {"epoch": i} for i in (1, 2)], 2)
    loss, accuracy = figures[0].axes
    marker = 0.01  # half of one, as a fraction of the axis
    assert loss.get_ylim()[0] == 0
    for ax, most in ((loss, 1.79), (accuracy, 1.0)):
        low, high = ax.get_ylim()
        assert most + marker * (high - low) < high < 1.1 * most
