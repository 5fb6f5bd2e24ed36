"""How the files that minivit draws are told from the user's own."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

from PIL import Image

SOFTWARE = "minivit"  # the entry "Software" of a figure's PNG
GENERATOR = b'<meta name="generator" content="minivit">'  # in the head of the explorer's page
HEAD_BYTES = 4096  # of a page, in which GENERATOR lies
NPZ_MEMBERS = {"rows.npy", "queries.npy", "blocks.npy", "grid.npy", "photo_size.npy"}


def is_ours(path: Path) -> bool:
    """Return whether minivit wrote this .png, .html or .npz, or whether it is empty.

    What cannot be read is not ours.
    """
    try:
        if path.stat().st_size == 0:
            return True
        if path.suffix == ".png":
            return _software(path) == SOFTWARE
        if path.suffix == ".html":
            with path.open("rb") as file:
                return GENERATOR in file.read(HEAD_BYTES)
        with zipfile.ZipFile(path) as archive:
            return set(archive.namelist()) >= NPZ_MEMBERS
    except Exception:  # A broken file makes Pillow and zipfile raise anything.
        return False


def _software(path: Path) -> object:
    """Return what a PNG names as the program that wrote it; its pixels are not decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of many pixels.
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Software")
