"""Files that are written whole or not at all, and the lock on a folder."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError, first_few

# Files that are being written.
_unfinished: set[Path] = set()


def remove_unfinished() -> None:
    """Remove the files that are being written, before a process ends at once."""
    for path in list(_unfinished):
        path.unlink(missing_ok=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to.

    The temporary file replaces `path` when the block ends, and is removed if the block fails.
    """
    # Threads and other machines may write into the same folder. The name is short because `path`
    # may have the longest name that the file system allows.
    partial = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.partial")
    _unfinished.add(partial)
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
        _unfinished.discard(partial)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder for one run, and remove what a killed run left half written.

    The operating system releases the lock when the process ends, however that happens. The file
    `.lock` stays and means nothing by itself. With `wait`, waits until the lock is free;
    otherwise raises UserError if another run holds it.
    """
    import filelock

    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        raise UserError(
            f"{folder}: another run is writing there; wait for its end or give another --out"
        ) from None
    try:
        for partial in folder.glob(".*.partial"):
            partial.unlink()
        yield
    finally:
        lock.release()


def refuse_to_overwrite(folder: Path, names: Iterable[str]) -> None:
    """Raise UserError if files of these names are in a folder that is going to be written into.

    A command calls this before it begins, with the names that it writes and has not written there
    before. Raises UserError too if no files can be written there. The folder need not exist, and
    nothing is left in it.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{existing}: expected a folder, found a file; give another --out")
    try:
        with tempfile.TemporaryFile(dir=existing):  # os.access() promises root too much.
            pass
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written to ({error.strerror}); give another --out"
        ) from error
    taken = [name for name in names if os.path.lexists(folder / name)]
    if taken:
        raise UserError(
            f"{folder}: holds {first_few(taken)}, which minivit did not write there and would "
            "overwrite; move that away, or give another --out"
        )


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name in another folder; where the disk cannot do that, copy it."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # FAT and some network file systems have no hard links.
        shutil.copy2(source, target, follow_symlinks=False)


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file; parts of a file name that are not UTF-8 become JSON escapes."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json(path: Path) -> dict:
    """Read a JSON object; raises UserError if the file holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=dict_of_unique_keys)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise UserError(f"{path}: expected JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def dict_of_unique_keys(pairs: list[tuple[str, object]]) -> dict:
    """Build a JSON object; raises ValueError for a repeated key, of which json keeps the last."""
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError(f"{len(pairs) - len(result)} of its keys given twice")
    return result
