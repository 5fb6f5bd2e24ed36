"""The gallery: photos whose answer comes from the background, or is spoilt by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ...data.photos import open_photo
from ...data.preprocess import Preprocess
from ...errors import printable
from ..score.gallery import GAP, LONGER_SIDE, CaptionedStrip, write_sections
from ..score.masks import read_pet
from .conditions import EVERYTHING, OUTSIDE_BOX, PET_ONLY, patch_sets
from .measure import NO_ANSWER, Key

CONDITIONS = (EVERYTHING, PET_ONLY, OUTSIDE_BOX)  # what each strip shows
PER_KIND = 6  # photos of each kind
EXPLANATION = (
    "Each strip shows the photo, only the patches with the pet, and only those outside its box,\n"
    "with the model's answer to each."
)
HIDDEN = 225  # the grey of patches that the model does not see


def choose_photos(predicted: Mapping[Key, np.ndarray], true: np.ndarray) -> dict[str, list[int]]:
    """Return the rows of up to PER_KIND photos of each kind, in the order of the photos."""
    whole = predicted[EVERYTHING] == true
    pet = predicted[PET_ONLY] == true
    background = predicted[OUTSIDE_BOX] == true
    kinds = {
        "right only because of the background": whole & background & ~pet,
        "wrong, although the pet alone is right": ~whole & pet,
    }
    return {kind: np.flatnonzero(of_kind)[:PER_KIND].tolist() for kind, of_kind in kinds.items()}


def name_answers(
    predicted: Mapping[Key, np.ndarray], labels: Sequence[str]
) -> dict[str, list[str]]:
    """Return the names of the answers to all photos under each condition that strips show."""
    names = {}
    for key in CONDITIONS:
        names[key] = ["no answer" if i == NO_ANSWER else labels[i] for i in predicted[key]]
    return names


def write_gallery(
    out: Path,
    kinds: Mapping[str, Sequence[int]],
    paths: Sequence[Path],
    true_names: Sequence[str],
    answers: Mapping[str, Sequence[str]],
    preprocess: Preprocess,
    grid: tuple[int, int],
) -> None:
    """Write gallery.png and gallery.html into `out`.

    `paths`, `true_names` and the names in `answers`, by condition, are those of all photos.
    """
    sections: dict[str, list[CaptionedStrip]] = {}
    for kind, rows in kinds.items():
        sections[kind] = []
        for row in rows:
            names = [printable(answers[key][row]) for key in CONDITIONS]
            caption = (
                f"{printable(paths[row].name)} (true: {printable(true_names[row])})\n"
                f"{names[0]} · pet: {names[1]} · outside: {names[2]}"
            )
            strip = draw_strip(paths[row], preprocess, grid)
            sections[kind].append(CaptionedStrip(strip, caption))
    write_sections(out, sections, EXPLANATION)


def draw_strip(path: Path, preprocess: Preprocess, grid: tuple[int, int]) -> Image.Image:
    """Return what the model sees of a photo, then the pet's patches, then those outside its box."""
    pet, background = read_pet(path, preprocess, grid).regions[0]
    sets = patch_sets(pet, background, grid)
    photo = open_photo(path)
    left, top, right, bottom = map(round, preprocess.box(photo.size))
    seen = photo.crop((left, top, right, bottom))
    scale = LONGER_SIDE / max(seen.size)
    w, h = (max(1, round(side * scale)) for side in seen.size)
    small = np.asarray(seen.resize((w, h)))
    gh, gw = grid
    patch_of_pixel = (np.arange(h) * gh // h)[:, None] * gw + np.arange(w) * gw // w
    strip = Image.new("RGB", (3 * (w + GAP) - GAP, h), "white")
    for i, shown in enumerate((np.arange(gh * gw), sets.pet, sets.outside_box)):
        panel = np.where(np.isin(patch_of_pixel, shown)[..., None], small, np.uint8(HIDDEN))
        strip.paste(Image.fromarray(panel), (i * (w + GAP), 0))
    return strip
