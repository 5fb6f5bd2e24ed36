"""Compare train.py with what a user of transformers writes, as whole processes in turn.

    python benchmarks/finetune.py [--data DIR] [--only transformers,minivit] [--epochs 5] [--runs 3]
                                  [--train 3680 --test 3669] [--commit NAME]

Both train blocks 10-11, the final norm and the head of ViT-B/16. The photos of DIR (drawn ones, if
it is not given) are linked under new names into class folders that both read, each as often as
needed. Both train on all of train/. After each epoch transformers evaluates test/,
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
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from one_photo import run
from results import (
    MODEL,
    ROOT,
    Figure,
    figure_of,
    machine_name,
    model_name,
    parse_with_model,
    record,
)
from workloads import VARIANTS, whole_job

from minivit.checkpoints.weights import read_configs
from minivit.data import store
from minivit.data.datasets import Data, load_data
from minivit.errors import UserError
from minivit.system.cores import cores
from minivit.system.device import pick_amp
from minivit.tools.demo.drawings import BREEDS, draw_pets

# What is measured of a process, in which unit, and how it is printed.
COLUMNS = {
    "time": ("s", ".1f"),
    "training speed": ("images/s", ",.0f"),
    "device memory": ("GiB", ".2f"),
    "host memory": ("MiB", ",.0f"),
}
PRINTED = ("time", "device memory", "host memory")
OTHER_PROGRAM = ROOT / "benchmarks" / "finetune_transformers.py"


def list_variants(bf16: bool) -> dict[str, tuple[str, ...]]:
    """Return each variant's flags. Its name begins with its program's.

    `bf16` says whether the device is good at bf16, so that a tuned program would use it.
    """
    in_float32 = ("--workers", str(cores()), "--persistent", "--resize-first")
    tuned = (*in_float32, "--bf16") if bf16 else in_float32
    return {
        "transformers": (),
        "transformers-bf16": ("--bf16", "--batch", "64"),
        "transformers-fp16": ("--fp16",),
        "transformers-tuned": (*tuned, "--batch", "64"),
        "transformers-tuned-float32": (*in_float32, "--batch", "64"),
        "transformers-tuned-256": (*tuned, "--batch", "256"),
        "transformers-even": (*tuned, "--batch", "64", "--eval-once"),
        "minivit-cold": (),  # It decodes the photos; the others find them decoded.
        "minivit": (),
        "minivit-fp16-cold": ("--amp", "fp16"),
        "minivit-fp16": ("--amp", "fp16"),
        "minivit-float32-cold": ("--amp", "off"),
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


def draw_photos(folder: Path, counts: Mapping[str, int]) -> None:
    """Draw as many photos as are needed, in the layout of Oxford-IIIT Pet."""
    # Three of a breed are the fewest that can be split.
    train = max(3, math.ceil(counts["train"] / len(BREEDS)))
    test = math.ceil(counts["test"] / len(BREEDS))
    print(f"drawing {len(BREEDS) * (train + test)} photos", flush=True)
    draw_pets(folder, per_breed=(train, test), seed=0, workers=cores())


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
    if name.endswith("-cold"):
        shutil.rmtree(data / ".minivit")
    program = ROOT / "train.py" if is_minivit else OTHER_PROGRAM
    result = run([sys.executable, str(program), *flags, "--data", str(data), "--out", str(out)])
    # Both end with a line of JSON, train.py's in a file.
    lines = (out / "metrics.jsonl").read_text() if is_minivit else result.output
    last_row = json.loads(lines.splitlines()[-1])
    shutil.rmtree(out)
    return {
        "time": result.seconds,
        "training speed": last_row.get("images_per_s"),
        # On a CPU, train.py reports the host's memory there.
        "device memory": None if "cpu" in flags else last_row["peak_gib"],
        "host memory": result.peak_mib,
    }


def decode_photos(data: Path, model: Path) -> None:
    """Write the store of decoded photos, which also fills the disk's cache with the photos."""
    spec, _ = read_configs(str(model), None)
    store.prepare(load_data(data, seed=0), spec.preprocess, workers=cores(), cap_gib=math.inf)


def figures_of(results: Mapping[str, list[dict[str, float | None]]]) -> dict[str, Figure]:
    """Return the figures of all variants, each over the variant's runs."""
    figures = {}
    for name, rows in results.items():
        for column, (unit, _) in COLUMNS.items():
            if rows[0][column] is not None:
                figures[f"{name}, {column}"] = figure_of([row[column] for row in rows], unit)
    return figures


def print_table(names: Sequence[str], figures: Mapping[str, Figure]) -> None:
    """Print a line for each variant: medians, the time against train.py's, and what it is."""
    columns = [column for column in PRINTED if f"{names[0]}, {column}" in figures]
    heads = [f"{column} ({COLUMNS[column][0]})" for column in columns]
    print("\n" + "  ".join([*heads, "against train.py"]))
    ours = figures.get("minivit-cold, time")
    for name in names:
        cells = []
        for column, head in zip(columns, heads):
            cell = format(figures[f"{name}, {column}"].median, COLUMNS[column][1])
            cells.append(cell.rjust(len(head)))
        ratio = "-"
        if ours is not None:
            ratio = f"{figures[f'{name}, time'].median / ours.median:.1f} times"
        cells.append(ratio.rjust(len("against train.py")))
        print("  ".join(cells), VARIANTS[name].replace("`", ""), sep="  ")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="Oxford-IIIT Pet or class folders; default: photos are drawn",
    )
    parser.add_argument("--train", type=int, default=3680, help="number of training photos")
    parser.add_argument("--test", type=int, default=3669, help="number of test photos")
    parser.add_argument("--epochs", type=int, default=5)
    known_names = ", ".join(VARIANTS)
    parser.add_argument("--only", metavar="NAME,...", help=f"default: all of {known_names}")
    parser.add_argument("--runs", type=int, default=3, help="each figure is the median of these")
    args = parse_with_model(parser)
    variants = list_variants(pick_amp("auto", args.device) is not None)
    names = args.only.split(",") if args.only else list(variants)
    unknown = set(names) - set(variants)
    if unknown:
        parser.error(f"--only {', '.join(unknown)}: expected some of {', '.join(variants)}")
    results: dict[str, list[dict[str, float | None]]] = {name: [] for name in names}
    counts = {"train": args.train, "val": math.ceil(args.train / 10), "test": args.test}
    common = ["--model", str(args.model), "--device", args.device.type]
    common += ["--epochs", str(args.epochs)]
    print(
        f"Fine-tuning {model_name(args.model)} on {machine_name(args.device)}.\n"
        f"Epochs: {args.epochs}, training photos: {args.train}, test photos: {args.test}.\n"
        "Each program is timed as a whole, from its start to its end. "
        f"Runs to wait for: {len(names) * args.runs}.",
        flush=True,
    )
    with tempfile.TemporaryDirectory(dir=MODEL.parent) as folder:
        photos = Path(folder) / "photos"
        source = args.data
        if source is None:
            source = Path(folder) / "drawn"
            draw_photos(source, counts)
        try:
            make_folders(source, photos, counts)
        except UserError as error:
            parser.error(str(error))
        decode_photos(photos, args.model)
        # This fills the disk's cache with the libraries, and compiles minivit's modules.
        run([sys.executable, str(OTHER_PROGRAM), "--help"])
        rehearsal = [
            *common,
            "--data",
            str(photos),
            "--out",
            str(Path(folder) / "run"),
            "--dry-run",
        ]
        run([sys.executable, str(ROOT / "train.py"), *rehearsal])
        for i in range(args.runs):
            for name in names:
                row = measure(name, [*common, *variants[name]], photos, Path(folder) / "run")
                results[name].append(row)
                print(f"run {i + 1} of {args.runs}, {name}: {row['time']:.1f} s", flush=True)
    figures = figures_of(results)
    print_table(names, figures)
    model = model_name(args.model)
    kind = "drawn photos" if args.data is None else "photos"
    workload = whole_job(model, args.epochs, args.train, args.test, kind, args.device.type)
    record(args, args.device, workload, figures)


if __name__ == "__main__":
    main()
