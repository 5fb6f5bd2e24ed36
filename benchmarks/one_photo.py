"""Compare infer.py with what a user of transformers writes: a photo to a figure of blocks 8 to 11.

    python benchmarks/one_photo.py PHOTO|FOLDER [--model DIR] [--runs 5] [--device cpu]

Both are measured as whole processes, in turn. Without --model, a ViT-B/16 with random weights is
written into .cache once. For a folder, infer.py alone is measured: photos a second, seconds to the
first figure, and peak memory; names alone (--no-figures), medians of three runs; and how fast the
photos are decoded without a model, in as many threads. The first run of each program fills the
disk's cache and does not count.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from results import MODEL, ROOT, Figure, figure_of, model_name, parse_with_model, record
from workloads import many_photos, one_photo

from minivit import Preprocess
from minivit.data.photos import open_photo
from minivit.system.cores import cores

# The start of a process varies by some tenths of a second, which matters to what comes after it.
NAMES_RUNS = 3
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


def measure_folder(command: list[str], folder: Path, out: Path) -> dict[str, Figure]:
    """Run infer.py on a folder, and print and return how fast it was."""
    photos = sorted(folder.iterdir())
    first = [word if word != str(folder) else str(photos[0]) for word in command]
    names = ["--no-figures", "--json"]
    run([*first, *names])
    result = run(command)
    number = len(list(out.iterdir()))
    starts = []
    speeds = []
    speeds_after_start = []
    decoding_speeds = []
    for _ in range(NAMES_RUNS):
        start = run([*first, *names]).seconds
        seconds = run([*command, *names]).seconds
        starts.append(start)
        speeds.append(number / seconds)
        speeds_after_start.append((number - 1) / (seconds - start))
        decoding_speeds.append(decoding_speed(photos))
    figures = {
        "infer.py, photos": figure_of([number], "photos"),
        "infer.py, speed": figure_of([number / result.seconds], "photos/s"),
        "infer.py, time to the first figure": figure_of([result.first_figure], "s"),
        "infer.py, host memory": figure_of([result.peak_mib], "MiB"),
        "infer.py --no-figures, photos": figure_of([number], "photos"),
        "infer.py --no-figures, speed": figure_of(speeds, "photos/s"),
        "infer.py --no-figures, time of one photo": figure_of(starts, "s"),
        "infer.py --no-figures, speed after the first photo": figure_of(
            speeds_after_start, "photos/s"
        ),
        "decoding in threads, speed": figure_of(decoding_speeds, "photos/s"),
    }
    for name, figure in figures.items():
        print(f"{name:52} {figure.median:8,.2f} {figure.unit}")
    return figures


def decoding_speed(photos: Sequence[Path]) -> float:
    """Return how many photos a second are decoded in a thread for each core, without a model."""
    preprocess = Preprocess()
    started = time.perf_counter()
    with ThreadPoolExecutor(cores()) as pool:
        for _ in pool.map(lambda path: preprocess.array(open_photo(path)), photos):
            pass
    return len(photos) / (time.perf_counter() - started)


def compare(ours: list[str], theirs: list[str], runs: int) -> dict[str, Figure]:
    """Run two commands in turn, and print and return the time and memory of each, and the ratio."""
    commands = {"infer.py": ours, "transformers": theirs}
    results: dict[str, list[ProcessResult]] = {name: [] for name in commands}
    for i in range(runs + 1):
        for name, command in commands.items():
            result = run(command)
            if i > 0:
                results[name].append(result)
    figures = {}
    for name, counted in results.items():
        figures[f"{name}, time"] = figure_of([result.seconds for result in counted], "s")
        figures[f"{name}, host memory"] = figure_of([result.peak_mib for result in counted], "MiB")
    pairs = zip(results["infer.py"], results["transformers"])
    ratios = [a.seconds / b.seconds for a, b in pairs]
    figures["infer.py, time against transformers"] = figure_of(ratios, "times")
    for name, figure in figures.items():
        spread = "" if figure.min is None else f" ({figure.min:g} to {figure.max:g})"
        print(f"{name:36} {figure.median:8g} {figure.unit}{spread}")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photo", type=Path, help="a photo or a folder of photos")
    parser.add_argument("--runs", type=int, default=5, help="each figure is the median of these")
    args = parse_with_model(parser)
    photo = str(args.photo)
    model = str(args.model)
    device = args.device.type
    with tempfile.TemporaryDirectory() as out:
        ours = [sys.executable, str(ROOT / "infer.py"), photo, "--model", model, "--out", out]
        ours += ["--device", device]
        theirs = [sys.executable, str(ROOT / "benchmarks" / "one_photo_transformers.py")]
        theirs += [photo, model, out, "--device", device]
        if args.photo.is_dir():
            figures = measure_folder(ours, args.photo, Path(out))
            workload = many_photos(model_name(args.model), device)
        else:
            figures = compare(ours, theirs, args.runs)
            workload = one_photo(model_name(args.model), device)
    record(args, args.device, workload, figures)


if __name__ == "__main__":
    main()
