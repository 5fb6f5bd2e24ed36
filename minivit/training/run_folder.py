"""The folder of a run: whose files lie in it, its lock, and the run that is begun or resumed there.

Nothing that a run did not write is overwritten. A file is a run's if it has a name that runs write,
and if a run's rows, state or summary lie beside it.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoints.tensors import TAIL_KEY, tail_metadata
from ..errors import UserError
from ..settings import AUTO, TrainSettings, flag, list_changes
from ..system import files
from .metrics import overfits_from
from .state import read_state

ROWS = "metrics.jsonl"
SUMMARY = "summary.json"
TAIL = "tail.safetensors"
REFERENCE = "reference.safetensors"
RUN_FILES: tuple[str, ...] = (
    "model.safetensors",
    "config.json",
    "preprocessor_config.json",
    TAIL,
    REFERENCE,
    ROWS,
    SUMMARY,
    "curves.png",
    "confusion.png",
    "calibration.png",
    "predictions.png",
    "classes.csv",
    "README.md",
)
STATE = "state.safetensors"  # This file is there until the run is finished.
ALL_FILES = (*RUN_FILES, STATE)
# By these a run is recognised, so they are the last that are removed of a run that was moved.
TELLING_FILES = (TAIL, ROWS, SUMMARY, STATE)
MOVING = ".minivit-moving"  # the folder that an earlier run moves into before it becomes earlier-N
MOVED = ".minivit-moved"  # in earlier-N: the files are still to be removed from where they were


def check_folder(out: Path) -> None:
    """Raise UserError if a run in this folder would overwrite what no run wrote there.

    Nothing is written: the folder need not exist.
    """
    written = files_of_run(out)
    names = [name for name in ALL_FILES if name not in written]
    names += [path.name for path in _earlier(out) if not _holds_any(path)]
    files.refuse_to_overwrite(out, names)


def check_inputs(settings: TrainSettings) -> None:
    """Raise UserError if the run would be written into the folder of its base or of its photos.

    The base has to stay where it is until the run ends, and results must never be taken for photos.
    """
    out = Path(settings.out)
    if _lies_in(settings.model, out):
        raise UserError(
            f"{out}: --model reads files of this folder, which a run would move or overwrite; "
            "give another --out"
        )
    if _is_same_place(settings.data, settings.out):
        raise UserError(f"{out}: is the folder of the photos too; give another --out")


def _lies_in(model: str, out: Path) -> bool:
    """Return whether a local model, or the base of a local tail, is the folder or a file in it."""
    path = Path(os.path.expanduser(model))
    if path.is_dir():
        return _is_same(path, out)
    if not path.is_file():
        return False
    if _is_same(path.parent, out):
        return True
    base = base_of(model)
    return base != model and _lies_in(base, out)


def base_of(model: str) -> str:
    """Return what a local tail names as its base, or the model itself if it is no tail."""
    path = Path(os.path.expanduser(model))
    metadata = tail_metadata(path)
    if metadata is None:
        return model
    try:
        about = json.loads(metadata[TAIL_KEY]) if TAIL_KEY in metadata else metadata
        return str(about["base"])
    except (ValueError, TypeError, KeyError):  # Whoever loads the tail will say what is wrong.
        return model


def _is_same(a: Path, b: Path) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)


def _is_same_place(a: str, b: str) -> bool:
    """Return whether two arguments name one file or folder."""
    return _is_same(Path(os.path.expanduser(a)), Path(os.path.expanduser(b)))


def files_of_run(out: Path) -> set[str]:
    """Return the names that a run may have written in this folder; none if there is no run.

    Until the end of its last epoch, a run has only its rows and its state. Then it writes the tail
    before the others, and the summary stays when the state is removed.
    """
    has_summary = _is_summary(out / SUMMARY)
    if not has_summary and not _is_rows(out / ROWS) and not _is_state(out / STATE):
        return set()
    if has_summary or _is_tail(out / TAIL):
        return set(ALL_FILES)
    return {ROWS, STATE}


def _is_rows(path: Path) -> bool:
    """Return whether a file holds rows of a run, of which the first may have been cut short."""
    try:
        with path.open("rb") as file:
            start = file.read(len(b'{"epoch": '))
    except OSError:
        return False
    return start in (b'{"epoch": ', b"")


def _is_state(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return "state" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _is_tail(path: Path) -> bool:
    try:
        return tail_metadata(path) is not None
    except UserError:
        return False


def _is_summary(path: Path) -> bool:
    try:
        summary = files.read_json(path)
    except (UserError, OSError):
        return False
    return "best_epoch" in summary and "settings" in summary


def _earlier(out: Path) -> list[Path]:
    """Return out/earlier-1 and so on, in this order, as far as they exist."""
    numbered = {}
    for path in out.glob("earlier-*"):
        number = path.name.removeprefix("earlier-")
        if number.isdecimal():
            numbered[int(number)] = path
    return [numbered[number] for number in sorted(numbered)]


def _holds_any(folder: Path) -> bool:
    return any((folder / name).exists() for name in ALL_FILES)


def lock_folder(out: Path, stack: contextlib.ExitStack) -> None:
    """Create the folder if need be, and hold its lock until the stack is closed.

    Raises UserError if another run holds it, or if the folder holds what no run wrote.
    """
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    stack.enter_context(files.locked(out))
    finish_moving(out)


def settle(out: Path) -> None:
    """Finish what an interrupted run left undone in its folder; raises as lock_folder does.

    A folder without a run is left as it is.
    """
    if files_of_run(out) or (out / ".lock").exists():
        with contextlib.ExitStack() as stack:
            lock_folder(out, stack)


def is_finished(out: Path) -> bool:
    """Return whether the folder holds a run that there is nothing left to do for."""
    return (out / SUMMARY).exists() and not (out / STATE).exists()


def check_finished(out: Path, settings: TrainSettings, precision: str) -> None:
    """Raise UserError if a finished run had other settings, of which it holds no result."""
    summary = files.read_json(out / SUMMARY)
    before = {flag(name): value for name, value in summary["settings"].items()}
    before["precision"] = summary["precision"]
    names = ("model", "revision", "img_size", "data", "blocks")
    wanted = settings.mathematics() | {flag(name): getattr(settings, name) for name in names}
    wanted["precision"] = precision
    chosen = [flag(name) for name in summary["settings"].get("chosen", ())]
    for name, value in wanted.items():
        if value == AUTO:
            # What was chosen would be chosen again.
            wanted[name] = before[name] if name in chosen else "auto"
    wanted = json.loads(json.dumps(wanted))  # A tuple, for example, becomes a list.
    for name in ("--model", "--data"):
        if name in before and _is_same_place(before[name], wanted[name]):  # as data and ./data/ are
            wanted[name] = before[name]
    # What the summary of an earlier version of minivit does not say cannot be compared.
    changes = list_changes(wanted | before, wanted)
    if changes:
        raise UserError(
            f"{out}: holds a finished run with other settings: {'; '.join(changes)}; "
            "without --resume, it is moved away and a new run begins"
        )


def has_state(out: Path, resume: bool) -> bool:
    """Return whether there is a saved state to resume from, and it is wanted."""
    return resume and (out / STATE).exists()


def views_of_state(out: Path) -> int | None:
    """Return how many views the run keeps that is saved here; None if none is saved."""
    try:
        with safe_open(out / STATE, "pt") as file:
            saved = json.loads(file.metadata()["state"])["settings"]
        return saved.get(flag("cache_views"))
    except (SafetensorError, OSError, TypeError, KeyError, ValueError):
        return None  # resume_run() will say what is wrong.


def resume_run(out: Path, fingerprint: Mapping[str, object]) -> tuple[dict[str, Tensor], dict]:
    """Return the saved state, and make metrics.jsonl agree with it.

    Raises UserError if the run began with another fingerprint.
    """
    tensors, about = read_state(out / STATE, fingerprint)
    write_rows(about["rows"], out)
    steps = len(about["losses"])
    print(f"{out}: going on in epoch {about['epoch']}, after {steps} of its steps", file=sys.stderr)
    return tensors, about


def begin_run(out: Path, resume: bool) -> None:
    """Begin a new run: what an earlier run left is moved out of the way."""
    if resume:
        print(f"{out}: there is no run to resume, so a new one begins", file=sys.stderr)
    keep_earlier_run(out)


def keep_earlier_run(out: Path) -> None:
    """Move what an earlier run wrote into out/earlier-N, so that nothing is lost.

    A process that is killed at any moment leaves the whole run in one of the two places: its files
    get second names in a hidden folder, one rename makes this folder earlier-N, and then the
    first names are removed, if not now then by the next run (finish_moving).
    """
    written = files_of_run(out)
    names = [name for name in ALL_FILES if name in written and os.path.lexists(out / name)]
    if not names:
        return
    hidden = out / MOVING
    hidden.mkdir()
    for name in names:
        files.link_or_copy(out / name, hidden / name)
    (hidden / MOVED).touch()
    number = 1
    while os.path.lexists(out / f"earlier-{number}"):
        number += 1
    earlier = out / f"earlier-{number}"
    files.replace_file(hidden, earlier)
    finish_moving(out)
    print(f"{out} holds an earlier run: moved to {earlier}", file=sys.stderr)


def finish_moving(out: Path) -> None:
    """Undo or finish the move of an earlier run that was cut short before or after the rename."""
    hidden = out / MOVING
    if hidden.is_dir():
        for name in (*ALL_FILES, MOVED):
            (hidden / name).unlink(missing_ok=True)
        hidden.rmdir()
    other_files = [name for name in ALL_FILES if name not in TELLING_FILES]
    for earlier in _earlier(out):
        if not (earlier / MOVED).exists():
            continue
        for name in (*other_files, *TELLING_FILES):
            if _is_copy(out / name, earlier / name):
                files.remove_file(out / name)
        (earlier / MOVED).unlink()


def _is_copy(path: Path, original: Path) -> bool:
    """Return whether two paths name one file, or equal ones."""
    if not path.is_file() or not original.is_file():
        return False
    return path.samefile(original) or filecmp.cmp(path, original, shallow=False)


def write_rows(rows: Sequence[Mapping[str, float]], out: Path) -> None:
    """Write metrics.jsonl with a row for each epoch."""
    lines = [json.dumps(row) + "\n" for row in rows]
    with files.whole_file(out / ROWS) as partial:
        partial.write_text("".join(lines), encoding="utf-8")


def report_epoch(rows: Sequence[Mapping[str, float]], epochs: int, out: Path) -> None:
    """Write metrics.jsonl, and print its last row as a line."""
    write_rows(rows, out)
    row = rows[-1]
    scores = (
        f"training {row['train_accuracy']:.4f} (loss {row['train_loss']:.4f}) · "
        f"validation {row['val_accuracy']:.4f} (loss {row['val_loss']:.4f})"
    )
    if row["epoch"] == 0:
        print(f"the head alone · {scores} · {row['seconds']:.1f} s", flush=True)
        return
    gap = f"gap {100 * (row['train_accuracy'] - row['val_accuracy']):.1f} points"
    first = overfits_from(rows)
    if first is not None:
        gap += f", overfitting since epoch {first}"
    print(
        f"epoch {row['epoch']}/{epochs} · loss {row['loss']:.4f} · "
        f"{scores} · {gap} · "
        f"{row['images_per_s']:.0f} images/s (MFU {row['mfu']:.0%}) · {row['seconds']:.1f} s",
        flush=True,
    )


def report_result(out: Path) -> None:
    """Print the result of a finished run, the last line on stdout."""
    summary = files.read_json(out / SUMMARY)
    photos = summary["test_photos"]
    accuracy = summary["test_accuracy"]
    print(
        f"test accuracy {accuracy:.4f} ({round(accuracy * photos)}/{photos}) · "
        f"macro F1 {summary['test_macro_f1']:.4f} · best epoch {summary['best_epoch']} · {out}",
        flush=True,
    )
