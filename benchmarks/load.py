"""Wall time and peak memory of a process that loads ViT-B/16 on the CPU and is then ready.

    python benchmarks/load.py [--runs 5]

Minivit, transformers and timm (if it is installed) take turns. A random ViT-B/16 in float32 is
written to a temporary folder, in the layout of transformers and in that of timm. Each load is a
process of its own, and the first of each fills the disk's cache and does not count.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import ROOT, Figure, figure_of, parse, record

PROGRAMS = {
    "minivit": (
        "from minivit import load_pretrained; model = load_pretrained(sys.argv[1] + '/hub').eval()"
    ),
    "transformers": (
        "from transformers import ViTForImageClassification; "
        "model = ViTForImageClassification.from_pretrained(sys.argv[1] + '/hub').eval()"
    ),
    "timm": (
        "import timm; "
        "model = timm.create_model("
        "'local-dir:' + sys.argv[1] + '/hub/timm', pretrained=True).eval()"
    ),
}
# After loading, each program prints its number of parameters and its peak memory in KiB.
COUNT = "print(sum(p.numel() for p in model.parameters()))"
PEAK = "print(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])"
NUM_PARAMETERS = 86_567_656


def write_model(folder: Path) -> None:
    """Write a random ViT-B/16 to folder/hub, and in timm's layout to folder/hub/timm."""
    from minivit import Preprocess, ViT, ViTConfig, save_pretrained
    from minivit.tools import export

    model = ViT(ViTConfig())
    model.labels = tuple(f"thing {i}" for i in range(1000))
    model.preprocess = Preprocess()
    hub = folder / "hub"
    hub.mkdir()
    save_pretrained(model, hub)
    export.main([str(hub), "--to", "timm"])


def measure(code: str, folder: str) -> tuple[float, float]:
    """Run a program in a process of its own; return its seconds and its peak memory in MiB."""
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; {COUNT}; {PEAK}", folder],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": python_path},
    )
    seconds = time.perf_counter() - started
    num_parameters, peak_kib = done.stdout.split()[-2:]
    assert int(num_parameters) == NUM_PARAMETERS
    return seconds, int(peak_kib) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="each figure is the median of these")
    args = parse(parser)
    import torch

    programs = {name: code for name, code in PROGRAMS.items() if importlib.util.find_spec(name)}
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        for run in range(args.runs + 1):
            for name, code in programs.items():
                result = measure(code, folder)
                if run > 0:
                    results[name].append(result)
    figures: dict[str, Figure] = {}
    for name, pairs in results.items():
        time_taken = figure_of([seconds for seconds, _ in pairs], "s")
        memory = figure_of([mib for _, mib in pairs], "MiB")
        figures[f"{name}, time"] = time_taken
        figures[f"{name}, host memory"] = memory
        print(f"{name:13} {time_taken.median:6.2f} s, {memory.median:6,.0f} MiB")
    record(args, torch.device("cpu"), "a process that loads ViT-B/16 in float32, cpu", figures)


if __name__ == "__main__":
    main()
