"""What accuracy costs: each way to run a model as a point of bytes and of seconds an image against its error."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from . import words
from .canvas import COLOURS, MARKERS, Look, Picture, dress, explain, scale, start
from .results import Results

COSTS = {"bytes": "size of the file", "seconds": "time an image"}
_NAMED = 8  # points of a front that get a name


@dataclass(frozen=True)
class Point:
    """One way to run a model.

    Args:
        model: Its name.
        bits: "float", "w4a4" and the like.
        form: "float" or "packed".
        adapter: That ran.
        error: Mean over the stream, in percent.
        bytes: Of the file; None where nobody counted.
        seconds: Of predicting and adapting, an image; None where nobody counted.
    """

    model: str
    bits: str
    form: str
    adapter: str
    error: float
    bytes: int | None
    seconds: float | None


def points_of(results: Results) -> list[Point]:
    """Return a point for each row that can be deployed: packed, and in float; simulations of packed ones are none."""
    found = []
    for row, images in zip(results.rows, results.images, strict=True):
        if row["form"] != "fake-quantised":
            seconds = row["seconds"] / images if images and row["seconds"] else None
            names = (row[key] for key in ("model", "bits", "form", "adapter"))
            found.append(Point(*names, row["mean_error"], row["bytes"], seconds))
    return found


def costs_of(points: list[Point]) -> list[str]:
    """Name the costs that tell at least two points apart."""
    return [name for name in COSTS if len({getattr(p, name) for p in points} - {None}) > 1]


def front_of(points: Iterable[Point], cost: str) -> list[Point]:
    """Return the Pareto front, cheapest first: the points that no other beats in error at the same cost or less."""
    known = [point for point in points if getattr(point, cost) is not None]
    front: list[Point] = []
    for point in sorted(known, key=lambda p: (getattr(p, cost), p.error)):
        if not front or point.error < front[-1].error:
            front.append(point)
    return front


def picture_tradeoff(points: list[Point]) -> Picture:
    """Return the figure with what it shows in words."""
    said = []
    for cost in costs_of(points):
        best = ", ".join(
            f"{_label(p)} with {p.adapter} ({_write(cost)(getattr(p, cost))}, {p.error:.1f} %)"
            for p in front_of(points, cost)
        )
        said.append(f"Error against {COSTS[cost]}; on the Pareto front, cheapest first: {best}.")
    return Picture(
        "tradeoff",
        " ".join(said),
        "Lower and further left is better. The dashed line is the Pareto front: no other point has less error at the "
        "same cost or less. Time is that of predicting and adapting on the machine below, in batches of the stream.",
        lambda look: plot_tradeoff(points, look),
    )


def plot_tradeoff(points: list[Point], look: Look):
    """Draw a panel a cost: points, coloured by adapter and shaped by model, and the Pareto front."""
    costs = costs_of(points)
    models, adapters = (list(dict.fromkeys(getattr(p, key) for p in points)) for key in ("model", "adapter"))
    shapes, colours = dict(zip(models, itertools.cycle(MARKERS))), dict(zip(adapters, itertools.cycle(COLOURS)))
    rows, columns = (len(costs), 1) if look.narrow else (1, len(costs))
    handles = _handles(shapes, colours, look)
    figure = start(look, 0.5 + 3.3 * rows + 0.22 * -(-len(handles) // (2 if look.narrow else 5)))
    for cost, axes in zip(costs, figure.subplots(rows, columns, squeeze=False).flat, strict=True):
        known = [point for point in points if getattr(point, cost) is not None]
        for point in known:
            colour = look[colours[point.adapter]]
            face = look["paper"] if point.form == "float" else colour
            axes.plot(
                getattr(point, cost), point.error, shapes[point.model], color=colour, markerfacecolor=face,
                markersize=7, markeredgewidth=1.4, zorder=3,
            )  # fmt: skip
        spent = [getattr(point, cost) for point in known]
        dress(axes, look, f"error against {COSTS[cost]}", "mean error, %")
        scale(axes, "x", spent, _write(cost))
        _leave_room(axes, min(spent), max(spent))
        axes.margins(y=0.12)
        _draw_front(axes, front_of(known, cost), cost, look)
    explain(figure, look, handles, loc="outside lower center", ncols=2 if look.narrow else 5, columnspacing=1.2)
    return figure


def _draw_front(axes, front, cost, look):
    """Draw the front as steps; a name stands below and left of its point, where no other point can be."""
    axes.step(
        [getattr(p, cost) for p in front], [p.error for p in front], where="post", color=look["ink"], linewidth=1.2,
        linestyle=(0, (4, 2)), zorder=2,
    )  # fmt: skip
    style = {"color": look["ink"], "fontsize": 8, "zorder": 4}
    below = {"xytext": (-5, -5), "textcoords": "offset points", "ha": "right", "va": "top"}
    for point in _apart(axes, front, cost):
        axes.annotate(_label(point), (getattr(point, cost), point.error), **style, **below)


def _leave_room(axes, low, high):
    """Leave room for names left of the points."""
    if axes.get_xscale() == "log":
        axes.set_xlim(low * (low / high) ** 0.3, high * (high / low) ** 0.08)
    else:
        axes.set_xlim(low - 0.3 * (high - low), high + 0.08 * (high - low))


def _apart(axes, front, cost):
    """Choose the points that are named, from the best on: those whose names do not run into each other."""
    axes.set_ylim(axes.get_ylim())
    chosen, boxes = [], []
    for point in reversed(front):
        x, y = axes.transAxes.inverted().transform(axes.transData.transform((getattr(point, cost), point.error)))
        wide = 0.0175 * len(_label(point))
        clear = all(abs(y - other_y) > 0.07 or x < left or x - wide > right for left, right, other_y in boxes)
        if clear and x > wide:
            chosen.append(point)
            boxes.append((x - wide, x, y))
    return chosen


def _handles(shapes, colours, look):
    from matplotlib.lines import Line2D

    plain = {"color": look["ink"], "linestyle": "none", "markersize": 7}
    found = [Line2D([], [], marker="o", label=name, **plain | {"color": look[c]}) for name, c in colours.items()]
    found += [Line2D([], [], marker=shape, label=name, **plain) for name, shape in shapes.items()]
    hollow = {"markerfacecolor": look["paper"], "markeredgewidth": 1.4}
    found.append(Line2D([], [], marker="o", label="hollow: float", **plain | hollow))
    return [*found, Line2D([], [], color=look["ink"], linewidth=1.2, linestyle=(0, (4, 2)), label="Pareto front")]


def _label(point):
    return f"{point.model} {words.width(point.bits)}"


def _write(cost):
    return words.kilobytes if cost == "bytes" else lambda seconds: f"{1e3 * seconds:.3g} ms"
