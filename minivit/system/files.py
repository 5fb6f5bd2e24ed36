"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

unfinished: set[Path] = set()  # what a process that ends at once must remove


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to, which takes its place when the block ends well, and is removed if not."""
    partial = path.with_name(
        f".{os.getpid()}.partial"
    )  # short: the whole file's name may be as long as names can be
    unfinished.add(partial)
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
        unfinished.discard(partial)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder for one run, and clear away what a killed one left half written; raises UserError if it is held.

    With `wait`, waits until it is not.

    The kernel lets go of it when the process ends, however that happens; the empty file `.lock` means nothing by itself.
    """
    import fcntl  # not on Windows

    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(
                f"{folder}: another run is writing there; wait for its end or give another --out"
            ) from None
        for left in folder.glob(".*.partial"):
            left.unlink()
        yield


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file; what UTF-8 cannot hold, of a file's name, becomes JSON's own escape."""
    with whole_file(path) as partial:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json(path: Path) -> dict:
    """Read a JSON object; raises UserError if the file holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=dict_of_once)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise UserError(f"{path}: expected JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def dict_of_once(pairs: list[tuple[str, object]]) -> dict:
    """An object_pairs_hook for json: raises ValueError for a key given twice, of which Python would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{len(pairs) - len(found)} of its keys given twice")
    return found
