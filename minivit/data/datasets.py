"""Data: Oxford-IIIT Pet or a folder of class folders, its splits, and augmentation on the device.

Shapes: n photos of a split, B of a batch, h, w pixels of the model's input.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from .pets import SPLITS, read_listing
from .photos import is_photo, list_photos

VAL_FRACTION = 0.1
SERVER_TIMEOUT_S = 6  # for each answer of Oxford's server


@dataclass(frozen=True)
class Split:
    """Some photos and the index of each one's class."""

    paths: list[Path]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Sequence[int]) -> Split:
        return Split([self.paths[i] for i in indices], [self.labels[i] for i in indices])


@dataclass(frozen=True)
class Data:
    """A data set: class names in label order, and three disjoint splits; test is for the very end."""

    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    root: Path  # of all photos
    is_pets: bool = False  # whether this is Oxford-IIIT Pet

    def paths(self) -> list[Path]:
        """Return the photos of all splits, each once, in order."""
        return sorted(
            {*self.train.paths, *self.val.paths, *self.test.paths}, key=os.fspath
        )  # of a million, in seconds


def load_data(root: str | os.PathLike[str], *, seed: int) -> Data:
    """List the photos of Oxford-IIIT Pet under `root` (downloaded there if absent), or of a folder of class folders.

    Pets: validation is a stratified tenth of trainval, chosen by `seed`; test is the official one. Class folders:
    `train/`, and `val/` and `test/` if present, hold a folder a class (without `train/`, the class folders lie right
    in `root`); what is absent is set apart from the training photos in the same way.
    Raises UserError if photos are missing, or if there is nothing to tell apart.
    """
    root = Path(os.path.expanduser(root))
    if (root / "annotations" / "trainval.txt").is_file():
        root = root.resolve().parent
    pets = root / "oxford-iiit-pet"
    if not pets.is_dir() and not _has_class_folders(root):
        if root.exists() and (
            not root.is_dir() or any(not p.name.startswith(".") for p in root.iterdir())
        ):
            raise UserError(
                f"{root}: expected oxford-iiit-pet/, or a folder of photos for each class; found neither"
            )
        download_pets(root)
    data = _load_pets(pets, seed) if pets.is_dir() else _load_class_folders(root, seed)
    if len(data.classes) < 2:
        raise UserError(
            f"{root}: expected photos of at least 2 classes, found {len(data.classes)} ({', '.join(data.classes)})"
        )
    return data


def download_pets(root: Path) -> None:
    """Download Oxford-IIIT Pet (774 MiB) into `root`/oxford-iiit-pet with torchvision, which checks its MD5 sums.

    It is made in a folder beside and then renamed: an interrupted download keeps its whole archives for the next try,
    and half-extracted photos, which torchvision takes for a complete data set, are never left in place.
    """
    from torchvision.datasets import OxfordIIITPet

    partial = root / ".download"
    print(f"{root}: downloading Oxford-IIIT Pet (774 MiB)", file=sys.stderr)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SERVER_TIMEOUT_S)  # torchvision sets none
    try:
        for folder in ("images", "annotations"):
            shutil.rmtree(partial / "oxford-iiit-pet" / folder, ignore_errors=True)
        with contextlib.redirect_stdout(sys.stderr):
            OxfordIIITPet(partial, download=True)
        os.replace(partial / "oxford-iiit-pet", root / "oxford-iiit-pet")
        partial.rmdir()
    except (OSError, EOFError, RuntimeError) as error:
        raise UserError(
            f"Oxford-IIIT Pet cannot be fetched from www.robots.ox.ac.uk into {root} ({error}); try again, "
            "or give a copy that has oxford-iiit-pet/images and annotations with --data FOLDER"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _load_pets(folder: Path, seed: int) -> Data:
    names: dict[int, str] = {}
    splits = {}
    for split in SPLITS:
        listed = read_listing(folder, split)
        names |= {
            n - 1: " ".join(part.title() for part in stem.rsplit("_", 1)[0].split("_"))
            for stem, n, _ in listed
        }
        splits[split] = Split(
            [folder / "images" / f"{stem}.jpg" for stem, *_ in listed],
            [n - 1 for _, n, _ in listed],
        )
    missing = [path for split in splits.values() for path in split.paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of the photos listed are missing, {missing[0].name} the first; "
            "remove the folder to have it downloaded again"
        )
    if sorted(names) != list(range(len(names))):
        raise UserError(
            f"{folder}: expected labels 1 to {len(names)}, found {sorted(label + 1 for label in names)}"
        )
    train, val = _hold_out(splits["trainval"], seed)
    return Data(
        tuple(names[i] for i in range(len(names))),
        train,
        val,
        splits["test"],
        folder.parent,
        is_pets=True,
    )


def _has_class_folders(root: Path) -> bool:
    base = root / "train" if (root / "train").is_dir() else root
    return base.is_dir() and bool(_class_folders(base))


def _class_folders(base: Path) -> list[str]:
    """List the folders with photos, but for hidden ones, which editors leave."""
    return sorted(
        p.name
        for p in base.iterdir()
        if p.is_dir() and p.name[0] != "." and any(map(is_photo, os.listdir(p)))
    )


def _load_class_folders(root: Path, seed: int) -> Data:
    base = root / "train" if (root / "train").is_dir() else root
    classes = _class_folders(base)

    def load(folder: Path) -> Split:
        unknown = [name for name in _class_folders(folder) if name not in classes]
        if unknown:
            raise UserError(
                f"{folder}: class {unknown[0]!r} has no folder in {base}; expected only {', '.join(classes)}"
            )
        found = [
            (p, i)
            for i, name in enumerate(classes)
            if (folder / name).is_dir()
            for p in list_photos(folder / name)
        ]
        if not found:
            raise UserError(f"{folder}: no photos in its class folders")
        return Split([p for p, _ in found], [i for _, i in found])

    train = load(base)
    val, test = (
        load(root / name) if base != root and (root / name).is_dir() else None
        for name in ("val", "test")
    )
    if test is None:
        train, test = _hold_out(train, seed)
        print(
            f"{root}: no test/ folder, so {len(test)} of the photos are set apart for the test",
            file=sys.stderr,
        )
    if val is None:
        train, val = _hold_out(train, seed)
    labels = (
        name.encode("utf-8", "surrogateescape").decode(errors="backslashreplace")
        for name in classes
    )  # for JSON
    return Data(tuple(labels), train, val, test, root)


def _hold_out(split: Split, seed: int) -> tuple[Split, Split]:
    """Set a stratified tenth apart, at least one photo of each class: (the rest, the tenth)."""
    by_class: dict[int, list[int]] = {}
    for i, label in enumerate(split.labels):
        by_class.setdefault(label, []).append(i)
    held, rng = set(), random.Random(seed)
    for indices in (by_class[label] for label in sorted(by_class)):
        if len(indices) < 2:
            raise UserError(
                f"{split.paths[indices[0]].parent}: a class with too few photos; expected at least 3"
            )
        held.update(rng.sample(indices, max(1, round(VAL_FRACTION * len(indices)))))
    return split.take([i for i in range(len(split)) if i not in held]), split.take(sorted(held))
