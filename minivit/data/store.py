"""The photos of a data set as a model's pixels: decoded once into a file beside them, or anew whenever they are asked for.

Shapes: n photos of a split, B of a batch, h, w pixels of the model's input.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError, printable
from ..system import workers as processes
from ..system.files import locked, read_json, whole_file, write_json
from ..system.prefetch import read_ahead
from .datasets import Data
from .photos import open_photo
from .preprocess import Preprocess, decode_into

VERSION = 1  # of what decoding gives; another one makes stores anew
CHUNK = 16  # photos that a process decodes in one go


class Pixels:
    """A split's pixels, those that infer.py gives to the model: pixels[index], a slice or int64 (B,), is uint8 (B, 3, h, w).

    Without a store each photo is decoded when it is asked for; that raises PhotoError if it cannot be read.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        preprocess: Preprocess,
        workers: int,
        stored: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> None:
        self.paths, self.preprocess, self.workers, self.stored = paths, preprocess, workers, stored
        self.rows = torch.arange(len(paths)) if rows is None else rows  # of `stored`

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        index = torch.arange(len(self))[index]
        if self.stored is not None:
            return self.stored[self.rows[index]]
        read = lambda i: self.preprocess.pixels(open_photo(self.paths[i]))  # noqa: E731
        return torch.stack(list(read_ahead(read, index.tolist(), self.workers)))


def prepare(
    data: Data, preprocess: Preprocess, *, workers: int, cap_gib: float, skip_bad: bool = False
) -> tuple[Data, Path | None]:
    """Decode every photo once, in parallel, into a file that the next run finds; return the data, and the file.

    The file lies in .minivit beside the photos (in the user's cache folder if nothing can be written there), and is made
    anew when a photo's name, size or time of change is another. There is none, and photos are decoded whenever they are
    needed, if it would take more than `cap_gib` or than is free. Photos that cannot be read are left out of the data that is
    returned, and named on stderr, if `skip_bad`. Raises UserError, naming them, if not, or if too few are left.
    """
    paths, (h, w) = data.paths(), preprocess.size
    kind = f"{h}x{w}-{_digest([preprocess.resize, preprocess.crop, preprocess.resample, preprocess.round_margins])[:8]}"
    found = [
        (os.path.relpath(path, data.root), stat.st_size, stat.st_mtime_ns)
        for path in paths
        for stat in [path.stat()]
    ]
    name = f"{kind}-{_digest(found)[:16]}.npy"
    file = next(
        (
            path
            for folder in _folders(data.root)
            if (path := folder / name).with_suffix(".json").exists()
        ),
        None,
    )
    if file is None:
        gib, folder = len(paths) * 3 * h * w / 2**30, _writable(data.root)
        free = shutil.disk_usage(folder).free / 2**30
        if gib > min(cap_gib, free):
            why = (
                f"more than --store-gib {cap_gib:g}"
                if gib > cap_gib
                else f"but {free:.1f} are free in {folder}"
            )
            if skip_bad:
                raise UserError(
                    f"{data.root}: decoded photos take {gib:.1f} GiB, {why}, and --skip-bad needs them there"
                )
            print(
                f"{data.root}: decoded photos take {gib:.1f} GiB, {why}: each epoch decodes them anew",
                file=sys.stderr,
            )
            return data, None
        with locked(folder, wait=True):
            file = folder / name
            if not file.with_suffix(".json").exists():  # as another run may just have made it
                for old in folder.glob(f"{kind}-*"):
                    old.unlink()
                _write(file, paths, preprocess, workers)
    bad = {paths[int(i)]: reason for i, reason in read_json(file.with_suffix(".json")).items()}
    return _without(data, bad, skip_bad), file


def open_splits(
    data: Data, file: Path | None, preprocess: Preprocess, workers: int
) -> list[tuple[Pixels, Tensor]]:
    """Return for train, val and test the pixels, in what `prepare` has made of the data, and labels (n,)."""
    whole, splits = open_pixels(data, file, preprocess, workers), (data.train, data.val, data.test)
    row_of = {path: i for i, path in enumerate(whole.paths)}
    rows = [torch.tensor([row_of[path] for path in split.paths]) for split in splits]
    return [
        (Pixels(split.paths, preprocess, workers, whole.stored, own), torch.tensor(split.labels))
        for split, own in zip(splits, rows)
    ]


def open_pixels(data: Data, file: Path | None, preprocess: Preprocess, workers: int) -> Pixels:
    """Return the pixels of all photos of the data that `prepare` returned, in the file that it made."""
    paths = data.paths()
    stored = None if file is None else torch.from_numpy(np.load(file, mmap_mode="c"))
    return Pixels(paths, preprocess, workers, stored)


def checksum(*splits: tuple[Sequence[Path], Sequence[int]]) -> str:
    """Return a short name for splits, each its photos and their labels: by the photos' names and sizes."""
    return _digest(
        [
            [(p.parent.name, p.name, p.stat().st_size) for p in paths] + list(labels)
            for paths, labels in splits
        ]
    )[:8]


def _write(file: Path, paths: Sequence[Path], preprocess: Preprocess, workers: int) -> None:
    """Write the pixels of all photos that can be read, uint8 (n, 3, h, w), and beside them the reasons for the rest."""
    n, size, reasons = len(paths), 3 * math.prod(preprocess.size), []
    header = {"descr": "|u1", "fortran_order": False}
    with whole_file(file) as partial, partial.open("wb+") as out:
        np.lib.format.write_array_header_1_0(out, header | {"shape": (n, 3, *preprocess.size)})
        place = out.tell()
        out.flush()
        jobs = (
            (decode_into, partial, place + i * size, paths[i : i + CHUNK], preprocess)
            for i in range(0, n, CHUNK)
        )
        with (
            processes.working(
                processes.worth_starting(paths, workers), "minivit.data.preprocess"
            ) as begin,
            tqdm(total=n, desc="decoding", unit="photo", leave=False) as bar,
        ):
            for found in processes.in_turn(begin, jobs, ahead=2 * workers):
                reasons += found
                bar.update(len(found))
        good = [i for i, reason in enumerate(reasons) if not reason]
        for row, i in enumerate(good):
            if row != i:  # those that can be read close ranks
                out.seek(place + i * size)
                pixels = out.read(size)
                out.seek(place + row * size)
                out.write(pixels)
        out.truncate(place + len(good) * size)
        out.seek(0)  # as many as there are, in a header of the same length
        np.lib.format.write_array_header_1_0(
            out, header | {"shape": (len(good), 3, *preprocess.size)}
        )
    # Last: a store without it is not whole.
    write_json(
        file.with_suffix(".json"), {str(i): reason for i, reason in enumerate(reasons) if reason}
    )


def _without(data: Data, bad: dict[Path, str], skip_bad: bool) -> Data:
    """Return the data without photos that cannot be read; raises UserError where that must not be, or too few are left."""
    splits = (data.train, data.val, data.test)
    if bad and not skip_bad:
        shown = "; ".join([*list(bad.values())[:3], "..."][: len(bad)])
        raise UserError(
            f"{len(bad)} of {sum(map(len, splits))} photos cannot be read: {shown}; to go on without them, add --skip-bad; "
            "python -m minivit doctor --data DIR lists everything that is wrong"
        )
    for reason in bad.values():
        print(f"left out: {printable(reason)}", file=sys.stderr)
    train, val, test = (
        split.take([i for i, path in enumerate(split.paths) if path not in bad]) for split in splits
    )
    lost = [
        f"of {data.classes[i]}" for i in sorted(set(range(len(data.classes))) - set(train.labels))
    ]
    lost += [
        f"for {name}" for name, split in (("validation", val), ("the test", test)) if not split
    ]
    if lost:
        raise UserError(
            f"no photos are left {', '.join(lost)}: mend or replace those that cannot be read"
        )
    return replace(data, train=train, val=val, test=test)


def _digest(value: object) -> str:
    return hashlib.sha256(repr((VERSION, value)).encode(errors="surrogateescape")).hexdigest()


def _folders(root: Path) -> tuple[Path, Path]:
    """Where a store can lie: beside the photos, or in the user's cache folder."""
    cache = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    return root / ".minivit", cache / "minivit" / hashlib.sha256(
        os.fsencode(root.resolve())
    ).hexdigest()[:16]


def _writable(root: Path) -> Path:
    beside, cache = _folders(root)
    try:
        beside.mkdir(exist_ok=True)
        if os.access(beside, os.W_OK):
            return beside
    except OSError:
        pass
    cache.mkdir(parents=True, exist_ok=True)
    print(f"{root}: cannot be written to; the decoded photos go into {cache}", file=sys.stderr)
    return cache
