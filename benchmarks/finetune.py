"""Compare train.py with what a user of transformers writes, as whole processes in turn.

    python benchmarks/finetune.py --data DIR [--only transformers,minivit] [--epochs 5] [--runs 3]
                                  [--train 3680 --test 3669]

Both train blocks 10-11, the final norm and the head of ViT-B/16. The photos of an Oxford-IIIT Pet
folder (drawn ones, if there is none) are linked under new names into class folders that both read,
each as often as needed. Both train on all of train/. After each epoch transformers evaluates test/,
and train.py evaluates what it trained on and val/, which holds a tenth as many photos as train/.
Both evaluate test/ at the end. Weights are random. Host memory is that of the largest process, the
main program or a worker.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from one_photo import MODEL, ROOT, run
from results import parse, record

from minivit.checkpoints.weights import read_configs
from minivit.cli import cores
from minivit.data import store
from minivit.data.datasets import Data, load_data
from minivit.system.device import pick_amp
from minivit.tools.demo.drawings import BREEDS, draw_pets

# What is measured of a process, and how it is printed.
COLUMNS = {"seconds": ".1f", "images/s": ",.0f", "device GiB": ".2f", "host MiB": ",.0f"}
OTHER_PROGRAM = ROOT / "benchmarks" / "finetune_transformers.py"


def list_variants(bf16: bool) -> dict[str, tuple[str, ...]]:
    """Return each variant's flags. Its name begins with its program's.

    `bf16` says whether the device is good at bf16, so that a tuned program would use it.
    """
    tuned = ["--workers", str(cores()), "--persistent", "--resize-first"]
    if bf16:
        tuned.append("--bf16")
    return {
        "transformers": (),
        "transformers-bf16": ("--bf16", "--batch", "64"),
        "transformers-tuned": (*tuned, "--batch", "64"),
        "transformers-tuned-256": (*tuned, "--batch", "256"),
        "transformers-even": (*tuned, "--batch", "64", "--eval-once"),
        "minivit-cold": (),  # It decodes the photos; the others find them decoded.
        "minivit": (),
        "minivit-views1": ("--cache-views", "1"),
        "minivit-views2": ("--cache-views", "2"),
        "minivit-256": ("--batch-size", "256"),
        "minivit-compile": ("--compile",),
        "minivit-compile-views1": ("--compile", "--cache-views", "1"),
    }


def make_folders(source: Path, out: Path, counts: Mapping[str, int]) -> None:
    """Link so many photos of a data set into out/<split>/<class>, one of each class in turn.

    Those for train/ are from its training and validation photos, the others from its test photos.
    """
    folders = ("oxford-iiit-pet", "annotations", "train")
    if not any((source / folder).exists() for folder in folders):
        source = out.with_name("drawn")
        per_breed = (
            math.ceil(counts["train"] / len(BREEDS)),
            math.ceil(counts["test"] / len(BREEDS)),
        )
        print(f"no photos there: drawing {len(BREEDS) * sum(per_breed)}", flush=True)
        draw_pets(source, per_breed=per_breed, seed=0, workers=cores())
    data = load_data(source, seed=0)
    for split, count in counts.items():
        photos = photos_by_class(data, split)
        if split != "val" and count < len(photos):
            sys.exit(
                f"--{split} {count}: expected at least one photo of each of the {len(photos)} "
                "classes"
            )
        for i in range(count):
            label = i % len(photos)
            photos_of_class = photos[label]
            photo = photos_of_class[i // len(photos) % len(photos_of_class)]
            link(photo, out / split / data.classes[label] / f"{i}{photo.suffix}")


def photos_by_class(data: Data, split: str) -> dict[int, list[Path]]:
    """Return the photos to take for a split, by label."""
    sources = (data.train, data.val) if split == "train" else (data.test,)
    photos: dict[int, list[Path]] = {}
    for source in sources:
        for path, label in zip(source.paths, source.labels):
            photos.setdefault(label, []).append(path)
    return photos


def link(photo: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(photo, path)
    except OSError:  # It lies on another file system.
        shutil.copy(photo, path)


def measure(name: str, flags: list[str], data: Path, out: Path) -> dict[str, float | None]:
    """Run one variant from start to end, and return a value for each of COLUMNS.

    The value is None where there is nothing to measure.
    """
    is_minivit = name.startswith("minivit")
    if name == "minivit-cold":
        shutil.rmtree(data / ".minivit")
    program = ROOT / "train.py" if is_minivit else OTHER_PROGRAM
    result = run([sys.executable, str(program), *flags, "--data", str(data), "--out", str(out)])
    # Both end with a line of JSON, train.py's in a file.
    lines = (out / "metrics.jsonl").read_text() if is_minivit else result.output
    last_row = json.loads(lines.splitlines()[-1])
    shutil.rmtree(out)
    return {
        "seconds": result.seconds,
        "images/s": last_row.get("images_per_s"),
        # On a CPU, train.py reports the host's memory there.
        "device GiB": None if "cpu" in flags else last_row["peak_gib"],
        "host MiB": result.peak_mib,
    }


def decode_photos(data: Path, model: Path) -> None:
    """Write the store of decoded photos, which also fills the disk's cache with the photos."""
    spec, _ = read_configs(str(model), None)
    store.prepare(load_data(data, seed=0), spec.preprocess, workers=cores(), cap_gib=math.inf)


def print_table(results: Mapping[str, list[dict[str, float | None]]]) -> dict[str, str]:
    """Print the medians of each variant's runs, and return them as figures to record."""
    figures = {}
    print(f"\n{'':24}", *(f"{column:>12}" for column in COLUMNS))
    for name, rows in results.items():
        cells = []
        for column, style in COLUMNS.items():
            cell = "-"
            if rows[0][column] is not None:
                cell = format(statistics.median(row[column] for row in rows), style)
                figures[f"whole process, {name}, {column}"] = cell
            cells.append(f"{cell:>12}")
        print(f"{name:24}", *cells)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT / "data",
        metavar="DIR",
        help="a folder of photos; if there are none, they are drawn",
    )
    parser.add_argument("--train", type=int, default=3680, help="number of training photos")
    parser.add_argument("--test", type=int, default=3669, help="number of test photos")
    parser.add_argument("--epochs", type=int, default=5)
    names = ", ".join(list_variants(True))
    parser.add_argument("--only", metavar="NAME,...", help=f"default: all of {names}")
    args = parse(parser)
    variants = list_variants(pick_amp("auto", args.device) is not None)
    names = args.only.split(",") if args.only else list(variants)
    unknown = set(names) - set(variants)
    if unknown:
        parser.error(f"--only {', '.join(unknown)}: expected some of {', '.join(variants)}")
    results: dict[str, list[dict[str, float | None]]] = {name: [] for name in names}
    counts = {"train": args.train, "val": math.ceil(args.train / 10), "test": args.test}
    common = ["--model", str(args.model), "--device", args.device.type]
    common += ["--epochs", str(args.epochs)]
    with tempfile.TemporaryDirectory(dir=MODEL.parent) as folder:
        photos = Path(folder) / "photos"
        make_folders(args.data, photos, counts)
        decode_photos(photos, args.model)
        # This fills the disk's cache with the libraries.
        run([sys.executable, str(OTHER_PROGRAM), "--help"])
        for i in range(args.runs):
            for name in names:
                row = measure(name, [*common, *variants[name]], photos, Path(folder) / "run")
                results[name].append(row)
                print(f"run {i + 1}, {name}: {row['seconds']:.1f} s", flush=True)
    record(print_table(results), args.device, args.record)


if __name__ == "__main__":
    main()
