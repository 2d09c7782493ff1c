"""What was measured, as a file, a table, a figure and one self-contained page."""

from .comparison import Comparison, evaluate_grid
from .drift import draw_drift
from .figure import draw, draw_comparison
from .findings import find
from .page import render
from .results import KEYS, Line, Results
from .table import tabulate

__all__ = [
    "KEYS",
    "Comparison",
    "Line",
    "Results",
    "draw",
    "draw_comparison",
    "draw_drift",
    "evaluate_grid",
    "find",
    "render",
    "tabulate",
]
