"""Does it look at the pet? A model's attention against Oxford-IIIT Pet's masks and head boxes, in numbers.

Shapes: n photos, M maps of each (measure.py).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ... import cli
from ...errors import UserError, printable

if TYPE_CHECKING:
    from ...model import ViT
    from .measure import Measured

REGIONS = ("pet", "head box")
METRICS = ("mass", "times_chance", "pointing", "average_precision")
GROUPS = ("all", "right", "wrong", "cats", "dogs")  # of photos
METHODS = ("attention", "rollout", "relevance")
RESAMPLES = 1000  # of the photos, for the intervals
MAX_GALLERY = 50


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("score", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "--model",
        metavar="ID|DIR|demo",
        help=f"as in train.py; none: {cli.RUN_DIR} if it is there, else {cli.BASE_MODEL}",
    )
    add(
        "--compare",
        metavar="BASE",
        help="the model before fine-tuning: scored beside it, with what changed",
    )
    add("--data", default="data", metavar="DIR", help="holds oxford-iiit-pet, annotations included")
    add(
        "--split",
        choices=("test", "trainval", "train", "val"),
        default="test",
        help="only trainval has head boxes",
    )
    add(
        "--blocks", default="all", metavar="RANGE", help="blocks to score, from 0: 8-11, 10,11, all"
    )
    add(
        "--methods",
        type=methods,
        default="attention",
        metavar="LIST",
        help=f"some of {','.join(METHODS)}, or all (slower)",
    )
    add(
        "--gallery",
        type=cli.at_least(0),
        default=0,
        metavar="N",
        help="show N photos of each kind that is worth a look",
    )
    parser.add_device_flags()
    parser.add_workers("threads that decode photos")
    add(
        "--out",
        default="score",
        metavar="DIR",
        help="where score.csv, score.json, score.png and the gallery are written",
    )
    return cli.run(score, parser, argv)


def methods(text: str) -> tuple[str, ...]:
    """An argparse type: some of METHODS; attention always is one of them."""
    asked = METHODS if text == "all" else text.split(",")
    if unknown := sorted(set(asked) - set(METHODS)):
        raise argparse.ArgumentTypeError(
            f"expected all, or some of {','.join(METHODS)}; found {unknown[0]!r}"
        )
    return tuple(name for name in METHODS if name in asked or name == "attention")


def score(args: argparse.Namespace) -> int:
    """Measure every photo, then tell how the maps fall on pet and head, for which photos, and what fine-tuning changed."""
    from ...checkpoints import weights
    from ...data import datasets as data
    from ...model import working_copy
    from ...system import device, files
    from . import figure as score_plots
    from . import gallery, masks, measure

    source = cli.default_model(args.model)
    print(f"model: {printable(source)}", file=sys.stderr)
    on, out, photos = (
        device.pick_device(args.device),
        Path(args.out),
        data.load_data(args.data, seed=0),
    )
    amp, train, val = device.pick_amp(args.amp, on), photos.train, photos.val
    trainval = data.Split(train.paths + val.paths, train.labels + val.labels)
    split = trainval if args.split == "trainval" else getattr(photos, args.split)
    if not any(masks.annotation(path, "trimaps", ".png").is_file() for path in split.paths):
        raise UserError(
            f"{args.data}: no photo of {args.split} has a mask; score needs Oxford-IIIT Pet's annotations/trimaps"
        )
    names = {"model": source, **({"base": args.compare} if args.compare else {})}
    models = {which: weights.load_pretrained(name) for which, name in names.items()}
    model = models["model"]
    knows, blocks = (
        set(photos.classes) <= set(model.labels),
        cli.parse_blocks(args.blocks, model.config.depth),
    )
    check(models, names, blocks, args, knows)
    out.mkdir(parents=True, exist_ok=True)

    started = time.perf_counter()
    models = {which: working_copy(m, on, amp, train=False) for which, m in models.items()}
    found = measure.measure(
        models, split.paths, blocks=blocks, methods=args.methods, workers=args.workers
    )
    seconds, split = time.perf_counter() - started, split.take(found.photos)
    truth = [photos.classes[i] for i in split.labels]
    right = (
        np.array([model.labels[p] == name for p, name in zip(found.predicted, truth)])
        if knows
        else None
    )
    groups = group_photos(split.paths, right)
    scores = summarize(
        found.rows, measure.map_keys(blocks, model.config.num_heads, args.methods), groups
    )

    sentence = say(scores, blocks[-1], names)
    left_out = {
        reason: [path.name for path in paths] for reason, paths in sorted(found.left_out.items())
    }
    print("\n".join(describe(names, found, left_out, groups, args.split, blocks)))
    print(*tables(scores, args.methods), "", sentence, sep="\n")
    columns = ("of", "region", "group", "method", "block", "head")
    rows = [
        dict(zip(columns, key)) | {k: None if v != v else v for k, v in row.items()}
        for key, row in scores.items()
    ]
    with files.whole_file(out / "score.csv") as partial, partial.open("w", newline="") as file:
        csv.writer(file).writerows([rows[0], *(row.values() for row in rows)])
    about = {
        "sentence": sentence,
        "photos": len(split),
        "left_out": left_out,
        "pet_area": float(found.area.mean()),
    }
    about |= {
        "equal_blocks": found.equal_blocks,
        "seconds": seconds,
        "peak_gib": device.peak_gib(on),
    }
    about |= {"settings": vars(args) | {"model": source, "device": str(on), "amp": str(amp)}}
    files.write_json(
        out / "score.json", about | {"scores": [row for row in rows if row["head"] == "mean"]}
    )
    score_plots.draw_scores(out / "score.png", scores, names, sentence)
    written = ["score.csv", "score.json", "score.png"]
    if args.gallery:
        kinds = gallery.choose(found, right, args.gallery)
        known = model.labels if knows else ()
        gallery.write_gallery(
            out, kinds, found, split.paths, truth, known, model.preprocess, blocks[-1]
        )
        written += ["gallery.png", "gallery.html"]
    print(f"{len(split)} photos scored in {seconds:.1f} s", file=sys.stderr)
    print(*(printable(out / name) for name in written), sep="\n")
    return 0


def check(
    models: Mapping[str, ViT],
    names: Mapping[str, str],
    blocks: Sequence[int],
    args: argparse.Namespace,
    knows: bool,
) -> None:
    """Refuse what cannot be scored before a photo is read."""
    model, base, name, other = (
        models["model"],
        models.get("base", models["model"]),
        names["model"],
        names.get("base"),
    )
    if not blocks:
        raise UserError("blocks 'none': expected at least one block to score")
    for what, size in vars(model.config).items():
        if what not in ("num_classes", "pool") and size != (
            found := getattr(base.config, what)
        ):  # the head may be another
            raise UserError(
                f"{other}: its {what} is {found}, not {size}; expected what {name} was tuned from"
            )
    if model.preprocess != base.preprocess:
        raise UserError(
            f"{other}: prepares photos otherwise than {name}; their maps cannot be compared"
        )
    for which, each in models.items():
        if "relevance" in args.methods and not each.config.num_classes:
            raise UserError(
                f"{names[which]}: without a classifier there is no class to be relevant for; score other --methods"
            )
    if args.gallery and not knows and not args.compare:
        raise UserError(
            f"{name}: does not know these breeds, so no photo is right or wrong; --gallery needs --compare"
        )
    if args.gallery > MAX_GALLERY:
        raise UserError(
            f"--gallery {args.gallery}: expected at most {MAX_GALLERY} photos of each kind"
        )


def group_photos(paths: Sequence[Path], right: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return which photos (n,) are in each of GROUPS; cats and dogs as Oxford-IIIT Pet lists them."""
    from ...data.pets import SPLITS, read_listing

    listed = [row for split in SPLITS for row in read_listing(paths[0].parents[1], split)]
    stems = {stem for stem, _, species in listed if species == "cat"}
    cats = np.array([path.stem in stems for path in paths])
    groups = {"all": np.ones(len(paths), bool), "cats": cats, "dogs": ~cats}
    return groups if right is None else {**groups, "right": right, "wrong": ~right}


def summarize(
    rows: Mapping[str, np.ndarray], keys: Sequence[tuple], groups: Mapping[str, np.ndarray]
) -> dict[tuple, dict[str, float]]:
    """Average each model's rows (n, M, 2, 4) over each group of photos, by (model, region, group, method, block, head).

    Of each metric, the mean and its 95% interval; "change", where there are two models, is each photo's, then likewise.
    """
    rows = dict(rows)
    scores: dict[tuple, dict[str, float]] = {}
    if "base" in rows:
        rows["change"] = rows["model"] - rows["base"]
    groups = {group: groups[group] for group in GROUPS if group in groups}
    for (of, values), (r, region), group in itertools.product(
        rows.items(), enumerate(REGIONS), groups
    ):
        chosen = values[groups[group], :, r]  # (n, M, 4)
        chosen = chosen[~np.isnan(chosen[:, 0, 0])]
        if len(chosen):
            for key, cell in zip(keys, np.stack(bootstrap(chosen), -1).tolist()):  # (4, 3)
                row = {
                    m + end: x
                    for m, line in zip(METRICS, cell)
                    for end, x in zip(("", "_low", "_high"), line)
                }
                scores |= {(of, region, group, *key): {"photos": len(chosen), **row}}
    return scores


def bootstrap(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean over n photos of values (n, ...), and the ends of its 95% interval: the percentile bootstrap's.

    One photo gives no interval: NaN. Source: Efron 1979, https://doi.org/10.1214/aos/1176344552
    """
    n, flat = len(values), values.reshape(len(values), -1)
    rng, times = (
        np.random.default_rng(0),
        np.empty((RESAMPLES, n), np.float32),
    )  # how often each photo is drawn
    for row in times:
        row[:] = np.bincount(rng.integers(n, size=n), minlength=n)
    low, high = (
        np.quantile(times @ flat / n, (0.025, 0.975), axis=0)
        if n > 1
        else np.full((2, flat.shape[1]), np.nan)
    )
    mean, low, high = (part.reshape(values.shape[1:]) for part in (flat.mean(0), low, high))
    return mean, low, high


def describe(
    names: Mapping[str, str],
    found: Measured,
    left_out: Mapping,
    groups: Mapping,
    split: str,
    blocks: Sequence[int],
) -> Iterator[str]:
    """Say in lines what was scored, what was left out and why, and that what is frozen did not change."""
    counts = ", ".join(
        f"{chosen.sum()} {group}" for group, chosen in groups.items() if group != "all"
    )
    yield f"{printable(names['model'])} on {len(found.photos)} photos of {split}: {counts}"
    if "right" not in groups:
        yield "it does not know these breeds, so none is right or wrong"
    for reason, files in left_out.items():
        yield f"left out, {reason}: {len(files)} ({', '.join(map(printable, files[:5]))}{', …' * (len(files) > 5)})"
    covers = f"the pet covers {found.area.mean():.3f} of what the model sees"
    yield f"{covers}: chance for mass, average precision and, about, pointing"
    if "base" in names:
        equal, scored = found.equal_blocks, sum(block < found.equal_blocks for block in blocks)
        few = {0: "block 0 or the embeddings changed", 1: "block 0 has equal weights"}
        said = few.get(equal, f"blocks 0-{equal - 1} have equal weights")
        said += (
            f", {scored} of them scored: identical maps, photo by photo"
            if scored
            else ", so any map may change"
        )
        yield f"before: {printable(names['base'])}; {said}"


def tables(scores: Mapping[tuple, Mapping[str, float]], methods: Sequence[str]) -> Iterator[str]:
    """Lay a table out for each method and region: a line a block, of the heads' mean."""
    compared = any(key[0] == "base" for key in scores)
    spans = (
        {"base": "before", "model": "after", "change": "change"}
        if compared
        else {"model": "times chance"}
    )
    for region, method in itertools.product(REGIONS, methods):
        rows = {
            (of, group, *key): row
            for (of, r, group, m, *key), row in scores.items()
            if (r, m) == (region, method)
        }
        if not rows:
            continue
        blocks, heads = (
            sorted({key[2] for key in rows}),
            sorted({key[3] for key in rows} - {"mean"}),
        )
        groups = [group for group in GROUPS[1:] if ("model", group, blocks[0], "mean") in rows]
        photos = rows["model", "all", blocks[0], "mean"]["photos"]
        yield f"\n{method} on the {region}, times chance, with 95% intervals over {photos} photos"
        columns = "  ".join(
            f"{title:^{22 if of == 'change' else 18}}" for of, title in spans.items()
        )
        best = "   best head" if heads else ""
        yield f"block  {columns}   mass  pointing     AP  {''.join(f'{group:>7}' for group in groups)}{best}"
        for block in blocks:
            row = rows["model", "all", block, "mean"]
            line = "  ".join(
                interval(rows[of, "all", block, "mean"], of == "change") for of in spans
            )
            line += (
                f"  {row['mass']:5.3f}  {row['pointing']:8.3f}  {row['average_precision']:5.3f}  "
            )
            line += "".join(
                f"{rows['model', group, block, 'mean']['times_chance']:7.2f}" for group in groups
            )
            times = {head: rows["model", "all", block, head]["times_chance"] for head in heads}
            head = max(heads, key=times.__getitem__, default=None)
            yield f"{block:5}  {line}" + (f"  {head:4}: {times[head]:.2f}" if heads else "")


def interval(row: Mapping[str, float], signed: bool = False) -> str:
    if signed and row["times_chance_low"] == row["times_chance_high"] == 0:
        return f"{'same':^22}"  # the very same maps
    mean, low, high = (
        format(row["times_chance" + end], "+5.2f" if signed else "4.2f")
        for end in ("", "_low", "_high")
    )
    return f"{mean} [{low}, {high}]"


def say(scores: Mapping[tuple, Mapping[str, float]], block: int, names: Mapping[str, str]) -> str:
    """Say in one sentence how much of its attention a block puts on the pet, and whether fine-tuning changed that."""
    rows = {
        of: row
        for (of, *key), row in scores.items()
        if key == ["pet", "all", "attention", block, "mean"]
    }
    row = rows["model"]
    low, high = row["times_chance_low"], row["times_chance_high"]
    said = f"block {block} of {printable(names['model'])} puts {row['times_chance']:.2f} times chance on the pet "
    said += f"(95% interval {low:.2f} to {high:.2f})"
    if "base" not in rows:
        return said
    base, change = rows["base"], rows["change"]
    by, low, high = (change["times_chance" + end] for end in ("", "_low", "_high"))
    verdict = (
        "more" if low > 0 else "less" if high < 0 else "no clear change" if by else "no change"
    )
    return f"{said}, before tuning {base['times_chance']:.2f}: {verdict} ({by:+.2f}, {low:+.2f} to {high:+.2f})"
