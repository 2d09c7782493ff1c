"""The figure of drift: what quantisers, norms and predictions showed along a stream, and what was done about it."""

import itertools
import os
from collections.abc import Iterable

from ..adaptation import Step, read_history
from .figure import _COLOURS, _THEMES, _print, _start

_KINDS = {  # how an event begins, what it is called
    "collapse": "collapse", "BatchNorm": "BatchNorm averages", "drift": "drift", "domain": "domain",
    "normalisation": "normalisation", "skipped": "skipped",
}  # fmt: skip
_TINTS = dict(zip(_KINDS.values(), ("#d64545", "#a259c4", "#ea7a34", "#2f80d0", "#c9a227", "#8d95a3"), strict=True))
_LINES = ("collapse", "BatchNorm averages", "domain", "normalisation")  # kinds that are lines through the panels, too
_FEW = 20  # events of such a kind; more would hide what the panels show
_NAMES, _LONGEST = 14, 30  # layers that are named beside the map, letters of a name


def draw_drift(history: Iterable[Step] | str | os.PathLike, *, dark: bool = False) -> bytes:
    """Draw how a stream moved away from calibration, over its batches.

    Above, when something happened; then for each quantised layer the share of its values that use other codes than
    the reference; the clip rate of the worst layer and on average against the reference; and the mean distance of the
    norms from the source with the mean entropy.

    Args:
        history: `Adapter.history` with telemetry, or the file that `write_history` wrote.
        dark: Light ink on dark paper.

    Returns:
        A PNG file.

    Raises:
        ValueError: No step holds drift, the file is none of `write_history`, or matplotlib is not installed.
    """
    steps = read_history(history) if isinstance(history, str | os.PathLike) else list(history)
    batches = _count(steps)
    measured = [(batch, step) for batch, step in zip(batches, steps, strict=True) if step.drift]
    if not measured:
        raise ValueError("draw_drift: no step holds drift; adapt with telemetry=10 and give its adapter.history")
    theme = _THEMES["dark" if dark else "light"]
    events = _events(zip(batches, steps, strict=True))
    figure = _start((10.5, 8.6), theme)
    heights = (0.16 * max(1, len(events)) + 0.1, 2.2, 1.2, 1.2)
    strip, above, middle, below = figure.subplots(4, 1, sharex=True, height_ratios=heights)
    _draw_events(strip, events, theme)
    _draw_layers(figure, above, measured, theme)
    _draw_clipping(middle, measured, theme)
    _draw_distance(below, measured, list(zip(batches, steps, strict=True)), theme)
    for kind in (kind for kind in _LINES if len(events.get(kind, ())) <= _FEW):
        for axes, batch in itertools.product((middle, below), events.get(kind, ())):
            axes.axvline(batch, color=_TINTS[kind], linewidth=0.9, linestyle=":", alpha=0.8, zorder=0.9)
    below.set_xlim(batches[0] - 0.5, batches[-1] + 0.5)
    below.set_xlabel("batch", color=theme["faint"])
    figure.get_layout_engine().set(h_pad=0.08)
    return _print(figure)


def _count(steps):
    """Number the batches; where a reset starts them anew, go on counting."""
    batches, past = [], 0
    for before, step in zip([None, *steps], steps, strict=False):
        past += before.batch + 1 if before is not None and step.batch <= before.batch else 0
        batches.append(past + step.batch)
    return batches


def _events(steps):
    """Gather by kind the batches at which something happened."""
    found = {kind: [] for kind in _KINDS.values()}
    for batch, step in steps:
        words = [*step.events, *(["skipped"] if step.skipped else [])]
        for kind in dict.fromkeys(_KINDS.get(text.split()[0].rstrip(":")) for text in words):
            if kind:
                found[kind].append(batch)
    return {kind: where for kind, where in found.items() if where}


def _draw_events(axes, events, theme):
    """Mark events in a row for each kind."""
    for row, (kind, where) in enumerate(events.items()):
        axes.plot(where, [row] * len(where), "|", color=_TINTS[kind], markersize=8, markeredgewidth=1.6)
    _dress(axes, theme, "events" if events else "events: none")
    axes.set_yticks(range(len(events)), list(events))
    axes.set_ylim(len(events) - 0.5 if events else 1, -0.5)
    axes.grid(visible=False)
    for label, kind in zip(axes.get_yticklabels(), events, strict=True):
        label.set_color(_TINTS[kind])


def _draw_layers(figure, axes, measured, theme):
    """Draw a map of layers over batches: the share of values on other codes than the reference."""
    from matplotlib.colors import LinearSegmentedColormap

    names = list(dict.fromkeys(name for _, step in measured for name in step.drift["layers"]))
    rows = [[step.drift["layers"].get(name, {}).get("moved", float("nan")) for _, step in measured] for name in names]
    middles = [(a + b) / 2 for (a, _), (b, _) in itertools.pairwise(measured)]
    half = middles[0] - measured[0][0] if middles else 0.5
    edges = [measured[0][0] - half, *middles, measured[-1][0] + half]
    most = max((value for row in rows for value in row if value == value), default=0.0)
    stops = [theme["paper"], "#2f80d0", "#ea7a34"]
    colours = LinearSegmentedColormap.from_list("drift", stops).with_extremes(bad=theme["grid"])
    _dress(axes, theme, "values that use other codes than the reference, by layer")
    axes.grid(visible=False)
    if rows:
        drawn = axes.pcolormesh(edges, [k - 0.5 for k in range(len(names) + 1)], rows, cmap=colours, vmin=0)
        drawn.set_clim(0, max(0.25, most))
        bar = figure.colorbar(drawn, ax=axes, pad=0.01, aspect=14, format=lambda value, _: f"{value:.0%}")
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=theme["faint"], length=0, labelsize=9)
    every = -(-len(names) // _NAMES) or 1
    shown = range(0, len(names), every)
    axes.set_yticks(shown, [_shorten(names[k]) for k in shown], fontsize=8)
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)


def _draw_clipping(axes, measured, theme):
    """Draw the clip rate of the worst layer and the mean, and that of the reference."""
    kept = [(batch, list(step.drift["layers"].values())) for batch, step in measured if step.drift["layers"]]
    batches = [batch for batch, _ in kept]
    mean = [100 * sum(row["clipped"] for row in rows) / len(rows) for _, rows in kept]
    worst = [100 * max(row["clipped"] for row in rows) for _, rows in kept]
    usual = [100 * sum(row["reference"] for row in rows) / len(rows) for _, rows in kept]
    style = {"marker": "o", "markersize": 3, "linewidth": 1.6}
    axes.plot(batches, worst, color=_COLOURS[2], label="worst layer", **style)
    axes.plot(batches, mean, color=_COLOURS[1], label="mean of the layers", **style)
    axes.plot(batches, usual, color=theme["ink"], linewidth=1.4, linestyle=(0, (4, 2)), label="mean of the reference")
    _dress(axes, theme, "clipped values", "%")
    axes.set_ylim(0, max(1.0, *worst, *usual) * 1.15 if kept else 1)
    _explain(axes, theme)


def _draw_distance(axes, measured, steps, theme):
    """Draw the mean distance of the norms from the source, and on an axis of its own the mean entropy."""
    kept = [(batch, step.drift["norms"].values()) for batch, step in measured if step.drift["norms"]]
    unsure = [(batch, step.entropy) for batch, step in steps if step.entropy is not None]
    right = axes.twinx() if kept else axes
    if kept:
        apart = [sum(norms) / len(norms) for _, norms in kept]
        style = {"marker": "o", "markersize": 3, "linewidth": 1.6, "color": _COLOURS[4]}
        axes.plot([batch for batch, _ in kept], apart, label="distance of the norms", **style)
        _dress(axes, theme, "distance of the norms from the source, and entropy", "source deviations")
        axes.set_ylim(0, max([0.1, *apart]) * 1.15)
    if unsure:
        right.plot(*zip(*unsure, strict=True), color=_COLOURS[3], linewidth=1.2, label="entropy")
    _dress(right, theme, "" if kept else "entropy of the predictions", "nats")
    right.set_ylim(0, max([0.1, *(value for _, value in unsure)]) * 1.15)
    if kept:
        right.grid(visible=False)
        right.set_facecolor("none")
        _explain(right, theme, *axes.get_legend_handles_labels())


def _explain(axes, theme, handles=(), labels=()):
    own = axes.get_legend_handles_labels()
    style = {"frameon": False, "labelcolor": theme["ink"], "fontsize": 9, "ncols": 3}
    axes.legend([*handles, *own[0]], [*labels, *own[1]], loc="lower right", bbox_to_anchor=(1, 0.97), **style)


def _dress(axes, theme, title, unit=""):
    axes.set_facecolor(theme["paper"])
    axes.set_title(title, loc="left", color=theme["ink"], fontsize=11, fontweight="bold", pad=7)
    axes.set_ylabel(unit, color=theme["faint"])
    axes.grid(axis="y", color=theme["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme["faint"], length=0, labelsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _shorten(name):
    return name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"
