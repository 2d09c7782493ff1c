"""What was measured, as a file, a table, figures and one self-contained page."""

from .checkpoints import Checkpoint, LayerRow, rows_of
from .comparison import Comparison, evaluate_grid
from .drift import draw_drift
from .figure import draw, draw_comparison
from .findings import find
from .page import read, render, say, write_figures
from .results import KEYS, Line, Results
from .streams import Stream
from .table import tabulate

__all__ = [
    "KEYS",
    "Checkpoint",
    "Comparison",
    "LayerRow",
    "Line",
    "Results",
    "Stream",
    "draw",
    "draw_comparison",
    "draw_drift",
    "evaluate_grid",
    "find",
    "read",
    "render",
    "rows_of",
    "say",
    "tabulate",
    "write_figures",
]
