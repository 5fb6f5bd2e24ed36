"""What an epoch costs, against the number of photos and against the number of trainable blocks.

    python benchmarks/scaling.py [--photos 1024,4096,16384,65536] [--blocks 0,1,2,4,12]
                                 [--plot docs/scaling.png]

It is measured with run_epochs, on ViT-B/16 and a file of random pixels. An epoch trains and then
evaluates the training photos. The first epoch warms up and does not count. Each number is measured
twice: with nothing kept, and with up to 4 GiB of features kept, which is train.py's default. If the
features of images without augmentation fit, they are computed once, before the first epoch. The
largest number of photos takes 150 KB of disk for each while this runs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator
from one_photo import MODEL, ROOT
from results import dtype_name, parse, record
from throughput import Case, train_epochs
from torch import Tensor

from minivit import load_pretrained
from minivit.system.device import pick_amp

CACHES = {"nothing kept": 1e-9, "up to 4 GiB kept": 4.0}  # GiB
STYLES = {
    "nothing kept": {"color": "black", "marker": "o"},
    "up to 4 GiB kept": {"color": "0.5", "marker": "s", "linestyle": "--"},
}
CHUNK = 256  # different photos, which are repeated
Curves = dict[str, dict[int, float]]  # of each of CACHES: seconds by the number of photos or blocks


def write_pixels(path: Path, n: int, size: tuple[int, int]) -> None:
    """Write n random photos, uint8 (n, 3, h, w), in numpy's format."""
    rng = np.random.default_rng(0)
    chunk = rng.integers(0, 256, (min(n, CHUNK), 3, *size), dtype=np.uint8)
    pixels = np.lib.format.open_memmap(path, "w+", np.uint8, (n, 3, *size))
    for start in range(0, n, CHUNK):
        pixels[start : start + CHUNK] = chunk[: n - start]


@dataclass(frozen=True)
class EpochCost:
    """The cost of an epoch, as medians."""

    seconds: float
    images_per_s: float  # in training
    seconds_before: float  # before the first epoch

    def __str__(self) -> str:
        return (
            f"{self.seconds:.3g} s ({self.images_per_s:,.0f} images/s in training; "
            f"{self.seconds_before:.1f} s before the first epoch)"
        )


def measure_epoch(case: Case, pixels: Tensor, blocks: str, cache_gib: float) -> EpochCost:
    started = time.perf_counter()
    rows = train_epochs(case, pixels, blocks=blocks, cache_gib=cache_gib)
    total = time.perf_counter() - started
    return EpochCost(
        seconds=statistics.median(row["seconds"] for row in rows[1:]),
        images_per_s=statistics.median(row["images_per_s"] for row in rows[1:]),
        seconds_before=total - sum(row["seconds"] for row in rows),
    )


def last_blocks(number: int, depth: int) -> str:
    """Return the last blocks of a model as --blocks takes them."""
    return f"{depth - number}-{depth - 1}" if number else "none"


def fit_line(x: list[int], y: list[float]) -> tuple[float, float, float]:
    """Return a and b of y = a + b x with the least relative errors, and the largest of these."""
    x_values = np.array(x)
    y_values = np.array(y)
    if len(x) > 1:
        b, a = np.polyfit(x_values, y_values, 1, w=1 / y_values)
    else:
        b = y_values[0] / x_values[0]
        a = 0.0
    errors = np.abs((a + b * x_values) / y_values - 1)
    return a, b, float(errors.max())


def draw(path: Path, by_photos: Curves, by_blocks: Curves, title: str) -> str:
    """Draw the seconds of an epoch against photos and against blocks; describe the fitted line."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", dpi=120)
    fitted = draw_by_photos(left, by_photos)
    draw_by_blocks(right, by_blocks)
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend()
    figure.suptitle(title)
    figure.savefig(path)
    return fitted


def draw_by_photos(ax: Axes, curves: Curves) -> str:
    for name, seconds in curves.items():
        ax.loglog(list(seconds), list(seconds.values()), label=name, **STYLES[name])
    sizes = sorted(curves["nothing kept"])
    a, b, error = fit_line(sizes, [curves["nothing kept"][n] for n in sizes])
    fitted = f"{a:.2g} s + {1000 * b:.3g} ms a photo"
    line = [a + b * n for n in sizes]
    ax.loglog(sizes, line, "k:", linewidth=2.5, label=f"the line {fitted}")
    ax.set(xlabel="training photos", ylabel="seconds an epoch")
    ax.set_xticks(sizes, [f"{n:,}" for n in sizes])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter("{x:g}")
    return f"{fitted}, within {error:.1%}"


def draw_by_blocks(ax: Axes, curves: Curves) -> None:
    for name, seconds in curves.items():
        ax.plot(list(seconds), list(seconds.values()), label=name, **STYLES[name])
    ticks = list(curves["nothing kept"])
    ax.set(xlabel="blocks that train", ylabel="seconds an epoch", xticks=ticks)
    ax.set_ylim(bottom=0)


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
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "scaling.png", metavar="FILE")
    args = parse(parser)
    sizes = [int(n) for n in args.photos.split(",")]
    numbers_of_blocks = [int(n) for n in args.blocks.split(",")]
    case = Case(args.model, args.device, pick_amp(args.amp, args.device), args.batch, args.runs)
    config = load_pretrained(args.model).config
    precision = dtype_name(case.amp)
    figures: dict[str, str] = {}

    def measure(pixels: Tensor, number: int, cache: str) -> float:
        """Measure an epoch with that many trainable blocks; print it, and note it in figures."""
        cost = measure_epoch(case, pixels, last_blocks(number, config.depth), CACHES[cache])
        what = f"an epoch of {len(pixels)} photos, {number} blocks, {precision}, {cache}"
        figures[what] = str(cost)
        print(f"{what:70} {cost}", flush=True)
        return cost.seconds

    by_photos: Curves = {}
    by_blocks: Curves = {}
    with tempfile.TemporaryDirectory(dir=MODEL.parent) as folder:
        file = Path(folder) / "pixels.npy"
        write_pixels(file, max(*sizes, args.blocks_photos), config.img_size)
        pixels = torch.from_numpy(np.load(file, mmap_mode="c"))
        for cache in CACHES:
            by_photos[cache] = {n: measure(pixels[:n], 2, cache) for n in sizes}
        some = pixels[: args.blocks_photos]
        for cache in CACHES:
            by_blocks[cache] = {k: measure(some, k, cache) for k in numbers_of_blocks}
    machine = torch.cuda.get_device_name(case.device) if case.device.type == "cuda" else "CPU"
    title = (
        f"ViT of {config.depth} blocks, {precision}, batch {case.batch}, {machine}\n"
        f"left: 2 blocks train; right: {len(some):,} photos"
    )
    fitted = draw(args.plot, by_photos, by_blocks, title)
    figures["the line through the epochs with nothing kept"] = fitted
    print(fitted)
    record(figures, case.device, args.record)


if __name__ == "__main__":
    main()
