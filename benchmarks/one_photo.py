"""Compare infer.py with what a user of transformers writes: a photo to a figure of blocks 8 to 11.

    python benchmarks/one_photo.py PHOTO|FOLDER [--model DIR] [--runs 5]

Both are measured as whole processes, in turn. Without --model, a ViT-B/16 with random weights is
written into .cache once. For a folder, infer.py alone is measured: photos a second, seconds to the
first figure, and peak memory. The first run of each program fills the disk's cache and does not
count.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
MODEL = ROOT / ".cache" / "random-vit-b16"
# This small program stands between us and the one that is measured. On Linux, the peak memory of a
# process includes what its parent held when it started it, and we hold torch.
LAUNCH = """import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)"""


class ProcessResult(NamedTuple):
    """What a process took, and what it printed."""

    seconds: float
    first_figure: float  # seconds until the name of a figure was printed; 0 if there was none
    peak_mib: float  # of the process or of its largest child
    output: str


def write_random_vit(folder: Path) -> None:
    """Write a ViT-B/16 with random weights, in the Hub's layout."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(num_labels=1000)).save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)


def run(command: list[str]) -> ProcessResult:
    """Run a command and measure it. If it fails, exit with the end of what it wrote to stderr."""
    # Keep bytecode, as for libraries that pip has installed. Some machines switch that off, and
    # then each process spends seconds on compiling.
    env = dict(os.environ)
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    env["PYTHONPYCACHEPREFIX"] = str(MODEL.parent / "bytecode")
    first_figure = 0.0
    lines: list[str] = []
    started = time.perf_counter()
    with (
        tempfile.TemporaryFile() as stderr,
        subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *command], stdout=subprocess.PIPE, stderr=stderr, env=env
        ) as process,
    ):
        for line in process.stdout:
            lines.append(line.decode(errors="replace"))
            if not first_figure and line.strip().endswith(b".png"):
                first_figure = time.perf_counter() - started
        if process.wait():
            stderr.seek(0)
            end = stderr.read()[-4000:].decode(errors="replace")
            sys.exit(f"{shlex.join(command)}: exit code {process.returncode}\n{end}")
    seconds = time.perf_counter() - started
    peak_kib = int(lines.pop())
    return ProcessResult(seconds, first_figure, peak_kib / 1024, "".join(lines))


def measure_folder(command: list[str], out: Path) -> None:
    """Run infer.py on a folder, and print how fast it was."""
    result = run(command)
    number = len(list(out.iterdir()))
    print(
        f"{number} photos in {result.seconds:.1f} s: {number / result.seconds:.2f} a second, "
        f"first figure after {result.first_figure:.1f} s, {result.peak_mib:,.0f} MiB"
    )


def compare(minivit: list[str], transformers: list[str], runs: int) -> None:
    """Run two commands in turn, and print the time and memory of each, and the ratio of times."""
    results: dict[str, list[ProcessResult]] = {"minivit": [], "transformers": []}
    for _ in range(runs + 1):
        results["minivit"].append(run(minivit))
        results["transformers"].append(run(transformers))
    times: dict[str, list[float]] = {}
    for name, all_results in results.items():
        counted = all_results[1:]
        seconds = [result.seconds for result in counted]
        times[name] = seconds
        print(
            f"{name:13} {statistics.median(seconds):6.2f} s "
            f"({min(seconds):.2f} to {max(seconds):.2f}), "
            f"{max(result.peak_mib for result in counted):6,.0f} MiB"
        )
    ratios = [a / b for a, b in zip(times["minivit"], times["transformers"])]
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photo", type=Path, help="a photo or a folder of photos")
    parser.add_argument("--model", type=Path, default=MODEL, help="a folder in the Hub's layout")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    if not (args.model / "config.json").exists():
        write_random_vit(args.model)
    import torch
    import transformers

    machine = platform.processor() or platform.machine()
    print(
        f"{time.strftime('%Y-%m-%d')}, {machine}, {os.cpu_count()} CPUs, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}"
    )
    infer_script = str(ROOT / "infer.py")
    other_script = str(ROOT / "benchmarks" / "one_photo_transformers.py")
    photo = str(args.photo)
    model = str(args.model)
    with tempfile.TemporaryDirectory() as out:
        ours = [sys.executable, infer_script, photo, "--model", model, "--out", out]
        if args.photo.is_dir():
            measure_folder(ours, Path(out))
        else:
            compare(ours, [sys.executable, other_script, photo, model, out], args.runs)


if __name__ == "__main__":
    main()
