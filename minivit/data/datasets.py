"""Data sets: split the photos of Oxford-IIIT Pet or of class folders.

layout.py decides what a folder is, and listing.py lists it. A listing is made once and serves both
split_data(), which is strict, and the survey in survey.py, which reports everything that is wrong.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, first_few, printable
from .folder import UNREAD_PHOTOS, count_extensions, read_folder
from .listing import MISSING, UNKNOWN_CLASS, ListedPhoto, Listing, list_data
from .pets import how_to_complete

HELD_OUT = 0.1  # the fraction of the training photos that stands in for a missing split


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


def load_data(root: str | os.PathLike[str], *, seed: int, only: str | None = None) -> Data:
    """List and split the data set in `root`.

    Oxford-IIIT Pet is downloaded into the default folder `data` if that is absent or empty. See
    list_data and split_data, which also say what raises UserError.
    """
    return split_data(list_data(root, download=True), seed=seed, only=only)


def split_data(
    listing: Listing, *, seed: int, only: str | None = None, skip_bad: bool = False
) -> Data:
    """Split listed photos into train, val and test.

    Oxford-IIIT Pet has its official test split, and class folders have what `val/` and `test/`
    contain. Otherwise about a tenth of the training photos is held out: for the test by the names
    of the photos, so that it is the same in every run, and then for validation by `seed`.

    With `only` ("train", "val", "test" or "trainval"), photos of Oxford-IIIT Pet outside of that
    split may be missing. With `skip_bad`, photos that are no files are left out and named on
    stderr. Raises UserError if photos, classes or splits are missing.
    """
    folder = listing.folder
    needed = _needed_splits(listing, only)
    _check_listing(listing, needed)
    photos_by_split = _leave_out_bad(listing, needed, skip_bad)
    splits: dict[str, Split] = {}
    class_names: dict[int, str] = {}
    for name, photos in photos_by_split.items():
        splits[name] = Split([photo.path for photo in photos], [photo.label for photo in photos])
        class_names.update((photo.label, photo.class_name) for photo in listing.splits[name])
    classes = tuple(_class_title(name, folder.is_pets) for _, name in sorted(class_names.items()))
    if len(classes) < 2:
        hint = "put photos into a folder for each class"
        if classes == ("images",) and not folder.has_split_folders:
            hint = "if this is Oxford-IIIT Pet, its folder annotations is missing beside images"
        raise UserError(
            f"{folder.root}: expected photos of at least 2 classes, "
            f"found {len(classes)} ({', '.join(classes)}); {hint}"
        )

    train = splits["trainval" if folder.is_pets else "train"]
    val = splits.get("val")
    test = splits.get("test")
    if test is None:
        train, test = _hold_out_by_name(train, left=2 if val is None else 1)
        print(
            f"{folder.root}: there is no test/ folder, "
            f"so {len(test)} of the photos are held out for the test, chosen by their names",
            file=sys.stderr,
        )
    if val is None:
        train, val = _hold_out_by_seed(train, seed)
    return Data(classes, train, val, test, folder.root, folder.is_pets)


def _needed_splits(listing: Listing, only: str | None) -> list[str]:
    """Return the listed splits that may not lack any photo."""
    if only is None or not listing.folder.is_pets:
        return list(listing.splits)
    return ["test"] if only == "test" else ["trainval"]


def _check_listing(listing: Listing, needed: Sequence[str]) -> None:
    """Raise UserError for what is wrong with a listing, except for single photos."""
    errors = list(listing.errors.values())
    if listing.folder.is_pets:
        errors = [error for split, error in listing.errors.items() if split in needed]
    if errors:
        more = f" (and {len(errors) - 1} more of this kind)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0]}{more}")
    if listing.folder.is_pets:
        numbers = sorted({photo.label + 1 for photo in listing.photos()})
        if numbers != list(range(1, len(numbers) + 1)):
            raise UserError(
                f"{listing.folder.pets}: expected labels 1 to {len(numbers)}, found {numbers}"
            )
        return
    known = {photo.class_name for photo in listing.splits["train"]}
    by_lower_case = {name.casefold().strip(): name for name in known}
    for split, photos in listing.splits.items():
        for photo in photos:
            if photo.label == UNKNOWN_CLASS:
                name = photo.class_name
                expected = f"only {', '.join(sorted(known))}"
                if name.casefold().strip() in by_lower_case:
                    expected = repr(by_lower_case[name.casefold().strip()])
                raise UserError(
                    f"{listing.folder.splits[split]}: class {name!r} has no folder in "
                    f"{listing.folder.splits['train']}; expected {expected}"
                )


def _leave_out_bad(
    listing: Listing, needed: Sequence[str], skip_bad: bool
) -> dict[str, list[ListedPhoto]]:
    """Return the photos of each split without those that are no files.

    Raises UserError for these without `skip_bad`, and for a class that has no others to train on.
    """
    root = listing.folder.pets or listing.folder.root
    expected = [photo for split in needed for photo in listing.splits[split]]
    bad = [photo for photo in expected if photo.problem]
    if bad and not skip_bad:
        missing = [photo.name for photo in bad if photo.problem == MISSING]
        if missing:
            raise UserError(
                f"{root}: {len(missing)} of {len(expected)} listed photos not found "
                f"({first_few(missing)}); {how_to_complete(root, 'images')}"
            )
        described = (f"{photo.name} {photo.problem}" for photo in bad)
        raise UserError(
            f"{root}: {len(bad)} of {len(expected)} photos cannot be read "
            f"({first_few(described)}); replace or remove them, or add --skip-bad to train "
            "without them"
        )
    kept = {
        split: [photo for photo in photos if not (photo.problem and split in needed)]
        for split, photos in listing.splits.items()
    }
    for split in needed:
        before = {photo.class_name for photo in listing.splits[split]}
        lost = sorted(before - {photo.class_name for photo in kept[split]})
        if lost:
            raise UserError(
                f"{root}: no photos are left of {', '.join(lost)} in {split}: "
                "replace those that cannot be read"
            )
    for photo in bad:
        print(f"left out: {printable(photo.path)}: {photo.problem}", file=sys.stderr)
    return kept


def _class_title(name: str, is_breed: bool) -> str:
    if is_breed:
        return name.replace("_", " ").title()
    # JSON requires that bytes of a folder's name which are not UTF-8 are escaped.
    return name.encode("utf-8", "surrogateescape").decode(errors="backslashreplace")


def _hold_out_by_name(split: Split, *, left: int) -> tuple[Split, Split]:
    """Hold out about a tenth of the photos, chosen by their names: (the rest, the tenth).

    Each photo is held out or not by a hash of its own name and its class's, whatever else is there,
    so that photos that are added or removed later do not move others from one split to the other.
    Of each class at least one photo is held out, at most a fifth, and `left` photos are left. Only
    where this matters, in small classes, does a photo's split depend on the others of its class.
    """
    held_out: set[int] = set()
    for indices in _indices_by_class(split):
        if len(indices) <= left:
            raise _too_few_photos(split.paths[indices[0]].parent, left + 1, len(indices))
        places = sorted((_place_by_name(split.paths[i]), i) for i in indices)
        count = sum(place < HELD_OUT for place, _ in places)
        count = min(count, round(2 * HELD_OUT * len(indices)), len(indices) - left)
        count = max(1, count)
        held_out.update(i for _, i in places[:count])
    return _separate(split, held_out)


def _place_by_name(photo: Path) -> float:
    """Return a number from 0 to 1 that depends only on the names of a photo and of its folder."""
    name = unicodedata.normalize("NFC", f"{photo.parent.name}/{photo.name}")
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _hold_out_by_seed(split: Split, seed: int) -> tuple[Split, Split]:
    """Hold out a stratified tenth, at least one photo of each class: (the rest, the tenth)."""
    rng = random.Random(seed)
    held_out: set[int] = set()
    for indices in _indices_by_class(split):
        if len(indices) < 2:
            raise _too_few_photos(split.paths[indices[0]].parent, 2, 1)
        held_out.update(rng.sample(indices, max(1, round(HELD_OUT * len(indices)))))
    return _separate(split, held_out)


def _too_few_photos(folder: Path, needed: int, found: int) -> UserError:
    unread = read_folder(folder).names(*UNREAD_PHOTOS)
    others = f", and {count_extensions(unread)} that cannot be read" if unread else ""
    return UserError(
        f"{folder}: a class has too few photos; expected at least {needed}, found {found}{others}"
    )


def _indices_by_class(split: Split) -> list[list[int]]:
    """Return the indices of each class's photos, in the order of the labels."""
    by_class: defaultdict[int, list[int]] = defaultdict(list)
    for i, label in enumerate(split.labels):
        by_class[label].append(i)
    return [indices for _, indices in sorted(by_class.items())]


def _separate(split: Split, held_out: set[int]) -> tuple[Split, Split]:
    rest = [i for i in range(len(split)) if i not in held_out]
    return split.take(rest), split.take(sorted(held_out))
