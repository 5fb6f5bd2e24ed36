"""Execute docs/tutorial.ipynb, and store in it what its cells print and show.

    python benchmarks/tutorial.py

Pictures are stored as small JPEGs, because the notebook lies in the repository. Progress bars and
the explorer's page, which GitHub does not show, are left out.
"""

from __future__ import annotations

import base64
import io
import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
WIDTH = 800  # pixels of a stored picture
QUALITY = 80  # of a JPEG


def main() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    os.environ["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, resources={"metadata": {"path": folder}}, timeout=600, record_timing=False
        )
        client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                make_small(output) for output in cell.outputs if output.get("name") != "stderr"
            ]
            cell.outputs = join_lines(cell.outputs)
            for output in cell.outputs:
                if "text" in output:
                    output.text = without_bars(output.text)
    nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK}: {NOTEBOOK.stat().st_size:,} bytes")


def make_small(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return an output without HTML, and with a small JPEG in place of its picture."""
    data = output.get("data", {})
    data.pop("text/html", None)
    if "image/png" in data:
        picture = Image.open(io.BytesIO(base64.b64decode(data.pop("image/png")))).convert("RGB")
        picture.thumbnail((WIDTH, 10 * WIDTH), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=QUALITY, optimize=True)
        data["image/jpeg"] = base64.b64encode(file.getvalue()).decode()
    return output


def join_lines(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Return the outputs with the parts of stdout that follow each other in one."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        if joined and output.get("name") == joined[-1].get("name") == "stdout":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def without_bars(text: str) -> str:
    """Return what is left on each line once a progress bar has vanished."""
    return "\n".join(line.rpartition("\r")[2] for line in text.split("\n"))


if __name__ == "__main__":
    main()
