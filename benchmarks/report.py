"""Write the tables of docs/benchmarks.md and README.md from results.jsonl.

    python benchmarks/report.py [--check]

A table stands between two comments, of which the first names it: <!-- results: NAME -->. Its
figures are those of one workload on one machine. Each figure is taken from the newest row that has
it, and of several of one day from the row with the most runs. Of rows with one command only those
of the newest commit count; several of one commit and one set of versions count as runs of one
measurement. The line under a table says where its figures come from, newest first. --check writes
nothing, and exits with 1 if a table or docs/scaling.png differs from the data.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import recipe_tables
import workloads
from results import ROOT, Figure, Row, number_of_runs, read_rows, rounded, runs_of

PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
PLOT = ROOT / "docs" / "scaling.png"
BEGIN = "<!-- results: {} -->\n"
END = "<!-- end of results -->"
TABLE = re.compile(rf"(?s){BEGIN.format('([^>]*)')}(.*?){END}")
SHOWN_VERSIONS = ("torch", "transformers", "timm")  # of those that a row holds
H200 = "NVIDIA H200"
H100 = "NVIDIA H100"
AMX_CORES = "Intel(R) Xeon(R) Processor, AMX, 2 cores"
BF16_CORES = "AMD EPYC, AVX512-BF16, 2 cores"
PLAIN_CORES = "AMD EPYC (Zen 2), 2 cores"
SLOWER_COMMIT = "477e192"  # what phases.py compares with
GPU_JOB = workloads.whole_job("ViT-B/16", 5, 3680, 3669, "photos", "cuda")


@dataclass(frozen=True)
class Cell:
    """The text of a cell in a table, and the row that its number comes from if it has one."""

    text: str
    source: Row | None = None


class Measurement:
    """The rows of one workload on one machine: the newest day first, and in it the most runs."""

    def __init__(self, rows: Iterable[Row], benchmark: str, workload: str, hardware: str) -> None:
        """Select rows. `hardware` begins a machine's name; the machine of the newest row counts."""
        matching = []
        for row in rows:
            is_workload = (row.benchmark, row.workload) == (benchmark, workload)
            if is_workload and row.hardware.startswith(hardware):
                matching.append(row)
        if not matching:
            raise ValueError(f"no row of {benchmark} says {workload!r} on {hardware}")
        matching.sort(key=age)
        self.workload = workload
        rows_of_machine = [row for row in matching if row.hardware == matching[-1].hardware]
        self.rows = sorted(
            newest_of_each_command(rows_of_machine),
            key=lambda row: (row.date, number_of_runs(row), row.line),
            reverse=True,
        )

    def figure(self, name: str) -> tuple[Figure, Row]:
        """Return a figure, and the first row that has it."""
        for row in self.rows:
            if name in row.figures:
                return row.figures[name], row
        raise ValueError(f"no row has a figure {name!r} of {self.workload!r}")

    def cell(self, name: str, style: str = "", *, spread: bool = False) -> Cell:
        """Return a figure's median, and on demand its least and greatest value, as a cell.

        `style` is that of format(). Without it, three significant digits are shown.
        """
        figure, source = self.figure(name)
        text = as_text(figure.median, style)
        if spread and figure.min is not None:
            text += f" ({as_text(figure.min, style)} to {as_text(figure.max, style)})"
        return Cell(text, source)


def as_text(value: float, style: str = "") -> str:
    if style:
        return format(value, style)
    value = float(f"{value:.3g}")
    return f"{int(value):,}" if value.is_integer() else f"{value:,}"


def age(row: Row) -> tuple[str, int]:
    """Return what sorts rows from the oldest to the newest: of one day, the later line is newer."""
    return row.date, row.line


def newest_of_each_command(rows: Sequence[Row]) -> list[Row]:
    """Return one row for each command, newest first: the newest, with others of its commit."""
    by_command: dict[str, list[Row]] = {}
    for row in reversed(rows):
        same_command = by_command.setdefault(row.command, [row])
        newest = same_command[0]
        is_another_run = (row.commit, row.versions) == (newest.commit, newest.versions)
        if is_another_run and row is not newest:
            same_command.append(row)
    return [merged(same_command) for same_command in by_command.values()]


def merged(rows: Sequence[Row]) -> Row:
    """Return one row for several of one command and commit: each figure is over all their runs."""
    if len(rows) == 1:
        return rows[0]
    figures: dict[str, Figure] = {}
    for name in rows[-1].figures:
        parts = [row.figures[name] for row in rows if name in row.figures]
        lows = [part.median if part.runs == 1 else part.min for part in parts]
        highs = [part.median if part.runs == 1 else part.max for part in parts]
        is_spread_known = None not in lows
        figures[name] = Figure(
            unit=parts[0].unit,
            runs=sum(part.runs for part in parts),
            median=rounded(statistics.median(part.median for part in parts)),
            min=min(lows) if is_spread_known else None,
            max=max(highs) if is_spread_known else None,
        )
    return dataclasses.replace(rows[0], figures=figures)


def table(head: Sequence[str], lines: Sequence[Sequence[Cell]]) -> str:
    """Return a table in Markdown, and under it the line that says how it was measured."""
    text = [markdown_line(head), "|" + "---|" * len(head)]
    text += [markdown_line([cell.text for cell in line]) for line in lines]
    return "\n".join([*text, "", provenance(lines)])


def markdown_line(cells: Sequence[str]) -> str:
    return re.sub(r" +", " ", f"| {' | '.join(cells)} |")


def provenance(lines: Sequence[Sequence[Cell]]) -> str:
    """Say in one line how the figures of a table were measured, and which if rows differ."""
    sources: list[Row] = []
    numbers: dict[int, list[str]] = {}  # of the table's rows, by the source's line in the file
    for number, line in enumerate(lines, start=1):
        for source in unique([cell.source for cell in line if cell.source is not None]):
            sources.append(source)
            numbers.setdefault(source.line, []).append(str(number))
    newest_first = sorted(unique(sources), key=age, reverse=True)
    machines = {row.hardware for row in newest_first}
    text = "Measured"
    if len(machines) == 1:
        text += f" on {newest_first[0].hardware}"
    same_conditions = len(machines) == len({conditions(row) for row in newest_first}) == 1
    if same_conditions:
        text += f", {conditions(newest_first[0])}"
    parts = []
    for row in newest_first:
        part = f"`{row.command}`"
        if not same_conditions:
            part = f"{conditions(row)}, {part}"
        if len(machines) > 1:
            part = f"{row.hardware}, {part}"
        if row.note:
            part += f" ({row.note})"
        if len(newest_first) > 1 and len(numbers[row.line]) < len(lines):
            rows = "row" if len(numbers[row.line]) == 1 else "rows"
            part = f"{rows} {', '.join(numbers[row.line])}: {part}"
        parts.append(part)
    parts = list(dict.fromkeys(parts))  # Two rows of one table's line may have one origin.
    return f"<sub>{text}: {'; '.join(parts)}.</sub>"


def conditions(row: Row) -> str:
    """Return versions, date, number of runs and commit of a row."""
    parts = [f"{name} {row.versions[name]}" for name in SHOWN_VERSIONS if name in row.versions]
    return ", ".join([*parts, row.date, runs_of(row), f"commit {row.commit}"])


def unique(rows: Sequence[Row]) -> list[Row]:
    """Return each row once; a row is known by its line in results.jsonl."""
    return list({row.line: row for row in rows}.values())


def table_of_variants(
    runs: Measurement, labels: Mapping[str, str], columns: Mapping[str, str], *, against: str = ""
) -> str:
    """Return a table of finetune.py's variants: the time, and other columns by their style.

    With `against`, a variant of train.py, a column says how many times its time another one took.
    Both are of the same row of the data, because another day or machine may be faster; rows without
    both have no ratio.
    """
    head = ["", "seconds"]
    if against:
        head.append("against `train.py`")
    head += columns
    lines = []
    for name, label in labels.items():
        line = [Cell(label), runs.cell(f"{name}, time", ".1f", spread=True)]
        if against:
            theirs, source = runs.figure(f"{name}, time")
            ours = source.figures.get(f"{against}, time")
            text = "" if ours is None else f"{theirs.median / ours.median:.1f} times"
            line.append(Cell(text))
        for column, style in columns.items():
            line.append(runs.cell(f"{name}, {QUANTITIES[column]}", style))
        lines.append(line)
    return table(head, lines)


QUANTITIES = {"device GiB": "device memory", "host MiB": "host memory"}


def job_in_short(rows: Sequence[Row]) -> str:
    labels = {
        "transformers": "transformers' Trainer as its users write it",
        "minivit-cold": "`train.py`, photos still to be decoded",
        "minivit": "`train.py`, photos decoded by an earlier run",
    }
    runs = Measurement(rows, "finetune", GPU_JOB, H200)
    return table_of_variants(runs, labels, {"device GiB": ".2f"})


def job_on_a_gpu(rows: Sequence[Row]) -> str:
    names = ["transformers", "transformers-bf16", "transformers-tuned", "transformers-tuned-256"]
    names += ["transformers-even", "minivit-cold", "minivit", "minivit-views1"]
    labels = {name: workloads.VARIANTS[name] for name in names}
    runs = Measurement(rows, "finetune", GPU_JOB, H200)
    columns = {"device GiB": ".2f", "host MiB": ",.0f"}
    return table_of_variants(runs, labels, columns, against="minivit-cold")


def phases_of_a_run(rows: Sequence[Row]) -> str:
    """Return the seconds of each stage of a first and a second run, before and now."""
    columns: dict[str, Row] = {}
    for run, cold in (("first run", True), ("second run", False)):
        workload = workloads.phases("cuda", cold=cold)
        of_gpu = [row for row in rows if row.hardware.startswith(H200)]
        of_workload = sorted((row for row in of_gpu if row.workload == workload), key=age)
        before = [row for row in of_workload if row.commit == SLOWER_COMMIT]
        now = [row for row in of_workload if row.commit != SLOWER_COMMIT]
        for row in (before[-1], now[-1]):
            columns[f"{run}, commit {row.commit}"] = row
    lines = []
    for stage in now[-1].figures:
        cells = [Cell(as_text(row.figures[stage].median, ".1f"), row) for row in columns.values()]
        lines.append([Cell(stage), *cells])
    return table(["seconds", *columns], lines)


def job_on_cores_with_amx(rows: Sequence[Row]) -> str:
    names = ["transformers", "transformers-bf16", "transformers-tuned", "transformers-even"]
    names += ["minivit-cold"]
    labels = {name: workloads.VARIANTS[name] for name in names}
    workload = workloads.whole_job("ViT-B/16", 5, 40, 40, "photos", "cpu")
    runs = Measurement(rows, "finetune", workload, AMX_CORES)
    return table_of_variants(runs, labels, {}, against="minivit-cold")


def job_on_cores_with_bf16(rows: Sequence[Row]) -> str:
    names = ["transformers", "transformers-tuned", "transformers-even", "minivit-cold"]
    labels = {name: workloads.VARIANTS[name] for name in names}
    workload = workloads.whole_job("ViT-B/16", 5, 40, 40, "photos", "cpu")
    runs = Measurement(rows, "finetune", workload, BF16_CORES)
    return table_of_variants(runs, labels, {}, against="minivit-cold")


def job_on_cores_in_float32(rows: Sequence[Row]) -> str:
    workload = workloads.whole_job("ViT-B/16", 5, 40, 40, "photos", "cpu")
    ours = "minivit-float32-cold, time"
    theirs = "transformers-tuned-float32, time"
    lines = []
    for cores in (BF16_CORES, AMX_CORES):
        runs = Measurement(rows, "finetune", workload, cores)
        slower, source = runs.figure(theirs)
        ratio = Cell(f"{slower.median / source.figures[ours].median:.1f} times", source)
        seconds = [runs.cell(name, ".1f", spread=True) for name in (theirs, ours)]
        lines.append([Cell(cores.removesuffix(", 2 cores")), *seconds, ratio])
    head = ["two cores of", "Trainer tuned, batch 64, float32", "`train.py --amp off`", "ratio"]
    return table(head, lines)


def job_on_a_gpu_with_two_cores(rows: Sequence[Row]) -> str:
    names = ["transformers-fp16", "minivit-fp16-cold", "minivit-fp16"]
    labels = {name: workloads.VARIANTS[name] for name in names}
    workload = workloads.whole_job("ViT-B/16", 5, 740, 740, "photos", "cuda")
    runs = Measurement(rows, "finetune", workload, f"{H200}, 2 cores")
    return table_of_variants(runs, labels, {}, against="minivit-fp16-cold")


def job_on_cores_without_amx(rows: Sequence[Row]) -> str:
    names = ["transformers", "transformers-even", "minivit-cold", "minivit-views1"]
    labels = {name: workloads.VARIANTS[name] for name in names}
    workload = workloads.whole_job("ViT-B/16", 5, 20, 20, "drawn photos", "cpu")
    runs = Measurement(rows, "finetune", workload, PLAIN_CORES)
    return table_of_variants(runs, labels, {}, against="minivit-cold")


def images_a_second(rows: Sequence[Row]) -> str:
    labels = {
        "minivit train": "`train.py`'s loop, photos from host memory, augmented on the device",
        "timm step": "a step of timm's model, on one batch that lies on the device",
        "transformers step": "a step of transformers' model, likewise",
        "minivit kept": "`train.py`'s loop from kept views (`--cache-views`)",
        "minivit eval": "`train.py`'s evaluation",
        "timm forward, weights in low precision": "a forward pass of timm's model, weights in bf16",
        "transformers forward, weights in low precision": "a forward pass of transformers' model, "
        "weights in bf16",
    }
    cases = {
        "batch 64": "batch 64, bfloat16",
        "batch 64, compiled": "batch 64, bfloat16, compiled",
        "batch 256": "batch 256, bfloat16",
        "batch 256, compiled": "batch 256, bfloat16, compiled",
    }
    runs = Measurement(rows, "throughput", workloads.steady_speed("ViT-B/16", 5120, "cuda"), H100)
    lines = []
    for name, label in labels.items():
        cells = [runs.cell(f"{name}, {case}, speed", ",.0f") for case in cases.values()]
        lines.append([Cell(label), *cells])
    return table(["bf16", *cases], lines)


def epochs(rows: Sequence[Row]) -> Measurement:
    workload = workloads.epoch_cost("ViT-B/16", "bfloat16", 64, "cuda")
    return Measurement(rows, "scaling", workload, H100)


@dataclass(frozen=True)
class EpochCurves:
    """Seconds an epoch by what is kept: against the number of photos, and of trained blocks."""

    by_photos: Mapping[str, Mapping[int, float]]
    by_blocks: Mapping[str, Mapping[int, float]]
    blocks: int  # that train while the number of photos varies
    photos: int  # in an epoch while the number of blocks varies


def epoch_curves(runs: Measurement) -> EpochCurves:
    """Return the curves that the newest row of scaling.py holds."""
    cases: dict[tuple[int, int, str], float] = {}
    for name, figure in runs.rows[0].figures.items():
        match = re.fullmatch(r"(\d+) photos, (\d+) blocks, (.*), time", name)
        if match is not None:
            cases[int(match[1]), int(match[2]), match[3]] = figure.median
    photos = statistics.mode(case[0] for case in cases)
    blocks = statistics.mode(case[1] for case in cases)
    by_photos: dict[str, dict[int, float]] = {}
    by_blocks: dict[str, dict[int, float]] = {}
    for (n, number, kept), seconds in sorted(cases.items()):
        if number == blocks:
            by_photos.setdefault(kept, {})[n] = seconds
        if n == photos:
            by_blocks.setdefault(kept, {})[number] = seconds
    return EpochCurves(by_photos, by_blocks, blocks, photos)


def digest_of_epochs(runs: Measurement) -> str:
    """Return a digest of all that scaling.png shows; the picture holds it in a text field."""
    row = runs.rows[0]
    names = sorted(name for name in row.figures if name.endswith("time") or "line" in name)
    shown = [f"{name}: {row.figures[name].median}" for name in names]
    return hashlib.sha256("\n".join([row.hardware, *shown]).encode()).hexdigest()


def epochs_picture(rows: Sequence[Row]) -> str:
    runs = epochs(rows)
    curves = epoch_curves(runs)
    sizes = list(curves.by_photos[workloads.KEPT_NOTHING])
    by_blocks = curves.by_blocks[workloads.KEPT_NOTHING]
    start, _ = runs.figure("line, time without photos")
    slope, _ = runs.figure("line, time for a photo")
    return (
        f"![Left, seconds an epoch against {sizes[0]:,} to {sizes[-1]:,} photos on logarithmic "
        f"axes: a straight line of {start.median:g} s and {slope.median:g} ms a photo. Right, "
        f"seconds an epoch against {min(by_blocks)} to {max(by_blocks)} trained blocks, from "
        f"{min(by_blocks.values()):.2g} to {max(by_blocks.values()):.3g} s. Where features are "
        "kept, both are lower for few photos and few blocks.](scaling.png)"
    )


def epochs_by_photos(rows: Sequence[Row]) -> str:
    runs = epochs(rows)
    curves = epoch_curves(runs)
    numbers = list(curves.by_photos[workloads.KEPT_NOTHING])
    cases = [(n, curves.blocks) for n in numbers]
    head = [f"seconds an epoch, {curves.blocks} trained blocks"]
    head += [f"{n:,} photos" for n in numbers]
    return table_of_epochs(runs, head, cases)


def epochs_by_blocks(rows: Sequence[Row]) -> str:
    runs = epochs(rows)
    curves = epoch_curves(runs)
    numbers = list(curves.by_blocks[workloads.KEPT_NOTHING])
    cases = [(curves.photos, number) for number in numbers]
    head = [f"seconds an epoch, {curves.photos:,} photos"]
    head += [f"trained blocks: {number}" for number in numbers]
    return table_of_epochs(runs, head, cases)


def table_of_epochs(
    runs: Measurement, head: Sequence[str], cases: Sequence[tuple[int, int]]
) -> str:
    labels = {
        workloads.KEPT_NOTHING: "nothing kept",
        workloads.KEPT_4_GIB: "up to 4 GiB of features kept (`--cache-gib`)",
    }
    lines = []
    for kept, label in labels.items():
        names = [workloads.epoch_name(n, number, kept) for n, number in cases]
        lines.append([Cell(label), *[runs.cell(f"{name}, time") for name in names]])
    return table(head, lines)


def one_photo(rows: Sequence[Row]) -> str:
    labels = {"infer.py": "`infer.py`", "transformers": "the same with transformers"}
    runs = Measurement(rows, "one_photo", workloads.one_photo("ViT-B/16", "cpu"), "AMD EPYC")
    lines = []
    for name, label in labels.items():
        seconds = runs.cell(f"{name}, time", spread=True)
        memory = runs.cell(f"{name}, host memory", ",.0f")
        lines.append([Cell(label), seconds, memory])
    return table(["one photo to a figure", "seconds", "host MiB"], lines)


def many_photos(rows: Sequence[Row]) -> str:
    runs = Measurement(rows, "one_photo", workloads.many_photos("ViT-B/16", "cpu"), "AMD EPYC")
    line = [
        runs.cell("infer.py, photos", ",.0f"),
        runs.cell("infer.py, speed"),
        runs.cell("infer.py, time to the first figure"),
        runs.cell("infer.py, host memory", ",.0f"),
    ]
    head = ["photos in a folder", "photos a second", "seconds to the first figure", "host MiB"]
    return table(head, [line])


def attention_cost(rows: Sequence[Row]) -> str:
    gpu = Measurement(rows, "attention_cost", workloads.attention_cost(64, "cuda"), H100)
    cores = Measurement(rows, "attention_cost", workloads.attention_cost(64, "cpu"), "AMD EPYC")
    cases = {
        "one H100, bf16": (gpu, "bfloat16"),
        "one H100, float32": (gpu, "float32"),
        "two cores, float32": (cores, "float32"),
    }
    lines = []
    for label, (runs, precision) in cases.items():
        name = f"{precision}, class token's rows, time against logits alone"
        lines.append([Cell(label), runs.cell(name, ".2f")])
    head = ["class token's rows of blocks 8-11 beside the logits", "times the logits alone"]
    return table(head, lines)


def accuracy(rows: Sequence[Row]) -> str:
    """Return the table of test accuracies: means and standard deviations over the seeds."""
    before = "--epochs 15 --batch-size 32"
    lines = []
    for flags, version in ((before, "before"), ("", "now")):
        for blocks in ("none", "11", "10-11", "8-11"):
            for setting in ("float32", "bf16"):
                name = f"blocks {blocks}, {setting}"
                cells = [mean_over_seeds(rows, data, flags, name) for data in ("pets3", "pets37")]
                if any(cell.text for cell in cells):
                    lines.append([Cell(version), Cell(blocks), Cell(setting), *cells])
    head = ["", "`--blocks`", "precision", "3 breeds, 298 test photos", "37 breeds, 74 test photos"]
    return table(head, lines)


def mean_over_seeds(rows: Sequence[Row], data: str, flags: str, name: str) -> Cell:
    """Return the mean and standard deviation of a test accuracy over all seeds, in per cent."""
    runs = Measurement(rows, "accuracy", workloads.accuracy("dino", data, flags), H100)
    values = [value for row in runs.rows for value in accuracies(row, name)]
    return Cell(mean_and_deviation(values), runs.rows[0]) if values else Cell("")


def accuracies(row: Row, name: str) -> list[float]:
    """Return the test accuracy of each seed in a row of accuracy.py, in per cent."""
    values = []
    for figure_name, figure in row.figures.items():
        if figure_name.startswith(f"{name}, seed "):
            values.append(100 * figure.median)
    return values


def mean_and_deviation(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def accuracy_before_and_after(rows: Sequence[Row]) -> str:
    """Return the table of test accuracies before and after the changes that phases.py shows."""
    rows_by_data: dict[str, list[Row]] = {}
    for data in ("pets3", "pets37"):
        workload = workloads.accuracy("dino", data, "")
        of_workload = [row for row in rows if row.workload == workload]
        rows_by_data[data] = [row for row in of_workload if row.hardware.startswith(H200)]
    newest = max((row for row in rows_by_data["pets3"] if row.commit != SLOWER_COMMIT), key=age)
    lines = []
    for setting in ("float32", "bf16"):
        for commit in (SLOWER_COMMIT, newest.commit):
            cells = []
            for rows_of_data in rows_by_data.values():
                row = max((row for row in rows_of_data if row.commit == commit), key=age)
                values = accuracies(row, f"blocks 10-11, {setting}")
                cells.append(Cell(mean_and_deviation(values), row))
            lines.append([Cell(commit), Cell(setting), *cells])
    head = ["commit", "precision", "3 breeds, 298 test photos", "37 breeds, 74 test photos"]
    return table(head, lines)


def demo(rows: Sequence[Row]) -> str:
    runs = Measurement(rows, "demo", workloads.DEMO, "AMD EPYC")
    line = [
        runs.cell("test accuracy", ".3f"),
        runs.cell("block 11 before, attention on the animal", ".2f"),
        runs.cell("block 11 after, attention on the animal", ".2f"),
        runs.cell("time"),
    ]
    head = ["accuracy on 150 test drawings", "times chance in block 11, before", "after", "seconds"]
    return table(head, [line])


def folder_on_a_gpu(rows: Sequence[Row], cores: int) -> Measurement:
    workload = workloads.many_photos("ViT-B/16", "cuda")
    return Measurement(rows, "one_photo", workload, f"{H200}, {cores} cores")


def figures_on_a_gpu(rows: Sequence[Row]) -> str:
    lines = []
    for cores in (16, 2):
        runs = folder_on_a_gpu(rows, cores)
        photos = runs.cell("infer.py, photos", ",.0f")
        speed = runs.cell("infer.py, speed", ",.0f")
        first = runs.cell("infer.py, time to the first figure", ".1f")
        lines.append([Cell(str(cores)), photos, speed, first])
    return table(["cores", "photos", "figures a second", "seconds to the first"], lines)


def names_on_a_gpu(rows: Sequence[Row]) -> str:
    """Return the table of names without figures, and of decoding alone."""
    lines = []
    for cores in (16, 2):
        runs = folder_on_a_gpu(rows, cores)
        name = "infer.py --no-figures"
        photos = runs.cell(f"{name}, photos", ",.0f")
        start = runs.cell(f"{name}, time of one photo", ".1f", spread=True)
        speed = runs.cell(f"{name}, speed after the first photo", ",.0f", spread=True)
        decoding = runs.cell("decoding in threads, speed", ",.0f")
        lines.append([Cell(str(cores)), photos, start, speed, decoding])
    head = ["cores", "photos", "seconds for one photo's names", "names a second from then on"]
    return table([*head, "decoded a second in threads"], lines)


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "the whole job in short": job_in_short,
    "the whole job on a GPU": job_on_a_gpu,
    "where the seconds of a run go": phases_of_a_run,
    "images a second": images_a_second,
    "what an epoch costs, as a picture": epochs_picture,
    "what an epoch costs by photos": epochs_by_photos,
    "what an epoch costs by trained blocks": epochs_by_blocks,
    "the whole job on two cores with AMX": job_on_cores_with_amx,
    "the whole job on two cores with AVX512-BF16": job_on_cores_with_bf16,
    "the whole job on two cores in float32": job_on_cores_in_float32,
    "the whole job on a GPU with two cores": job_on_a_gpu_with_two_cores,
    "the whole job on two cores without AMX": job_on_cores_without_amx,
    "one photo": one_photo,
    "a folder of photos": many_photos,
    "a folder of photos on a GPU": figures_on_a_gpu,
    "names of a folder on a GPU": names_on_a_gpu,
    "attention beside the logits": attention_cost,
    "accuracy on real photos": accuracy,
    "accuracy before and after": accuracy_before_and_after,
    "which epoch to keep": lambda _: recipe_tables.rules(),
    "training settings": lambda _: recipe_tables.settings(),
    "the demo": demo,
}


def updated(text: str, rows: Sequence[Row]) -> str:
    """Return a page with its tables made anew."""
    for name, _ in TABLE.findall(text):
        begin = BEGIN.format(name)
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(END)
        text = f"{before}{begin}\n{TABLES[name](rows)}\n\n{END}{after}"
    return text


def differing_tables(text: str, rows: Sequence[Row]) -> list[str]:
    """Return the names of a page's tables that differ from the data."""
    return [name for name, shown in TABLE.findall(text) if shown != f"\n{TABLES[name](rows)}\n\n"]


def is_plot_current(rows: Sequence[Row], plot: Path = PLOT) -> bool:
    """Say whether the picture of the epochs was drawn from the newest row."""
    from PIL import Image

    with Image.open(plot) as image:
        return image.info.get("Comment") == digest_of_epochs(epochs(rows))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, say what differs")
    args = parser.parse_args()
    try:
        rows = read_rows()
    except ValueError as error:
        sys.exit(f"{error}")
    differences = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        names = differing_tables(text, rows)
        differences += [f"{page.name}, table {name!r}" for name in names]
        if not args.check:
            page.write_text(updated(text, rows), encoding="utf-8")
    for difference in differences:
        print(f"{difference}: {'differs from results.jsonl' if args.check else 'written'}")
    if not is_plot_current(rows):
        print(
            "docs/scaling.png: drawn from other rows; python benchmarks/figures.py --only scaling"
        )
        return 1
    if args.check and differences:
        print("run python benchmarks/report.py, or correct results.jsonl")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
