"""infer.py against what a user of transformers writes, as whole processes in turn: one photo to a figure of blocks 8 to 11.

    python benchmarks/one_photo.py PHOTO|FOLDER [--model DIR] [--runs 5]

Without --model, a ViT-B/16 of random weights is written once into .cache. A folder is timed with infer.py alone: images a
second, seconds to the first figure, peak memory. The first run of each program, which fills the disk's cache, does not count.
"""

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

ROOT = Path(__file__).parents[1]
MODEL = ROOT / ".cache" / "random-vit-b16"
# Between us and a program, as on Linux a process's peak counts what its parent held when it was started: here, torch.
LAUNCH = """import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)"""


def write_random_vit(folder: Path) -> None:
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(num_labels=1000)).save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)


def run(command: list[str]) -> tuple[float, float, float, str]:
    """Return a process's seconds, seconds to its first figure, peak MiB (its own or its largest child's), and its output."""
    # Bytecode is kept, as where libraries were installed by pip: some machines forbid it, and then compiling takes seconds.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    env |= {"PYTHONPYCACHEPREFIX": str(MODEL.parent / "bytecode")}
    started = time.perf_counter()
    with (
        tempfile.TemporaryFile() as notes,
        subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *command], stdout=subprocess.PIPE, stderr=notes, env=env
        ) as process,
    ):
        first, lines = None, []
        for line in process.stdout:
            lines.append(line.decode(errors="replace"))
            if line.strip().endswith(b".png"):
                first = first or time.perf_counter() - started
        if process.wait():
            notes.seek(0)
            sys.exit(
                f"{shlex.join(command)}: exit code {process.returncode}\n{notes.read()[-4000:].decode(errors='replace')}"
            )
    return time.perf_counter() - started, first or 0, int(lines[-1]) / 1024, "".join(lines[:-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photo", type=Path)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    if not (args.model / "config.json").exists():
        write_random_vit(args.model)
    import torch
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {versions}"
    )
    with tempfile.TemporaryDirectory() as out:
        common = [str(args.photo), "--model", str(args.model), "--out", out]
        ours = [sys.executable, str(ROOT / "infer.py"), *common]
        if args.photo.is_dir():
            seconds, first, peak, _ = run(ours)
            number = len(list(Path(out).iterdir()))
            said = f"{number} photos in {seconds:.1f} s: {number / seconds:.2f} a second"
            print(f"{said}, first figure after {first:.1f} s, {peak:,.0f} MiB")
            return
        theirs = [
            sys.executable,
            str(ROOT / "benchmarks" / "one_photo_transformers.py"),
            str(args.photo),
            str(args.model),
            out,
        ]
        pairs = [(run(ours), run(theirs)) for _ in range(args.runs + 1)][1:]
    for name, runs in zip(("minivit", "transformers"), zip(*pairs)):
        seconds, _, peaks, _ = zip(*runs)
        print(
            f"{name:13} {statistics.median(seconds):6.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), {max(peaks):6,.0f} MiB"
        )
    ratios = [ours[0] / theirs[0] for ours, theirs in pairs]
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
