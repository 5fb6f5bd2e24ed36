"""How many photos, how many blocks? Fine-tuning over a grid of photos a class and trained blocks, from tokens computed once.

Shapes: A all photos, n of a split, B of a batch, N tokens, D embed_dim, K views.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import cli
from ...errors import UserError, printable

if TYPE_CHECKING:
    import torch

    from ...data.datasets import Data, Split
    from ...model import ViT
    from .tokens import KnownTokens

MIN_EPOCHS = 5  # of a run: few photos take more
COLUMNS = (
    "shots",
    "blocks",
    "seed",
    "photos",
    "epochs",
    "train_accuracy",
    "val_accuracy",
    "test_accuracy",
    "seconds",
)
NAMES = {"none": "the head alone", "all": "all blocks"}
SETTINGS = (
    "model",
    "revision",
    "epochs",
    "batch_size",
    "lr",
    "views",
    "amp",
)  # a study goes on only with the same


@dataclass(frozen=True)
class Cell:
    """One run of the grid, and its training photos."""

    shots: str  # photos a class, or all
    blocks: str
    seed: int
    cut: int
    epochs: int
    train: Split


def make_parser() -> cli.Parser:
    parser = cli.Parser("study", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", default=cli.BASE_MODEL, metavar="ID|DIR|FILE|demo", help="as in train.py")
    add("--revision", metavar="REV", help="Hub revision; none: the default branch")
    add("--data", default="data", metavar="DIR", help="as in train.py")
    add(
        "--shots",
        nargs="+",
        default=["5", "10", "20", "50", "all"],
        type=shots,
        metavar="N",
        help="photos a class",
    )
    blocks = ["none", "11", "10-11", "8-11", "all"]
    add(
        "--blocks",
        nargs="+",
        default=blocks,
        metavar="RANGE",
        help="blocks to train, as in train.py; all takes longest",
    )
    add(
        "--seeds",
        type=cli.at_least(1),
        default=3,
        help="how often each is repeated, with other photos in another order",
    )
    add(
        "--epochs",
        type=cli.at_least(1),
        help=f"none: {MIN_EPOCHS}, or as many as {cli.MIN_STEPS} steps take",
    )
    add("--batch-size", type=cli.at_least(1), default=16, help="photos per optimiser step")
    add("--lr", type=cli.positive, default=cli.LR, help="peak learning rate")
    add(
        "--views",
        type=cli.at_least(1),
        default=4,
        metavar="K",
        help="augmented views of each photo that are kept",
    )
    add(
        "--cache-gib",
        type=cli.positive,
        default=8.0,
        metavar="X",
        help="memory for what frozen blocks make of photos",
    )
    add(
        "--store-gib",
        type=cli.positive,
        default=cli.STORE_GIB,
        metavar="X",
        help="disk for decoded photos, beside the data",
    )
    parser.add_device_flags()
    parser.add_workers("threads that decode photos")
    add(
        "--out",
        default="study",
        metavar="DIR",
        help="where study.csv and study.png are written; an interrupted study goes on",
    )
    add("--dry-run", action="store_true", help="say how long it will take; train nothing")
    return parser


def shots(text: str) -> str:
    """An argparse type: photos a class, or all."""
    return text if text == "all" else str(cli.at_least(1)(text))


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(study, make_parser(), argv)


def study(args: argparse.Namespace) -> int:
    """Compute all photos' tokens block by block; at each cut train what starts there; tell what came out."""
    from ...checkpoints import weights
    from ...data import datasets as data
    from ...data import store
    from ...model import freeze_except, working_copy
    from ...system import device, files
    from ...training import features as frozen
    from . import figure as study_plots
    from .tokens import KnownTokens

    started, out, on = time.perf_counter(), Path(args.out), device.pick_device(args.device)
    amp = device.pick_amp(args.amp, on)
    splits = [data.load_data(args.data, seed=seed) for seed in range(args.seeds)]
    model = weights.load_pretrained(args.model, revision=args.revision, labels=splits[0].classes)
    cuts = {
        text: freeze_except(model, cli.parse_blocks(text, model.config.depth))
        for text in args.blocks
    }
    cells, low = plan(args, splits, cuts), working_copy(model, on, amp, train=False)
    learn = sorted({path for split in splits for path in split.train.paths})
    need = frozen.token_gib(low, len(splits[0].paths()) + args.views * len(learn))
    if need > args.cache_gib:
        raise UserError(
            f"the tokens take {need:.1f} GiB; raise --cache-gib {args.cache_gib:g}, or lower --views {args.views}"
        )
    print(
        f"{len(cells)} runs, about {estimate(low, cells, splits, args.views) / 60:.0f} minutes on {on}",
        flush=True,
    )
    if args.dry_run:
        return 0
    out.mkdir(parents=True, exist_ok=True)
    with files.locked(out):
        rows = earlier(
            out,
            {name: vars(args)[name] for name in SETTINGS}
            | {"photos": store.checksum((splits[0].paths(), ()))},
        )
        done = {(row["shots"], row["blocks"], row["seed"]) for row in rows}
        cells = [cell for cell in cells if (cell.shots, cell.blocks, str(cell.seed)) not in done]
        if cells:
            photos, file = store.prepare(
                splits[0], model.preprocess, workers=args.workers, cap_gib=args.store_gib
            )
            pixels = store.open_pixels(photos, file, model.preprocess, args.workers)
            tokens = KnownTokens(
                low, pixels, learn, args.views, batch=device.eval_batch(on, 1, 1, amp)
            )
        for cell in sorted(cells, key=lambda cell: cell.cut):
            tokens.advance(cell.cut)
            row = run(cell, model, splits[cell.seed], tokens, args, amp)
            if row is None:
                print(
                    f"\ninterrupted; what is done is in {out}: the same command goes on",
                    file=sys.stderr,
                )
                return 130
            rows.append({name: str(row[name]) for name in COLUMNS})
            with (
                files.whole_file(out / "study.csv") as partial,
                partial.open("w", newline="", encoding="utf-8") as sheet,
            ):
                csv.writer(sheet, lineterminator="\n").writerows(
                    [COLUMNS, *(row.values() for row in rows)]
                )
            print("{shots:>4} photos a class, blocks {blocks}, seed {seed}: training {train_accuracy:.3f}, validation "
                  "{val_accuracy:.3f}, test {test_accuracy:.3f} · {seconds:.0f} s".format(**row), flush=True)  # fmt: skip
    table = summarize(rows)
    said = advice(table)
    study_plots.draw_study(out / "study.png", table, said)
    print("", *lay_out(table), "", said, sep="\n")
    print(f"{len(rows)} runs in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    print(*(printable(out / name) for name in ("study.csv", "study.png")), sep="\n")
    return 0


def plan(args: argparse.Namespace, splits: Sequence[Data], cuts: Mapping[str, int]) -> list[Cell]:
    """List the grid's runs. A seed's photos of fewer shots are among those of more; each class must have more than that."""
    cells, fewest = (
        [],
        min(
            min(split.train.labels.count(i) for i in range(len(split.classes))) for split in splits
        ),
    )
    possible = [
        count for count in dict.fromkeys(args.shots) if count == "all" or int(count) < fewest
    ]
    if left := [count for count in args.shots if count not in possible]:
        print(
            f"left out: {', '.join(left)} photos a class; the smallest class has {fewest} to train on",
            file=sys.stderr,
        )
    for seed, split in enumerate(splits):
        order = random.Random(seed).sample(range(len(split.train)), len(split.train))
        for count in possible:
            of_class: dict[int, list[int]] = {}
            for i in order:
                of_class.setdefault(split.train.labels[i], []).append(i)
            chosen = sorted(
                i
                for found in of_class.values()
                for i in found[: None if count == "all" else int(count)]
            )
            steps = math.ceil(len(chosen) / args.batch_size)
            epochs = args.epochs or max(MIN_EPOCHS, math.ceil(cli.MIN_STEPS / steps))
            cells += [
                Cell(count, blocks, seed, cut, epochs, split.train.take(chosen))
                for blocks, cut in cuts.items()
            ]
    return cells


def estimate(low: ViT, cells: Sequence[Cell], splits: Sequence[Data], views: int) -> float:
    """Return about how many seconds a study takes, by the speed of a forward pass on this device."""
    import torch

    images = torch.randn(32, 3, *low.config.img_size, device=low.cls_token.device)
    with torch.inference_mode():
        for _ in range(2):  # the first warms up
            started = time.perf_counter()
            low(images).float().sum().item()
            speed = len(images) * low.flops() / (time.perf_counter() - started)
    photos = len(splits[0].paths()) + views * len(splits[0].train)
    work = photos * (low.flops() - low.flops(max(cell.cut for cell in cells)))
    for cell in cells:
        n, val, test = len(cell.train), len(splits[cell.seed].val), len(splits[cell.seed].test)
        evaluations = math.ceil(cell.epochs / evaluate_every(cell.epochs))
        work += low.flops(cell.cut) * (cell.epochs * 3 * n + evaluations * val + n + test)
    return work / speed


def evaluate_every(epochs: int) -> int:
    """Return after how many epochs to look for the best one: five to nine times a run, as of few photos epochs are many."""
    return max(1, epochs // MIN_EPOCHS)


def run(
    cell: Cell,
    model: ViT,
    split: Data,
    tokens: KnownTokens,
    args: argparse.Namespace,
    amp: torch.dtype | None,
) -> dict[str, Any] | None:
    """Fine-tune from tokens as train.py does, and test the best epoch; None if a signal came. Leaves the model as it was."""
    import torch

    from ...model import freeze_except, working_copy
    from ...system import device
    from ...training import metrics, state
    from ...training import step as loop

    started, on = time.perf_counter(), tokens.model.cls_token.device
    freeze_except(model, cli.parse_blocks(cell.blocks, model.config.depth))
    going = state.begin(
        working_copy(model, on, amp, train=True), amp=amp, weight_decay=cli.WEIGHT_DECAY
    )
    before, (train, val, test) = (
        going.tail(),
        ((s.paths, torch.tensor(s.labels)) for s in (cell.train, split.val, split.test)),
    )
    how: dict[str, Any] = {
        "epochs": cell.epochs,
        "batch_size": args.batch_size,
        "micro_batch": device.pick_micro_batch(None, args.batch_size, on, amp),
        "lr": args.lr,
        "seed": cell.seed,
        "evaluate_every": evaluate_every(cell.epochs),
        "scored": ["val"],
    }
    how |= {
        "cache_views": args.views,
        "frozen": tokens,
        "train": train,
        "val": val,
    }  # photos by path, as tokens knows them
    for row in loop.fit(going, cut=cell.cut, amp=amp, **how):
        if metrics.best_row(going.rows) is row:
            going.best = going.tail()
    if going.stopped:
        return None
    state.set_tail(going.model, going.best)
    tuned = working_copy(going.model, on, amp, train=False)
    accuracy = {"val": metrics.best_row(going.rows)["val_accuracy"]}
    for name, (photos, labels) in (("train", train), ("test", test)):
        logits = loop.predict(
            tuned, tokens.evaluation(photos, torch.arange(len(labels)))(), cut=cell.cut
        )
        accuracy[name] = loop.score(logits, labels)["accuracy"]
    state.set_tail(going.model, before)  # of which the model has the memory, where nothing is cast
    found = {name: vars(cell)[name] for name in ("shots", "blocks", "seed", "epochs")} | {
        "photos": len(cell.train)
    }
    found |= {f"{name}_accuracy": value for name, value in accuracy.items()}
    return found | {"seconds": time.perf_counter() - started}


def earlier(out: Path, settings: Mapping[str, object]) -> list[dict[str, str]]:
    """Return the rows of a study that lies there; raises UserError if it is another's, and names what differs."""
    from ...system import files

    now = json.loads(json.dumps(settings))
    then = files.read_json(out / "study.json") if (out / "study.json").exists() else now
    if changed := [
        f"{name} was {then.get(name)}, now {value}"
        for name, value in now.items()
        if then.get(name) != value
    ]:
        raise UserError(f"{out}: holds another study: {'; '.join(changed)}; give another --out")
    files.write_json(out / "study.json", now)
    if not (out / "study.csv").exists():
        return []
    with (out / "study.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def summarize(rows: Sequence[Mapping[str, str]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return by blocks, then by photos a class: photos; the seeds' mean test accuracy and gap, lowest and highest; in order."""
    count = lambda text: math.inf if text == "all" else int(text)  # noqa: E731
    table: dict[str, dict[str, dict[str, float]]] = {}
    for blocks in dict.fromkeys(row["blocks"] for row in rows):
        for asked in sorted({row["shots"] for row in rows if row["blocks"] == blocks}, key=count):
            found = [row for row in rows if (row["blocks"], row["shots"]) == (blocks, asked)]
            tests = [float(row["test_accuracy"]) for row in found]
            gaps = [float(row["train_accuracy"]) - float(row["val_accuracy"]) for row in found]
            cell = {
                "photos": statistics.mean(int(row["photos"]) for row in found),
                "seeds": len(found),
            }
            for name, values in (("test", tests), ("gap", gaps)):
                cell |= {
                    name: statistics.mean(values),
                    f"{name}_low": min(values),
                    f"{name}_high": max(values),
                }
            called = NAMES.get(blocks, f"block{'s' * (not blocks.isdecimal())} {blocks}")
            table.setdefault(called, {})[asked] = cell
    return table


def lay_out(table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterator[str]:
    """Lay the mean test accuracies out, a line for each choice of blocks, with the lowest and highest of the seeds."""
    columns = list(dict.fromkeys(count for cells in table.values() for count in cells))
    columns.sort(
        key=lambda count: max(cells[count]["photos"] for cells in table.values() if count in cells)
    )
    yield "test accuracy (lowest to highest seed) by photos a class"
    yield f"{'trained':14}" + "".join(f"{count:>22}" for count in columns)
    for blocks, cells in table.items():
        said = [
            "{test:.3f} ({test_low:.3f}-{test_high:.3f})".format(**cells[c]) if c in cells else ""
            for c in columns
        ]
        yield f"{blocks:14}" + "".join(f"{text:>22}" for text in said)


def advice(table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Say in a sentence which blocks to train with all of these photos, and whether more photos would help."""
    most = max(table.values(), key=lambda cells: max(cell["photos"] for cell in cells.values()))
    *others, last = most
    ends = {blocks: cells[last] for blocks, cells in table.items() if last in cells}
    best = max(ends, key=lambda blocks: ends[blocks]["test"])
    spread = (ends[best]["test_high"] - ends[best]["test_low"]) / 2
    said = f"with {last} photos a class train {best}: test accuracy {ends[best]['test']:.3f}"
    equals = [
        blocks
        for blocks in ends
        if blocks != best and ends[blocks]["test"] >= ends[best]["test"] - spread
    ]
    said += f" ({' and '.join(equals)} as good within the seeds' spread)" if equals else ""
    if others and others[-1] in table[best]:
        gain = ends[best]["test"] - table[best][others[-1]]["test"]
        helps = (
            "more photos would still help"
            if gain > max(spread, 0.01)
            else "more photos would help little"
        )
        said += f"; {100 * gain:+.1f} points since {others[-1]} photos, so {helps}"
    return f"{said}; training is {100 * ends[best]['gap']:.1f} points above validation there"
