"""List the photos of a data folder, and account for everything in it that is not read.

No photo is opened whose name says what it is.
"""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError, first_few
from .folder import (
    AVIF,
    FORMAT,
    HEIC,
    HIDDEN,
    MISNAMED,
    OTHER,
    OWN,
    SUFFIXES,
    FolderContents,
    count_extensions,
    has_suffix,
    is_own_folder,
    photos_below,
    read_folder,
)
from .layout import (
    DataFolder,
    expand,
    find_data_folder,
    has_class_folders,
    is_absent_or_empty,
    is_default_folder,
)
from .own_masks import MASKS_FOLDER, holds_masks, is_folder_of_masks
from .pets import SPLITS, download_pets, read_listing
from .photos import HOW_TO_READ

UNKNOWN_CLASS = -1  # the label of a class that has no training photos
MISSING = "missing"  # the problem of a listed photo that does not exist

# Why something in the data folder is not used, besides the reasons in folder.py.
NESTED = "nested"  # It is a photo in a folder inside a class folder.
OUTSIDE = "outside"  # It is a photo outside of class folders.
BESIDE = "beside"  # It is a folder of photos beside those that are read.
MASKS = "masks"  # It is a folder of masks, which only the measuring tools read.
LOCKED = "locked"  # It is a folder that the user may not read.
UNLISTED = "unlisted"  # It is a photo that no listing of Oxford-IIIT Pet names.


class ListedPhoto(NamedTuple):
    """A photo that a data set lists. Whether it can be decoded is not known yet."""

    name: str  # as findings show it
    path: Path
    class_name: str = ""  # as its folder or file name spells it, in Unicode's normal form C
    label: int = UNKNOWN_CLASS
    split: str = ""  # empty if no split contains the photo
    problem: str = ""  # MISSING, or what it is in place of a file


@dataclass(frozen=True)
class Listing:
    """The photos that a data folder lists, by split, and whatever else it contains."""

    folder: DataFolder
    splits: dict[str, list[ListedPhoto]]  # class folders: at least "train"; Pets: those of SPLITS
    # By the reason, the visible files and folders that training does not read.
    unused: defaultdict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    # What training cannot do without, by split of Pets or by class folder.
    errors: dict[str, UserError] = field(default_factory=dict)

    def photos(self) -> list[ListedPhoto]:
        return [photo for photos in self.splits.values() for photo in photos]

    def name_of(self, path: Path) -> str:
        """Return how findings call a file: photos of Pets have no folder in their name."""
        pets = self.folder.pets
        if pets is not None and path.parent == pets / "images":
            return path.name
        return path.relative_to(self.folder.root).as_posix()


def list_data(
    root: str | os.PathLike[str], *, download: bool = False, anywhere: bool = False
) -> Listing:
    """List the photos of Oxford-IIIT Pet or of class folders.

    layout.py says which of these a folder is. With `download`, Oxford-IIIT Pet is downloaded into
    the default folder `data` if that is absent or empty, and with `anywhere` into any such folder.
    Raises UserError for a folder that is neither.
    """
    may_download = download and (anywhere or is_default_folder(root))
    if may_download and is_absent_or_empty(root):
        download_pets(expand(root))
    folder = find_data_folder(root)
    if folder.is_pets:
        return _list_pets(folder)
    return _list_class_folders(folder)


def _list_pets(folder: DataFolder) -> Listing:
    pets = folder.pets
    assert pets is not None
    images = pets / "images"
    contents = read_folder(images) if images.is_dir() else FolderContents()
    problems = dict.fromkeys(contents.photos, "") | contents.broken
    problems |= dict.fromkeys(contents.folders, "is a folder")
    by_stem = {Path(name).stem.lower(): name for name in contents.photos}
    listing = Listing(folder, {split: [] for split in SPLITS})
    listed: set[str] = set()
    for split in SPLITS:
        try:
            lines = read_listing(pets, split)
        except UserError as error:
            listing.errors[split] = error
            continue
        for stem, number, _ in lines:
            name = f"{stem}.jpg"
            listed.add(name)
            problem = problems.get(name, MISSING)
            if problem == MISSING and stem.lower() in by_stem:
                problem = f"is there as {by_stem[stem.lower()]}: rename it"
            breed = stem.rsplit("_", 1)[0]
            photo = ListedPhoto(name, images / name, breed, number - 1, split, problem)
            listing.splits[split].append(photo)
    unlisted = [name for name in (*contents.photos, *contents.broken) if name not in listed]
    listing.unused[UNLISTED] += [images / name for name in unlisted]
    for name in contents.folders:
        if name not in listed:
            _note_folder(listing, images / name)
    _note_unread(listing, images, contents)
    _note_beside_pets(listing, pets)
    return listing


def _note_beside_pets(listing: Listing, pets: Path) -> None:
    """Note what lies beside Oxford-IIIT Pet, and beside its images/ and annotations/."""
    known = {pets, pets / "images", pets / "annotations"}
    known |= {pets / f"{part}.tar.gz" for part in ("images", "annotations")}
    for folder in {listing.folder.root, pets}:
        contents = read_folder(folder)
        _note_files(listing, folder, contents, known)
        for name in contents.folders:
            if folder / name not in known:
                _note_folder(listing, folder / name)


def _note_files(
    listing: Listing, folder: Path, contents: FolderContents, known: Container[Path] = ()
) -> None:
    """Note the files of a folder that holds no photos of the data set."""
    listing.unused[OUTSIDE] += [folder / name for name in (*contents.photos, *contents.broken)]
    _note_unread(listing, folder, contents, known)


def _note_unread(
    listing: Listing, folder: Path, contents: FolderContents, known: Container[Path] = ()
) -> None:
    """Note the files of a folder that are not photos, each under its reason."""
    for name, reason in contents.unread.items():
        if folder / name not in known:
            listing.unused[reason].append(folder / name)


def _note_folder(listing: Listing, folder: Path) -> None:
    """Note a folder that is not read, and the reason."""
    try:
        if is_own_folder(folder):
            reason = OWN
        elif next(photos_below(folder), None) is not None:
            reason = BESIDE
        else:
            reason = OTHER
    except PermissionError:
        reason = LOCKED
    listing.unused[reason].append(folder)


def _list_class_folders(folder: DataFolder) -> Listing:
    listing = Listing(folder, {split: [] for split in folder.splits})
    labels: dict[str, int] = {}  # of the classes in train, which comes first
    for split, split_folder in folder.splits.items():
        contents = read_folder(split_folder)
        _note_files(listing, split_folder, contents)
        names = contents.folders
        if MASKS_FOLDER in names and holds_masks(split_folder, names):
            listing.unused[MASKS].append(split_folder / MASKS_FOLDER)
            names = [name for name in names if name != MASKS_FOLDER]
        for class_name, class_folder in _name_classes(listing, split_folder, names):
            problems = _list_class(listing, class_folder)
            if problems and split == "train":
                labels.setdefault(class_name, len(labels))
            label = labels.get(class_name, UNKNOWN_CLASS)
            place = listing.name_of(class_folder)
            for name, problem in sorted(problems.items()):
                path = class_folder / name
                photo = ListedPhoto(f"{place}/{name}", path, class_name, label, split, problem)
                listing.splits[split].append(photo)
        has_errors = any(Path(place).parent == split_folder for place in listing.errors)
        if not listing.splits[split] and not has_errors:
            _note_empty_split(listing, split_folder, contents)
    if folder.has_split_folders:
        _note_beside_splits(listing, set(labels))
    return listing


def _note_empty_split(listing: Listing, split_folder: Path, contents: FolderContents) -> None:
    outside = contents.like_photos()
    found = f", {len(outside):,} outside of them" if outside else ""
    listing.errors.setdefault(
        str(split_folder),
        UserError(
            f"{split_folder}: no photos in its class folders{found}; "
            "put photos into a folder for each class, or move this folder away"
        ),
    )


def _name_classes(
    listing: Listing, split_folder: Path, names: Sequence[str]
) -> list[tuple[str, Path]]:
    """Return each class's name and folder, sorted by name.

    Names that are the same to some file systems are an error: those that differ only in Unicode's
    normal form, in case, or in spaces around them.
    """
    classes = sorted((unicodedata.normalize("NFC", name), name) for name in names)
    first: dict[str, str] = {}
    for class_name, name in classes:
        other = first.setdefault(class_name.casefold().strip(), name)
        if other != name:
            listing.errors[str(split_folder / name)] = UserError(
                f"{split_folder}: expected one folder for each class, found {_spell(other)} and "
                f"{_spell(name)}, which many file systems take for one name; merge or rename them"
            )
    return [(class_name, split_folder / name) for class_name, name in classes]


def _spell(name: str) -> str:
    """Return a name in quotes, with its code points if these cannot be seen."""
    return repr(name) if name.isascii() else f"{name!r} (written {name!a})"


def _list_class(listing: Listing, folder: Path) -> dict[str, str]:
    """Return the problem of each photo in a class folder, and note all else that it holds.

    A folder that would be a class if its photos could be read is an error, and so is an empty one:
    no class gets lost without a word.
    """
    contents = read_folder(folder)
    problems = dict.fromkeys(contents.photos, "") | contents.broken
    nested: list[Path] = []
    without_photos: list[Path] = []
    for name in contents.folders:
        below = list(photos_below(folder / name))
        nested += below
        if not below and has_suffix(name, SUFFIXES):
            problems[name] = "is a folder"
        elif not below:
            without_photos.append(folder / name)
    lost = _describe_lost_photos(contents, nested, folder)
    if problems or lost:
        listing.unused[NESTED] += nested
        _note_unread(listing, folder, contents)
        for path in without_photos:
            _note_folder(listing, path)

    if problems:
        return problems
    if lost:
        listing.errors[str(folder)] = UserError(f"{folder}: no photo of this class is read: {lost}")
    elif is_own_folder(folder):
        listing.unused[OWN].append(folder)
    elif any(files for _, _, files in os.walk(folder)):
        listing.unused[OTHER].append(folder)
    else:
        listing.errors[str(folder)] = UserError(
            f"{folder}: an empty folder where a class is expected; "
            "put photos of that class into it, or remove it"
        )
    return {}


def _describe_lost_photos(contents: FolderContents, nested: Sequence[Path], folder: Path) -> str:
    """Say why none of a class folder's photos is read, and what to do; "" if there are none."""
    reasons = []
    unread = contents.names(FORMAT)
    heic = contents.names(HEIC)
    avif = contents.names(AVIF)
    misnamed = contents.names(MISNAMED)
    hidden = contents.names(HIDDEN)
    if unread:
        kinds = count_extensions(unread)
        reasons.append(f"{kinds} in a format that cannot be opened, so convert to JPEG")
    for names, advice in ((heic, HOW_TO_READ["HEIC"]), (avif, HOW_TO_READ["AVIF"])):
        if names:
            reasons.append(f"{count_extensions(names)}, so {advice}, or convert to JPEG")
    if misnamed:
        reasons.append(_count(misnamed, "with another extension", "rename {}", first_few(misnamed)))
    if hidden:
        reasons.append(_count(hidden, "hidden by a dot", "rename {}", first_few(hidden)))
    if nested:
        place = nested[0].relative_to(folder).as_posix()
        reasons.append(_count(nested, "in a folder inside", "move {} up", place))
    return "; ".join(reasons)


def _count(photos: Sequence[object], what: str, advice: str, names: str) -> str:
    """Return for example "2 photos hidden by a dot (.a.png, .b.png), so rename them"."""
    if len(photos) == 1:
        return f"1 photo {what} ({names}), so {advice.format('it')}"
    return f"{len(photos):,} photos {what} ({names}), so {advice.format('them')}"


def _note_beside_splits(listing: Listing, classes: set[str]) -> None:
    """Note what lies beside train/. What looks like a split that is missing is an error."""
    root = listing.folder.root
    splits = listing.folder.splits
    contents = read_folder(root)
    _note_files(listing, root, contents)
    missing = [f"{split}/" for split in ("val", "test") if split not in splits]
    for path in (root / name for name in contents.folders):
        if path in splits.values():
            continue
        if is_folder_of_masks(path):
            listing.unused[MASKS].append(path)
            continue
        _note_folder(listing, path)
        if path not in listing.unused[BESIDE] or not has_class_folders(path):
            continue
        inner = {unicodedata.normalize("NFC", name) for name in read_folder(path).folders}
        if missing and classes & inner:
            listing.errors[str(path)] = UserError(
                f"{path}: looks like a split, since it has folders of the same classes, but is not "
                f"read; call it {' or '.join(missing)}, or move it away"
            )
