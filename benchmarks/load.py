"""Wall time and peak memory of a process that loads ViT-B/16 and is ready on the CPU: ours, transformers' and timm's, in turn.

    python benchmarks/load.py [--runs 5]

Writes a random ViT-B/16 in float32 in both layouts to a temporary folder, warms the file cache, and runs each in processes of
their own. timm is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAMS = {
    "minivit": "from minivit import load_pretrained; model = load_pretrained(sys.argv[1] + '/hub').eval()",
    "transformers": (
        "from transformers import ViTForImageClassification; "
        "model = ViTForImageClassification.from_pretrained(sys.argv[1] + '/hub').eval()"
    ),
    "timm": "import timm; model = timm.create_model('local-dir:' + sys.argv[1] + '/hub/timm', pretrained=True).eval()",
}
CHECK = "; print(sum(p.numel() for p in model.parameters()))"
PEAK = "; print(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    sys.path.insert(0, str(ROOT))
    import torch

    from minivit import Preprocess, ViT, ViTConfig, save_pretrained
    from minivit.tools import export

    programs = {name: code for name, code in PROGRAMS.items() if importlib.util.find_spec(name)}
    with tempfile.TemporaryDirectory() as folder:
        model = ViT(ViTConfig())
        model.labels, model.preprocess = tuple(f"thing {i}" for i in range(1000)), Preprocess()
        hub = Path(folder) / "hub"
        hub.mkdir()
        save_pretrained(model, hub)
        export.main([str(hub), "--to", "timm"])
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
        for run in range(runs + 1):  # the first warms the caches
            for name, code in programs.items():
                started = time.perf_counter()
                command = [sys.executable, "-c", f"import sys; {code}{CHECK}{PEAK}", folder]
                environment = os.environ | {
                    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
                }
                done = subprocess.run(
                    command, capture_output=True, text=True, check=True, cwd=folder, env=environment
                )
                seconds = time.perf_counter() - started
                count, peak = done.stdout.split()[-2:]
                assert int(count) == 86_567_656
                if run:
                    found[name].append((seconds, int(peak) / 1024))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    for name, rows in found.items():
        seconds, mib = (statistics.median(column) for column in zip(*rows))
        row = {
            "what": name,
            "seconds": round(seconds, 2),
            "peak_mib": round(mib),
            "runs": runs,
            "commit": commit,
        }
        row |= {
            "date": str(datetime.date.today()),
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
        }
        print(
            json.dumps(
                row | {"torch": torch.__version__, "command": " ".join(["python", *sys.argv])}
            )
        )


if __name__ == "__main__":
    main()
