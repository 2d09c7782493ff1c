"""The sections on packed checkpoints: layers with their bits and SQNR, and how their blocks were learned."""

import statistics

from . import words
from .checkpoints import Checkpoint, grouped
from .curves import learned, picture_curves, title
from .layers import picture_layers
from .markup import Section, card, folded, heads, items, number, row, spark, table, word


def checkpoint_cards(checkpoints: list[Checkpoint]) -> list[str]:
    """Give each checkpoint its size and the mean bits of its weights."""
    found = []
    for one in checkpoints:
        mean = f", {one.code_bits:.2f} bits a packed weight" if one.code_bits else ""
        found.append(card(words.kilobytes(one.bytes), f"{title(one)}: {one.name}{mean}"))
    return found


def describe_checkpoints(checkpoints: list[Checkpoint]) -> list[str]:
    """Say of each checkpoint how it was made, and where it is weakest."""
    found = []
    for one in checkpoints:
        images = f"{one.images:,} images" if one.images else "images that nobody counted"
        text = f"{one.name}: {title(one)} by {words.method(one.method)}, calibrated on {images}"
        if one.measured:
            worst = min(one.measured, key=lambda entry: entry.sqnr)
            middle = statistics.median(entry.sqnr for entry in one.measured)
            text += f"; SQNR of the median layer {middle:.1f} dB, lowest {worst.sqnr:.1f} dB in {worst.name}"
        worse = [entry.name for entry in one.blocks if entry.after > entry.before and one.statistics == "source"]
        text += f"; learning left {', '.join(worse)} with more error than rounding to nearest" if worse else ""
        found.append(text + ".")
    return found


def layers_section(checkpoints: list[Checkpoint]) -> Section:
    """Show bits, bytes and SQNR of each layer."""
    groups = grouped(checkpoints)
    drawn = [group for group in groups if any(one.measured for one in group.values())]
    body = items(describe_checkpoints(checkpoints)) + "".join(_layer_table(group) for group in groups)
    lead = "" if drawn else "Nobody measured the SQNR of these layers; reconstruction does."
    return Section("Layers", lead, body, (picture_layers(drawn),) if drawn else ())


def _layer_table(group):
    """Set the checkpoints of one architecture side by side."""
    names = list(dict.fromkeys(entry.name for one in group.values() for entry in one.layers))
    rows = {label: {entry.name: entry for entry in one.layers} for label, one in group.items()}
    columns = [f"{label}: {what}" for label in group for what in ("bits", "bytes", "SQNR, dB")]
    lines = []
    for name in names:
        cells = [cell for label in group for cell in _layer_cells(rows[label].get(name))]
        lines.append(row(name, *cells))
    model = next(iter(group.values())).model
    filled = table(f"Layers of {model}", heads(("layer",), columns), lines)
    return folded(f"The {len(names)} layers of {model} in numbers", filled)


def _layer_cells(entry):
    if entry is None:
        return [number(words.DASH)] * 3
    widths = [f"{letter}{bits}" for letter, bits in (("W", entry.weight), ("A", entry.activation)) if bits]
    yield number("".join(widths) or "float")
    yield number(f"{entry.bytes:,}" if entry.bytes else words.DASH)
    yield number(words.percent(entry.sqnr))


def curves_section(checkpoints: list[Checkpoint]) -> Section | None:
    """Show how the error of each block fell, where blocks were learned."""
    with_blocks = [one for one in checkpoints if one.blocks]
    if not with_blocks:
        return None
    rows = []
    for one in with_blocks:
        for place, entry in enumerate(one.blocks):
            ratio = entry.after / entry.before if entry.before else float("nan")
            change = words.DASH if ratio != ratio else f"{ratio:.2f}" if ratio < 100 else f"{ratio:,.0f}"
            steps = words.DASH if entry.steps is None else f"{entry.steps:,}"
            drawn = spark(entry.curve, f"curve of {entry.name}") if entry.curve else number(words.DASH)
            cells = [number(steps), number(f"{entry.before:.4g}"), number(f"{entry.after:.4g}"), number(change), drawn]
            new = ' class="new"' if not place and rows else ""
            rows.append(row(title(one), word(entry.name), *cells, kind=new))
    head = heads(("checkpoint", "block"), ("steps", "before", "after", "after / before", "while learning"))
    about = "Squared distance to the float block's output, mean over all images: rounded to nearest, and decided codes"
    if any(one.statistics == "batch" for one in with_blocks):
        about += (
            ". Blocks with BatchNorm learned under the statistics of each batch, and theirs were then measured anew: "
            "their two errors are those of different statistics"
        )
    drawn = learned(with_blocks)
    return Section("Reconstruction", body=table(about, head, rows), pictures=(picture_curves(drawn),) if drawn else ())
