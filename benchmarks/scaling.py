"""What an epoch costs, against the number of photos and against the number of trainable blocks.

    python benchmarks/scaling.py [--photos 1024,4096,16384,65536] [--blocks 0,1,2,4,12]

It is measured with run_epochs, on ViT-B/16 and a file of random pixels. An epoch trains and then
evaluates the training photos. The first epoch warms up and does not count. Each number is measured
twice: with nothing kept, and with up to 4 GiB of features kept, which is train.py's default. If the
features of images without augmentation fit, they are computed once, before the first epoch. The
largest number of photos takes 150 KB of disk for each while this runs. figures.py draws the result.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from results import (
    MODEL,
    Figure,
    dtype_name,
    figure_of,
    model_name,
    parse_with_model,
    record,
    rounded,
)
from throughput import Case, train_epochs
from torch import Tensor
from workloads import KEPT_4_GIB, KEPT_NOTHING, epoch_cost, epoch_name

from minivit import load_pretrained
from minivit.system.device import pick_amp

CACHES = {KEPT_NOTHING: 1e-9, KEPT_4_GIB: 4.0}  # GiB
BLOCKS = 2  # that train while the number of photos varies
CHUNK = 256  # different photos, which are repeated


def write_pixels(path: Path, n: int, size: tuple[int, int]) -> None:
    """Write n random photos, uint8 (n, 3, h, w), in numpy's format."""
    rng = np.random.default_rng(0)
    chunk = rng.integers(0, 256, (min(n, CHUNK), 3, *size), dtype=np.uint8)
    pixels = np.lib.format.open_memmap(path, "w+", np.uint8, (n, 3, *size))
    for start in range(0, n, CHUNK):
        pixels[start : start + CHUNK] = chunk[: n - start]


def measure_epoch(
    case: Case, pixels: Tensor, blocks: int, depth: int, kept: str
) -> dict[str, Figure]:
    """Train that many of the last blocks; print and return what an epoch takes."""
    started = time.perf_counter()
    rows = train_epochs(case, pixels, blocks=last_blocks(blocks, depth), cache_gib=CACHES[kept])
    total = time.perf_counter() - started
    counted = rows[1:]
    seconds = figure_of([row["seconds"] for row in counted], "s")
    speed = figure_of([row["images_per_s"] for row in counted], "images/s")
    before = figure_of([total - sum(row["seconds"] for row in rows)], "s")
    what = epoch_name(len(pixels), blocks, kept)
    print(
        f"{what:50} {seconds.median:.3g} s ({speed.median:,.0f} images/s in training; "
        f"{before.median:.1f} s before the first epoch)",
        flush=True,
    )
    return {
        f"{what}, time": seconds,
        f"{what}, training speed": speed,
        f"{what}, time before the first epoch": before,
    }


def last_blocks(number: int, depth: int) -> str:
    """Return the last blocks of a model as --blocks takes them."""
    return f"{depth - number}-{depth - 1}" if number else "none"


def fit_line(x: Sequence[int], y: Sequence[float]) -> dict[str, Figure]:
    """Fit y = a + b x with the least relative errors: return a, b and the largest error."""
    x_values = np.array(x)
    y_values = np.array(y)
    if len(x) > 1:
        b, a = np.polyfit(x_values, y_values, 1, w=1 / y_values)
    else:
        b = y_values[0] / x_values[0]
        a = 0.0
    errors = np.abs((a + b * x_values) / y_values - 1)
    return {
        "line, time without photos": Figure("s", 1, rounded(a)),
        "line, time for a photo": Figure("ms", 1, rounded(1000 * b)),
        "line, largest error": Figure("fraction", 1, rounded(errors.max())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", default="1024,4096,16384,65536", metavar="N,...")
    parser.add_argument(
        "--blocks", default="0,1,2,4,12", metavar="N,...", help="how many of the last blocks train"
    )
    parser.add_argument(
        "--blocks-photos", type=int, default=4096, metavar="N", help="photos to compare blocks on"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--amp", default="auto", help="auto, bf16, fp16, off")
    parser.add_argument("--runs", type=int, default=3, help="each figure is the median of these")
    args = parse_with_model(parser)
    sizes = [int(n) for n in args.photos.split(",")]
    numbers_of_blocks = [int(n) for n in args.blocks.split(",")]
    cases = [(n, BLOCKS) for n in sizes]
    for number in numbers_of_blocks:
        if (args.blocks_photos, number) not in cases:
            cases.append((args.blocks_photos, number))
    case = Case(args.model, args.device, pick_amp(args.amp, args.device), args.batch, args.runs)
    config = load_pretrained(args.model).config
    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory(dir=MODEL.parent) as folder:
        file = Path(folder) / "pixels.npy"
        write_pixels(file, max(*sizes, args.blocks_photos), config.img_size)
        pixels = torch.from_numpy(np.load(file, mmap_mode="c"))
        for kept in CACHES:
            for photos, blocks in cases:
                figures |= measure_epoch(case, pixels[:photos], blocks, config.depth, kept)
    seconds = [figures[f"{epoch_name(n, BLOCKS, KEPT_NOTHING)}, time"].median for n in sizes]
    line = fit_line(sizes, seconds)
    for name, figure in line.items():
        print(f"{name:50} {figure.median:g} {figure.unit}")
    workload = epoch_cost(
        model_name(args.model), dtype_name(case.amp), case.batch, case.device.type
    )
    record(args, case.device, workload, figures | line)


if __name__ == "__main__":
    main()
