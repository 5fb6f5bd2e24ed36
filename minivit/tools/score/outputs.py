"""The files of `score` and `drop`: their names, and what may be overwritten."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ...errors import UserError
from ...system.files import locked, read_json, refuse_to_overwrite, whole_file


def output_names(command: str, *, gallery: bool) -> list[str]:
    """Return the names of the files that a command writes.

    The JSON file comes first, because its list says which other files the command wrote.
    """
    names = [f"{command}.{suffix}" for suffix in ("json", "csv", "png")]
    if gallery:
        names += ["gallery.png", "gallery.html"]
    return names


def earlier_outputs(out: Path, command: str) -> set[str]:
    """Return the names of the files in a folder that an earlier call of a command wrote there."""
    try:
        about = read_json(out / f"{command}.json")
    except (UserError, OSError):
        return set()
    settings = about.get("settings")
    if "sentence" not in about or not isinstance(settings, dict):
        return set()  # Another program wrote this file.
    # Older files of score have no list.
    usual = output_names(command, gallery=bool(settings.get("gallery")))
    files = about.get("files", usual)
    return {name for name in output_names(command, gallery=True) if name in files}


def check_folder(out: Path, command: str, *, gallery: bool) -> None:
    """Raise UserError if a command would overwrite what it did not write."""
    earlier = earlier_outputs(out, command)
    names = output_names(command, gallery=gallery)
    refuse_to_overwrite(out, [name for name in names if name not in earlier])


@contextlib.contextmanager
def replace_earlier(out: Path, command: str) -> Iterator[None]:
    """Lock a folder while a command writes into it, without what an earlier call wrote there.

    So the results of two models never lie together.
    """
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, wait=True):
        for name in earlier_outputs(out, command) - {f"{command}.json"}:  # This is replaced first.
            (out / name).unlink(missing_ok=True)
        yield


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows that have the same columns."""
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
