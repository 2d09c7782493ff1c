"""Model cards: what a checkpoint is and what was measured of it, as JSON beside the file."""

import hashlib
import json
import os
from pathlib import Path

from .doctor import describe_machine
from .files import write_atomically
from .report import Results
from .spec import Recipe

FORMAT = 1


def card_path(checkpoint: str | os.PathLike) -> Path:
    """Return where the card of a checkpoint lies: model.safetensors has model.card.json."""
    return Path(checkpoint).with_suffix(".card.json")


def write_card(
    checkpoint: str | os.PathLike, report: dict, *, reference: str, data: str, seed: int, seconds: float
) -> Path:
    """Write the card of a checkpoint that was just made.

    Args:
        checkpoint: The file.
        report: What `jobs.carry_out` returns.
        reference: What builds the architecture.
        data: What the calibration images are called.
        seed: Of images and reconstruction.
        seconds: That quantising and packing took.

    Returns:
        The card's path.
    """
    recipe = Recipe.from_json(report["recipe"])
    card = {
        "format": FORMAT,
        "checkpoint": Path(checkpoint).name,
        "sha256": _digest(checkpoint),
        "model": reference,
        "bits": str(recipe).partition(",")[0],
        "policy": {key: report["recipe"][key] for key in ("first_last", "exclude", "overrides")},
        "method": report["method"],
        "seed": seed,
        "steps": _steps(report),
        "calibration": {"data": data, "images": report["calibration"]["images"]},
        "bytes": {"file": report["file_bytes"], "float": report["float_bytes"]},
        "seconds": round(seconds, 3),
        "check": report["check"] and {key: round(value, 2) for key, value in report["check"].items()},
        "machine": describe_machine(),
        "evaluations": [],
    }
    return _write(card_path(checkpoint), card)


def read_card(checkpoint: str | os.PathLike) -> dict | None:
    """Read the card of a checkpoint; None where there is none, or it belongs to another file's content."""
    try:
        card = json.loads(card_path(checkpoint).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(card, dict) or card.get("format") != FORMAT or card.get("sha256") != _digest(checkpoint):
        return None
    return card


def add_evaluation(checkpoint: str | os.PathLike, results: Results) -> Path | None:
    """Enter results of a checkpoint in its card; what was measured under the same settings before is replaced.

    Args:
        checkpoint: The file.
        results: Of `measurement.evaluate_file`.

    Returns:
        The card's path; None where the checkpoint has none.

    Raises:
        OSError: The card cannot be written.
    """
    card = read_card(checkpoint)
    if card is None:
        return None
    for row, errors in zip(results.rows, results.errors, strict=True):
        entry = {"form": row["form"], "adapter": row["adapter"], **results.settings}
        measured = {key: row[key] for key in ("clean_error", "mean_error", "seconds")}
        measured |= {"errors": errors, "machine": results.machine}
        kept = [old for old in card["evaluations"] if {k: v for k, v in old.items() if k not in measured} != entry]
        card["evaluations"] = [*kept, entry | measured]
    return _write(card_path(checkpoint), card)


def _steps(report):
    """Return the steps of each block, and of the network where it was refined."""
    blocks = {row["name"]: row["steps"] for row in report.get("blocks", []) if "steps" in row}
    return blocks | ({"refinement": report["refinement"]["steps"]} if "refinement" in report else {})


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, card: dict) -> Path:
    return write_atomically(path, (json.dumps(card, indent=1, ensure_ascii=False) + "\n").encode())
