"""The folder of a run: held by one process, begun or gone on with, told in a row an epoch."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..system import files
from . import state
from .metrics import overfits_from

RUN_FILES: tuple[str, ...] = (
    "model.safetensors",
    "config.json",
    "preprocessor_config.json",
    "tail.safetensors",
)
RUN_FILES += (
    "metrics.jsonl",
    "summary.json",
    "curves.png",
    "confusion.png",
    "predictions.png",
    "classes.csv",
    "README.md",
)
STATE = "state.safetensors"  # there until the run is finished


def claim(out: Path, held: contextlib.ExitStack, resume: bool) -> bool:
    """Take hold of the folder, and say whether it holds a finished run that there is nothing to go on with."""
    out.mkdir(parents=True, exist_ok=True)
    held.enter_context(files.locked(out))
    finished = resume and (out / "summary.json").exists() and not (out / STATE).exists()
    if finished:
        print(f"{out} holds a finished run", file=sys.stderr)
        print(result(files.read_json(out / "summary.json"), out))
    return finished


def begin(out: Path, resume: bool, settings: dict) -> tuple | None:
    """Read the state to go on from, and let metrics.jsonl say what it says; else move what is there out of the way."""
    if resume and (out / STATE).exists():
        tensors, about = state.read(out / STATE, settings)
        with files.whole_file(out / "metrics.jsonl") as partial:
            partial.write_text(
                "".join(json.dumps(row) + "\n" for row in about["rows"]), encoding="utf-8"
            )
        print(
            f"{out}: going on in epoch {about['epoch']}, after {len(about['losses'])} of its steps",
            file=sys.stderr,
        )
        return tensors, about
    if resume:
        print(f"{out}: no run to go on with, so it begins", file=sys.stderr)
    keep_earlier_run(out)
    return None


def keep_earlier_run(out: Path) -> None:
    """Move what an earlier run wrote into out/earlier-N, so that nothing is lost when a new run begins."""
    if not (out / "metrics.jsonl").exists() and not (out / STATE).exists():
        return
    earlier = next(path for i in itertools.count(1) if not (path := out / f"earlier-{i}").exists())
    earlier.mkdir()
    for name in (*RUN_FILES, STATE):
        if (out / name).exists():
            (out / name).rename(earlier / name)
    print(f"{out} holds an earlier run: moved to {earlier}", file=sys.stderr)


def report_epoch(rows: Sequence[Mapping[str, float]], epochs: int, out: Path) -> None:
    """Add the last row to metrics.jsonl, and say it in a line."""
    row, first = rows[-1], overfits_from(rows)
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(
        f"epoch {row['epoch']}/{epochs} · loss {row['loss']:.4f} · "
        f"training {row['train_accuracy']:.4f} (loss {row['train_loss']:.4f}) · "
        f"validation {row['val_accuracy']:.4f} (loss {row['val_loss']:.4f}) · "
        f"gap {100 * (row['train_accuracy'] - row['val_accuracy']):.1f} points"
        f"{f', overfitting since epoch {first}' if first else ''} · "
        f"{row['images_per_s']:.0f} images/s (MFU {row['mfu']:.0%}) · {row['seconds']:.1f} s",
        flush=True,
    )


def result(summary: Mapping, out: Path) -> str:
    """Return the last line of a run."""
    photos, accuracy = summary["test_photos"], summary["test_accuracy"]
    return (
        f"test accuracy {accuracy:.4f} ({round(accuracy * photos)}/{photos}) · macro F1 {summary['test_macro_f1']:.4f} · "
        f"best epoch {summary['best_epoch']} · {out}"
    )
