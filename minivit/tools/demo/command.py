"""The whole story on drawings, offline: a model that names furniture learns to see the animals.

The embedded checkpoint (`--model demo`, made by benchmarks/pretrain_demo.py) was trained to name
the household object in a drawn room, whether or not an animal is there. The demo fine-tunes its
last two blocks on breeds, with the same train and infer commands that are used for photos. Then it
measures where the model looks, and whether its answers stay without the animal.
"""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ... import cli, commands
from ...system.files import whole_file
from ..drop import command as drop_command
from ..score import command as score_command
from . import scenes
from .drawings import BREEDS, draw_pets

DESCRIPTION = (
    "The whole story on drawings, offline: a model that names furniture learns to see the animals."
)
PER_BREED = (130, 25)  # photos in trainval and in test
# The model is tiny, so it learns at a higher rate, and its frozen blocks cost little.
TRAINING = shlex.split(
    "--epochs 6 --batch-size 16 --lr 2e-3 --head-lr 2e-3 --cache-views 0 --amp off"
)
# The commands that tell the story. They import torch only when they are run.
COMMANDS = {
    "infer": commands.infer,
    "train": commands.train,
    "score": score_command.main,
    "drop": drop_command.main,
}
# The photos to explain: a household object, a breed, and a seed that gives a good picture.
STORY = (
    ("washing machine", "Ginger_Tabby", 7),
    ("toilet", "Husky", 4),
    ("sofa", "Siamese", 2),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("demo", description=DESCRIPTION)
    parser.add_argument(
        "--out", type=cli.folder, default="runs/demo", metavar="DIR", help="output folder"
    )
    parser.add_argument(
        "--seed", type=cli.at_least(0), default=0, help="seed of the drawings and of training"
    )
    parser.add_workers("number of threads that draw")
    return cli.run(tell_story, parser, argv)


def tell_story(args: argparse.Namespace) -> int:
    """Draw the data, explain photos, fine-tune, explain them again, and list what to look at."""
    started = time.perf_counter()
    out = Path(args.out)
    data, photos, run = (str(out / name) for name in ("drawings", "photos", "run"))
    num_trainval, num_test = PER_BREED
    print(
        f"drawing {len(BREEDS)} breeds, with {num_trainval} photos each for training and "
        f"{num_test} for the test: {data}",
        flush=True,
    )
    draw_pets(Path(data), per_breed=PER_BREED, seed=args.seed, workers=args.workers)
    draw_photos(Path(photos))
    infer = ["infer", photos, "--top-k", "2"]
    tuned = ["--model", run, "--compare", "demo"]
    seed = ["--seed", str(args.seed)]
    for command in (
        [*infer, "--out", str(out / "before"), "--model", "demo"],
        ["train", "--model", "demo", "--data", data, "--out", run, *TRAINING, *seed],
        [*infer, "--out", str(out / "after"), *tuned, "--html"],
        ["score", *tuned, "--data", data, "--gallery", "3", "--out", str(out / "score")],
        ["drop", "--model", run, "--data", data, "--photos", "60", "--out", str(out / "drop")],
    ):
        print(f"\n$ python -m minivit {shlex.join(command)}", flush=True)
        # It runs in this process, so that whatever ends the demo ends the command.
        code = COMMANDS[command[0]](command[1:])
        if code:
            return code
    print(f"\nThe whole story took {time.perf_counter() - started:.0f} s. Now look at:")
    for name, description in (
        ("before", "where the model looks while it only knows furniture"),
        ("after", "where it looks after fine-tuning, next to before; each has a page to explore"),
        ("score", "how much of its attention is on the animal, and the photos where little is"),
        ("drop/drop.png", "whether it still names the breed without the animal, or the room"),
        ("run/predictions.png", "test photos that it names right and wrong"),
        ("run/confusion.png", "which breeds it confuses"),
        ("run/curves.png", "loss and accuracy by epoch"),
    ):
        print(f"  {out / name!s:32} {description}")
    return 0


def draw_photos(folder: Path) -> None:
    """Draw the photos that are explained before and after fine-tuning."""
    folder.mkdir(parents=True, exist_ok=True)
    for thing, breed, seed in STORY:
        scene = scenes.draw_scene(
            np.random.default_rng(seed),
            thing,
            BREEDS[breed],
            size=(320, 240),
            scale=2,
            animal=(0.45, 0.6),
        )
        with whole_file(folder / f"{breed.replace('_', ' ')} and {thing}.jpg") as partial:
            scene.photo.save(partial, "JPEG", quality=92)
