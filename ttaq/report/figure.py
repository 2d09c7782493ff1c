"""The figure of errors: along the stream, and the mean of every width."""

import itertools
import math

from . import words
from .canvas import COLOURS, DASHES, MARKERS, Look, Picture, as_png, dress, explain, start
from .findings import headline
from .results import Line, Results

_MOST = 16  # bars of a panel that get numbers; those of more stand in the table alone


def draw(results: Results, *, dark: bool = False) -> bytes:
    """Draw the figure.

    Above, the error in each domain of the stream, for the headline line of the first model; below, for each model,
    the mean error of each width, packed where there is one, with round-to-nearest marked beside it.

    Args:
        results: Of any run.
        dark: Light ink on dark paper.

    Returns:
        A PNG file.

    Raises:
        ValueError: matplotlib is not installed.
    """
    return as_png(plot_errors(results, Look.of(dark=dark)))


def draw_comparison(comparison, *, dark: bool = False) -> bytes:
    """Draw a `Comparison`: above the error of each method over the domains, below their means.

    Both with the standard deviation over seeds, where there are several.

    Args:
        comparison: Of any methods and streams.
        dark: Light ink on dark paper.

    Returns:
        A PNG file.

    Raises:
        ValueError: matplotlib is not installed.
    """
    look = Look.of(dark=dark)
    figure = start(look, 6.6)
    above, below = figure.subplots(2, 1, height_ratios=(1.3, 1))
    domains, highest = comparison.domains, 0.0
    for number, (method, colour) in enumerate(zip(comparison.results, itertools.cycle(COLOURS))):
        means, deviations = zip(*(comparison.spread(method, domain) for domain in domains), strict=True)
        style = {"color": look[colour], "linestyle": DASHES[number // len(COLOURS) % len(DASHES)], "capsize": 2}
        spread = [deviation or 0.0 for deviation in deviations]
        marker = MARKERS[number % len(MARKERS)]
        above.errorbar(range(len(domains)), means, spread, marker=marker, markersize=4, label=method, **style)
        mean, deviation = comparison.spread(method)
        below.bar(number, mean, 0.7, yerr=deviation, color=look[colour], ecolor=look["ink"], capsize=3)
        _write(below, number, mean, mean, look)
        highest = max(highest, *(m + d for m, d in zip(means, spread, strict=True)))
    above.set_xticks(range(len(domains)), [words.domain(name) for name in domains], rotation=28, ha="right")
    below.set_xticks(range(len(comparison.results)), list(comparison.results))
    _finish(above, look, "error in each domain", highest)
    _finish(below, look, "mean error", max(sum(filter(None, comparison.spread(m))) for m in comparison.results))
    return as_png(figure)


def picture_errors(results: Results) -> Picture:
    """Return the figure of errors with what it shows in words."""
    line = headline(results.lines())
    means = ", ".join(f"{words.percent(line.error(name))} % with {name}" for name in line.rows)
    return Picture(
        "errors",
        f"Lines: the error of {words.label(line)} in each domain of the stream, one line an adapter; means {means}. "
        "Bars: for each model the mean error of each width and adapter.",
        "Above, the error in each domain of the stream, in the order in which it is met. Below, the mean over the "
        "stream for each width, with the size of the file; dashes mark rounding to nearest without reconstruction.",
        lambda look: plot_errors(results, look),
    )


def plot_errors(results: Results, look: Look):
    """Draw what `draw` says; on narrow paper the models stand below each other."""
    lines = results.lines()
    models = list(dict.fromkeys(line.model for line in lines))
    styles = dict(zip(results.adapters(), itertools.cycle(zip(COLOURS, MARKERS, strict=False))))
    columns = 1 if look.narrow else min(2, len(models))
    rows = -(-len(models) // columns)
    figure = start(look, 3.4 + 3.2 * rows)
    grid = figure.add_gridspec(1 + rows, columns, hspace=0.08)
    _draw_stream(figure.add_subplot(grid[0, :]), headline(lines), styles, look)
    shared = None
    for place, model in enumerate(models):
        own = [line for line in lines if line.model == model]
        shared = figure.add_subplot(grid[1 + place // columns, place % columns], sharey=shared)
        _draw_means(shared, own, styles, look, max(_highest(lines), 1.0))
    return figure


def _highest(lines):
    return max(row["mean_error"] for line in lines for row in line.rows.values())


def _draw_stream(axes, line: Line, styles, look):
    """Draw one curve an adapter over the domains, in the order in which they were met."""
    domains = list(dict.fromkeys(name for errors in line.errors.values() for name in errors))
    curves = {adapter: [errors.get(name, math.nan) for name in domains] for adapter, errors in line.errors.items()}
    for number, (adapter, values) in enumerate(curves.items()):
        colour, marker = styles[adapter]
        thickness = max(1.4, 2.6 - 0.6 * number)  # later curves are thinner: those beneath show
        label = f"{adapter}, mean {line.error(adapter):.1f} %"
        style = {"color": look[colour], "marker": marker, "markersize": 3 + thickness, "linewidth": thickness}
        axes.plot(values, label=label, **style)
    best = min(line.errors, key=line.error)
    if best != "source" and "source" in curves:
        gap = {"color": look[styles[best][0]], "alpha": 0.10, "linewidth": 0}
        axes.fill_between(range(len(domains)), curves["source"], curves[best], **gap)
    turn = {"rotation": 60 if look.narrow else 28, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(domains)), [words.domain(name) for name in domains], **turn)
    highest = max(error for errors in line.errors.values() for error in errors.values())
    room = 0.17 * (1 if not look.narrow else len(curves))
    _finish(axes, look, f"{words.label(line)}: error along the stream", highest * (1 + room), 1 if look.narrow else 4)


def _draw_means(axes, lines, styles, look, highest):
    """Draw a group of bars for each width, one bar an adapter, and a mark where rounding to nearest ends up."""
    shown = _one_a_width(lines)
    adapters = [name for name in styles if any(name in line.rows for line in shown.values())]
    nearest = {line.bits: line for line in lines if line.method == "rtn"}
    size = 0.84 / len(adapters)
    dashes = {"color": look["ink"], "linewidth": 1.7, "linestyle": (0, (2, 1))}
    for number, adapter in enumerate(adapters):
        left = (number - len(adapters) / 2) * size
        for group, line in enumerate(shown.values()):
            if adapter not in line.rows:
                continue
            colour = look[styles[adapter][0]]
            label = adapter if all(bar.get_label() != adapter for bar in axes.containers) else None
            axes.bar(group + left, line.error(adapter), size * 0.9, align="edge", color=colour, label=label)
            bars = len(shown) * len(adapters)
            if bars <= _MOST:
                _write(axes, group + left + size * 0.45, line.error(adapter), highest, look, upright=bars <= 8)
            other = nearest[line.bits].error(adapter) if line.bits in nearest else None
            if other is not None and line.method != "rtn":
                axes.hlines(other, group + left, group + left + size * 0.9, **dashes)
    sizes = [f"\n{words.kilobytes(line.bytes)}" if line.bytes else "" for line in shown.values()]
    axes.set_xticks(range(len(shown)), [words.width(bits) + size for bits, size in zip(shown, sizes, strict=True)])
    if any(line.method != "rtn" for bits, line in shown.items() if bits in nearest):
        axes.plot([], [], label="round to nearest", **dashes)
    _finish(axes, look, f"{lines[0].model}: mean error and file size", highest * 1.18, 4 if len(adapters) < 4 else 3)


def _write(axes, x, error, highest, look, *, upright=True):
    """Write a bar's number at its foot, or above it where it is low, on a piece of paper."""
    style = {
        "rotation": 0 if upright else 90,
        "ha": "center",
        "va": "bottom",
        "fontsize": 8,
        "zorder": 4,
        "textcoords": "offset points",
    }
    paper = {"facecolor": look["paper"], "edgecolor": "none", "pad": 0.8}
    place = ((x, 0), (0, 5)) if error > 0.15 * highest else ((x, error), (0, 3))
    axes.annotate(f"{error:.1f}", *place, color=look["ink"], bbox=paper, **style)


def _one_a_width(lines):
    """Choose for each width the packed line, else the last that there is."""
    chosen = {}
    for line in lines:
        if line.bits not in chosen or chosen[line.bits].form != "packed":
            chosen[line.bits] = line
    return chosen


def _finish(axes, look, title, highest, columns=4):
    dress(axes, look, title, "error, %")
    axes.set_ylim(0, max(1.0, highest) * 1.1)
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= min(100, 1.1 * highest)])
    if axes.get_legend_handles_labels()[1]:
        explain(axes, look, loc="upper left", ncols=columns, borderaxespad=0.2, columnspacing=1.2, handlelength=1.8)
