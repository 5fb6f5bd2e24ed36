"""What the benchmarks that add to RESULTS.md share: their flags, and the rows that they add."""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torchvision
import transformers
from one_photo import MODEL, ROOT, write_random_vit

sys.path.insert(0, str(ROOT))
from minivit.cli import cores
from minivit.system.device import pick_device

# These flags say where something is written, not what is measured, so rows leave them out.
OUTPUT_FLAGS = {"--record", "--plot"}


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Add the flags that benchmarks share, and parse the command line.

    `device` becomes a torch.device, and `record` becomes None with --no-record. If there is no
    model in the folder, a ViT-B/16 with random weights is written into it.
    """
    parser.add_argument(
        "--model",
        type=Path,
        default=MODEL,
        metavar="DIR",
        help="a folder in the Hub's layout; a ViT-B/16 of random weights is written if it is empty",
    )
    parser.add_argument(
        "--device", default="auto", metavar="cpu|cuda", help="auto takes a GPU if there is one"
    )
    parser.add_argument("--runs", type=int, default=3, help="each figure is the median of these")
    parser.add_argument(
        "--record",
        type=Path,
        default=ROOT / "benchmarks" / "RESULTS.md",
        metavar="FILE",
        help="the file that rows are added to",
    )
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    args.device = pick_device(args.device)
    if args.no_record:
        args.record = None
    MODEL.parent.mkdir(exist_ok=True)  # Temporary files go there, too.
    if not (args.model / "config.json").exists():
        write_random_vit(args.model)
    return args


def record(figures: Mapping[str, str], device: torch.device, file: Path | None) -> None:
    """Print how the figures were measured, and add a row for each to a file if there is one."""
    versions = [f"Python {platform.python_version()}"]
    for library in (torch, torchvision, transformers):
        versions.append(f"{library.__name__} {library.__version__}")
    hardware = f"{machine_name(device)}, {cores()} cores"
    date = time.strftime("%Y-%m-%d")
    about = f"{date} | {hardware} | {', '.join(versions)} | {commit_name()} | `{command_line()}`"
    print(f"\n{about}")
    if file is not None:
        with file.open("a") as table:
            for name, figure in figures.items():
                table.write(f"| {about} | {name} | {figure} |\n")


def machine_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU and whether it has AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    machine = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text()
        model_name = text.partition("model name\t: ")[2].partition("\n")[0]
        if model_name:
            machine = model_name
        if "amx_bf16" in text:
            machine += ", AMX"
    return machine


def commit_name() -> str:
    """Return the commit that was measured, marked as dirty if files have changed since."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def command_line() -> str:
    """Return the command that measures the same again."""
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}"]
    for previous, word in zip(sys.argv, sys.argv[1:]):
        if not OUTPUT_FLAGS & {previous, word}:
            words.append(word)
    return " ".join(words)


def dtype_name(amp: torch.dtype | None) -> str:
    """Return the name of autocast's dtype, such as bfloat16; None means float32."""
    dtype = torch.float32 if amp is None else amp
    return str(dtype).removeprefix("torch.")
