"""Name what is in photos, and draw where each block of the Vision Transformer looks."""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from . import cli  # torch comes in with the job, so that --help and a mistyped flag answer at once

if TYPE_CHECKING:
    from .explain import Look, Photo
    from .model import ViT

METHODS = ("attention", "rollout", "relevance")
POOL_FROM = 8  # photos; figures of fewer are drawn before processes that draw would have started
MAX_ROWS_GIB = 0.5  # of attention in a batch, where all its rows are asked for


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("infer", description=__doc__)
    add = parser.add_argument
    add("photos", nargs="+", metavar="PHOTO|FOLDER", help="photos, or folders of photos")
    add(
        "--model",
        metavar="ID|DIR|FILE|demo",
        help=f"as in train.py; none: {cli.RUN_DIR} if it is there, else {cli.BASE_MODEL}",
    )
    add("--revision", metavar="REV", help="Hub revision; none: the default branch")
    add(
        "--compare",
        metavar="ID|DIR|demo",
        help="another model, drawn above, with the difference below: before and after",
    )
    add(
        "--img-size",
        type=cli.image_size,
        metavar="N|HxW",
        help="another input size than the checkpoint's, in pixels",
    )
    add(
        "--layers", default="8-11", metavar="RANGE", help="blocks to draw, from 0: 8-11, 10,11, all"
    )
    add(
        "--method",
        choices=METHODS,
        default="attention",
        help="what is drawn of a block: its attention, attention followed up to it, or what spoke for a class up to it",
    )
    add("--target", metavar="NAME", help="class for relevance; none: each photo's first prediction")
    add(
        "--heads",
        action="store_true",
        help="a panel for each head and a row for each block; else the mean of the heads",
    )
    add(
        "--query",
        type=pixel,
        metavar="X,Y",
        help="where the patch at this pixel of the photo looks; none: the class token",
    )
    add(
        "--scale",
        choices=("own", "row"),
        default="own",
        help="colours: over each map's own range, or one along each row",
    )
    add("--top-k", type=cli.at_least(1), default=5, help="names to print for each photo")
    add(
        "--out",
        default="attention",
        metavar="DIR",
        help="where the figures are written, as <photo's stem>.png",
    )
    add(
        "--html",
        action="store_true",
        help="also write <stem>.html, to point at any patch of any block and head",
    )
    add(
        "--npz",
        action="store_true",
        help="also write <stem>.npz, the rows of attention as arrays; with --html, all rows",
    )
    add("--json", action="store_true", help="print one JSON object a photo")
    parser.add_workers("threads that decode, and processes that draw")
    parser.add_device_flags()
    return cli.run(infer, parser, argv)


def pixel(text: str) -> tuple[float, float]:
    """An argparse type: X,Y in a photo's pixels."""
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected X,Y as 250,130, found {text!r}") from None
    return x, y


def infer(args: argparse.Namespace) -> int:
    """Batch by batch: photos, what the models make of them, figures; photo by photo: names and what was written."""
    from . import explain as look
    from .data import photos
    from .errors import UserError
    from .model import working_copy
    from .system import device
    from .system import distributed as parallel
    from .system import prefetch as ahead
    from .system import workers as processes

    rank, world = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
    )
    jobs = list(place(expand(args.photos), Path(args.out)))[
        rank::world
    ]  # torchrun's processes share them out
    on = device.pick_device(parallel.own_device(args.device))
    amp = device.pick_amp(args.amp, on)
    models = [
        working_copy(model, on, amp, train=False) for model in load_models(args, quiet=rank > 0)
    ]
    targets = [find_target(args.target, model, models) for model in models]
    blocks = cli.parse_blocks(args.layers, min(model.config.depth for model in models))
    methods = check_flags(args, models, blocks)
    Path(args.out).mkdir(parents=True, exist_ok=True)

    def read(job: tuple[Path, Path]) -> tuple[Path, Path, Photo | UserError]:
        try:
            return *job, look.read_photo(job[0], models, args.query, small=args.heads)
        except UserError as error:
            return *job, error

    drawers = min(args.workers, len(jobs)) if len(jobs) >= POOL_FROM else 0
    unreadable, size = 0, batch_size(models[0], blocks, args, cpu=on.type == "cpu")
    with (
        progress_bar(len(jobs)) as progress,
        processes.working(drawers, "minivit.figures.plots") as draw,
    ):
        found = ahead.read_ahead(read, jobs, args.workers)
        drawn: deque[tuple[Callable[[], None], dict]] = deque()
        while batch := list(itertools.islice(found, size)):
            for path, _, error in batch:
                if isinstance(error, UserError):
                    say(
                        error if isinstance(error, photos.PhotoError) else f"{path}: {error}",
                        sys.stderr,
                    )
                    unreadable += 1
                    progress.update()
            if not (
                sound := [
                    (path, figure, photo)
                    for path, figure, photo in batch
                    if isinstance(photo, look.Photo)
                ]
            ):
                continue
            decoded, asked = (
                [photo for *_, photo in sound],
                {"methods": methods, "all_rows": args.html},
            )
            looks = [
                look.look_at(model, decoded, i, blocks, target=targets[i], **asked)
                for i, model in enumerate(models)
            ]
            for job, *of_models in zip(sound, *looks):
                drawn.append(write(args, job, of_models, blocks, draw))
                while len(drawn) > 2 * args.workers:
                    finish(*drawn.popleft(), args, progress)
        while drawn:
            finish(*drawn.popleft(), args, progress)
    if world > 1:
        parallel.wait_for_others()
    return 2 if unreadable else 0


def load_models(args: argparse.Namespace, *, quiet: bool) -> list[ViT]:
    """Load the model, after the one to compare it with if there is one, and say which on stderr."""
    from .checkpoints import weights

    source = cli.default_model(args.model)
    if not quiet:
        say(f"model: {source}", sys.stderr)
    models = [weights.load_pretrained(args.compare, img_size=args.img_size)] if args.compare else []
    models.append(weights.load_pretrained(source, revision=args.revision, img_size=args.img_size))
    for model in models:
        if not model.labels:
            say(f"{model.origin.source} has no classifier: attention only", sys.stderr)
    return models


def check_flags(
    args: argparse.Namespace, models: Sequence[ViT], blocks: Sequence[int]
) -> list[str]:
    """Return the methods that are needed. Raises UserError for flags that would mean nothing, or that the models lack."""
    from .errors import UserError

    bare = [model.origin.source for model in models if not model.labels]
    ways = [(model.config.grid, model.preprocess.resize, model.preprocess.crop) for model in models]
    relevance, unlike, seen = (
        args.method == "relevance",
        len(set(ways)) > 1,
        " and ".join(map(str, ways)),
    )
    refused = {
        f"--layers {args.layers}: no block to draw; expected a range as 8-11": not blocks,
        f"--method {args.method} has no heads to draw; leave --heads away": args.heads
        and args.method != "attention",
        "--method relevance is for the class token; leave --query away": args.query and relevance,
        "--target is for --method relevance or --html": args.target
        and not (relevance or args.html),
        f"{' and '.join(bare)} has no classifier, so nothing speaks for a class; use --method rollout": bare
        and relevance,
        f"--compare: expected two models that see a photo in the same patches, found (grid, resize, crop) {seen}": unlike,
    }
    for message, wrong in refused.items():
        if wrong:
            raise UserError(message)
    return [
        method
        for method in METHODS
        if method == args.method or (args.html and not (bare and method == "relevance"))
    ]


def find_target(name: str | None, model: ViT, models: Sequence[ViT]) -> int | None:
    """Return the index of a class by its name; None, said on stderr, where only another of the models has it."""
    from .errors import UserError

    found = {label.lower(): i for i, label in enumerate(model.labels)}.get((name or "").lower())
    if name is None or found is not None:
        return found
    everything = [label for each in models for label in each.labels]
    if name.lower() not in map(str.lower, everything):
        close = difflib.get_close_matches(name, everything, n=3, cutoff=0) or [
            "a model with a classifier"
        ]
        raise UserError(
            f"--target {name!r}: no such class; expected one of the model's, as {', '.join(close)}"
        )
    say(
        f"{model.origin.source} has no class {name!r}: relevance there is for its own first prediction",
        sys.stderr,
    )
    return None


def batch_size(model: ViT, blocks: Sequence[int], args: argparse.Namespace, *, cpu: bool) -> int:
    """Return how many photos go through the models at once; of a CPU few, so that the first figure is there soon."""
    from .system.device import CPU_BATCH

    N, size = model.config.num_tokens, CPU_BATCH if cpu else 32
    if args.method == "attention" and not args.html:
        return size
    whole = 4 * model.config.num_heads * N * N * (max(blocks) + 1)  # bytes a photo
    return max(1, min(size, int(MAX_ROWS_GIB * 2**30 / whole)))


def write(
    args: argparse.Namespace,
    job: tuple[Path, Path, Photo],
    looks: Sequence[Look],
    blocks: Sequence[int],
    draw: Callable,
) -> tuple[Callable[[], None], dict]:
    """Begin to draw a photo's figure and write what goes beside it; return what waits for the figure, and the answer."""
    from . import explain as look
    from .figures import explorer as report
    from .figures import plots

    path, figure, photo = job
    layout = look.figure_rows(photo, looks, args.method, blocks, heads=args.heads)
    dominated = []
    for row in layout:
        model = f" of {row.label.splitlines()[0]}" if len(looks) > 1 else ""
        dominated += [f"{panel.title}{model} ({panel.note})" for panel in row.panels if panel.warn]
    if dominated:
        say(f"{path}: one token dominates {', '.join(dominated)}", sys.stderr)
    said = f": {looks[0].says(args.method)}" if len(looks) == 1 and looks[0].model.labels else ""
    title, common = plots.shorten(path.name, 60) + plots.shorten(said, 80), args.scale == "row"
    caption, mark = (
        look.caption(photo, looks, args.method, heads=args.heads, common=common),
        look.mark(photo, looks[-1].model),
    )
    wait = draw(
        plots.draw_attention, figure, photo.panel, layout, title, caption, common=common, mark=mark
    )
    answer = {
        "photo": str(path),
        **look.summary(looks[-1], args.top_k, args.method),
        "figure": str(figure),
    }
    answer |= {"layers": list(blocks), "method": args.method}
    if args.html:
        answer["html"] = str(figure.with_suffix(".html"))
        panes = [look.pane(photo, a, args.top_k) for a in looks]
        report.write_report(figure.with_suffix(".html"), panes, photo.picture, path.name)
    if args.npz:
        answer["npz"] = str(figure.with_suffix(".npz"))
        look.write_arrays(figure.with_suffix(".npz"), photo, looks, args.method)
    if len(looks) > 1:
        answer["compare"] = look.summary(looks[0], args.top_k, args.method)
    return wait, answer


def finish(wait: Callable[[], None], answer: dict, args: argparse.Namespace, progress) -> None:
    """Print a photo's answer once its figure is there."""
    wait()
    progress.update()
    lines = [answer["photo"]]
    for summary in (answer["compare"], answer) if args.compare else (answer,):
        lines += [summary["model"]] if args.compare else []
        lines += [
            f"{named['probability']:.3f}  {named['label']}" for named in summary["predictions"]
        ]
    lines += [answer[kind] for kind in ("figure", "html", "npz") if kind in answer]
    for line in [json.dumps(answer)] if args.json else lines:
        say(line, sys.stdout)


def progress_bar(num_photos: int):
    from tqdm import tqdm

    return tqdm(
        total=num_photos,
        desc="photos",
        unit="photo",
        leave=False,
        disable=True if num_photos < 2 else None,
    )


def say(text: object, stream) -> None:
    """Print one line to a stream, above the progress bar."""
    from tqdm import tqdm

    with tqdm.external_write_mode(file=stream):
        print(cli.printable(text), file=stream, flush=True)


def expand(arguments: Iterable[str]) -> Iterator[Path]:
    """Yield the photos that are meant: a folder stands for those right inside it, and must have some."""
    from .data.photos import SUFFIXES, list_photos
    from .errors import UserError

    for path in map(Path, arguments):
        try:
            found = list_photos(path)
        except OSError:  # not a folder; if it is no photo either, open_photo says why
            found = [path]
        if not found:
            raise UserError(
                f"{path}: no photos in this folder; expected files ending in {', '.join(SUFFIXES)}"
            )
        yield from found


def place(photos: Iterable[Path], out: Path) -> Iterator[tuple[Path, Path]]:
    """Yield each photo with where to draw it, over no photo and no other figure: cat.png, cat-2.png, ..."""
    photos = list(photos)
    taken = {os.path.realpath(path) for path in photos}
    for path in photos:
        stem = path.stem
        while len(os.fsencode(stem)) > 240:  # of the 255 bytes that a name can have
            stem = stem[:-1]
        figure = out / f"{stem}.png"
        for i in itertools.count(2):
            if os.path.realpath(figure) not in taken:
                break
            figure = out / f"{stem}-{i}.png"
        taken.add(os.path.realpath(figure))
        yield path, figure


def command() -> NoReturn:
    """Run as a script: infer.py, and minivit-infer where it is installed."""
    cli.start(main)
