"""The benchmarks are programs of ours too: what they import from the product must be there."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT


def test_all_benchmarks_start():
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {
        "one_photo_transformers"
    }  # which has no main
    code = f"import sys; sys.path[:0] = ['benchmarks', '.']; import {', '.join(sorted(names))}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
