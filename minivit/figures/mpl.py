"""Import matplotlib without letting the user's settings reach our figures.

No other module imports matplotlib at run time, because a wrong MPLBACKEND or matplotlibrc makes the
import itself fail.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from types import ModuleType

from ..errors import UserError

# matplotlib logs what is wrong with the user's settings of it, which these figures do not follow.
# Without a handler, that would be printed on stderr.
logging.getLogger("matplotlib").addHandler(logging.NullHandler())


def _import_matplotlib() -> ModuleType:
    """Import matplotlib although the user's settings of it may be wrong.

    Raises UserError if they cannot be read at all.
    """
    # A notebook sets MPLBACKEND for every program that is started from it, although the program's
    # environment may lack that backend.
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        try:
            matplotlib = importlib.import_module("matplotlib")
        except ImportError:
            raise
        except Exception:  # A matplotlibrc is not UTF-8, for example, or may not be read.
            matplotlib = _import_without_settings()
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        # Other figures of the same program may need it.
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    return matplotlib


def _import_without_settings() -> ModuleType:
    """Import matplotlib with an empty file in place of the user's matplotlibrc."""
    named = os.environ.get("MATPLOTLIBRC")
    os.environ["MATPLOTLIBRC"] = os.devnull
    for name in list(sys.modules):  # Modules of the first attempt are half imported.
        if name.partition(".")[0] == "matplotlib":
            del sys.modules[name]
    try:
        return importlib.import_module("matplotlib")
    except Exception as error:
        # A matplotlibrc in the working directory is read all the same.
        raise UserError(
            f"matplotlib cannot read its settings ({error}); mend or remove the file matplotlibrc "
            "in this folder"
        ) from error
    finally:
        del os.environ["MATPLOTLIBRC"]
        if named is not None:
            os.environ["MATPLOTLIBRC"] = named


matplotlib = _import_matplotlib()

# The rest of matplotlib is imported behind it.
from matplotlib import colormaps, font_manager  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg, get_hinting_flag  # noqa: E402
from matplotlib.cm import ScalarMappable  # noqa: E402
from matplotlib.colors import Colormap, Normalize  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ft2font import FT2Font  # noqa: E402
from matplotlib.gridspec import GridSpec  # noqa: E402
from matplotlib.text import Text  # noqa: E402
from matplotlib.ticker import MaxNLocator, NullLocator  # noqa: E402

__all__ = [
    "Axes",
    "Colormap",
    "FT2Font",
    "Figure",
    "FigureCanvasAgg",
    "GridSpec",
    "MaxNLocator",
    "Normalize",
    "NullLocator",
    "ScalarMappable",
    "Text",
    "colormaps",
    "font_manager",
    "get_hinting_flag",
    "matplotlib",
]
