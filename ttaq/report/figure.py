"""The figure: the error along the stream, and the mean error of every width."""

import io
import itertools
import math

from . import words
from .findings import headline
from .results import Line, Results

_THEMES = {
    "light": {"paper": "#ffffff", "ink": "#1c2330", "faint": "#5d6675", "grid": "#e3e7ed"},
    "dark": {"paper": "#161b22", "ink": "#e6e9ee", "faint": "#9aa4b2", "grid": "#2b323c"},
}
_COLOURS = ("#8d95a3", "#2f80d0", "#ea7a34", "#2ba84a", "#a259c4", "#c9a227")


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
    theme = _THEMES["dark" if dark else "light"]
    lines = results.lines()
    models = list(dict.fromkeys(line.model for line in lines))
    colours = dict(zip(results.adapters(), itertools.cycle(_COLOURS)))
    figure = _start((10.5, 8.2), theme)
    grid = figure.add_gridspec(2, len(models), height_ratios=(1, 1.1), hspace=0.08)
    _draw_stream(figure.add_subplot(grid[0, :]), headline(lines), colours, theme)
    for column, model in enumerate(models):
        own = [line for line in lines if line.model == model]
        _draw_means(figure.add_subplot(grid[1, column]), own, colours, theme)
    return _print(figure)


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
    theme = _THEMES["dark" if dark else "light"]
    figure = _start((10.5, 7.6), theme)
    above, below = figure.subplots(2, 1, height_ratios=(1.3, 1))
    domains, highest = comparison.domains, 0.0
    for number, (method, colour) in enumerate(zip(comparison.results, itertools.cycle(_COLOURS))):
        means, deviations = zip(*(comparison.spread(method, domain) for domain in domains), strict=True)
        style = {"color": colour, "linestyle": ("-", "--", ":")[number // len(_COLOURS) % 3], "capsize": 2}
        spread = [deviation or 0.0 for deviation in deviations]
        above.errorbar(range(len(domains)), means, spread, marker="o", markersize=4, label=method, **style)
        mean, deviation = comparison.spread(method)
        below.bar(number, mean, 0.7, yerr=deviation, color=colour, ecolor=theme["ink"], capsize=3)
        _write(below, number, mean, mean, theme)
        highest = max(highest, *(m + d for m, d in zip(means, spread, strict=True)))
    above.set_xticks(range(len(domains)), [words.domain(name) for name in domains], rotation=28, ha="right")
    below.set_xticks(range(len(comparison.results)), list(comparison.results))
    _finish(above, theme, "error in each domain", highest)
    _finish(below, theme, "mean error", max(sum(filter(None, comparison.spread(m))) for m in comparison.results))
    return _print(figure)


def _start(size, theme):
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('report: the figure needs matplotlib; pip install "ttaq[demo]"') from error
    figure = Figure(figsize=size, facecolor=theme["paper"], layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _print(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130, metadata={"Software": "ttaq"})
    return file.getvalue()


def _draw_stream(axes, line: Line, colours, theme):
    """Draw one curve an adapter over the domains, in the order in which they were met."""
    domains = list(dict.fromkeys(name for errors in line.errors.values() for name in errors))
    curves = {adapter: [errors.get(name, math.nan) for name in domains] for adapter, errors in line.errors.items()}
    for number, (adapter, values) in enumerate(curves.items()):
        thickness = max(1.6, 3.6 - number)  # later curves are thinner: those beneath show
        label = f"{adapter}, mean {line.error(adapter):.1f} %"
        axes.plot(
            values, color=colours[adapter], marker="o", markersize=3 + thickness, linewidth=thickness, label=label
        )
    best = min(line.errors, key=line.error)
    if best != "source" and "source" in curves:
        gap = {"color": colours[best], "alpha": 0.10, "linewidth": 0}
        axes.fill_between(range(len(domains)), curves["source"], curves[best], **gap)
    axes.set_xticks(range(len(domains)), [words.domain(name) for name in domains], rotation=28, ha="right")
    highest = max(error for errors in line.errors.values() for error in errors.values())
    _finish(axes, theme, f"{words.label(line)}: error along the stream", highest)


def _draw_means(axes, lines, colours, theme):
    """Draw a group of bars for each width, one bar an adapter, and a mark where rounding to nearest ends up."""
    shown = _one_a_width(lines)
    adapters = [name for name in colours if any(name in line.rows for line in shown.values())]
    nearest = {line.bits: line for line in lines if line.method == "rtn"}
    size = 0.8 / len(adapters)
    highest = max(line.error(a) for line in (*shown.values(), *nearest.values()) for a in line.rows)
    dashes = {"color": theme["ink"], "linewidth": 1.7, "linestyle": (0, (2, 1))}
    for number, adapter in enumerate(adapters):
        left = (number - len(adapters) / 2) * size
        for group, line in enumerate(shown.values()):
            if adapter not in line.rows:
                continue
            axes.bar(group + left, line.error(adapter), size * 0.9, align="edge", color=colours[adapter])
            _write(axes, group + left + size * 0.45, line.error(adapter), highest, theme)
            other = nearest[line.bits].error(adapter) if line.bits in nearest else None
            if other is not None and line.method != "rtn":
                axes.hlines(other, group + left, group + left + size * 0.9, **dashes)
    sizes = [f"\n{words.kilobytes(line.bytes)}" if line.bytes else "" for line in shown.values()]
    axes.set_xticks(range(len(shown)), [words.width(bits) + size for bits, size in zip(shown, sizes, strict=True)])
    if any(line.method != "rtn" for bits, line in shown.items() if bits in nearest):
        axes.plot([], [], label="round to nearest", **dashes)
    _finish(axes, theme, f"{lines[0].model}: mean error and file size", highest, legend="upper left")


def _write(axes, x, error, highest, theme):
    """Write a bar's number at its foot, or above it where it is low."""
    inside = error > 0.15 * highest
    style = {"ha": "center", "fontsize": 8.5, "zorder": 4, "textcoords": "offset points"}
    if inside:
        axes.annotate(f"{error:.1f}", (x, 0), (0, 5), va="bottom", color="white", **style)
    else:
        paper = {"facecolor": theme["paper"], "edgecolor": "none", "pad": 0.6}
        axes.annotate(f"{error:.1f}", (x, error), (0, 3), va="bottom", color=theme["ink"], bbox=paper, **style)


def _one_a_width(lines):
    """Choose for each width the packed line, else the last that there is."""
    chosen = {}
    for line in lines:
        if line.bits not in chosen or chosen[line.bits].form != "packed":
            chosen[line.bits] = line
    return chosen


def _finish(axes, theme, title, highest, legend="upper right"):
    axes.set_facecolor(theme["paper"])
    axes.set_ylim(0, max(1.0, highest) * 1.12)
    axes.set_ylabel("error, %", color=theme["faint"])
    axes.set_title(title, loc="left", color=theme["ink"], fontsize=12, fontweight="bold", pad=10)
    axes.grid(axis="y", color=theme["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme["faint"], length=0, labelsize=9.5)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc=legend, frameon=False, labelcolor=theme["ink"], fontsize=10)
