"""The figure of drift: what quantisers, norms and predictions showed along a stream, and what was done about it."""

import itertools
import os
from collections.abc import Iterable

from ..adaptation import Step, read_history
from . import words
from .canvas import Look, Picture, as_png, dress, explain, start

_KINDS = {  # how an event begins, what it is called
    "collapse": "collapse", "BatchNorm": "BatchNorm averages", "drift": "drift", "domain": "domain",
    "normalisation": "normalisation", "skipped": "skipped",
}  # fmt: skip
_TINTS = dict(zip(_KINDS.values(), ("c6", "c4", "c2", "c1", "c5", "c0"), strict=True))
_LINES = ("collapse", "BatchNorm averages", "domain", "normalisation")  # kinds that are lines through the panels, too
_FEW = 20  # events of such a kind; more would hide what the panels show
_NAMES, _LONGEST = 14, 30  # layers that are named beside the map, letters of a name


def draw_drift(history: Iterable[Step] | str | os.PathLike, *, dark: bool = False) -> bytes:
    """Draw how a stream moved away from calibration, over its batches.

    Above, when something happened; then for each quantised layer the share of its values that use other codes than
    the reference; the clip rate of the worst layer and on average against the reference; the mean distance of the norms
    from the source; and the mean entropy.

    Args:
        history: `Adapter.history` with telemetry, or the file that `write_history` wrote.
        dark: Light ink on dark paper.

    Returns:
        A PNG file.

    Raises:
        ValueError: No step holds drift, the file is none of `write_history`, or matplotlib is not installed.
    """
    steps = read_history(history) if isinstance(history, str | os.PathLike) else list(history)
    if not any(step.drift for step in steps):
        raise ValueError("draw_drift: no step holds drift; adapt with telemetry=10 and give its adapter.history")
    return as_png(plot_drift(steps, Look.of(dark=dark)))


def picture_drift(name: str, steps: list[Step]) -> Picture:
    """Return the figure of a stream with what it shows in words; of steps some of which hold drift."""
    last = next(step for step in reversed(steps) if step.drift)
    worst = max(last.drift["layers"].items(), key=lambda item: item[1]["moved"], default=None)
    said = f"; at the last measurement {worst[0]} most, for {worst[1]['moved']:.0%} of its values" if worst else ""
    kinds = _events(zip(_count(steps), steps, strict=True))
    events = ", ".join(f"{len(where)} of {kind}" for kind, where in kinds.items())
    return Picture(
        name,
        f"Along the batches of the stream: events ({events or 'none'}); a map of how far each layer's codes moved from "
        f"the reference{said}; the share of clipped values; and how far the norms are from the source.",
        "From above: when something happened; for each layer the share of its values that use other codes than the "
        "reference (occupancy); values outside the range of the quantisers, worst layer and mean, against the "
        "reference (range); how far the norms moved; and the entropy of the predictions.",
        lambda look: plot_drift(steps, look),
    )


def plot_drift(steps: list[Step], look: Look):
    """Draw what `draw_drift` says."""
    batches = _count(steps)
    measured = [(batch, step) for batch, step in zip(batches, steps, strict=True) if step.drift]
    events = _events(zip(batches, steps, strict=True))
    norms, unsure = any(step.drift["norms"] for _, step in measured), [s for s in steps if s.entropy is not None]
    heights = [
        0.16 * max(1, len(events)) + 0.1,
        2.4,
        1.7 if look.narrow else 1.2,
        *([1.0] if norms else []),
        *([1.0] if unsure else []),
    ]
    figure = start(look, max(7.0, 1.7 + 1.1 * sum(heights)))
    strip, above, *curves = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    _draw_events(strip, events, look)
    _draw_layers(figure, above, measured, look)
    _draw_clipping(curves[0], measured, look)
    if norms:
        _draw_distance(curves[1], measured, look)
    if unsure:
        _draw_entropy(curves[-1], list(zip(batches, steps, strict=True)), look)
    for kind in (kind for kind in _LINES if len(events.get(kind, ())) <= _FEW):
        for axes, batch in itertools.product(curves, events.get(kind, ())):
            axes.axvline(batch, color=look[_TINTS[kind]], linewidth=0.9, linestyle=":", alpha=0.8, zorder=0.9)
    curves[-1].set_xlim(batches[0] - 0.5, batches[-1] + 0.5)
    curves[-1].xaxis.get_major_locator().set_params(integer=True)
    curves[-1].set_xlabel("batch", color=look["faint"], fontsize=9)
    return figure


def _count(steps):
    """Number the batches of steps; where a reset starts them anew, go on counting."""
    batches, past = [], 0
    for before, step in zip([None, *steps], steps, strict=False):
        past += before.batch + 1 if before is not None and step.batch <= before.batch else 0
        batches.append(past + step.batch)
    return batches


def _events(steps):
    """Gather by kind the batches at which something happened."""
    found = {kind: [] for kind in _KINDS.values()}
    for batch, step in steps:
        said = [*step.events, *(["skipped"] if step.skipped else [])]
        for kind in dict.fromkeys(map(kind_of, said)):
            if kind:
                found[kind].append(batch)
    return {kind: where for kind, where in found.items() if where}


def kind_of(event: str) -> str | None:
    """Name the kind of an event by its first word; None of one that is not known."""
    return _KINDS.get(event.split()[0].rstrip(":"))


def _draw_events(axes, events, look):
    """Mark events in a row for each kind."""
    for row, (kind, where) in enumerate(events.items()):
        axes.plot(where, [row] * len(where), "|", color=look[_TINTS[kind]], markersize=8, markeredgewidth=1.6)
    dress(axes, look, "events" if events else "events: none")
    axes.set_yticks(range(len(events)), list(events))
    axes.set_ylim(len(events) - 0.5 if events else 1, -0.5)
    axes.grid(visible=False)


def _draw_layers(figure, axes, measured, look):
    """Draw a map of layers over batches: the share of values on other codes than the reference."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    names = list(dict.fromkeys(name for _, step in measured for name in step.drift["layers"]))
    rows = [[step.drift["layers"].get(name, {}).get("moved", float("nan")) for _, step in measured] for name in names]
    middles = [(a + b) / 2 for (a, _), (b, _) in itertools.pairwise(measured)]
    half = middles[0] - measured[0][0] if middles else 0.5
    edges = [measured[0][0] - half, *middles, measured[-1][0] + half]
    most = max((value for row in rows for value in row if value == value), default=0.0)
    stops = [to_rgba("#2f7fd0", 0.0), "#2f7fd0", "#a04fc4", "#e07020"]  # from no ink, on either paper
    colours = LinearSegmentedColormap.from_list("drift", stops).with_extremes(bad=to_rgba("#808080", 0.25))
    dress(axes, look, "occupancy: values on other codes than the reference")
    axes.grid(visible=False)
    if rows:
        sides = [k - 0.5 for k in range(len(names) + 1)]
        drawn = axes.pcolormesh(edges, sides, rows, cmap=colours, vmin=0, rasterized=True)
        drawn.set_clim(0, max(0.25, most))
        bar = figure.colorbar(drawn, ax=axes, pad=0.01, aspect=14, format=lambda value, _: f"{value:.0%}")
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=look["faint"], length=0, labelsize=9)
    every = -(-len(names) // _NAMES) or 1
    shown = range(0, len(names), every)
    axes.set_yticks(shown, [words.shorten(names[k], _LONGEST // (2 if look.narrow else 1)) for k in shown], fontsize=8)
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)


def _draw_clipping(axes, measured, look):
    """Draw the clip rate of the worst layer and the mean, and that of the reference."""
    kept = [(batch, list(step.drift["layers"].values())) for batch, step in measured if step.drift["layers"]]
    batches = [batch for batch, _ in kept]
    mean = [100 * sum(row["clipped"] for row in rows) / len(rows) for _, rows in kept]
    worst = [100 * max(row["clipped"] for row in rows) for _, rows in kept]
    usual = [100 * sum(row["reference"] for row in rows) / len(rows) for _, rows in kept]
    style = {"marker": "o", "markersize": 3, "linewidth": 1.6}
    axes.plot(batches, worst, color=look["c2"], label="worst layer", **style)
    axes.plot(batches, mean, color=look["c1"], label="mean of the layers", **style)
    axes.plot(batches, usual, color=look["ink"], linewidth=1.4, linestyle=(0, (4, 2)), label="mean of the reference")
    dress(axes, look, "range: clipped values", "%")
    axes.set_ylim(0, max(0.2, *worst, *usual) * (2.2 if look.narrow else 1.35) if kept else 1)
    explain(axes, look, loc="upper left", ncols=1 if look.narrow else 3, borderaxespad=0, columnspacing=1.2)


def _draw_distance(axes, measured, look):
    """Draw the mean distance of the norms from the source."""
    kept = [(batch, step.drift["norms"].values()) for batch, step in measured if step.drift["norms"]]
    apart = [sum(norms) / len(norms) for _, norms in kept]
    axes.plot([batch for batch, _ in kept], apart, color=look["c4"], marker="o", markersize=3, linewidth=1.6)
    dress(axes, look, "norms: mean distance from the source", "deviations")
    axes.set_ylim(0, max([0.1, *apart]) * 1.15)


def _draw_entropy(axes, steps, look):
    """Draw the mean entropy of the predictions."""
    unsure = [(batch, step.entropy) for batch, step in steps if step.entropy is not None]
    axes.plot(*zip(*unsure, strict=True), color=look["c3"], linewidth=1.6)
    dress(axes, look, "entropy of the predictions", "nats")
    axes.set_ylim(0, max([0.1, *(value for _, value in unsure)]) * 1.15)
