"""Import matplotlib without letting the user's settings reach our figures.

No module but this one and mpl_charts imports matplotlib at run time, because a wrong MPLBACKEND or
matplotlibrc makes the import itself fail. What is imported here is enough for fonts and colours.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

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
from matplotlib import colormaps, font_manager, ft2font  # noqa: E402
from matplotlib.ft2font import FT2Font  # noqa: E402

__all__ = [
    "DPI",
    "HINTING",
    "FT2Font",
    "colormaps",
    "default_settings",
    "font_manager",
    "matplotlib",
]

DPI = 120  # of all figures


def _hinting_flag() -> Any:
    """Return the flag with which matplotlib fits letters to pixels by default.

    backend_agg.get_hinting_flag() returns it, too, but takes as long to import as this module.
    Before matplotlib 3.10, the flags were numbers.
    """
    name = matplotlib.rcParamsDefault["text.hinting"].upper()
    if hasattr(ft2font, "LoadFlags"):
        return ft2font.LoadFlags[name]
    return getattr(ft2font, f"LOAD_{name}")


HINTING = _hinting_flag()


@contextlib.contextmanager
def default_settings() -> Iterator[None]:
    """Give matplotlib its own settings, and not the user's, until the block ends."""
    settings = dict(matplotlib.rcParamsDefault)
    del settings["backend"]  # A figure's canvas is what draws it, whatever the backend.
    with contextlib.ExitStack() as stack:
        with warnings.catch_warnings():
            # Some settings are deprecated, and setting them to their defaults would warn.
            warnings.simplefilter("ignore", matplotlib.MatplotlibDeprecationWarning)
            stack.enter_context(matplotlib.rc_context(settings))
        yield
