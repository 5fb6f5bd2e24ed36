"""Where progress bars are shown: on a terminal, and in the cell of a notebook."""

from __future__ import annotations

import sys


def bars_are_hidden() -> bool:
    """Return whether a progress bar on stderr would only fill a file or a pipe.

    A notebook's stderr is no terminal, and yet shows a line again in place of the one before.
    tqdm's own widgets for notebooks would need ipywidgets.
    """
    is_in_notebook = type(sys.stderr).__module__ == "ipykernel.iostream"
    return sys.stderr is None or not (sys.stderr.isatty() or is_in_notebook)
