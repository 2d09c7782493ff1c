"""The figure of reconstruction: how the error of each block fell while it was learned."""

import math

from . import words
from .canvas import Look, Picture, dress, explain, scale, start
from .checkpoints import BlockRow, Checkpoint

_DEPTH = ("#2f7fd0", "#9a58c0", "#d0601f")  # from the first block to the last; 3 : 1 on both papers


def learned(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """Return the checkpoints whose blocks left curves."""
    return [one for one in checkpoints if any(row.curve for row in one.blocks)]


def shares(row: BlockRow) -> tuple[list[float], list[float]]:
    """Return the steps amid each part of a block's curve, and the errors there over that of the first part."""
    parts = len(row.curve)
    first = row.curve[0] or 1.0
    return [(k + 0.5) * row.steps / parts for k in range(parts)], [error / first for error in row.curve]


def picture_curves(checkpoints: list[Checkpoint]) -> Picture:
    """Return the figure with what it shows in words; of checkpoints with curves."""
    said = []
    for one in checkpoints:
        ends = [shares(row)[1][-1] for row in one.blocks if row.curve]
        said.append(f"{title(one)}: at the end {min(ends):.0%} to {max(ends):.0%} of the error of the first steps")
    return Picture(
        "reconstruction",
        f"The error of each block over the steps of its learning. {'; '.join(said)}.",
        "Squared distance of a block's output to that of the float block, mean over equal parts of the steps, as a "
        "share of the first part. While learning, part of the quantisation is dropped at random, and roundings are "
        "soft until they are decided: the table has the errors of decided codes.",
        lambda look: plot_curves(checkpoints, look),
    )


def plot_curves(checkpoints: list[Checkpoint], look: Look):
    """Draw a panel a checkpoint, a curve a block, coloured and named by depth."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("depth", _DEPTH)
    columns = 1 if look.narrow else min(3, len(checkpoints))
    rows = -(-len(checkpoints) // columns)
    figure = start(look, 2.7 * rows + 0.2)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    values = [share for one in checkpoints for row in one.blocks if row.curve for share in shares(row)[1]]
    values = [value for value in values if 0 < value < math.inf] or [1.0]
    for one, axes in zip(checkpoints, panels, strict=False):
        drawn = [row for row in one.blocks if row.curve]
        for number, row in enumerate(drawn):
            colour = colours(number / max(1, len(drawn) - 1))
            dash = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)))[number % 3]
            axes.plot(
                *shares(row), color=colour, linewidth=1.4 if len(drawn) <= 20 else 0.8, linestyle=dash, label=row.name
            )
        first = axes.get_subplotspec().is_first_col()
        dress(axes, look, title(one), "error, share of the first" if first else "", along="step")
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
        scale(axes, "y", values, lambda value: f"{value:.0%}")
        _leave_room(axes, min(values), max(values))
        shown = axes.lines if len(drawn) <= 10 else [axes.lines[0], axes.lines[len(drawn) // 2], axes.lines[-1]]
        columns = 1 if look.narrow or len(shown) < 6 else 2
        explain(axes, look, list(shown), fontsize=7.5, ncols=columns, loc="lower left", borderaxespad=0)
    for axes in figure.axes[len(checkpoints) :]:
        axes.set_visible(False)
    return figure


def _leave_room(axes, low, high):
    """Leave a third of a panel, below the curves, to their names."""
    if axes.get_yscale() == "log":
        axes.set_ylim(low * (low / high) ** 0.6, high * 1.1)
    else:
        axes.set_ylim(low - 0.6 * max(high - low, 0.1 * high), 1.03 * high)


def title(one: Checkpoint) -> str:
    """Name a checkpoint: "resnet W4A4"."""
    return f"{one.model} {words.width(one.bits)}"
