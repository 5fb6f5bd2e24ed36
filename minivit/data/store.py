"""The store: a file of all photos of a data set, decoded to a model's pixels.

It is written once and found again by later runs, until the photos or what decodes them change (see
`_digest_files`). Without a store, photos are decoded whenever they are needed.

torch is imported only where photos are read, so that a process can write a store without it.
Shapes: n photos, B of a batch, h, w pixels of the model's input.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import PIL
from tqdm import tqdm

from ..errors import UserError, first_few, printable
from ..system.files import (
    has_locks,
    is_writable,
    locked,
    read_json,
    remove_leftovers,
    whole_file,
    write_json,
)
from ..system.home import cache_folders
from ..system.progress import progress_bar
from ..system.workers import (
    map_ahead,
    processes_worth_starting,
    read_ahead,
    worker_pool,
    write_behind,
)
from .datasets import Data
from .photos import PhotoError, open_photo
from .preprocess import Preprocess, decode_into

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 2  # of the code that decodes: stores of other versions are not used
SAMPLED_PHOTOS = 256  # whose content the checksum of a data set is of, besides one of each folder
SAMPLED_BYTES = 1 << 16
CHUNK = 16  # photos that a worker decodes in one job
# After so many photos, the disk is told to write what it has been given, a multiple of CHUNK. It
# then does so while photos are decoded, and not at the end, when all wait for it.
FLUSHED_PHOTOS = 64 * CHUNK


class Pixels:
    """The pixels of some photos: pixels[index] is uint8 (B, 3, h, w), for a slice or int64 (B,).

    Photos come from the rows of `stored`, uint8 (all photos, 3, h, w), if it is given. Otherwise
    they are decoded by `workers` threads when they are asked for, which raises PhotoError for a
    photo that cannot be read.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        preprocess: Preprocess,
        workers: int,
        stored: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> None:
        import torch

        self.paths = paths
        self.preprocess = preprocess
        self.workers = workers
        self.stored = stored
        self.rows = torch.arange(len(paths)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        import torch

        index = torch.arange(len(self))[index]
        if self.stored is not None:
            return self.stored[self.rows[index]]
        paths = [self.paths[i] for i in index.tolist()]
        return torch.stack(list(read_ahead(self._decode, paths, self.workers)))

    def _decode(self, path: Path) -> Tensor:
        return self.preprocess.pixels(open_photo(path))


def prepare(
    data: Data, preprocess: Preprocess, *, workers: int, cap_gib: float, skip_bad: bool = False
) -> tuple[Data, Path | None]:
    """Find or write the store of a data set; return the data, and the store's file.

    The store lies in .minivit beside the photos, or in the user's cache folder if nothing can be
    written there. It is written anew when a photo changes. If it would take more than `cap_gib`, or
    more than is free on the disk, or if no folder can be written to, there is none (the file is
    None).

    With `skip_bad`, photos that cannot be read are left out of the returned data and named on
    stderr. Otherwise they raise UserError, as does a class or split that has no photos left.
    """
    paths = data.paths()
    name = _file_name(paths, data.root, preprocess)
    file = _find_store(data.root, name)
    if file is None or _has_become_readable(file, paths):
        folder = _writable_folder(data.root)
        if folder is not None:
            remove_leftovers(folder)  # They may take the room that is needed.
        obstacle = _obstacle(len(paths), preprocess, folder, cap_gib)
        if obstacle and skip_bad:
            raise UserError(f"{data.root}: {obstacle}, and --skip-bad needs the store")
        if obstacle or folder is None:
            print(f"{data.root}: {obstacle}: each epoch decodes them anew", file=sys.stderr)
            return data, None
        file = folder / name
        with locked(folder, wait=True):
            # Another run may just have written it.
            if not _is_complete(file) or _has_become_readable(file, paths):
                with show_decoding(len(paths)) as bar:
                    _write_store(file, paths, preprocess, workers, bar.update)
    errors = {paths[int(i)]: error for i, error in read_json(_errors_file(file)).items()}
    return _without(data, errors, skip_bad), file


def prepare_ahead(
    data: Data,
    preprocess: Preprocess,
    *,
    workers: int,
    cap_gib: float,
    report: Callable[[int], object],
) -> None:
    """Write the store beside the photos, if there is none and nothing needs to be said about it.

    This is for a process that runs ahead of the one that calls prepare(), which then finds the
    store. Whatever stands in the way is left for that one to find and to report. `report` is called
    with the number of all photos, and then with that of the photos in each job that is done.
    """
    paths = data.paths()
    folder = _folders(data.root)[0]
    file = folder / _file_name(paths, data.root, preprocess)
    if _find_store(data.root, file.name) is not None:
        return
    if processes_worth_starting(paths, workers) == 0:
        return
    if not is_writable(folder) or not has_locks(folder):
        return
    with locked(folder):
        if _is_complete(file) or _obstacle(len(paths), preprocess, folder, cap_gib):
            return
        report(len(paths))
        _write_store(file, paths, preprocess, workers, report)


def show_decoding(num_photos: int) -> tqdm:
    """Return a bar, shown on a terminal only, that is told of the photos that are decoded."""
    return progress_bar(total=num_photos, desc="decoding", unit="photo")


def open_splits(
    data: Data, file: Path | None, preprocess: Preprocess, workers: int
) -> list[tuple[Pixels, Tensor]]:
    """Return the pixels and the labels (n,) of train, val and test.

    `data` and `file` are what prepare() returned.
    """
    import torch

    everything = open_pixels(data, file, preprocess, workers)
    row_of = {path: i for i, path in enumerate(everything.paths)}
    opened = []
    for split in (data.train, data.val, data.test):
        rows = torch.tensor([row_of[path] for path in split.paths])
        pixels = Pixels(split.paths, preprocess, workers, everything.stored, rows)
        opened.append((pixels, torch.tensor(split.labels)))
    return opened


def open_pixels(data: Data, file: Path | None, preprocess: Preprocess, workers: int) -> Pixels:
    """Return the pixels of all photos.

    `data` and `file` are what prepare() returned. Without the file, photos are decoded when they
    are needed.
    """
    import torch

    stored = None
    # A rank on another machine may not see a temporary folder of rank 0's, and then decodes.
    if file is not None and _is_complete(file):
        # Copy on write: torch wants memory that it may write to.
        stored = torch.from_numpy(np.load(file, mmap_mode="c"))
    return Pixels(data.paths(), preprocess, workers, stored)


def checksum(*splits: tuple[Sequence[Path], Sequence[int]]) -> str:
    """Return a short digest of splits, each given as its photos and their labels.

    It is of what a run depends on wherever the photos lie, so that a run goes on with a copy of
    them: of a photo its folder's name, its own name and its size, and of some photos, at least one
    of each folder, also a part of their content. Two folders that have changed places are noticed;
    two photos of the same size may not be.
    """
    described: list[object] = []
    folders: set[Path] = set()  # of which a photo has been sampled
    for paths, labels in splits:
        photos = [(path.parent.name, path.name, path.stat().st_size) for path in paths]
        described.append([*photos, *labels])
        step = -(-len(paths) // SAMPLED_PHOTOS)
        for i, path in enumerate(paths):
            if i % step == 0 or path.parent not in folders:
                folders.add(path.parent)
                # Writing out the bytes themselves would take longer than all else here.
                described.append(hashlib.sha256(_middle(path)).hexdigest())
    return _digest([VERSION, *described])[:8]


def _middle(path: Path) -> bytes:
    """Return bytes from the middle of a file, where a photo has its pixels."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, (size - SAMPLED_BYTES) // 2))
        return file.read(SAMPLED_BYTES)


def _kind(preprocess: Preprocess) -> str:
    """Name a way of decoding. For each there is at most one store beside the photos."""
    h, w = preprocess.size
    steps = [
        preprocess.resize,
        preprocess.crop,
        preprocess.resample,
        preprocess.round_margins,
    ]
    return f"{h}x{w}-{_digest(steps)[:8]}"


def _file_name(paths: Sequence[Path], root: Path, preprocess: Preprocess) -> str:
    return f"{_kind(preprocess)}-{_digest_files(paths, root)[:16]}.npy"


def _digest_files(paths: Sequence[Path], root: Path) -> str:
    """Return a digest that changes when the photos do, or the library that decodes them.

    Of a photo, its path within `root`, its size, its times and its inode number count. The number
    goes with a file that is moved, so that photos that change places are noticed even if they have
    one size and one time. The time of the last change, unlike that of the last modification, cannot
    be set back: it tells of a photo that `cp -p` has overwritten. A copy has other numbers, as has
    every mount of some network file systems: there, the store is written anew.

    Not noticed is a photo that is overwritten in its place with as many bytes at the moment that
    the store has just been written, if the file system's clock is coarse.
    """
    digest = hashlib.sha256(repr((VERSION, PIL.__version__)).encode())
    folders: dict[str, str] = {}  # paths within `root`
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.relpath(folder, root)
        identity = None
        with contextlib.suppress(OSError):  # Decoding says what is wrong with the photo.
            status = path.stat()
            times = status.st_mtime_ns, status.st_ctime_ns
            identity = status.st_size, times, status.st_ino
        described = repr((folders[folder], name, identity))
        digest.update(described.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode(errors="surrogateescape")).hexdigest()


def _folders(root: Path) -> list[Path]:
    """Return the folders that can hold a store, best first: the first one lies in `root`."""
    digest = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()
    return [root / ".minivit", *(cache / digest[:16] for cache in cache_folders())]


def _find_store(root: Path, name: str) -> Path | None:
    for folder in _folders(root):
        if _is_complete(folder / name):
            return folder / name
    return None


def _is_complete(file: Path) -> bool:
    """Return whether there is a whole store that this user may read."""
    # The errors are written last.
    return os.access(file, os.R_OK) and os.access(_errors_file(file), os.R_OK)


def _errors_file(file: Path) -> Path:
    """Return the JSON file beside a store, which says why photos are not in it."""
    return file.with_suffix(".json")


def _has_become_readable(file: Path, paths: Sequence[Path]) -> bool:
    """Return whether a photo that is missing from a store can be read by now.

    Its file need not have changed: rights were given, or a disk answers again.
    """
    for i in read_json(_errors_file(file)):
        with contextlib.suppress(PhotoError):
            open_photo(paths[int(i)])
            return True
    return False


def _writable_folder(root: Path) -> Path | None:
    """Return the best folder for a store of photos in `root`, or None if none can be written to."""
    beside, *others = _folders(root)
    if is_writable(beside):
        return beside
    for folder in others:
        if is_writable(folder):
            print(
                f"{beside}: cannot be written to; the decoded photos go into {folder}",
                file=sys.stderr,
            )
            return folder
    return None


def _obstacle(n: int, preprocess: Preprocess, folder: Path | None, cap_gib: float) -> str:
    """Return why n decoded photos cannot be kept in a folder, or "" if they can."""
    if folder is None:
        return "decoded photos can be kept neither beside the data nor in ~/.cache or TMPDIR"
    gib = n * _bytes_per_photo(preprocess) / 2**30
    old_stores = folder.glob(f"{_kind(preprocess)}-*")  # They make room for a new one.
    old_gib = sum(path.stat().st_size for path in old_stores) / 2**30
    free_gib = shutil.disk_usage(folder).free / 2**30 + old_gib
    if gib > cap_gib:
        return f"decoded photos take {gib:.1f} GiB, more than --store-gib {cap_gib:g}"
    if gib > free_gib:
        return f"decoded photos take {gib:.1f} GiB, but {free_gib:.1f} are free in {folder}"
    return ""


def _bytes_per_photo(preprocess: Preprocess) -> int:
    return 3 * math.prod(preprocess.size)


def _write_store(
    file: Path,
    paths: Sequence[Path],
    preprocess: Preprocess,
    workers: int,
    report: Callable[[int], object],
) -> None:
    """Write the pixels of all readable photos, uint8 (n, 3, h, w), and the errors of the rest.

    Older stores of this kind are removed. `report` is called with the number of photos in each job
    that is done.
    """
    for old in file.parent.glob(f"{_kind(preprocess)}-*"):
        with contextlib.suppress(PermissionError):  # On Windows, another run may have it mapped.
            old.unlink(missing_ok=True)
    size = _bytes_per_photo(preprocess)
    with whole_file(file) as partial, partial.open("wb+") as store:
        _write_header(store, len(paths), preprocess)
        offset = store.tell()
        store.flush()
        errors: list[str] = []
        with write_behind() as write_later:
            for chunk in _decode_all(partial, offset, paths, preprocess, workers):
                errors += chunk
                report(len(chunk))
                if len(errors) % FLUSHED_PHOTOS == 0:
                    write_later(os.fsync, store.fileno())
        readable = [i for i, error in enumerate(errors) if not error]
        # Move photos up into the gaps that unreadable ones have left.
        for row, i in enumerate(readable):
            if row != i:
                store.seek(offset + i * size)
                pixels = store.read(size)
                store.seek(offset + row * size)
                store.write(pixels)
        store.truncate(offset + len(readable) * size)
        # The header is padded, so that another number of photos does not change its length.
        store.seek(0)
        _write_header(store, len(readable), preprocess)
    unreadable = {str(i): error for i, error in enumerate(errors) if error}
    write_json(_errors_file(file), unreadable)


def _write_header(store: BinaryIO, n: int, preprocess: Preprocess) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": (n, 3, *preprocess.size)}
    np.lib.format.write_array_header_1_0(store, header)


def _decode_all(
    file: Path, offset: int, paths: Sequence[Path], preprocess: Preprocess, workers: int
) -> Iterator[list[str]]:
    """Decode photos into a file from a byte offset on; yield the error of each, or "", by jobs."""
    size = _bytes_per_photo(preprocess)
    jobs = (
        (file, offset + i * size, paths[i : i + CHUNK], preprocess)
        for i in range(0, len(paths), CHUNK)
    )
    processes = processes_worth_starting(paths, workers)
    with worker_pool(processes, "minivit.data.preprocess") as pool:
        yield from map_ahead(pool, decode_into, jobs, ahead=2 * workers)


def _without(data: Data, errors: dict[Path, str], skip_bad: bool) -> Data:
    """Return the data without the photos in `errors`, which cannot be read."""
    splits = (data.train, data.val, data.test)
    if errors and not skip_bad:
        raise UserError(
            f"{len(errors)} of {sum(map(len, splits))} photos cannot be read: "
            f"{first_few(errors.values(), separator='; ')}; to go on without them, "
            "add --skip-bad; python -m minivit doctor --data DIR lists everything that is wrong"
        )
    for error in errors.values():
        print(f"left out: {printable(error)}", file=sys.stderr)
    train, val, test = (
        split.take([i for i, path in enumerate(split.paths) if path not in errors])
        for split in splits
    )
    trained = set(train.labels)
    lost = [f"of {name}" for i, name in enumerate(data.classes) if i not in trained]
    if not val:
        lost.append("for validation")
    if not test:
        lost.append("for the test")
    if lost:
        raise UserError(
            f"no photos are left {', '.join(lost)}: repair or replace those that cannot be read"
        )
    return replace(data, train=train, val=val, test=test)
