"""Test accuracy of train.py, for choices of blocks, precisions and kept views, over some seeds.

    python benchmarks/accuracy.py --model DIR --data DIR [--blocks none 10-11] [--only bf16]
                                  [--seeds 0,1,2] [--flags "--epochs 15"] [--jobs 4]

It trains once for each setting and seed, `--jobs` at a time, and reads test_accuracy from
summary.json. With --code it runs another checkout, to compare versions.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from results import ROOT, Figure, figure_of, parse_with_model, record
from workloads import ACCURACY_SETTINGS, accuracy

# Runs in one process save the seconds in which each would import torch and start the GPU.
SEVERAL_RUNS = """
import json, sys
from minivit import commands
for argv in json.load(sys.stdin):
    if code := commands.train(argv):
        sys.exit(code)
"""


def flags_of(args: argparse.Namespace, run: tuple[str, str, str], out: Path) -> list[str]:
    """Return the flags of train.py for a run: its blocks, setting and seed."""
    blocks, setting, seed = run
    flags = ["--model", str(args.model), "--data", str(args.data), "--device", args.device.type]
    flags += ["--blocks", blocks, "--seed", seed, "--out", str(out), "--workers", "2"]
    return [*flags, *ACCURACY_SETTINGS[setting], *shlex.split(args.flags)]


def train(args: argparse.Namespace, runs: list[tuple[str, str, str]]) -> list[float]:
    """Train several times, one after the other, and return the test accuracies."""
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / str(i) for i in range(len(runs))]
        argvs = [flags_of(args, run, out) for run, out in zip(runs, outs, strict=True)]
        done = subprocess.run(
            [sys.executable, "-c", SEVERAL_RUNS],
            cwd=args.code,
            input=json.dumps(argvs),
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode:
            sys.exit(f"train: exit code {done.returncode}\n{done.stderr[-4000:]}")
        summaries = [json.loads((out / "summary.json").read_text()) for out in outs]
        return [summary["test_accuracy"] for summary in summaries]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--blocks", nargs="+", default=["10-11"], metavar="RANGE")
    parser.add_argument("--only", metavar="NAME,...", default=",".join(ACCURACY_SETTINGS))
    parser.add_argument("--seeds", default="0,1,2", metavar="N,...")
    parser.add_argument("--flags", default="", help="more flags of train.py")
    parser.add_argument("--jobs", type=int, default=1, help="processes that train")
    parser.add_argument("--code", type=Path, default=ROOT, metavar="DIR")
    args = parse_with_model(parser)
    names = args.only.split(",")
    unknown = set(names) - set(ACCURACY_SETTINGS)
    if unknown:
        parser.error(f"--only {','.join(unknown)}: expected some of {','.join(ACCURACY_SETTINGS)}")
    runs = list(product(args.blocks, names, args.seeds.split(",")))
    shares = [runs[job :: args.jobs] for job in range(args.jobs)]
    results: dict[tuple[str, str, str], float] = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        for share, values in zip(shares, pool.map(lambda share: train(args, share), shares)):
            results |= dict(zip(share, values, strict=True))
    figures: dict[str, Figure] = {}
    for blocks, name in product(args.blocks, names):
        values = []
        for run in runs:
            if run[:2] == (blocks, name):
                figures[f"blocks {blocks}, {name}, seed {run[2]}"] = figure_of(
                    [results[run]], "fraction"
                )
                values.append(results[run])
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        mean = statistics.mean(values)
        print(f"{args.data.name}, blocks {blocks}, {name}: {mean:.4f} ± {spread:.4f}", flush=True)
    record(args, args.device, accuracy(args.model.name, args.data.name, args.flags), figures)


if __name__ == "__main__":
    main()
