"""The figure of layers: SQNR and bits of each, along the network."""

import itertools
from collections.abc import Mapping

from . import words
from .canvas import COLOURS, DASHES, Look, Picture, dress, explain, start
from .checkpoints import Checkpoint

SHAPES = {2: "v", 3: "^", 4: "o", 5: "p", 6: "h", 7: "*", 8: "s", None: "x"}  # bits of the weight
_NAMES, _LONGEST = 16, 26  # layers that are named along the axis, letters of a name
_DOTS = 60  # layers beyond which only every marker that differs is drawn

Group = Mapping[str, Checkpoint]
"""Checkpoints of one architecture by what to call each."""


def picture_layers(groups: list[Group]) -> Picture:
    """Return the figure with what it shows in words; of the groups, each with a layer that was measured."""
    said = []
    for group in groups:
        for label, one in group.items():
            if one.measured:
                low, high = (pick(one.measured, key=lambda row: row.sqnr) for pick in (min, max))
                said.append(
                    f"{one.model} {label}: from {low.sqnr:.1f} dB ({low.name}) to {high.sqnr:.1f} dB ({high.name})"
                )
    return Picture(
        "layers",
        f"SQNR of each layer in the order of the network. {'; '.join(said)}.",
        "Signal to quantisation noise of each layer's output, in dB, with the layer's weight and input quantised and "
        "all others in float, on calibration images; higher is better, and a bit is worth 6 dB. The shape of a mark "
        "gives the bits of the weight.",
        lambda look: plot_layers(groups, look),
    )


def plot_layers(groups: list[Group], look: Look):
    """Draw a panel an architecture, a curve a checkpoint, a mark a layer whose shape gives the bits of its weight."""
    figure = start(look, 0.5 + (3.4 if look.narrow else 3.1) * len(groups))
    for group, axes in zip(groups, figure.subplots(len(groups), 1, squeeze=False).flat, strict=True):
        names = list(dict.fromkeys(row.name for one in group.values() for row in one.measured))
        for (label, one), (number, colour) in zip(group.items(), enumerate(itertools.cycle(COLOURS[1:])), strict=False):
            _draw_one(axes, names, one, label, look, look[colour], DASHES[number // 5 % len(DASHES)])
        every = -(-len(names) // (_NAMES // 2 if look.narrow else _NAMES)) or 1
        shown = range(0, len(names), every)
        turn = {"rotation": 60 if look.narrow else 35, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(shown, [words.shorten(names[k], _LONGEST) for k in shown], fontsize=8, **turn)
        dress(axes, look, f"{next(iter(group.values())).model}: SQNR of each layer", "dB")
        axes.tick_params(axis="x", labelsize=8)
        axes.margins(x=0.03, y=0.1)
        if axes.get_ylim()[0] > 0:
            axes.set_ylim(bottom=0)
    explain(figure, look, _handles(groups, look), loc="outside lower center", ncols=3 if look.narrow else 8)
    return figure


def _draw_one(axes, names, one, label, look, colour, dash):
    """Draw a checkpoint: its curve, and the marks of its layers by bits."""
    values = {row.name: row for row in one.measured}
    places = [k for k, name in enumerate(names) if name in values]
    axes.plot(places, [values[names[k]].sqnr for k in places], color=colour, linewidth=1.3, linestyle=dash, label=label)
    for bits in dict.fromkeys(row.weight for row in one.measured):
        own = [k for k in places if values[names[k]].weight == bits]
        size = 5.5 if len(names) <= _DOTS else 3.5
        axes.plot(own, [values[names[k]].sqnr for k in own], SHAPES[bits], color=colour, markersize=size)


def _handles(groups, look):
    from matplotlib.lines import Line2D

    found, labels = [], []
    for group in groups:
        for label, (number, colour) in zip(group, enumerate(itertools.cycle(COLOURS[1:])), strict=False):
            if label not in labels:
                labels.append(label)
                dash = DASHES[number // 5 % len(DASHES)]
                found.append(Line2D([], [], color=look[colour], linestyle=dash, label=label))
    rows = [row for group in groups for one in group.values() for row in one.measured]
    for bits in sorted({row.weight for row in rows}, key=lambda b: b or 99):
        name = f"{bits}-bit weight" if bits else "no weight"
        plain = {"color": look["ink"], "linestyle": "none", "markersize": 6}
        found.append(Line2D([], [], marker=SHAPES[bits], label=name, **plain))
    return found
