"""What the benchmarks that add to RESULTS.md share: their flags, and a row for each figure with how to measure it again."""

import argparse
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import torchvision
import transformers
from one_photo import MODEL, ROOT, write_random_vit

sys.path.insert(0, str(ROOT))
from minivit.cli import cores
from minivit.system.device import pick_device

WRITTEN = {"--record", "--plot"}  # say where, not what is measured


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Add the flags that benchmarks share, parse, and write a random ViT-B/16 if there is no model yet."""
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        default=MODEL,
        metavar="DIR",
        help="a folder in the Hub's layout; made, of random weights",
    )
    add("--device", default="auto", metavar="cpu|cuda", help="auto takes a GPU if there is one")
    add("--runs", type=int, default=3, help="of which figures are medians")
    add(
        "--record",
        type=Path,
        default=ROOT / "benchmarks" / "RESULTS.md",
        metavar="FILE",
        help="where rows are added",
    )
    add("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    args.device = pick_device(args.device)
    MODEL.parent.mkdir(exist_ok=True)  # what is made for a while goes there too
    if not (args.model / "config.json").exists():
        write_random_vit(args.model)
    return args


def record(args: argparse.Namespace, figures: dict[str, str]) -> None:
    """Add a row for each figure to the table of results, with all that is needed to measure it again."""
    machine, git = (
        platform.processor() or platform.machine(),
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
    )
    if args.device.type == "cuda":
        machine = torch.cuda.get_device_name(args.device)
    elif (cpuinfo := Path("/proc/cpuinfo")).exists():
        text = cpuinfo.read_text()
        machine = text.partition("model name\t: ")[2].partition("\n")[0] or machine
        machine += ", AMX" * ("amx_bf16" in text)
    try:
        commit = (
            subprocess.run(git, capture_output=True, text=True, cwd=ROOT).stdout.strip()
            or "unknown"
        )
    except FileNotFoundError:
        commit = "unknown"
    libraries = {"torch": torch, "torchvision": torchvision, "transformers": transformers}
    versions = ", ".join(
        [
            f"Python {platform.python_version()}",
            *(f"{k} {v.__version__}" for k, v in libraries.items()),
        ]
    )
    words = [
        word for before, word in zip(["", *sys.argv], sys.argv) if not WRITTEN & {before, word}
    ]
    command = " ".join(["python", f"benchmarks/{Path(words[0]).name}", *words[1:]])
    about = f"{time.strftime('%Y-%m-%d')} | {machine}, {cores()} cores | {versions} | {commit} | `{command}`"
    rows = "".join(f"| {about} | {what} | {figure} |\n" for what, figure in figures.items())
    print(f"\n{about}")
    if not args.no_record:
        with args.record.open("a") as file:
            file.write(rows)
