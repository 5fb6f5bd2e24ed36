"""A data set of drawn cats and dogs in the layout of Oxford-IIIT Pet."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from ...data.pets import PETS_FOLDER
from ...system.files import refuse_to_overwrite, whole_folder
from . import animals, scenes

# With eight breeds, test accuracy stayed below 0.95.
NAMES = (
    "Ginger_Tabby",
    "Siamese",
    "Tuxedo_Cat",
    "Beagle",
    "Golden_Retriever",
    "Husky",
)
BREEDS = {name: animals.BREEDS[name] for name in NAMES}
SPECIES = {"cat": 1, "dog": 2}  # as Oxford-IIIT Pet's listings number them
ANIMAL = (0.55, 0.85)  # range of an animal's height, as a fraction of the photo's shorter side
XML = """<annotation>
  <filename>{stem}.jpg</filename>
  <size><width>{W}</width><height>{H}</height><depth>3</depth></size>
  <object><name>{species}</name>\
<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>
</annotation>
"""


def draw_pets(root: Path, *, per_breed: tuple[int, int], seed: int, workers: int) -> None:
    """Draw photos, masks, head boxes and listings into root/oxford-iiit-pet.

    `per_breed` is each breed's number of photos in trainval and in test. The same seed gives the
    same data set, whatever `workers`, which takes the place of an earlier one when it is whole.
    Raises UserError if there is another data set.
    """
    if not _is_drawn(root / PETS_FOLDER):
        refuse_to_overwrite(root, [PETS_FOLDER])
    num_trainval, num_test = per_breed
    numbers = range(1, num_trainval + num_test + 1)
    photos = [(breed, number) for breed in BREEDS for number in numbers]
    root.mkdir(parents=True, exist_ok=True)
    with whole_folder(root / PETS_FOLDER) as folder:
        for part in ("images", "annotations/trimaps", "annotations/xmls"):
            (folder / part).mkdir(parents=True)
        draw = partial(_draw_pet, folder, seed, num_trainval)
        # Threads are enough, because Pillow releases the GIL while it resizes and blurs.
        with ThreadPoolExecutor(workers) as executor:
            # Asking for the results raises the errors of the threads.
            list(executor.map(draw, *zip(*photos)))
        _write_listing(folder, "trainval", numbers[:num_trainval])
        _write_listing(folder, "test", numbers[num_trainval:])


def _is_drawn(folder: Path) -> bool:
    """Return whether a data set is one of our drawings: whether it begins with our first breed."""
    listing = folder / "annotations" / "trainval.txt"
    return listing.is_file() and listing.read_bytes().startswith(NAMES[0].encode())


def _draw_pet(folder: Path, seed: int, num_trainval: int, breed: str, number: int) -> None:
    """Draw a photo and its mask, and write its head box, which Oxford-IIIT Pet has for trainval."""
    rng = np.random.default_rng([seed, NAMES.index(breed), number])
    thing = str(rng.choice(list(scenes.OBJECTS)))
    scene = scenes.draw_scene(rng, thing, BREEDS[breed], animal=ANIMAL)
    stem = f"{breed}_{number}"
    scene.photo.save(folder / "images" / f"{stem}.jpg", quality=90)
    scene.mask.save(folder / "annotations" / "trimaps" / f"{stem}.png")
    if scene.head and number <= num_trainval:
        W, H = scene.photo.size
        text = XML.format(*scene.head, stem=stem, W=W, H=H, species=BREEDS[breed].species)
        (folder / "annotations" / "xmls" / f"{stem}.xml").write_text(text, "utf-8")


def _write_listing(folder: Path, split: str, numbers: range) -> None:
    """Write the listing of a split, which has these numbers of each breed's photos."""
    lines = []
    for label, breed in enumerate(BREEDS, 1):
        species = SPECIES[BREEDS[breed].species]
        for number in numbers:
            lines.append(f"{breed}_{number} {label} {species} {label}\n")
    (folder / "annotations" / f"{split}.txt").write_text("".join(lines), "utf-8")
