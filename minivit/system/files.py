"""Files that are written whole or not at all, and the lock on a folder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError, first_few
from .stand_ins import stand_in

# A temporary file of another machine's that has not grown for so long is nobody's.
LEFTOVER_AFTER_S = 3600
# Decoding the photos of a very large data set, for which other runs wait, takes hours.
LOCK_LIMIT_S = 12 * 3600
# A program that looks at new files, as a virus scanner does, has closed them by then.
IN_USE_LIMIT_S = 2.0
# Names of devices, which Windows takes for no file's, with any extension or none.
DEVICE_NAMES = {"con", "prn", "aux", "nul", "conin$", "conout$"}
DEVICE_NAMES |= {f"{port}{number}" for port in ("com", "lpt") for number in "0123456789¹²³"}
# Files that are being written.
_unfinished: set[Path] = set()


def remove_unfinished() -> None:
    """Remove the files and folders that are being written, before a process ends at once."""
    for path in list(_unfinished):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to.

    The temporary file replaces `path` when the block ends, and is removed if the block fails. An
    OSError, as of a full disk, then names `path`, the only name that the user knows.
    """
    partial = _temporary_path(path)
    _unfinished.add(partial)
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        replace_file(partial, path)
    except OSError as error:
        if error.strerror and error.filename in (None, str(partial), partial):
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(PermissionError):  # A scanner has it open: it is a leftover now.
            partial.unlink(missing_ok=True)
        _unfinished.discard(partial)


def replace_file(source: Path, target: Path) -> None:
    """Give a file or folder the name `target`, which a file may have had until now."""
    _patiently(target, os.replace, source, target)


def remove_file(path: Path) -> None:
    """Remove a file."""
    _patiently(path, os.unlink, path)


def _patiently(path: Path, change: Callable[..., None], *arguments: Path) -> None:
    """Call change(*arguments), again and again for a while if that is not allowed.

    Windows neither removes nor replaces a file that a program has open or mapped into memory.
    Raises PermissionError, which names `path`, if it stays open.
    """
    deadline = time.monotonic() + IN_USE_LIMIT_S
    while True:
        try:
            return change(*arguments)
        except PermissionError as error:
            if time.monotonic() > deadline:
                reason = f"{error.strerror}; if a program or a notebook has it open, close it there"
                raise PermissionError(error.errno, reason, str(path)) from error
            time.sleep(0.05)


def portable_stem(stem: str) -> str:
    """Return a file name without its extension, changed if need be to one that any system takes.

    Windows has no names with `: * ? " < > | \\`, with a dot or space at the end, or of devices.
    """
    stem = re.sub(r'[\x00-\x1f:*?"<>|/\\]', "_", stem)
    stem = re.sub(r"[. ]+$", "_", stem)
    if stem.partition(".")[0].rstrip(" ").lower() in DEVICE_NAMES:
        stem = f"_{stem}"
    return stem


def _temporary_path(path: Path) -> Path:
    """Return a name beside `path` that no other thread, process or machine takes."""
    # It is short because `path` may have the longest name that the file system allows.
    name = f".{_process_space()}-{os.getpid()}-{secrets.token_hex(4)}.partial"
    return path.with_name(name)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, for a library that makes temporary files of its own.

    All that is in it is removed when the block ends, or after this process is killed.
    """
    folder = _temporary_path(path)
    _unfinished.add(folder)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unfinished.discard(folder)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path` to write into.

    It replaces the folder `path` when the block ends, and is removed if the block fails.
    """
    partial = path.with_name(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # A process that was killed may have left it.
    partial.mkdir()
    _unfinished.add(partial)
    try:
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        replace_file(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _unfinished.discard(partial)


@functools.cache
def _process_space() -> str:
    """Return a name for all processes that have their numbers from the same system as this one.

    Machines differ in it, and so do containers and the starts of one machine.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        namespace = Path("/proc/self/ns/pid").readlink()
    except OSError:  # Not Linux. Nothing tells whose process numbers are ours.
        return secrets.token_hex(4)
    space = f"{platform.node()} {boot} {namespace}"
    return hashlib.sha256(space.encode()).hexdigest()[:8]


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes were writing in a folder, but not what live ones are writing.

    Which processes are alive is known only where process numbers are shared. Others may write
    from another machine or container: their files are removed when they have not grown for long.
    """
    for partial in folder.glob(".*.partial"):
        with contextlib.suppress(FileNotFoundError):
            if _is_leftover(partial):
                _remove(partial)


def _is_leftover(partial: Path) -> bool:
    space, _, rest = partial.name.lstrip(".").partition("-")
    number = rest.partition("-")[0]
    if space == _process_space() and number.isdecimal():
        return not _is_alive(int(number))
    changes = [each.stat().st_mtime for each in (partial, *partial.glob("*"))]
    return time.time() - max(changes) > LEFTOVER_AFTER_S


def _is_alive(process: int) -> bool:
    if process == os.getpid():
        return True
    try:
        # This sends no signal. On Windows it would, but it is asked on Linux only, where
        # _process_space() is that of other processes, too.
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # It is somebody else's.
        return True
    return True


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder for one run, and remove what a killed run left half written.

    The operating system releases the lock when the process ends, however that happens. The file
    `.lock` stays and means nothing by itself. With `wait`, waits until the lock is free, and says
    so; otherwise raises UserError if another run holds it. On a file system without locks, goes on
    without one, and says so.
    """
    import filelock

    lock = filelock.FileLock(folder / ".lock")
    if not has_locks(folder):
        print(
            f"{folder}: its file system has no locks; see to it that no other run writes there",
            file=sys.stderr,
        )
        remove_leftovers(folder)
        yield
        return
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if not wait:
            raise UserError(
                f"{folder}: another run is writing there; wait for its end or give another --out"
            ) from None
        print(f"waiting for another process to release {lock.lock_file}", file=sys.stderr)
        try:
            lock.acquire(timeout=LOCK_LIMIT_S)
        except filelock.Timeout:
            raise UserError(
                f"{lock.lock_file}: still held by another process after {LOCK_LIMIT_S / 3600:g} "
                "hours; end that process"
            ) from None
    try:
        remove_leftovers(folder)
        yield
    finally:
        lock.release()


def has_locks(folder: Path) -> bool:
    """Return whether a new file in a folder can be locked. Raises OSError if none can be made."""
    if sys.platform == "win32":  # Each of its file systems has them.
        return True
    import fcntl

    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # ENOSYS, EOPNOTSUPP, ENOLCK: nobody else can hold the lock of a new file.
            return False
    return True


def is_writable(folder: Path) -> bool:
    """Return whether files can be written into a folder under its lock, and make it if need be.

    They are tried, because what a file system says about rights may not be true.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").open("ab").close()
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def refuse_to_overwrite(folder: Path, names: Iterable[str]) -> None:
    """Raise UserError if files of these names are in a folder that is going to be written into.

    A command calls this before it begins, with the names that it writes and has not written there
    before. Raises UserError too if no files can be written there. The folder need not exist, and
    nothing is left in it.
    """
    places = [path for path in (folder, *folder.absolute().parents) if os.path.lexists(path)]
    if not places:
        raise UserError(f"{folder}: there is no such drive; give another --out")
    existing = places[0]
    if not existing.is_dir():
        found = "a file" if existing.exists() else "a link that leads nowhere"
        raise UserError(f"{existing}: expected a folder, found {found}; give another --out")
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
    except (OSError, NotImplementedError):  # FAT and some network file systems have no hard links.
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
        explanation = stand_in(path)
        if not explanation:
            explanation = f"expected JSON ({error})"
        raise UserError(f"{path}: {explanation}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def dict_of_unique_keys(pairs: list[tuple[str, object]]) -> dict:
    """Build a JSON object; raises ValueError for a repeated key, of which json keeps the last."""
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError(f"{len(pairs) - len(result)} of its keys given twice")
    return result
