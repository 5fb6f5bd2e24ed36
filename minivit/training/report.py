"""What a finished run leaves to read: its figures, a table of its classes, and its model card.

Nothing is imported from torch, so that processes that draw figures start quickly.

Shapes: n test photos, C classes.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, printable
from ..system.files import whole_file
from . import calibration, metrics
from .model_card import model_card

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.datasets import Data

NUM_SHOWN = 24  # photos in predictions.png
NUM_PAIRS = 8  # pairs of classes that are listed as confused most often


def draw_figures(
    executor: Executor,
    out: Path,
    rows: Sequence[Mapping[str, float]],
    kept: metrics.Kept,
    data: Data,
    logits: Tensor,
    confusion: Tensor,
    temperature: float | None,
) -> dict[str, Future[str]]:
    """Start drawing the figures of a run, and return a future for each by its file's name.

    `rows` are those of metrics.jsonl; `logits` (n, C) and `confusion` (C, C) are the test photos'.
    `temperature` is what the logits were divided by, if they were.
    """
    num_photos = int(confusion.sum())
    num_right = int(confusion.trace())
    predictions_title = (
        f"Test photos: the most confident of {num_photos - num_right} wrong predictions, "
        f"and some of {num_right} right ones"
    )
    confusion_title = f"{num_right} of {num_photos} test photos right"
    pairs = name_pairs(confusion, data.classes)
    overfits_from = metrics.overfits_from(rows)
    arguments = {
        "predictions": (*_choose_predictions(data, logits), predictions_title),
        "confusion": (confusion.numpy(), data.classes, confusion_title, pairs),
        "calibration": (_compare_calibration(logits, data, temperature),),
        "curves": (rows, kept.epoch, overfits_from, metrics.verdict(rows, kept)),
    }
    figures = {}
    for name, args in arguments.items():
        figures[f"{name}.png"] = submit(executor, _draw, name, out / f"{name}.png", *args)
    return figures


def _compare_calibration(
    logits: Tensor, data: Data, temperature: float | None
) -> list[tuple[str, list[calibration.Bin]]]:
    """Return the label and the bins of each line of calibration.png."""
    labels = logits.new_tensor(data.test.labels).long()
    before_and_after = {"as trained": logits}
    if temperature is not None:
        before_and_after = {
            "as trained": logits * temperature,
            f"calibrated, temperature {temperature:.2f}": logits,
        }
    lines = []
    for name, drawn in before_and_after.items():
        bins = calibration.reliability(drawn, labels)
        error = calibration.calibration_error(bins)
        lines.append((f"{name}: error {100 * error:.1f} points", bins))
    return lines


def submit(executor: Executor, draw: Callable[..., str], *args: object) -> Future[str]:
    """Start drawing, and return a future that holds the error, too, if drawing cannot start."""
    try:
        return executor.submit(draw, *args)
    except BrokenProcessPool as error:  # A worker was killed, or could not start.
        failed: Future[str] = Future()
        failed.set_exception(error)
        return failed


def wait_for_figures(figures: Mapping[str, Future[str]], out: Path) -> bool:
    """Wait until all figures are drawn or have failed, and return whether all are drawn.

    If the cause of a failure lies outside of minivit, a line on stderr names the figure. Any other
    error is raised, after all figures.
    """
    all_are_drawn = True
    defect: BaseException | None = None
    for name, figure in figures.items():
        error = figure.exception()
        if error is None:
            _report_lacking(figure.result())
            continue
        all_are_drawn = False
        if not _lies_outside(error):
            defect = error
            continue
        reason = str(error) or type(error).__name__
        print(
            f"{out / name}: cannot be drawn ({printable(reason)}); all else is written, and the "
            "same command with --resume draws it",
            file=sys.stderr,
        )
    if defect is not None:
        raise defect
    return all_are_drawn


def _report_lacking(characters: str | None) -> None:
    """Report the characters that a figure cannot show."""
    if characters:
        from ..figures.fonts import report_lacking  # This imports matplotlib.

        report_lacking(characters)


def _lies_outside(error: BaseException) -> bool:
    """Return whether an error has its cause in the machine: its disk, memory, photos or fonts."""
    if isinstance(error, (OSError, MemoryError, ImportError, UserError, BrokenProcessPool)):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and ("font" in words or "latex" in words)


def _draw(name: str, path: Path, *args) -> str:
    """Draw one figure, and return the characters that it cannot show.

    This runs in a worker, so that only workers import matplotlib.
    """
    from ..figures import panels, plots

    module = panels if name == "predictions" else plots
    return getattr(module, f"draw_{name}")(path, *args)


def _choose_predictions(
    data: Data, logits: Tensor
) -> tuple[list[Path], list[tuple[str, str, float]]]:
    """Choose test photos to show; return their paths and captions.

    Up to half of them are the most confident mistakes. The rest are right predictions, spread
    evenly over the test photos and thus over the classes. A caption is the true class, the
    predicted class and its probability.
    """
    confidence, predicted = logits.softmax(1).max(1)
    is_right = predicted == predicted.new_tensor(data.test.labels)
    wrong = (~is_right).nonzero()[:, 0]
    right = is_right.nonzero()[:, 0]
    by_confidence = confidence[wrong].argsort(descending=True)
    indices = wrong[by_confidence][: NUM_SHOWN // 2].tolist()
    num_right = NUM_SHOWN - len(indices)
    stride = max(1, len(right) // num_right)
    indices += right[::stride][:num_right].tolist()
    captions = []
    for i in indices:
        true_class = data.classes[data.test.labels[i]]
        captions.append((true_class, data.classes[predicted[i]], confidence[i].item()))
    return [data.test.paths[i] for i in indices], captions


def name_pairs(confusion: Tensor, classes: Sequence[str]) -> list[tuple[str, str, int]]:
    """Return the pairs confused most often: (true class, predicted class, number of photos)."""
    pairs = []
    for true, predicted, count in metrics.confused_pairs(confusion, NUM_PAIRS):
        pairs.append((classes[true], classes[predicted], count))
    return pairs


def make_card(out: Path, summary: Mapping, *, name: str | None) -> str:
    """Return the model card of a run, whose summary.json holds `summary`.

    It calls the model `name`, which is the id of its Hub repository, or else by its folder's name.
    """
    if name is None:
        name = out.resolve().name
    return model_card(summary, summary["confused"], name=name, pets=summary["is_pets"])


def write_card(out: Path, summary: Mapping, *, name: str | None) -> None:
    """Write the model card README.md of a run, as make_card() makes it."""
    card = make_card(out, summary, name=name)
    with whole_file(out / "README.md") as partial:
        partial.write_text(card, encoding="utf-8", errors="backslashreplace")


def write_classes(path: Path, confusion: Tensor, classes: Sequence[str]) -> None:
    """Write a row for each class: its number of test photos, precision, recall and F1."""
    scores = [column.tolist() for column in metrics.per_class(confusion)]
    with (
        whole_file(path) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["class", "photos", "precision", "recall", "f1"])
        for name, photos, *values in zip(classes, confusion.sum(1).tolist(), *scores):
            table.writerow([name, photos, *(f"{value:.4f}" for value in values)])
