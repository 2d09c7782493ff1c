"""What was measured, as a file, a table, a figure and one self-contained page."""

from .figure import draw
from .findings import find
from .page import render
from .results import KEYS, Line, Results
from .table import tabulate

__all__ = ["KEYS", "Line", "Results", "draw", "find", "render", "tabulate"]
