"""Progress bars, where they are of use: on a terminal, and in the cell of a notebook."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(*arguments: Any, hidden: bool = False, **settings: Any) -> tqdm:
    """Return a bar of tqdm's, which vanishes when it is done.

    In a file or a pipe there is none. In a notebook it goes where the lines go that are printed
    between two bars, because stderr has a colour of its own there. tqdm's widgets for notebooks
    would need ipywidgets.
    """
    stream = sys.stderr
    if type(sys.stdout).__module__ == "ipykernel.iostream":
        stream = sys.stdout
    elif stream is None or not stream.isatty():
        hidden = True
    return tqdm(*arguments, file=stream, disable=hidden, leave=False, **settings)
