"""The folder of a run: locked by one process, begun or resumed, with a row for each epoch."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..system import files
from .metrics import overfits_from
from .state import read_state

RUN_FILES: tuple[str, ...] = (
    "model.safetensors",
    "config.json",
    "preprocessor_config.json",
    "tail.safetensors",
    "metrics.jsonl",
    "summary.json",
    "curves.png",
    "confusion.png",
    "predictions.png",
    "classes.csv",
    "README.md",
)
STATE = "state.safetensors"  # This file is there until the run is finished.


def lock_folder(out: Path, stack: contextlib.ExitStack) -> None:
    """Create the folder if need be, and hold its lock until the stack is closed."""
    out.mkdir(parents=True, exist_ok=True)
    stack.enter_context(files.locked(out))


def is_finished(out: Path) -> bool:
    """Return whether the folder holds a run that there is nothing left to do for."""
    return (out / "summary.json").exists() and not (out / STATE).exists()


def report_finished(out: Path) -> None:
    """Print the result of a finished run again."""
    print(f"{out} holds a finished run", file=sys.stderr)
    print(result_line(files.read_json(out / "summary.json"), out))


def has_state(out: Path, resume: bool) -> bool:
    """Return whether there is a saved state to resume from, and it is wanted."""
    return resume and (out / STATE).exists()


def resume_run(out: Path, fingerprint: Mapping[str, object]) -> tuple[dict[str, Tensor], dict]:
    """Return the saved state, and make metrics.jsonl agree with it.

    Raises UserError if the run began with another fingerprint.
    """
    tensors, about = read_state(out / STATE, fingerprint)
    rows = "".join(json.dumps(row) + "\n" for row in about["rows"])
    with files.whole_file(out / "metrics.jsonl") as partial:
        partial.write_text(rows, encoding="utf-8")
    steps = len(about["losses"])
    print(f"{out}: going on in epoch {about['epoch']}, after {steps} of its steps", file=sys.stderr)
    return tensors, about


def begin_run(out: Path, resume: bool) -> None:
    """Begin a new run: what an earlier run left is moved out of the way."""
    if resume:
        print(f"{out}: there is no run to resume, so a new one begins", file=sys.stderr)
    keep_earlier_run(out)


def keep_earlier_run(out: Path) -> None:
    """Move what an earlier run wrote into out/earlier-N, so that nothing is lost."""
    if not (out / "metrics.jsonl").exists() and not (out / STATE).exists():
        return
    folders = (out / f"earlier-{i}" for i in itertools.count(1))
    earlier = next(folder for folder in folders if not folder.exists())
    earlier.mkdir()
    for name in (*RUN_FILES, STATE):
        if (out / name).exists():
            (out / name).rename(earlier / name)
    print(f"{out} holds an earlier run: moved to {earlier}", file=sys.stderr)


def report_epoch(rows: Sequence[Mapping[str, float]], epochs: int, out: Path) -> None:
    """Append the last row to metrics.jsonl, and print it as a line."""
    row = rows[-1]
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    gap = f"gap {100 * (row['train_accuracy'] - row['val_accuracy']):.1f} points"
    first = overfits_from(rows)
    if first is not None:
        gap += f", overfitting since epoch {first}"
    print(
        f"epoch {row['epoch']}/{epochs} · loss {row['loss']:.4f} · "
        f"training {row['train_accuracy']:.4f} (loss {row['train_loss']:.4f}) · "
        f"validation {row['val_accuracy']:.4f} (loss {row['val_loss']:.4f}) · {gap} · "
        f"{row['images_per_s']:.0f} images/s (MFU {row['mfu']:.0%}) · {row['seconds']:.1f} s",
        flush=True,
    )


def result_line(summary: Mapping, out: Path) -> str:
    """Return the last line that a run prints."""
    photos = summary["test_photos"]
    accuracy = summary["test_accuracy"]
    return (
        f"test accuracy {accuracy:.4f} ({round(accuracy * photos)}/{photos}) · "
        f"macro F1 {summary['test_macro_f1']:.4f} · best epoch {summary['best_epoch']} · {out}"
    )
