"""The parts of matplotlib that draw charts. They are slow to import."""

from __future__ import annotations

from . import mpl  # noqa: F401  # It imports matplotlib itself, and so comes first.

# isort: split
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, NullLocator

__all__ = [
    "Axes",
    "Colormap",
    "Figure",
    "FigureCanvasAgg",
    "GridSpec",
    "MaxNLocator",
    "Normalize",
    "NullLocator",
    "ScalarMappable",
    "Text",
]
