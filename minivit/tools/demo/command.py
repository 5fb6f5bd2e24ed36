"""The whole story on drawings, without network: a model that names furniture learns to see the animals.

The embedded checkpoint (`--model demo`, made by benchmarks/pretrain_demo.py) was taught to name household objects in
drawn rooms, animals or not. Its last two blocks are then fine-tuned on breeds, by the same train and infer.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ... import cli
from ...data.pets import SPLITS
from ...system.files import whole_file
from . import scenes

NAMES = (
    "Ginger_Tabby",
    "Siamese",
    "Tuxedo_Cat",
    "Beagle",
    "Golden_Retriever",
    "Husky",
)  # eight stayed below 0.95
BREEDS = {name: scenes.BREEDS[name] for name in NAMES}
PER_BREED = (130, 25)  # photos in trainval and test
ANIMAL = (0.55, 0.85)  # height over the photo's shorter side
TRAINING = (
    "--epochs",
    "6",
    "--batch-size",
    "16",
    "--lr",
    "2e-3",
    "--amp",
    "off",
)  # bf16 was not tried
STORY = (
    ("washing machine", "Ginger_Tabby", 7),
    ("toilet", "Husky", 4),
    ("sofa", "Siamese", 2),
)  # seeds of fair pictures
XML = """<annotation>
  <filename>{stem}.jpg</filename>
  <size><width>{W}</width><height>{H}</height><depth>3</depth></size>
  <object><name>{species}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>
</annotation>
"""


def draw_pets(root: Path, *, per_breed: tuple[int, int], seed: int, workers: int) -> None:
    """Draw a data set in Oxford-IIIT Pet's layout into root/oxford-iiit-pet: photos, masks, head boxes, splits.

    `per_breed` counts each breed's photos in trainval and in test. One seed gives one data set, whatever `workers`. It is
    drawn beside and then takes the place of what was drawn before, so an interrupt never leaves half of it there.
    """
    folder, num_trainval = root / ".partial", per_breed[0]
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("images", "annotations/trimaps", "annotations/xmls"):
        (folder / part).mkdir(parents=True)
    photos = [(breed, i) for breed in BREEDS for i in range(1, 1 + sum(per_breed))]
    with ThreadPoolExecutor(
        workers
    ) as pool:  # Pillow lets go of the GIL while it resizes and blurs
        list(
            pool.map(
                lambda photo: _draw_pet(
                    folder, photo[0], photo[1], seed, boxed=photo[1] <= num_trainval
                ),
                photos,
            )
        )
    for split in SPLITS:
        lines = []
        for breed, i in photos:
            if (i <= num_trainval) == (split == "trainval"):
                label, species = (
                    list(BREEDS).index(breed) + 1,
                    1 if BREEDS[breed].species == "cat" else 2,
                )
                lines.append(f"{breed}_{i} {label} {species} {label}\n")
        (folder / "annotations" / f"{split}.txt").write_text("".join(lines))
    shutil.rmtree(root / "oxford-iiit-pet", ignore_errors=True)
    folder.rename(root / "oxford-iiit-pet")


def _draw_pet(folder: Path, breed: str, i: int, seed: int, *, boxed: bool) -> None:
    stem, rng = f"{breed}_{i}", np.random.default_rng([seed, list(BREEDS).index(breed), i])
    scene = scenes.draw_scene(
        rng, str(rng.choice(list(scenes.OBJECTS))), BREEDS[breed], animal=ANIMAL
    )
    scene.photo.save(folder / "images" / f"{stem}.jpg", quality=90)
    scene.mask.save(folder / "annotations" / "trimaps" / f"{stem}.png")
    if boxed and scene.head:  # as in the original, which has head boxes for trainval only
        W, H = scene.photo.size
        text = XML.format(*scene.head, stem=stem, W=W, H=H, species=BREEDS[breed].species)
        (folder / "annotations" / "xmls" / f"{stem}.xml").write_text(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("demo", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", default="runs/demo", metavar="DIR", help="where everything is written"
    )
    parser.add_argument(
        "--seed", type=cli.at_least(0), default=0, help="of the drawings and of training"
    )
    parser.add_workers("threads that draw")
    return cli.run(tell, parser, argv)


def tell(args: argparse.Namespace) -> int:
    """Draw, look before, fine-tune, look after, and say what to open."""
    started, out = time.perf_counter(), Path(args.out)
    data, photos, run = out / "drawings", out / "photos", out / "run"
    photos.mkdir(parents=True, exist_ok=True)
    learn, test = PER_BREED
    print(
        f"drawing {len(BREEDS)} breeds, {learn} photos each to learn from and {test} to test on: {data}",
        flush=True,
    )
    draw_pets(data, per_breed=PER_BREED, seed=args.seed, workers=args.workers)
    for thing, breed, seed in STORY:
        rng = np.random.default_rng(seed)
        scene = scenes.draw_scene(
            rng, thing, BREEDS[breed], size=(320, 240), scale=2, animal=(0.45, 0.6)
        )
        with whole_file(photos / f"{breed.replace('_', ' ')} and {thing}.jpg") as partial:
            scene.photo.save(partial, "JPEG", quality=92)
    look = ("infer", str(photos), "--top-k", "2", "--out")
    for command in (
        (*look, str(out / "before"), "--model", "demo"),
        (
            "train",
            "--model",
            "demo",
            "--data",
            str(data),
            "--out",
            str(run),
            *TRAINING,
            "--seed",
            str(args.seed),
        ),
        (*look, str(out / "after"), "--model", str(run), "--compare", "demo", "--html"),
        (
            "score",
            "--model",
            str(run),
            "--compare",
            "demo",
            "--data",
            str(data),
            "--gallery",
            "3",
            "--out",
            str(out / "score"),
        ),
    ):
        print(f"\n$ python -m minivit {shlex.join(command)}", flush=True)
        code = subprocess.run([sys.executable, "-m", "minivit", *command]).returncode
        if code:
            return code
    print(f"\nthe whole story in {time.perf_counter() - started:.0f} s. Look at")
    for path, what in (
        (out / "before", "where the model looks that names furniture"),
        (
            out / "after",
            "where it looks once two of its blocks have learnt breeds, beside before; a page of each, to explore",
        ),
        (
            out / "score",
            "how much of its attention is on the animal, in numbers; photos where it is not",
        ),
        (run / "predictions.png", "test photos, right and wrong"),
        (run / "confusion.png", "which breeds are taken for which"),
        (run / "curves.png", "how it learnt"),
    ):
        print(f"  {path!s:32} {what}")
    return 0
