"""train.py against what a user of transformers writes, as whole processes in turn: ViT-B/16, blocks 10-11, norm and head.

    python benchmarks/finetune.py --data DIR [--only transformers,minivit] [--train 3680 --test 3669] [--epochs 5] [--runs 3]

The photos of an Oxford-IIIT Pet folder (drawn ones, if there is none) lie under new names, each as often as needed, in class
folders that both sides read; both train on all of train/. After each epoch transformers scores test/, train.py what it
trained on and val/, a tenth as many as it trains on; test/ comes last on both sides. Weights are random.
Host memory is the largest process's, of main program and workers.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from one_photo import MODEL, ROOT, run
from results import parse, record

from minivit.cli import cores

COLUMNS = {"seconds": ".1f", "images/s": ",.0f", "device GiB": ".2f", "host MiB": ",.0f"}


def variants(bf16: bool) -> dict[str, tuple[str, ...]]:
    """Return each program's flags, by a name that begins with whose it is; bf16: this device is good at it."""
    tuned = ("--workers", str(cores()), "--persistent", "--resize-first", *["--bf16"] * bf16)
    return {
        "transformers": (),
        "transformers-bf16": ("--bf16", "--batch", "64"),
        "transformers-tuned": (*tuned, "--batch", "64"),
        "transformers-tuned-256": (*tuned, "--batch", "256"),
        "transformers-even": (*tuned, "--batch", "64", "--eval-once"),
        "minivit-cold": (),  # it decodes the photos, which the others find decoded
        "minivit": (),
        "minivit-views1": ("--cache-views", "1"),
        "minivit-views2": ("--cache-views", "2"),
        "minivit-256": ("--batch-size", "256"),
        "minivit-compile": ("--compile",),
        "minivit-compile-views1": ("--compile", "--cache-views", "1"),
    }


def make_folders(source: Path, out: Path, counts: dict[str, int]) -> None:
    """Link so many photos of a data set into out/<split>/<class>, class by class in turn; train from its train and val."""
    from minivit.data.datasets import load_data
    from minivit.tools.demo.drawings import BREEDS, draw_pets

    if not any((source / part).exists() for part in ("oxford-iiit-pet", "annotations", "train")):
        source, number = (
            out.with_name("drawn"),
            [math.ceil(counts[split] / len(BREEDS)) for split in ("train", "test")],
        )
        print(f"no photos there: drawing {len(BREEDS) * sum(number)}", flush=True)
        draw_pets(source, per_breed=number, seed=0, workers=cores())
    data = load_data(source, seed=0)
    for split, count in counts.items():
        photos: dict[int, list[Path]] = {}
        for part in (data.train, data.val) if split == "train" else (data.test,):
            for path, label in zip(part.paths, part.labels):
                photos.setdefault(label, []).append(path)
        if split != "val" and count < len(photos):
            sys.exit(
                f"--{split} {count}: expected at least one photo of each of the {len(photos)} classes"
            )
        for i in range(count):
            of_class = photos[i % len(photos)]
            found = of_class[i // len(photos) % len(of_class)]
            place = out / split / data.classes[i % len(photos)] / f"{i}{found.suffix}"
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(found, place)
            except OSError:  # another file system
                shutil.copy(found, place)


def measure(
    name: str, flags: tuple[str, ...], common: list[str], data: Path, out: Path
) -> dict[str, float | None]:
    """Run one program from start to end and return what it took."""
    ours = name.startswith("minivit")
    if name == "minivit-cold":
        shutil.rmtree(data / ".minivit")
    program = ROOT / ("train.py" if ours else "benchmarks/finetune_transformers.py")
    seconds, _, mib, said = run(
        [sys.executable, str(program), *common, "--data", str(data), "--out", str(out), *flags]
    )
    last = (out / "metrics.jsonl").read_text() if ours else said
    row = json.loads(last.splitlines()[-1])
    device = row["peak_gib"] if "cpu" not in common else None  # of a CPU it is what the host has
    shutil.rmtree(out)
    return dict(zip(COLUMNS, (seconds, row.get("images_per_s"), device, mib), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT / "data",
        metavar="DIR",
        help="photos; drawn, if there are none",
    )
    parser.add_argument("--train", type=int, default=3680, help="photos")
    parser.add_argument("--test", type=int, default=3669, help="photos")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument(
        "--only", metavar="NAME,...", help=f"none: all of {', '.join(variants(True))}"
    )
    args = parse(parser)
    from minivit.checkpoints import weights
    from minivit.data import datasets as data
    from minivit.data import store
    from minivit.system import device

    known = variants(device.pick_amp("auto", args.device) is not None)
    names = args.only.split(",") if args.only else list(known)
    if unknown := set(names) - set(known):
        parser.error(f"--only {', '.join(unknown)}: expected some of {', '.join(known)}")
    with tempfile.TemporaryDirectory(dir=MODEL.parent) as folder:
        photos, out = Path(folder) / "photos", Path(folder) / "run"
        make_folders(
            args.data,
            photos,
            {"train": args.train, "val": math.ceil(args.train / 10), "test": args.test},
        )
        # Decoded once, which also fills the disk's cache, as --help does with libraries.
        how = {"workers": cores(), "cap_gib": math.inf}
        store.prepare(
            data.load_data(photos, seed=0),
            weights.read_configs(str(args.model), None)[0].preprocess,
            **how,
        )
        run([sys.executable, str(ROOT / "benchmarks" / "finetune_transformers.py"), "--help"])
        common = [
            "--model",
            str(args.model),
            "--device",
            args.device.type,
            "--epochs",
            str(args.epochs),
        ]
        found: dict[str, list[dict]] = {name: [] for name in names}
        for i in range(args.runs):
            for name in names:
                found[name].append(measure(name, known[name], common, photos, out))
                print(f"run {i + 1}, {name}: {found[name][-1]['seconds']:.1f} s", flush=True)
    print(f"\n{'':24}", *(f"{column:>12}" for column in COLUMNS))
    figures = {}
    for name, rows in found.items():
        middle = {
            c: statistics.median(r[c] for r in rows) for c in COLUMNS if rows[0][c] is not None
        }
        shown = {column: format(value, COLUMNS[column]) for column, value in middle.items()}
        print(f"{name:24}", *(f"{shown.get(column, '-'):>12}" for column in COLUMNS))
        figures |= {f"whole process, {name}, {column}": value for column, value in shown.items()}
    record(args, figures)


if __name__ == "__main__":
    main()
