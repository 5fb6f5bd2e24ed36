"""Data sets: list the photos of Oxford-IIIT Pet or of class folders, and split them.

A listing opens no photo. It is made once and serves both split_data(), which is strict, and the
survey in survey.py, which reports everything that is wrong.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError, first_few
from .pets import PETS_FOLDER, SPLITS, read_listing
from .photos import is_photo

VAL_FRACTION = 0.1
SERVER_TIMEOUT_S = 6  # for each answer of Oxford's server
UNKNOWN_CLASS = -1  # the label of a class that has no training photos


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
    """A data set: its class names in label order and three disjoint splits.

    The test split is for the very end of a run only.
    """

    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    root: Path  # contains all photos
    is_pets: bool = False  # whether this is Oxford-IIIT Pet

    def paths(self) -> list[Path]:
        """Return the photos of all splits, sorted and without duplicates."""
        paths = {*self.train.paths, *self.val.paths, *self.test.paths}
        return sorted(paths, key=os.fspath)  # Comparing strings is much faster than paths.


@dataclass(frozen=True)
class DataFolder:
    """What a data folder is: either one that contains Oxford-IIIT Pet, or class folders."""

    root: Path
    is_pets: bool

    @property
    def pets(self) -> Path:
        """The folder of Oxford-IIIT Pet itself."""
        return self.root / PETS_FOLDER


class ListedPhoto(NamedTuple):
    """A photo that a data set lists. Whether it exists and can be read is not known yet."""

    name: str  # as findings show it
    path: Path
    class_name: str = ""  # as its folder or file name spells it
    label: int = UNKNOWN_CLASS
    split: str = ""  # empty if no split contains the photo


@dataclass(frozen=True)
class Listing:
    """The photos that a data folder lists, by split, and whatever else it contains."""

    folder: DataFolder
    splits: dict[str, list[ListedPhoto]]  # class folders: at least "train"; Pets: those of SPLITS
    unused: list[Path]  # visible files and folders that training does not read
    errors: dict[str, UserError] = field(default_factory=dict)  # by split that cannot be listed

    def photos(self) -> list[ListedPhoto]:
        return [photo for photos in self.splits.values() for photo in photos]


def load_data(root: str | os.PathLike[str], *, seed: int) -> Data:
    """List and split the data set in `root`; Oxford-IIIT Pet is downloaded there if it is absent.

    See list_data and split_data, which also say what raises UserError.
    """
    return split_data(list_data(root, download=True), seed=seed)


def find_data_folder(root: str | os.PathLike[str]) -> DataFolder:
    """Return which kind of data folder `root` is, which need not exist.

    `root` may also be the folder of Oxford-IIIT Pet itself.
    """
    root = Path(os.path.expanduser(root))
    if (root / "annotations" / "trainval.txt").is_file():
        root = root.resolve().parent
    return DataFolder(root, is_pets=(root / PETS_FOLDER).is_dir())


def list_data(root: str | os.PathLike[str], *, download: bool) -> Listing:
    """List the photos of Oxford-IIIT Pet or of class folders, without opening any of them.

    Class folders lie in `train/`, and in `val/` and `test/` if these exist. Without `train/`, they
    lie right in `root`. With `download`, Oxford-IIIT Pet is downloaded into a folder that is absent
    or empty. Raises UserError if there are no photos of either kind.
    """
    folder = find_data_folder(root)
    if download and not folder.is_pets and _is_absent_or_empty(folder.root):
        download_pets(folder.root)
        folder = find_data_folder(root)
    if folder.is_pets:
        return _list_pets(folder)
    return _list_class_folders(folder)


def _is_absent_or_empty(root: Path) -> bool:
    return not root.exists() or (root.is_dir() and not _visible_entries(root))


def _visible_entries(folder: Path) -> list[str]:
    """Return the sorted names in a folder, without hidden ones: [] for what is not a folder."""
    if not folder.is_dir():
        return []
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def _list_pets(folder: DataFolder) -> Listing:
    images = folder.pets / "images"
    splits: dict[str, list[ListedPhoto]] = {}
    errors: dict[str, UserError] = {}
    names: set[str] = set()
    for split in SPLITS:
        splits[split] = []
        try:
            listed = read_listing(folder.pets, split)
        except UserError as error:
            errors[split] = error
            continue
        for stem, number, _ in listed:
            name = f"{stem}.jpg"
            breed = stem.rsplit("_", 1)[0]
            splits[split].append(ListedPhoto(name, images / name, breed, number - 1, split))
            names.add(name)
    unused = [images / name for name in _visible_entries(images) if name not in names]
    return Listing(folder, splits, unused, errors)


def _list_class_folders(folder: DataFolder) -> Listing:
    root = folder.root
    split_names = ("train", "val", "test")
    if (root / "train").is_dir():
        folders = {name: root / name for name in split_names if (root / name).is_dir()}
        unused = [root / name for name in _visible_entries(root) if name not in split_names]
    else:
        folders = {"train": root}
        unused = []
    splits: dict[str, list[ListedPhoto]] = {}
    labels: dict[str, int] = {}  # of the classes in train, which comes first
    for split, split_folder in folders.items():
        splits[split] = []
        for class_name in _visible_entries(split_folder):
            class_folder = split_folder / class_name
            entries = _visible_entries(class_folder)
            photo_names = [name for name in entries if is_photo(name)]
            if not photo_names:
                unused.append(class_folder)
                continue
            unused += [class_folder / name for name in entries if not is_photo(name)]
            if split == "train":
                labels[class_name] = len(labels)
            label = labels.get(class_name, UNKNOWN_CLASS)
            place = class_folder.relative_to(root).as_posix()
            for name in photo_names:
                path = class_folder / name
                splits[split].append(ListedPhoto(f"{place}/{name}", path, class_name, label, split))
    if not splits["train"]:
        raise UserError(
            f"{root}: expected {PETS_FOLDER}/ or a folder of photos for each class, "
            "found neither; name another folder with --data"
        )
    return Listing(folder, splits, unused)


def split_data(listing: Listing, *, seed: int) -> Data:
    """Split listed photos into train, val and test.

    Oxford-IIIT Pet has its official test split, and class folders have what `val/` and `test/`
    contain. A missing split is a stratified tenth of the training photos, chosen by `seed`.
    Raises UserError if photos or classes are missing.
    """
    folder = listing.folder
    if folder.is_pets:
        _check_pets(listing)
    else:
        _check_class_folders(listing)
    splits: dict[str, Split] = {}
    class_names: dict[int, str] = {}
    for name, photos in listing.splits.items():
        splits[name] = Split([photo.path for photo in photos], [photo.label for photo in photos])
        class_names.update((photo.label, photo.class_name) for photo in photos)
    classes = tuple(_class_title(name, folder.is_pets) for _, name in sorted(class_names.items()))

    train = splits["trainval" if folder.is_pets else "train"]
    val = splits.get("val")
    test = splits.get("test")
    if test is None:
        train, test = _hold_out(train, seed)
        print(
            f"{folder.root}: there is no test/ folder, "
            f"so {len(test)} of the photos are held out for the test",
            file=sys.stderr,
        )
    if val is None:
        train, val = _hold_out(train, seed)
    if len(classes) < 2:
        raise UserError(
            f"{folder.root}: expected photos of at least 2 classes, "
            f"found {len(classes)} ({', '.join(classes)})"
        )
    return Data(classes, train, val, test, folder.root, folder.is_pets)


def _check_pets(listing: Listing) -> None:
    folder = listing.folder.pets
    for error in listing.errors.values():
        raise error
    photos = listing.photos()
    missing = [photo.name for photo in photos if not photo.path.is_file()]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of {len(photos)} listed photos not found "
            f"({first_few(missing)}); remove the folder to have it downloaded again"
        )
    numbers = sorted({photo.label + 1 for photo in photos})
    if numbers != list(range(1, len(numbers) + 1)):
        raise UserError(f"{folder}: expected labels 1 to {len(numbers)}, found {numbers}")


def _check_class_folders(listing: Listing) -> None:
    root = listing.folder.root
    known = {photo.class_name for photo in listing.splits["train"]}
    for split, photos in listing.splits.items():
        for photo in photos:
            if photo.label == UNKNOWN_CLASS:
                raise UserError(
                    f"{root / split}: class {photo.class_name!r} has no folder in "
                    f"{root / 'train'}; expected only {', '.join(sorted(known))}"
                )
        if not photos:
            raise UserError(f"{root / split}: no photos in its class folders")


def _class_title(name: str, is_breed: bool) -> str:
    if is_breed:
        return name.replace("_", " ").title()
    # JSON requires that bytes of a folder's name which are not UTF-8 are escaped.
    return name.encode("utf-8", "surrogateescape").decode(errors="backslashreplace")


def _hold_out(split: Split, seed: int) -> tuple[Split, Split]:
    """Hold out a stratified tenth, at least one photo of each class: (the rest, the tenth)."""
    by_class: dict[int, list[int]] = {}
    for i, label in enumerate(split.labels):
        by_class.setdefault(label, []).append(i)
    rng = random.Random(seed)
    held_out: set[int] = set()
    for _, indices in sorted(by_class.items()):
        if len(indices) < 2:
            folder = split.paths[indices[0]].parent
            raise UserError(f"{folder}: a class has too few photos; expected at least 3")
        held_out.update(rng.sample(indices, max(1, round(VAL_FRACTION * len(indices)))))
    rest = [i for i in range(len(split)) if i not in held_out]
    return split.take(rest), split.take(sorted(held_out))


def download_pets(root: Path) -> None:
    """Download Oxford-IIIT Pet (774 MiB) into `root`/oxford-iiit-pet with torchvision.

    torchvision checks the archives' MD5 sums. The download goes into a hidden folder that is
    renamed at the end: an interrupted download keeps its complete archives for the next attempt,
    and never leaves half-extracted photos where torchvision would take them for the data set.
    """
    from torchvision.datasets import OxfordIIITPet

    partial = root / ".download"
    print(f"{root}: downloading Oxford-IIIT Pet (774 MiB)", file=sys.stderr)
    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SERVER_TIMEOUT_S)  # torchvision sets none.
    try:
        for name in ("images", "annotations"):
            shutil.rmtree(partial / PETS_FOLDER / name, ignore_errors=True)
        with contextlib.redirect_stdout(sys.stderr):
            OxfordIIITPet(partial, download=True)
        os.replace(partial / PETS_FOLDER, root / PETS_FOLDER)
        partial.rmdir()
    except (OSError, EOFError, RuntimeError) as error:
        raise UserError(
            f"Oxford-IIIT Pet cannot be fetched from www.robots.ox.ac.uk into {root} ({error}); "
            f"try again, or give a copy that has {PETS_FOLDER}/images and annotations "
            "with --data FOLDER"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout_before)
