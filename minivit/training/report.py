"""What a finished run leaves to look at: its figures, a table of its classes, and its model card."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ..data.datasets import Data
from ..system.files import whole_file
from ..system.workers import call
from . import metrics
from .model_card import model_card

NUM_SHOWN = 24  # photos in predictions.png
NUM_PAIRS = 8  # of classes that were confused most


def draw_figures(
    out: Path,
    rows: Sequence[Mapping[str, float]],
    data: Data,
    logits: torch.Tensor,
    begin: Callable[..., Callable[[], object]],
) -> list[Callable[[], object]]:
    """Begin to draw the three figures, from the test photos' logits (n, C), and return what waits for each.

    processes.working gives `begin`.
    """
    labels = torch.tensor(data.test.labels)
    confidence, predicted = logits.softmax(1).max(1)
    wrong = (predicted != labels).nonzero()[:, 0]
    right = (predicted == labels).nonzero()[:, 0]
    # The most confident mistakes, up to half of the grid, and right ones from across the classes.
    shown = wrong[confidence[wrong].argsort(descending=True)][: NUM_SHOWN // 2].tolist()
    stride = max(1, len(right) // (NUM_SHOWN - len(shown)))
    shown += right[::stride][: NUM_SHOWN - len(shown)].tolist()
    captions = [
        (data.classes[labels[i]], data.classes[predicted[i]], confidence[i].item()) for i in shown
    ]
    title = f"Test photos: the most confident of {len(wrong)} wrong, and some of {len(right)} right predictions"
    confusion, pairs = confuse(data, logits)
    of_all, best = (
        f"{len(right)} of {len(labels)} test photos right",
        metrics.best_row(rows)["epoch"],
    )
    figures = {
        "predictions": ([data.test.paths[i] for i in shown], captions, title),
        "confusion": (confusion.numpy(), data.classes, of_all, pairs),
        "curves": (rows, best, metrics.overfits_from(rows), metrics.verdict(rows)),
    }
    return [
        begin(call, "minivit.figures.plots", f"draw_{what}", out / f"{what}.png", *args)
        for what, args in figures.items()
    ]


def confuse(data: Data, logits: torch.Tensor) -> tuple[torch.Tensor, list[tuple[str, str, int]]]:
    """Return the confusion matrix (C, C) and which classes were confused most: true, predicted, photos."""
    confusion = metrics.confusion_matrix(
        logits.argmax(1), torch.tensor(data.test.labels), len(data.classes)
    )
    return confusion, [
        (data.classes[i], data.classes[j], n)
        for i, j, n in metrics.confused_pairs(confusion, NUM_PAIRS)
    ]


def write_tables(
    out: Path, data: Data, logits: torch.Tensor, summary: Mapping, *, name: str, pets: bool
) -> None:
    """Write classes.csv and README.md, which calls the model `name`, and the photos Oxford-IIIT Pet's if they are `pets`."""
    confusion, pairs = confuse(data, logits)
    write_classes(out / "classes.csv", confusion, data.classes)
    with whole_file(out / "README.md") as partial:
        partial.write_text(
            model_card(summary, pairs, name=name, pets=pets),
            encoding="utf-8",
            errors="backslashreplace",
        )


def write_classes(path: Path, confusion: torch.Tensor, classes: Sequence[str]) -> None:
    """Write a line a class: its test photos, precision, recall and F1."""
    columns = zip(
        classes,
        confusion.sum(1).tolist(),
        *(column.tolist() for column in metrics.per_class(confusion)),
    )
    with (
        whole_file(path) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["class", "photos", "precision", "recall", "f1"])
        table.writerows(
            [name, n, *(f"{value:.4f}" for value in scores)] for name, n, *scores in columns
        )
