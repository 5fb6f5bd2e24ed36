"""The inference job: for each photo, the likeliest names and a figure of where the model looks.

What a model makes of a photo is in look.py; how attention becomes a map is in attention.py.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

from . import look
from .attention import METHODS
from .checkpoints.weights import load_pretrained
from .cli import default_model, parse_blocks
from .data.jobs import Job
from .data.photos import PhotoError
from .data.prepared import LARGE, SMALL, Needs, read_photo, read_photos
from .errors import UserError, printable
from .figures import fonts, panels
from .figures.pages import write_page
from .look import Explanation, Photo, Target
from .model import ViT, working_copy
from .settings import InferSettings, flag
from .system import device as devices
from .system import distributed
from .system.launch import launched_rank
from .system.progress import progress_bar
from .system.workers import InlineExecutor, map_ahead, read_ahead
from .training.reference import find_reference

GPU_BATCH = 32
NAMES_GPU_BATCH = 128  # where there are no figures, of which the first should come soon
# Photos that a worker process sends in one message, at most. Each message takes this process some
# time, however little it holds.
READ_TOGETHER = 8
# Memory for attention in a batch, where all rows of it are kept.
MAX_ROWS_GIB = 0.5


@dataclass(frozen=True)
class Plan:
    """What is done with every photo."""

    models: Sequence[ViT]  # the model to compare with comes first, if there is one
    targets: Sequence[Target | None]  # each model's, for relevance; None: its first prediction
    blocks: Sequence[int]
    methods: Sequence[str]

    @property
    def device(self) -> torch.device:
        return self.models[0].cls_token.device


@dataclass(frozen=True)
class Answer:
    """The answer to one photo, as JSON, and the figure that is being drawn for it, if any."""

    json: dict
    figure: Future[str] | None = None  # the characters that it cannot show


@devices.own_defaults()
def infer(settings: InferSettings, jobs: Sequence[Job], pool: Executor) -> int:
    """Name the photos of these jobs and draw their figures; return how many cannot be read.

    data/jobs.py lists the jobs and starts the workers of the pool, before torch is imported.
    """
    # torchrun's processes share the photos out, which is right only if all of them are there.
    distributed.join_others()
    with devices.few_threads():
        plan = make_plan(settings)
    if not settings.no_figures:
        Path(settings.out).mkdir(parents=True, exist_ok=True)
    # A single photo needs no bar.
    progress_of_photos = progress_bar(
        total=len(jobs), desc="photos", unit="photo", hidden=len(jobs) < 2
    )
    num_unreadable = 0
    pending: deque[Answer] = deque()
    with devices.current(plan.device), progress_of_photos as progress:
        for job, photo, explanations in explain_all(jobs, plan, settings, pool):
            if isinstance(photo, UserError):
                report_unreadable(job, photo)
                num_unreadable += 1
                progress.update()
                distributed.report_progress()
                continue
            pending.append(answer_photo(settings, plan, job, photo, explanations, pool))
            if len(pending) > 2 * settings.workers:
                finish(pending.popleft(), settings, progress)
        while pending:
            finish(pending.popleft(), settings, progress)
    return num_unreadable


def make_plan(settings: InferSettings) -> Plan:
    """Load the models and decide what is done with every photo."""
    device = devices.pick_device(distributed.local_device(settings.device))
    amp = devices.pick_amp(settings.amp, device)
    models = [working_copy(model, device, amp, train=False) for model in load_models(settings)]
    return plan_for(models, settings)


def plan_for(models: Sequence[ViT], settings: InferSettings) -> Plan:
    """Decide what these models do with every photo; the one to compare with comes first."""
    if settings.no_figures:
        check_names_only(settings, models)
        return Plan(models, [None] * len(models), [], [])
    targets = [find_target(settings, model, models) for model in models]
    blocks = parse_blocks(settings.layers, min(model.config.depth for model in models))
    check_settings(settings, models, blocks)
    # The page offers all methods that are possible.
    methods = possible_methods(models) if settings.html else [settings.method]
    return Plan(models, targets, blocks, methods)


def explain_all(
    jobs: Sequence[Job], plan: Plan, settings: InferSettings, pool: Executor
) -> Iterator[tuple[Job, Photo | UserError, Sequence[Explanation]]]:
    """Yield for each job its photo and each model's explanation, computed batch by batch.

    A photo that cannot be read is replaced by the error, without explanations.
    """
    panel = None
    if not settings.no_figures:
        panel = SMALL if settings.heads else LARGE
    needs = look.needs_of(plan.models, settings.query, panel=panel, page=settings.html)
    batch_size = choose_batch_size(settings, plan)
    photos = read_all(jobs, needs, pool, settings.workers, batch_size=batch_size)
    for start in range(0, len(jobs), batch_size):
        batch = list(itertools.islice(photos, batch_size))
        readable = [photo for photo in batch if isinstance(photo, Photo)]
        explanations = iter(explain_batch(readable, plan, all_rows=settings.html))
        for job, photo in zip(jobs[start:], batch):
            if isinstance(photo, Photo):
                yield job, photo, next(explanations)
            else:
                yield job, photo, ()


def read_all(
    jobs: Sequence[Job], needs: Needs, pool: Executor, workers: int, *, batch_size: int
) -> Iterator[Photo | UserError]:
    """Yield each job's photo in order, read in the pool's processes; if it has none, in threads.

    Up to a batch of them waits to be taken, and some more for each worker. Of a batch, and of few
    photos, each process reads an equal part.
    """
    if isinstance(pool, InlineExecutor):
        yield from read_ahead(lambda job: read_photo(job.photo, needs), jobs, workers)
        return
    part_of_worker = math.ceil(min(batch_size, len(jobs)) / workers)
    num_together = max(1, min(READ_TOGETHER, part_of_worker))
    parts = []
    for start in range(0, len(jobs), num_together):
        part = jobs[start : start + num_together]
        parts.append(([job.photo for job in part], needs))
    ahead = math.ceil(batch_size / num_together) + workers
    for photos in map_ahead(pool, read_photos, parts, ahead=ahead):
        yield from photos


def explain_batch(
    photos: Sequence[Photo], plan: Plan, *, all_rows: bool
) -> list[tuple[Explanation, ...]]:
    """Return for each photo the explanation of each model."""
    if not photos:
        return []
    by_model = [
        look.explain_photos(
            model,
            photos,
            index,
            plan.blocks,
            methods=plan.methods,
            all_rows=all_rows,
            target=plan.targets[index],
        )
        for index, model in enumerate(plan.models)
    ]
    return list(zip(*by_model))


def finish(answer: Answer, settings: InferSettings, progress: tqdm) -> None:
    """Wait for a photo's figure, if it gets one, and print its answer."""
    if answer.figure is not None:
        fonts.report_lacking(answer.figure.result())
    progress.update()
    distributed.report_progress()
    report(answer.json, settings)


def load_models(settings: InferSettings) -> list[ViT]:
    """Load the models: first the one to compare with, if there is one, as it is drawn on top.

    Under torchrun, each process loads them, but only rank 0 says which model it takes.
    """
    source = default_model(settings.model)
    if launched_rank() == 0:
        say(f"model: {source}", sys.stderr)
    models = []
    if settings.compare:
        models.append(load_pretrained(settings.compare, img_size=settings.img_size))
    models.append(load_pretrained(source, revision=settings.revision, img_size=settings.img_size))
    for model in models:
        model.reference = find_reference(model)
        if not model.labels:
            say(f"{model.origin.source} has no classifier: attention only", sys.stderr)
    return models


def check_settings(settings: InferSettings, models: Sequence[ViT], blocks: Sequence[int]) -> None:
    """Raise UserError for settings that would mean nothing, or that the models cannot do."""
    method = settings.method
    without_classifier = [model.origin.source for model in models if not model.labels]
    if not blocks:
        raise UserError(f"--layers {settings.layers}: no block to draw; expected a range as 8-11")
    if settings.heads and method != "attention":
        raise UserError(f"--method {method} has no heads to draw; leave --heads away")
    if settings.query and method == "relevance":
        raise UserError("--method relevance is for the class token; leave --query away")
    if settings.target and method != "relevance" and not settings.html:
        raise UserError("--target is for --method relevance or --html")
    if settings.against and (method != "relevance" or settings.target is None):
        raise UserError(
            "--against is for --method relevance with --target: what speaks for the target rather "
            "than for this class"
        )
    if without_classifier and method == "relevance":
        raise UserError(
            f"{' and '.join(without_classifier)} has no classifier, so nothing speaks for a "
            "class; use --method rollout"
        )
    geometries = [
        (model.config.grid, model.preprocess.resize, model.preprocess.crop) for model in models
    ]
    if len(set(geometries)) > 1:
        raise UserError(
            "--compare: expected two models that see a photo in the same patches, found "
            f"(grid, resize, crop) {' and '.join(map(str, geometries))}"
        )


def check_names_only(settings: InferSettings, models: Sequence[ViT]) -> None:
    """Raise UserError for settings that mean nothing without figures, and without a classifier."""
    defaults = InferSettings(photos=())
    for name in ("layers", "method", "target", "against", "heads", "query", "scale", "html", "npz"):
        if getattr(settings, name) != getattr(defaults, name):
            raise UserError(f"--no-figures prints names only; leave {flag(name)} away")
    for model in models:
        if not model.labels:
            raise UserError(
                f"{model.origin.source} has no classifier, so there are no names; "
                "leave --no-figures away"
            )


def possible_methods(models: Sequence[ViT]) -> list[str]:
    """Return all methods, without relevance if a model has no classifier."""
    all_have_classifiers = all(model.labels for model in models)
    return [method for method in METHODS if method != "relevance" or all_have_classifiers]


def find_target(settings: InferSettings, model: ViT, models: Sequence[ViT]) -> Target | None:
    """Return the classes that relevance explains in a model; None for each first prediction.

    If a class is one of another model only, stderr says what is drawn instead. Raises UserError if
    no model has the class, and for a class against itself.
    """
    if settings.target is None:
        return None
    index = find_class("target", settings.target, model, models)
    if index is None:
        say(
            f"{model.origin.source} has no class {settings.target!r}: "
            "relevance there is for its own first prediction",
            sys.stderr,
        )
        return None
    if settings.against is None:
        return Target(index)
    against = find_class("against", settings.against, model, models)
    if against is None:
        say(
            f"{model.origin.source} has no class {settings.against!r}: "
            f"relevance there is for {settings.target!r} alone",
            sys.stderr,
        )
    if against == index:
        raise UserError(f"--against {settings.against!r}: is the class of --target; name another")
    return Target(index, against)


def find_class(setting: str, name: str, model: ViT, models: Sequence[ViT]) -> int | None:
    """Return the index of a model's class of that name; None if only another model has it.

    Raises UserError, which names the flag of the setting, if no model has it.
    """
    indices = {label.lower(): index for index, label in enumerate(model.labels)}
    if name.lower() in indices:
        return indices[name.lower()]
    all_labels = [label for each in models for label in each.labels]
    if name.lower() not in [label.lower() for label in all_labels]:
        close = difflib.get_close_matches(name, all_labels, n=3, cutoff=0)
        names = ", ".join(close) if close else "a model with a classifier"
        raise UserError(
            f"{flag(setting)} {name!r}: no such class; expected one of the model's, as {names}"
        )
    return None


def choose_batch_size(settings: InferSettings, plan: Plan) -> int:
    """Return how many photos go through the models at once.

    On a CPU these are few, so that the first figure is there soon. Where all rows of attention
    are kept, memory limits them.
    """
    model = plan.models[0]
    is_cpu = plan.device.type == "cpu"
    gpu_batch = NAMES_GPU_BATCH if settings.no_figures else GPU_BATCH
    batch_size = devices.CPU_BATCH if is_cpu else gpu_batch
    if settings.method == "attention" and not settings.html:
        return batch_size
    config = model.config
    bytes_per_block = 4 * config.num_heads * config.num_tokens**2
    bytes_per_photo = bytes_per_block * (max(plan.blocks) + 1)
    return max(1, min(batch_size, int(MAX_ROWS_GIB * 2**30 / bytes_per_photo)))


def answer_photo(
    settings: InferSettings,
    plan: Plan,
    job: Job,
    photo: Photo,
    explanations: Sequence[Explanation],
    pool: Executor,
) -> Answer:
    """Start drawing a photo's figure, if it gets one, and return the answer to the photo.

    With settings.html and settings.npz, the explorer's page and the arrays are written beside it.
    """
    method = None if settings.no_figures else settings.method
    answer: dict = {
        "photo": str(job.photo),
        **look.summary(explanations[-1], settings.top_k, method),
        "figure": None if job.figure is None else str(job.figure),
        "layers": list(plan.blocks),
        "method": method,
    }
    if len(explanations) > 1:
        answer["compare"] = look.summary(explanations[0], settings.top_k, method)
    if job.figure is None:
        return Answer(answer)
    figure = look.attention_figure(
        photo,
        explanations,
        settings.method,
        plan.blocks,
        title=job.photo.name,
        heads=settings.heads,
        shared_scale=settings.scale == "row",
    )
    report_dominant_tokens(job.photo, figure.rows, is_compared=len(explanations) > 1)
    drawing = pool.submit(panels.draw_attention, job.figure, figure)
    if settings.html:
        page = job.figure.with_suffix(".html")
        write_page(page, look.explorer_page(photo, explanations, settings.top_k, job.photo.name))
        answer["html"] = str(page)
    if settings.npz:
        arrays = job.figure.with_suffix(".npz")
        look.write_arrays(arrays, photo, explanations, settings.method)
        answer["npz"] = str(arrays)
    return Answer(answer, drawing)


def report_dominant_tokens(path: Path, rows: Sequence[panels.Row], *, is_compared: bool) -> None:
    """Warn on stderr about maps in which one token has most of the attention."""
    dominated = []
    for row in rows:
        of_model = f" of {row.label.splitlines()[0]}" if is_compared else ""
        for panel in row.panels:
            if panel.warn:
                dominated.append(f"{panel.title}{of_model} ({panel.note})")
    if dominated:
        say(f"{path}: one token dominates {', '.join(dominated)}", sys.stderr)


def report_unreadable(job: Job, error: UserError) -> None:
    """Say on stderr why a photo cannot be read."""
    message = str(error)
    if not isinstance(error, PhotoError):  # A PhotoError names the photo already.
        message = f"{job.photo}: {message}"
    say(message, sys.stderr)


def report(answer: dict, settings: InferSettings) -> None:
    """Print a photo's answer, as lines or as one JSON object."""
    if settings.json:
        say(json.dumps(answer), sys.stdout)
        return
    say(str(answer["photo"]), sys.stdout)
    summaries = [answer]
    if settings.compare:
        summaries = [answer["compare"], answer]
    for summary in summaries:
        if settings.compare:
            say(summary["model"], sys.stdout)
        for prediction in summary["predictions"]:
            say(f"{prediction['probability']:.3f}  {prediction['label']}", sys.stdout)
        if summary.get("unlike_training"):
            distance = f"distance {summary['distance']:.3g} over {summary['threshold']:.3g}"
            say(f"{look.UNLIKE} ({distance})", sys.stdout)
    for kind in ("figure", "html", "npz"):
        if answer.get(kind) is not None:
            say(answer[kind], sys.stdout)


def say(text: str, stream: TextIO) -> None:
    """Print one line to a stream, above the progress bar."""
    with tqdm.external_write_mode(file=stream):
        print(printable(text), file=stream, flush=True)
