from __future__ import annotations

import pytest
import torch
from PIL import Image

from minivit.metrics import confusion_matrix, per_class, summarize


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


def test_a_class_that_neither_is_nor_was_predicted_does_not_count_in_macro_f1():
    assert summarize(confusion_matrix(torch.tensor([0, 1]), torch.tensor([0, 1]), 4))["macro_f1"] == 1


def drawn(path) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).float()


HOSTILE = "$x^2 <b>\x1b[31m" + "long " * 50


def test_figures_show_their_contents_and_take_any_name(tmp_path):
    from minivit import plots

    photo = Image.new("RGB", (300, 200), "green")
    plots.draw_predictions(tmp_path / "p.png", [photo] * 7, [(HOSTILE.replace("\x1b", ""), "a", 0.5)] * 7, "title")
    picture = drawn(tmp_path / "p.png")
    assert (picture == torch.tensor([0.0, 128.0, 0.0])).all(-1).float().mean() > 0.2  # the photos themselves
    plots.draw_confusion(tmp_path / "c.png", torch.eye(40, dtype=torch.long), [HOSTILE.replace("\x1b", "")] * 40, "title")
    row = {"train_loss": 1, "val_loss": 2, "train_accuracy": 0.5, "val_accuracy": 0.4}
    plots.draw_curves(tmp_path / "l.png", [row | {"epoch": i} for i in (1, 2)], 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.png", "l.png", "p.png"]
