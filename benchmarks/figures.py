"""Make the figures of README.md and docs/ again, from what `make demo` leaves.

    python -m minivit demo
    python benchmarks/figures.py [--demo runs/demo] [--out docs]

story.png shows one drawing before and after fine-tuning, chosen by a rule. 60 rooms with a washing
machine and a cat are drawn, none of which training has seen. A drawing passes if the model before
fine-tuning calls it a washing machine and looks away from the cat (the brightest patch of blocks 10
and 11 is off it), and the tuned model names the breed and looks at the cat. Of those that pass, the
one whose attention on the cat rises by the median is shown. How many pass is printed.
score.png and gallery.png are the demo's own. explorer.png is a screenshot of the demo's page, and
is left as it is where there is no Chromium.
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
from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from minivit import ViT, load_pretrained, open_photo, query_maps  # noqa: E402
from minivit.figures.plots import HEAT, overlay, value_range  # noqa: E402
from minivit.tools.demo.drawings import ANIMAL, BREEDS  # noqa: E402
from minivit.tools.demo.scenes import draw_scene  # noqa: E402
from minivit.tools.score.masks import read_pet  # noqa: E402

BLOCKS = (10, 11)
OBJECT = "washing machine"
NUM_DRAWINGS = 60
SEED = 2026
WIDTH = 830  # pixels at which GitHub shows a figure


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, default=ROOT / "runs" / "demo", metavar="DIR")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", metavar="DIR")
    args = parser.parse_args()
    models = {"before": load_pretrained("demo"), "after": load_pretrained(args.demo / "run")}
    with tempfile.TemporaryDirectory() as folder:
        drawings = draw_candidates(Path(folder))
        drawing = choose_drawing(models["before"], models["after"], drawings)
        draw_story(args.out / "story.png", drawing, models)
    for name in ("score.png", "gallery.png"):
        shrink(args.demo / "score" / name, args.out / name)
    pages = sorted((args.demo / "after").glob(f"*{OBJECT}*.html"))
    screenshot_explorer(pages[0], args.out / "explorer.png")


if __name__ == "__main__":
    main()
