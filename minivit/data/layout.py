"""Decide what a data folder is: Oxford-IIIT Pet, splits of class folders, or class folders.

All commands decide it here. No photo is opened, and nothing outside of the named folder is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError, first_few
from ..settings import DATA_DIR
from .folder import (
    SPLIT_NAMES,
    FolderContents,
    count_extensions,
    is_own_folder,
    is_split_name,
    photos_below,
    read_folder,
)
from .own_masks import is_folder_of_masks
from .pets import PETS_FOLDER, SPLITS

ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")


@dataclass(frozen=True)
class DataFolder:
    """What a data folder is: either `pets` is given or `splits`."""

    root: Path  # the folder that was named
    pets: Path | None = None  # the folder that holds Oxford-IIIT Pet's images/ and annotations/
    splits: Mapping[str, Path] = field(default_factory=dict)  # train, perhaps val and test

    @property
    def is_pets(self) -> bool:
        return self.pets is not None

    @property
    def has_split_folders(self) -> bool:
        """Whether the class folders lie in `train/`, and not right in the root."""
        return bool(self.splits) and self.splits["train"] != self.root


def is_default_folder(root: str | os.PathLike[str]) -> bool:
    """Return whether this is the folder that is read if none is named."""
    return os.path.normpath(root) == DATA_DIR


def is_absent_or_empty(root: str | os.PathLike[str]) -> bool:
    """Return whether there is nothing in a folder but hidden files. Its links count as something.

    A file is neither absent nor empty.
    """
    try:
        contents = read_folder(expand(root))
    except FileNotFoundError:
        return not expand(root).is_symlink()
    except NotADirectoryError:
        return False
    return contents == FolderContents()


def expand(root: str | os.PathLike[str]) -> Path:
    """Return the path of a data folder, with ~ expanded. Raises UserError for an empty name."""
    if not os.fspath(root):
        raise UserError("--data: expected the name of a folder, found an empty one")
    return Path(os.path.expanduser(root))


def find_data_folder(root: str | os.PathLike[str]) -> DataFolder:
    """Return what the folder `root` is.

    Raises UserError if it is no data folder, or could be read in two ways, and OSError if it may
    not be read.
    """
    root = expand(root)
    contents = _read_root(root)
    pets = _find_pets(root, contents)
    if pets is not None:
        return DataFolder(root, pets)
    splits = _find_splits(root, contents)
    if splits:
        return DataFolder(root, splits=splits)
    if has_class_folders(root, contents):
        _check_splits_are_no_classes(root, contents)
        return DataFolder(root, splits={"train": root})
    raise UserError(
        f"{root}: expected {PETS_FOLDER}/ or a folder of photos for each class, "
        f"found neither{_describe_what_is_there(root, contents)}; name another folder with --data"
    )


def _read_root(root: Path) -> FolderContents:
    try:
        return read_folder(root)
    except FileNotFoundError:
        found = "a link that leads nowhere" if root.is_symlink() else "no such folder"
        raise UserError(
            f"{root}: {found}; name the folder of the data with --data, or have Oxford-IIIT Pet "
            "(774 MiB) downloaded into this one with train.py --download"
        ) from None
    except NotADirectoryError:
        what = "unpack it, and name the folder" if _is_archive(root.name) else "name its folder"
        raise UserError(f"{root}: expected a folder, found a file; {what} with --data") from None


def _find_pets(root: Path, contents: FolderContents) -> Path | None:
    """Return the folder of Oxford-IIIT Pet: the root itself, or a folder of that name in it."""
    folders = contents.folders
    if "annotations" in folders:
        annotations = root / "annotations"
        has_listing = any((annotations / f"{split}.txt").is_file() for split in SPLITS)
        # Without its listings, it is known by what else it has, and by no photos there.
        if has_listing or ("images" in folders and not read_folder(annotations).like_photos()):
            return root
    if PETS_FOLDER in folders:
        return root / PETS_FOLDER
    return None


def _find_splits(root: Path, contents: FolderContents) -> dict[str, Path]:
    """Return the folders of the splits; none if there is no train/ that holds class folders."""
    splits: dict[str, Path] = {}
    for split, spellings in SPLIT_NAMES.items():
        folders = [root / name for name in contents.folders if name.lower() in spellings]
        filled = [folder for folder in folders if has_class_folders(folder)]
        if len(filled) > 1:
            raise UserError(
                f"{root}: expected one folder for {_long_name(split)}, found "
                f"{_names(filled)}; merge them, or move all but one away"
            )
        if filled:
            splits[split] = filled[0]
        elif split == "train":
            return {}
        else:
            # A split without photos is an error, which the listing reports.
            splits.update((split, folder) for folder in folders if not is_own_folder(folder))
    if read_folder(splits["train"]).photos:
        _check_train_is_no_class(root, contents, splits)
    return splits


def _check_train_is_no_class(
    root: Path, contents: FolderContents, splits: Mapping[str, Path]
) -> None:
    """Raise UserError if train/ could also be a class, because photos lie directly in it."""
    beside = [root / name for name in contents.folders if root / name not in splits.values()]
    filled = [folder for folder in beside if read_folder(folder).photos]
    classes = [folder for folder in filled if not is_folder_of_masks(folder)]
    if classes:
        train = splits["train"].name
        raise UserError(
            f"{root}: {train}/ holds photos and folders of photos, so it could be a class beside "
            f"{_names(classes)}, or the training split; move the photos or the folders out of it"
        )


def _check_splits_are_no_classes(root: Path, contents: FolderContents) -> None:
    """Raise UserError if all class folders are called as splits are: train/ and test1/, say."""
    splits = [name for name in contents.folders if is_split_name(name.rstrip("0123456789"))]
    filled = [root / name for name in splits if read_folder(root / name).like_photos()]
    if len(filled) < 2:
        return
    others = (root / name for name in contents.folders if name not in splits)
    classes = (folder for folder in others if not is_folder_of_masks(folder))
    if not any(read_folder(folder).like_photos() for folder in classes):
        raise UserError(
            f"{root}: {_names(filled)} hold photos directly, so the classes are not known; put the "
            f"photos into a folder for each class, as {filled[-1].name}/cat/"
        )


def has_class_folders(folder: Path, contents: FolderContents | None = None) -> bool:
    """Return whether any folder in a folder holds photos, even if these cannot be read."""
    if contents is None:
        contents = read_folder(folder)
    return any(read_folder(folder / name).like_photos() for name in contents.folders)


def _describe_what_is_there(root: Path, contents: FolderContents) -> str:
    """Return, for an error, what there is in place of photos in class folders."""
    archives = [name for name in contents.unread if _is_archive(name)]
    if archives:
        return f", but {first_few(archives)}, which must be unpacked first"
    alike = contents.like_photos()
    if alike:
        return (
            f", but {len(alike):,} photos directly in it ({first_few(alike)}), whose classes are "
            "not known: move them into a folder for each class"
        )
    for name in contents.folders:
        deeper = next(photos_below(root / name), None)
        if name.lower() in SPLIT_NAMES["train"] and deeper is not None:
            return (
                f", and no class folders in {name}/, whose photos lie further down, "
                f"as {deeper.relative_to(root)}"
            )
    inner = [root / name for name in contents.folders if _is_data_folder(root / name)]
    if len(inner) == 1:
        return f", but {inner[0]} is one"
    if inner:
        return (
            f", but several data folders ({_names(inner)}): call them train/, val/ and test/, "
            "or name one of them"
        )
    deeper = next(photos_below(root), None)
    if deeper is not None:
        return f", but photos in folders further down, as {deeper.relative_to(root)}"
    if contents == FolderContents():
        return ": the folder is empty"
    if contents.unread:
        return f", but {count_extensions(contents.unread)} files"
    return ""


def _is_data_folder(folder: Path) -> bool:
    contents = read_folder(folder)
    if _find_pets(folder, contents) is not None or _find_splits(folder, contents):
        return True
    _check_splits_are_no_classes(folder, contents)
    return has_class_folders(folder, contents)


def _is_archive(name: str) -> bool:
    return name.lower().endswith(ARCHIVES)


def _long_name(split: str) -> str:
    return {"train": "training", "val": "validation", "test": "the test"}[split]


def _names(folders: Sequence[Path]) -> str:
    return " and ".join(f"{folder.name}/" for folder in folders)
