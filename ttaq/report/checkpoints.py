"""What packed checkpoints say of their layers and blocks, read from their headers, no tensor among it."""

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import read_header
from ..spec import Recipe
from . import words


@dataclass(frozen=True)
class LayerRow:
    """One layer of a checkpoint.

    Args:
        name: Its dotted name.
        kind: Its class.
        weight: Bits of its weight; None in float or without one.
        activation: Bits of its input; None in float.
        bytes: Of its codes; 0 where there are none.
        sqnr: dB, of its output over its quantisation error on calibration images; None where nobody measured.
    """

    name: str
    kind: str
    weight: int | None
    activation: int | None
    bytes: int
    sqnr: float | None


@dataclass(frozen=True)
class BlockRow:
    """One block as it was learned; errors are squared distances to the float block's output.

    Args:
        name: Of the block.
        before: Error before, rounded to nearest.
        after: Error afterwards, packed codes.
        steps: Of learning; None where codes were chosen in closed form.
        curve: Mean error over equal parts of the steps, with part of the quantisation dropped; empty in older files.
    """

    name: str
    before: float
    after: float
    steps: int | None
    curve: tuple[float, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A packed checkpoint.

    Args:
        name: Of the file, without its folder.
        model: What its architecture is called.
        bits: "w4a4" and the like.
        recipe: In words.
        method: Of quantisation.
        images: That it was calibrated on; None where nobody counted.
        bytes: Of the whole file.
        fingerprint: Of the architecture.
        statistics: "batch" where blocks learned under each batch's own statistics of BatchNorm, else "source".
        layers: In the order of the model.
        blocks: In the order in which they were learned; none of a model that was rounded to nearest.
    """

    name: str
    model: str
    bits: str
    recipe: str
    method: str
    images: int | None
    bytes: int
    fingerprint: str
    statistics: str
    layers: tuple[LayerRow, ...]
    blocks: tuple[BlockRow, ...]

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Checkpoint":
        """Read a file that `ttaq.save` wrote.

        Raises:
            ValueError: The file is missing, truncated or not one of ours.
        """
        header = read_header(path)
        report = header["report"]
        recipe = str(Recipe.from_json(report["recipe"]))
        return cls(
            Path(path).name, _shorten(header["reference"] or Path(path).stem), recipe.partition(",")[0], recipe,
            report.get("method", "rtn"), report.get("calibration", {}).get("images"), Path(path).stat().st_size,
            header["fingerprint"], report.get("schedule", {}).get("statistics", "source"), rows_of(header),
            tuple(
                BlockRow(row["name"], row["before"], row["after"], row.get("steps"), tuple(row.get("curve", ())))
                for row in report.get("blocks", ())
            ),
        )  # fmt: skip

    @property
    def measured(self) -> list[LayerRow]:
        """The layers whose SQNR somebody measured."""
        return [row for row in self.layers if row.sqnr is not None and math.isfinite(row.sqnr)]

    @property
    def code_bits(self) -> float | None:
        """The mean over packed weights of their bits."""
        bits = 8 * sum(row.bytes for row in self.layers)
        weights = sum(8 * row.bytes / row.weight for row in self.layers if row.weight)
        return bits / weights if weights else None


def rows_of(header: Mapping) -> tuple[LayerRow, ...]:
    """Return the layers that a header of `checkpoint.read_header` describes."""
    packed, sqnr = header["report"].get("packed", {}), header["report"].get("sqnr", {})
    return tuple(
        LayerRow(
            name, found["kind"], found["weight"] and found["weight"]["bits"],
            found["activation"] and found["activation"]["bits"], packed.get(name, 0), sqnr.get(name),
        )
        for name, found in header["layers"].items()
    )  # fmt: skip


def grouped(checkpoints: Iterable[Checkpoint]) -> list[dict[str, Checkpoint]]:
    """Gather checkpoints of one architecture, each under its widths, or its file's name where several share them."""
    groups: dict[str, list[Checkpoint]] = {}
    for one in checkpoints:
        groups.setdefault(one.fingerprint, []).append(one)
    found = []
    for group in groups.values():
        times = Counter(one.bits for one in group)
        found.append({words.width(one.bits) if times[one.bits] == 1 else one.name: one for one in group})
    return found


def _shorten(reference):
    """Name the architecture without where it comes from: "timm:resnet18" is resnet18."""
    return reference.rpartition(":")[2].removeprefix("build_")
