"""Test accuracy of train.py in each precision, with kept views and without, over some seeds.

    python benchmarks/accuracy.py --model DIR --data DIR [--only bf16] [--seeds 0,1,2]
                                  [--epochs 15] [--batch 32]

It runs train.py once for each setting and seed, and reads test_accuracy from summary.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from results import ROOT, Figure, figure_of, parse_with_model, record
from workloads import ACCURACY_SETTINGS, accuracy


def train(args: argparse.Namespace, flags: tuple[str, ...], seed: str, out: Path) -> float:
    """Run train.py, and return its test accuracy."""
    command = [sys.executable, str(ROOT / "train.py"), "--model", str(args.model)]
    command += ["--data", str(args.data), "--device", args.device.type]
    command += ["--epochs", str(args.epochs), "--batch-size", str(args.batch)]
    command += ["--seed", seed, "--out", str(out), *flags]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        sys.exit(f"train.py: exit code {done.returncode}\n{done.stderr[-4000:]}")
    return json.loads((out / "summary.json").read_text())["test_accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", metavar="NAME,...", default=",".join(ACCURACY_SETTINGS))
    parser.add_argument("--seeds", default="0,1,2", metavar="N,...")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=32)
    args = parse_with_model(parser)
    names = args.only.split(",")
    unknown = set(names) - set(ACCURACY_SETTINGS)
    if unknown:
        parser.error(f"--only {','.join(unknown)}: expected some of {','.join(ACCURACY_SETTINGS)}")
    figures: dict[str, Figure] = {}
    for name in names:
        for seed in args.seeds.split(","):
            with tempfile.TemporaryDirectory() as folder:
                share = train(args, ACCURACY_SETTINGS[name], seed, Path(folder) / "run")
            figures[f"{name}, seed {seed}"] = figure_of([share], "fraction")
            print(f"{name}, seed {seed}: test accuracy {share:.4f}", flush=True)
    workload = accuracy(args.model.name, args.data.name, args.epochs, args.batch)
    record(args, args.device, workload, figures)


if __name__ == "__main__":
    main()
