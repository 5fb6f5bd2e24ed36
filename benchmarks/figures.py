"""Make the figures of README.md and docs/ again: of the demo, and of what benchmarks measured.

    python -m minivit demo
    python benchmarks/figures.py [--demo runs/demo] [--out docs] [--only scaling]

story.png shows one drawing before and after fine-tuning, chosen by a rule. 60 rooms with a washing
machine and a cat are drawn, none of which training has seen. A drawing passes if the model before
fine-tuning calls it a washing machine and looks away from the cat (the brightest patch of blocks 10
and 11 is off it), and the tuned model names the breed and looks at the cat. Of those that pass, the
one whose attention on the cat rises by the median is shown. How many pass is printed.
score.png and gallery.png are the demo's own. explorer.png is a screenshot of the demo's page, and
is left as it is where there is no Chromium. scaling.png shows what scaling.py measured last; it is
drawn from results.jsonl, and is the only one that needs no demo.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image
from report import EpochCurves, digest_of_epochs, epoch_curves, epochs
from results import read_rows
from workloads import KEPT_4_GIB, KEPT_NOTHING

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from minivit import ViT, load_pretrained, open_photo, query_maps  # noqa: E402
from minivit.figures.panels import HEAT, overlay, value_range  # noqa: E402
from minivit.tools.demo.drawings import ANIMAL, BREEDS  # noqa: E402
from minivit.tools.demo.scenes import draw_scene  # noqa: E402
from minivit.tools.score.masks import read_pet  # noqa: E402

BLOCKS = (10, 11)
OBJECT = "washing machine"
NUM_DRAWINGS = 60
SEED = 2026
WIDTH = 830  # pixels at which GitHub shows a figure
CURVES = {
    KEPT_NOTHING: {"color": "black", "marker": "o"},
    KEPT_4_GIB: {"color": "0.5", "marker": "s", "linestyle": "--"},
}


def explain(model: ViT, path: Path) -> tuple[str, float, dict[int, torch.Tensor]]:
    """Return the first prediction, its probability, and each block's map (gh, gw) of shares."""
    images = model.preprocess(open_photo(path))[None]
    with torch.inference_mode():
        logits, attn = model.forward_with_attention(images, BLOCKS, queries=[0])
    probability, index = logits[0].softmax(0).max(0)
    maps = {}
    for block in BLOCKS:
        maps[block] = query_maps(attn[block], model.config.grid)[0].mean(0)
        maps[block] = maps[block] / maps[block].sum()
    return model.labels[index], probability.item(), maps


def draw_candidates(folder: Path) -> list[tuple[Path, str]]:
    """Draw rooms with the object and a cat, and their masks; return photos and breeds."""
    cats = [name for name, breed in BREEDS.items() if breed.species == "cat"]
    drawings = []
    for part in ("images", "annotations/trimaps"):
        (folder / part).mkdir(parents=True)
    for number in range(NUM_DRAWINGS):
        name = cats[number % len(cats)]
        rng = np.random.default_rng([SEED, number])
        scene = draw_scene(rng, OBJECT, BREEDS[name], size=(320, 240), scale=2, animal=ANIMAL)
        path = folder / "images" / f"{name}_{number}.jpg"
        scene.photo.save(path, quality=92)
        scene.mask.save(folder / "annotations" / "trimaps" / f"{path.stem}.png")
        drawings.append((path, name.replace("_", " ")))
    return drawings


def choose_drawing(base: ViT, tuned: ViT, drawings: list[tuple[Path, str]]) -> Path:
    """Return the drawing that the rule above chooses."""
    rises: dict[Path, float] = {}
    for path, breed in drawings:
        label_before, _, before = explain(base, path)
        label_after, _, after = explain(tuned, path)
        if label_before != OBJECT or label_after != breed:
            continue
        regions = read_pet(path, tuned.preprocess, tuned.config.grid).regions
        cat = torch.from_numpy(regions[0, 0])  # the cat's share of each patch's area
        looked_before = [cat[before[b].argmax()].item() > 0.5 for b in BLOCKS]
        looks_after = [cat[after[b].argmax()].item() > 0.5 for b in BLOCKS]
        if all(looks_after) and not any(looked_before):
            change = sum(after[b].flatten() - before[b].flatten() for b in BLOCKS)
            rises[path] = (change @ cat).item() / len(BLOCKS)
    if not rises:
        raise SystemExit(f"none of {len(drawings)} drawings passes")
    chosen = sorted(rises, key=lambda path: rises[path])[len(rises) // 2]
    print(f"{len(rises)} of {len(drawings)} pass; {chosen.name}: +{rises[chosen]:.2f} on the cat")
    return chosen


def draw_story(path: Path, photo_path: Path, models: dict[str, ViT]) -> None:
    """Draw two rows of three panels: the photo and two blocks, before and after."""
    photo = np.asarray(open_photo(photo_path))
    height, width = photo.shape[:2]
    figure = Figure((10, 10 * 2 / 3 * height / width + 0.8), layout="constrained", dpi=100)
    axes = figure.subplots(2, 3)
    for row, (when, model) in zip(axes, models.items()):
        label, probability, maps = explain(model, photo_path)
        panels = {f"{when}: {label}": photo}
        for block in BLOCKS:
            values = model.preprocess.to_photo(maps[block], (width, height))
            low, high = value_range([values])
            panels[f"block {block}"] = overlay(photo, values, low, high, HEAT)
        for ax, (title, image) in zip(row, panels.items()):
            ax.imshow(image)
            ax.set_title(title, fontsize=17, loc="left")
            ax.axis("off")
        print(f"{when}: {label} {probability:.3f}")
    figure.savefig(path, pil_kwargs={"optimize": True})


def shrink(source: Path, path: Path) -> None:
    """Save a picture with 256 colours, which takes a third of the bytes."""
    with Image.open(source) as image:
        image.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE).save(path, optimize=True)


def screenshot_explorer(page: Path, out: Path) -> None:
    """Take a picture of the explorer with the pointer on the animal, if there is a browser."""
    try:
        from selenium import webdriver
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys
    except ImportError:
        print("explorer.png is left as it is: there is no selenium")
        return
    if shutil.which("chromium") is None:
        print("explorer.png is left as it is: there is no chromium")
        return
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tempfile.mkdtemp()}")
    options.binary_location = shutil.which("chromium")
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    browser = webdriver.Chrome(options=options, service=service)
    try:
        browser.set_window_size(WIDTH + 170, 1100)
        browser.get(page.resolve().as_uri())
        block = browser.find_element(By.ID, "block")
        block.send_keys(Keys.ARROW_LEFT)  # from block 11 to block 10
        browser.execute_script("document.activeElement.blur()")
        time.sleep(1)
        browser.find_element(By.TAG_NAME, "body").screenshot(str(out))
    finally:
        browser.quit()
    shrink(out, out)


def draw_scaling(path: Path) -> None:
    """Draw the seconds of an epoch against photos and against blocks, from results.jsonl."""
    runs = epochs(read_rows())
    curves = epoch_curves(runs)
    start = runs.figure("line, time without photos")[0].median
    slope = runs.figure("line, time for a photo")[0].median
    figure = Figure((WIDTH / 100, 3.9), layout="constrained", dpi=200)
    left, right = figure.subplots(1, 2)
    draw_by_photos(left, curves, start, slope)
    draw_by_blocks(right, curves)
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=9)
    figure.suptitle(f"ViT-B/16 on one {runs.rows[0].hardware}", fontsize=11)
    # The digest lets report.py --check say whether the picture shows the newest row.
    figure.savefig(path, metadata={"Comment": digest_of_epochs(runs), "Software": None})


def draw_by_photos(ax: Axes, curves: EpochCurves, start: float, slope: float) -> None:
    """Draw the measured times, and the line of `start` seconds and `slope` ms a photo."""
    for name, seconds in curves.by_photos.items():
        ax.loglog(list(seconds), list(seconds.values()), label=name, **CURVES[name])
    sizes = list(curves.by_photos[KEPT_NOTHING])
    line = [start + slope / 1000 * n for n in sizes]
    ax.loglog(sizes, line, "k:", linewidth=2.5, label=f"{start:g} s + {slope:g} ms a photo")
    ax.set_title(f"{curves.blocks} blocks train", fontsize=10)
    ax.set(xlabel="training photos", ylabel="seconds an epoch")
    ax.set_xticks(sizes, [f"{n:,}" for n in sizes])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter("{x:g}")


def draw_by_blocks(ax: Axes, curves: EpochCurves) -> None:
    for name, seconds in curves.by_blocks.items():
        ax.plot(list(seconds), list(seconds.values()), label=name, **CURVES[name])
    ax.set_title(f"{curves.photos:,} photos", fontsize=10)
    numbers = list(curves.by_blocks[KEPT_NOTHING])
    ax.set(xlabel="blocks that train", ylabel="seconds an epoch", xticks=numbers)
    ax.set_ylim(bottom=0)


def draw_demo(demo: Path, out: Path) -> None:
    """Make the figures that come from a finished demo."""
    models = {"before": load_pretrained("demo"), "after": load_pretrained(demo / "run")}
    with tempfile.TemporaryDirectory() as folder:
        drawings = draw_candidates(Path(folder))
        drawing = choose_drawing(models["before"], models["after"], drawings)
        draw_story(out / "story.png", drawing, models)
    for name in ("score.png", "gallery.png"):
        shrink(demo / "score" / name, out / name)
    pages = sorted((demo / "after").glob(f"*{OBJECT}*.html"))
    screenshot_explorer(pages[0], out / "explorer.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, default=ROOT / "runs" / "demo", metavar="DIR")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", metavar="DIR")
    parser.add_argument("--only", choices=("scaling",), help="default: make all figures")
    args = parser.parse_args()
    draw_scaling(args.out / "scaling.png")
    if args.only is None:
        draw_demo(args.demo, args.out)


if __name__ == "__main__":
    main()
