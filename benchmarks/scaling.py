"""What an epoch costs, against the number of photos and of trained blocks: loop.fit of ViT-B/16 on a file of random pixels.

    python benchmarks/scaling.py [--photos 1024,4096,16384,65536] [--blocks 0,1,2,4,12] [--plot docs/scaling.png]

An epoch is training, then scoring the training photos; the first one, which warms up, does not count. With --cache-gib as
train.py has it, what frozen blocks make of the photos to score is kept if it fits: computed once, before the first epoch.
The largest number of photos takes 150 KB of disk each while this runs.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullLocator
from one_photo import MODEL, ROOT
from results import parse, record
from throughput import fit

from minivit import load_pretrained
from minivit.system import device

CACHES = {"nothing kept": 1e-9, "up to 4 GiB kept": 4.0}
CHUNK = 256  # photos that are written again and again
LINES = (
    {"color": "black", "marker": "o"},
    {"color": "0.5", "marker": "s", "linestyle": "--"},
)  # of CACHES


def write_pixels(path: Path, n: int, size: tuple[int, int]) -> None:
    """Write n random photos, uint8 (n, 3, h, w), in numpy's format."""
    chunk = np.random.default_rng(0).integers(0, 256, (min(n, CHUNK), 3, *size), dtype=np.uint8)
    pixels = np.lib.format.open_memmap(path, "w+", np.uint8, (n, 3, *size))
    for start in range(0, n, CHUNK):
        pixels[start : start + CHUNK] = chunk[: n - start]


def line(x: list[int], y: list[float]) -> tuple[float, float, float]:
    """Return a and b of the line y = a + b x with the least relative errors, and the largest of these."""
    x, y = np.array(x), np.array(y)
    b, a = np.polyfit(x, y, 1, w=1 / y) if len(x) > 1 else (y[0] / x[0], 0.0)
    return a, b, float(np.abs((a + b * x) / y - 1).max())


def draw(path: Path, by_photos: dict, by_blocks: dict, title: str) -> str:
    """Draw seconds an epoch against photos and against trained blocks; return what the fitted line is."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", dpi=120)
    for (name, found), style in zip(by_photos.items(), LINES):
        left.loglog(*zip(*found.items()), label=name, **style)
    sizes = sorted(by_photos["nothing kept"])
    a, b, off = line(sizes, [by_photos["nothing kept"][n] for n in sizes])
    fitted = f"{a:.2g} s + {1000 * b:.3g} ms a photo"
    left.loglog(sizes, [a + b * n for n in sizes], "k:", linewidth=2.5, label=f"the line {fitted}")
    left.set(xlabel="training photos", ylabel="seconds an epoch")
    left.set_xticks(sizes, [f"{n:,}" for n in sizes])
    left.xaxis.set_minor_locator(NullLocator())
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_minor_locator(NullLocator())
    left.yaxis.set_major_formatter("{x:g}")
    for (name, found), style in zip(by_blocks.items(), LINES):
        right.plot(*zip(*found.items()), label=name, **style)
    right.set(xlabel="blocks that train", ylabel="seconds an epoch", xticks=list(found))
    right.set_ylim(bottom=0)
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend()
    figure.suptitle(title)
    figure.savefig(path)
    return f"{fitted}, within {off:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", default="1024,4096,16384,65536", metavar="N,...")
    parser.add_argument(
        "--blocks", default="0,1,2,4,12", metavar="N,...", help="how many of the last ones train"
    )
    parser.add_argument(
        "--blocks-photos", type=int, default=4096, metavar="N", help="photos to compare blocks on"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--amp", default="auto", help="auto, bf16, fp16, off")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "scaling.png", metavar="FILE")
    args = parse(parser)
    sizes, blocks = ([int(n) for n in text.split(",")] for text in (args.photos, args.blocks))
    amp, depth, figures = (
        device.pick_amp(args.amp, args.device),
        load_pretrained(args.model).config.depth,
        {},
    )
    precision = str(amp or torch.float32).removeprefix("torch.")

    def seconds(pixels: torch.Tensor, trained: int, cache: str) -> float:
        """Measure, print and note an epoch."""
        started, span = time.perf_counter(), f"{depth - trained}-{depth - 1}" if trained else "none"
        how = {"epochs": args.runs + 1, "cache_gib": CACHES[cache]}
        rows = fit(args.model, pixels, args.device, amp, span, args.batch, **how)
        before = time.perf_counter() - started - sum(row["seconds"] for row in rows)
        found, speed = (
            statistics.median(row[key] for row in rows[1:]) for key in ("seconds", "images_per_s")
        )
        what = f"an epoch of {len(pixels)} photos, {trained} blocks, {precision}, {cache}"
        figures[what] = (
            f"{found:.3g} s ({speed:,.0f} images/s in training; {before:.1f} s before the first epoch)"
        )
        print(f"{what:70} {figures[what]}", flush=True)
        return found

    with tempfile.TemporaryDirectory(dir=MODEL.parent) as folder:
        file, most = Path(folder) / "pixels.npy", max(*sizes, args.blocks_photos)
        write_pixels(file, most, load_pretrained(args.model).config.img_size)
        pixels = torch.from_numpy(np.load(file, mmap_mode="c"))
        by_photos = {cache: {n: seconds(pixels[:n], 2, cache) for n in sizes} for cache in CACHES}
        some = pixels[: args.blocks_photos]
        by_blocks = {cache: {k: seconds(some, k, cache) for k in blocks} for cache in CACHES}
    machine = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "CPU"
    title = f"ViT of {depth} blocks, {precision}, batch {args.batch}, {machine}"
    title += f"\nleft: 2 blocks train; right: {len(some):,} photos"
    figures["the line through the epochs with nothing kept"] = draw(
        args.plot, by_photos, by_blocks, title
    )
    print(figures["the line through the epochs with nothing kept"])
    record(args, figures)


if __name__ == "__main__":
    main()
