"""The benchmarks must start, and measure what they claim to measure."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT

from minivit.checkpoints.hub import DEMO


def run_in_root(*arguments: str) -> str:
    """Run Python in the root of the repository, and return what it prints."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_benchmarks_start():
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
    assert "throughput" in names
    run_in_root("-c", f"import sys; sys.path[:0] = ['benchmarks', '.']; import {', '.join(names)}")


def test_throughput_measures_our_loop_and_predictions(tmp_path):
    table = tmp_path / "rows.md"
    printed = run_in_root(
        *("benchmarks/throughput.py", "--model", str(DEMO), "--device", "cpu", "--amp", "off"),
        *("--only", "train,kept,eval", "--photos", "4", "--batch", "4", "--runs", "1"),
        *("--no-compile", "--record", str(table)),
    )
    rows = table.read_text().splitlines()
    assert len(rows) == 3
    for part, row in zip(("train", "kept", "eval"), rows):
        what, figure = row.split(" | ")[-2:]
        assert what == f"minivit {part}, batch 4, float32"
        speed = figure.removesuffix(" images/s |")
        assert float(speed.replace(",", "")) > 0
        assert speed in printed
        assert str(table) not in row
