"""What a packed checkpoint says of itself, and how two of them differ: what `ttaq inspect` and `ttaq compare` print."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from .cards import read_card
from .checkpoint import read_header
from .pipeline import decisions
from .report import LayerRow, rows_of
from .spec import Recipe


@dataclass(frozen=True)
class Inspection:
    """A checkpoint as read from its header, no tensor among it.

    Args:
        path: The file.
        facts: What stands above the table: name to text.
        layers: In the order of the model.
        notes: What was decided and left out, in sentences.
        header: As `read_header` gave it.
    """

    path: Path
    facts: dict[str, str]
    layers: tuple[LayerRow, ...]
    notes: tuple[str, ...]
    header: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Give plain values."""
        rows = [vars(row) for row in self.layers]
        return {"path": str(self.path), **self.facts, "layers": rows, "notes": list(self.notes)}


def inspect(path: str | Path) -> Inspection:
    """Read what a packed checkpoint says of itself.

    Raises:
        ValueError: The file is missing, truncated or not one of ours.
    """
    path, header = Path(path), read_header(path)
    report = header["report"]
    layers = rows_of(header)
    size = path.stat().st_size
    facts = {
        "model": header["reference"] or "not named",
        "recipe": str(Recipe.from_json(report["recipe"])),
        "method": report.get("method", "rtn"),
        "bytes": f"{size:,}, {sum(row.bytes for row in layers):,} of them codes",
        "calibrated on": f"{report.get('calibration', {}).get('images', 'unknown')} images",
    }
    if header["preprocessing"]:
        facts["preprocessing"] = ", ".join(f"{key} {_short(value)}" for key, value in header["preprocessing"].items())
    if header["classes"]:
        facts["classes"] = f"{len(header['classes'])}: {', '.join(header['classes'][:5])}" + (
            ", ..." if len(header["classes"]) > 5 else ""
        )
    card = read_card(path)
    if card:
        facts |= _from_card(card)
    measured = [_measured(entry) for entry in card["evaluations"]] if card else []
    left = [f"left in float: {name}: {reason}" for name, reason in report.get("left_out", {}).items()]
    return Inspection(path, facts, layers, (*decisions(report), *left, *measured), header)


def _from_card(card: dict) -> dict[str, str]:
    """Give what the card beside a checkpoint says of how it was made."""
    facts = {"made": f"in {card['seconds']:,.1f} s, seed {card['seed']}, by ttaq {card['machine']['ttaq']}"}
    if found := card["check"]:
        facts["check"] = (
            f"{found['error']:.1f} % error on {found['images']:.0f} calibration images, {found['float_error']:.1f} % "
            f"in float, the same prediction on {found['agreement']:.1f} %"
        )
    return facts


def _measured(entry: dict) -> str:
    """Say what one evaluation in a card found."""
    stream = entry["stream"] if entry["stream"] == "clean" else f"{entry['stream']}, severity {entry['severity']}"
    form = "" if entry["form"] == "packed" else f"{entry['form']}, "
    return f"measured: {form}{entry['mean_error']:.1f} % error with {entry['adapter']} on {entry['data']} ({stream})"


def tabulate_layers(found: Inspection, columns: int = 100) -> Table:
    """Make a rich table of the layers; a narrow terminal gets fewer columns."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("layer", overflow="fold")
    wide = columns >= 72
    for name in (*(("kind",) if wide else ()), "W", "A", *(("bytes",) if wide else ()), "SQNR, dB"):
        table.add_column(name, justify="left" if name == "kind" else "right", no_wrap=True)
    for row in found.layers:
        middle = [row.kind] if wide else []
        size = [f"{row.bytes:,}" if row.bytes else "-"] if wide else []
        table.add_row(row.name, *middle, _bits(row.weight), _bits(row.activation), *size, _decibel(row.sqnr))
    return table


def compare(one: Inspection, other: Inspection) -> tuple[Table, list[str]]:
    """Set two checkpoints side by side.

    Returns:
        A rich table of the layers whose bits or SQNR differ, and sentences on the rest.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("layer", overflow="fold")
    for name in ("bits", "bits ", "SQNR, dB", "SQNR, dB ", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    left, right = ({row.name: row for row in found.layers} for found in (one, other))
    alone = [(one, sorted(left.keys() - right.keys())), (other, sorted(right.keys() - left.keys()))]
    for name in (name for name in left if name in right):
        a, b = left[name], right[name]
        if (a.weight, a.activation, a.sqnr) != (b.weight, b.activation, b.sqnr):
            gap = "-" if a.sqnr is None or b.sqnr is None else f"{b.sqnr - a.sqnr:+.1f}"
            table.add_row(name, _pair(a), _pair(b), _decibel(a.sqnr), _decibel(b.sqnr), gap)
    said = [
        f"{key}: {one.facts.get(key, '-')} | {other.facts.get(key, '-')}"
        for key in dict.fromkeys((*one.facts, *other.facts))
        if one.facts.get(key) != other.facts.get(key)
    ]
    if one.header["fingerprint"] != other.header["fingerprint"]:
        said.append("they belong to different architectures")
    said += [f"only in {found.path.name}: {', '.join(names)}" for found, names in alone if names]
    return table, said or ["they say the same of themselves"]


def _bits(bits):
    return "float" if bits is None else str(bits)


def _pair(row):
    return f"W{row.weight or 16}A{row.activation or 16}"


def _decibel(value):
    return "-" if value is None else f"{value:.1f}"


def _short(value):
    return "/".join(f"{one:.3g}" for one in value) if isinstance(value, list) else value
