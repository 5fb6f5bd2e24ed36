"""What all benchmarks share: the file of what they measured, and their flags.

results.jsonl holds one JSON object a line, one for each time that a benchmark ran, oldest first.
`benchmark` names the script and `workload` what was measured, so rows that agree in both can be
compared. `date`, `commit`, `hardware`, `versions` and `command` say how to measure it again.
`figures` maps a name such as "minivit-cold, time" to its unit, the number of runs, their median
and, where known, the least and the greatest of them. `note` is optional. Benchmarks add rows, and
report.py makes the tables of the documents from them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from minivit.system.cores import cores  # noqa: E402

if TYPE_CHECKING:
    import torch

RESULTS = ROOT / "benchmarks" / "results.jsonl"
MODEL = ROOT / ".cache" / "random-vit-b16"
UNITS = ("s", "ms", "images/s", "photos/s", "photos", "GiB", "MiB", "times", "fraction", "logits")
LIBRARIES = ("torchvision", "transformers", "timm")
# These flags say where a row goes, not what is measured, so a row's command leaves them out.
RECORDING_FLAGS = ("--record", "--commit")
PATH_FLAGS = ("--data", "--model", "--out")  # A row shows no path of the machine's.


@dataclass(frozen=True)
class Figure:
    """A measured number: the median of some runs, and the least and the greatest where known."""

    unit: str
    runs: int
    median: float
    min: float | None = None
    max: float | None = None

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"expected a unit among {', '.join(UNITS)}; found {self.unit!r}")
        if self.runs < 1:
            raise ValueError(f"expected at least one run; found {self.runs}")
        if (self.min is None) != (self.max is None):
            raise ValueError("expected both min and max, or neither")
        if self.min is not None and not self.min <= self.median <= self.max:
            raise ValueError(f"expected {self.min} <= {self.median} <= {self.max}")


@dataclass(frozen=True)
class Row:
    """A line of results.jsonl: what a benchmark measured, and how to measure it again."""

    benchmark: str
    workload: str
    date: str
    commit: str
    hardware: str
    versions: Mapping[str, str]
    command: str
    figures: Mapping[str, Figure]
    note: str = ""
    line: int = 0  # its number in results.jsonl; not written there

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name not in ("note", "line") and not getattr(self, field.name):
                raise ValueError(f"expected something in {field.name!r}")
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", self.date):
            raise ValueError(f"expected a date such as 2026-01-31; found {self.date!r}")


def read_rows(file: Path = RESULTS) -> list[Row]:
    """Read results.jsonl. A line that is no Row is a ValueError that names it."""
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            fields = json.loads(line)
            figures = {name: Figure(**figure) for name, figure in fields["figures"].items()}
            rows.append(Row(**fields | {"figures": figures, "line": number}))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{file.name}, line {number}: {error}") from error
    return rows


def to_json(row: Row) -> str:
    """Return a row as a line of results.jsonl, without what is not known."""
    fields = dataclasses.asdict(row)
    del fields["line"]
    for name, figure in fields["figures"].items():
        fields["figures"][name] = {k: value for k, value in figure.items() if value is not None}
    if not row.note:
        del fields["note"]
    return json.dumps(fields, ensure_ascii=False)


def figure_of(values: Sequence[float], unit: str) -> Figure:
    """Return the figure for the values that some runs gave."""
    median = rounded(statistics.median(values))
    if len(values) == 1:
        return Figure(unit, 1, median)
    return Figure(unit, len(values), median, rounded(min(values)), rounded(max(values)))


def rounded(value: float) -> float:
    """Round to five significant digits; a whole number becomes an int, which is shorter."""
    value = float(f"{value:.5g}")
    return int(value) if value.is_integer() else value


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Add the flags that say where the row goes, and parse the command line.

    With --no-record, `record` becomes None. A row has to name its commit, so without git --commit
    is needed.
    """
    parser.add_argument(
        "--record", type=Path, default=RESULTS, metavar="FILE", help="the file that gets the row"
    )
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument(
        "--commit", metavar="NAME", help="the commit that is measured; default: what git says"
    )
    args = parser.parse_args()
    if args.no_record:
        args.record = None
    if args.commit is None:
        args.commit = commit_name()
    if not args.commit:
        if args.record is not None:
            parser.error("git names no commit here: give --commit NAME, or --no-record")
        args.commit = "unknown"
    return args


def parse_with_model(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Add --model, --device and the flags of `parse`, and parse the command line.

    `device` becomes a torch.device. If there is no model in the folder, a ViT-B/16 with random
    weights is written into it.
    """
    from minivit.system.device import pick_device

    parser.add_argument(
        "--model",
        type=Path,
        default=MODEL,
        metavar="DIR",
        help="a folder in the Hub's layout; a ViT-B/16 of random weights is written if it is empty",
    )
    parser.add_argument(
        "--device", default="auto", metavar="cpu|cuda", help="auto takes a GPU if there is one"
    )
    args = parse(parser)
    args.device = pick_device(args.device)
    MODEL.parent.mkdir(exist_ok=True)  # Temporary files go there, too.
    if not (args.model / "config.json").exists():
        write_random_vit(args.model)
    return args


def model_name(folder: Path) -> str:
    """Return what a workload calls the model in a folder."""
    return "ViT-B/16" if folder == MODEL else folder.name


def write_random_vit(folder: Path) -> None:
    """Write a ViT-B/16 with random weights, in the Hub's layout."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(num_labels=1000)).save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)


def record(
    args: argparse.Namespace,
    device: torch.device,
    workload: str,
    figures: Mapping[str, Figure],
) -> None:
    """Print how the figures were measured, and add a row of them to the file if there is one."""
    row = Row(
        benchmark=Path(sys.argv[0]).stem,
        workload=workload,
        date=time.strftime("%Y-%m-%d"),
        commit=args.commit,
        hardware=f"{machine_name(device)}, {cores()} cores",
        versions=installed_versions(),
        command=command_line(sys.argv),
        figures=figures,
    )
    print(f"\nMeasured: {about(row)}.")
    if args.record is None:
        return
    line = to_json(row)
    with args.record.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    print(f"\nAdded to {args.record}:\n{line}")


def about(row: Row) -> str:
    """Describe in one line how a row was measured, except for its command."""
    versions = [f"{name} {version}" for name, version in row.versions.items()]
    return ", ".join([row.hardware, *versions, row.date, runs_of(row), f"commit {row.commit}"])


def number_of_runs(row: Row) -> int:
    return max(figure.runs for figure in row.figures.values())


def runs_of(row: Row) -> str:
    runs = number_of_runs(row)
    return "one run" if runs == 1 else f"medians of {runs} runs"


def machine_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU and what it has for bf16."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    machine = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text()
        model_name_line = re.search(r"model name\t: (.+)", text)
        if model_name_line is not None:
            machine = model_name_line[1]
        for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")):
            if flag in text:
                return f"{machine}, {name}"
    return machine


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that matter to speed."""
    import torch

    versions = {"Python": platform.python_version(), "torch": torch.__version__}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def commit_name() -> str:
    """Return the commit of this tree, marked as dirty if files have changed; "" without git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def command_line(argv: Sequence[str]) -> str:
    """Return the command that measures the same again, with placeholders for paths."""
    words = ["python", f"benchmarks/{Path(argv[0]).name}"]
    split = [part for word in argv[1:] for part in split_flag(word)]
    for previous, word in zip(["", *split], split):
        if word in RECORDING_FLAGS or previous in RECORDING_FLAGS:
            continue
        if previous in PATH_FLAGS:
            words.append("DIR")
        elif not word.startswith("-") and "/" in word:
            words.append("FOLDER" if Path(word).is_dir() else Path(word).name)
        else:
            words.append(f'"{word}"' if " " in word else word)
    return " ".join(words)


def split_flag(word: str) -> list[str]:
    """Split --flag=value in two."""
    if word.startswith("--") and "=" in word:
        return word.split("=", 1)
    return [word]


def dtype_name(amp: torch.dtype | None) -> str:
    """Return the name of autocast's dtype, such as bfloat16; None means float32."""
    return "float32" if amp is None else str(amp).removeprefix("torch.")
