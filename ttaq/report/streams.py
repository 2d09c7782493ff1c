"""What a stream showed: the JSON lines of `ttaq adapt`, or those of an adapter's history."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adaptation import Step

_SKIPPED = "skipped: "


@dataclass
class Stream:
    """One stream, from its first batch to its last.

    Args:
        name: Of the file, or what the stream is called.
        steps: Of the batches about which something is known, in order.
        predicted: How many predictions there are.
        refused: Images that got none, with the reason, in order.
        labels: How often each class was predicted.
        confidence: Mean over the predictions; None where nobody wrote it down.
        images: How many different names of images were answered; None where nobody wrote names down.
    """

    name: str
    steps: list[Step] = field(default_factory=list)
    predicted: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)
    labels: Counter = field(default_factory=Counter)
    confidence: float | None = None
    images: int | None = None

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Stream":
        """Read JSON lines that `ttaq adapt` or `write_history` wrote.

        Raises:
            ValueError: There is no such file, or it holds something else.
        """
        try:
            rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        except OSError as error:
            raise ValueError(f"report: cannot read {path} ({error.strerror}); give JSON lines of ttaq adapt") from error
        except ValueError as error:
            raise ValueError(f"report: {path} holds no JSON lines ({error}); give the output of ttaq adapt") from error
        if not rows:
            raise ValueError(f"report: {path} holds no JSON lines yet; give it once ttaq adapt has answered an image")
        try:
            return cls._of_history(path, rows) if "returned" in rows[0] else cls._of_lines(path, rows)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"report: {path} holds other JSON lines than ttaq adapt and write_history write; give one of theirs"
            ) from error

    @classmethod
    def of(cls, name: str, history: Iterable[Step]) -> "Stream":
        """Take an adapter's history."""
        steps = list(history)
        return cls(name, steps, sum(step.images for step in steps))

    @classmethod
    def _of_history(cls, path, rows):
        return cls.of(Path(path).name, [Step(**row | {"events": tuple(row["events"])}) for row in rows])

    @classmethod
    def _of_lines(cls, path, rows):
        found, sure = cls(Path(path).name), 0.0
        found.images = len({row["image"] for row in rows if "image" in row})
        for row in rows:
            if "error" in row:
                found.refused.append((row["image"], row["error"]))
            elif "image" in row:
                found.predicted += 1
                found.labels[str(row.get("class", row["label"]))] += 1
                sure += row["confidence"]
            else:
                found._note(row)
        found.confidence = sure / found.predicted if found.predicted else None
        return found

    def _note(self, row: dict[str, Any]) -> None:
        """Add an event or a measurement to the step of its batch; both may come for one."""
        batch = row["batch"]
        held = self.steps.pop() if self.steps and self.steps[-1].batch == batch else _silent(batch)
        values = {name: getattr(held, name) for name in Step.__slots__}
        if "drift" in row:
            values |= {"drift": _known(row["drift"]), "entropy": row.get("entropy")}
        elif row["event"].startswith(_SKIPPED):
            values |= {"skipped": True, "reason": row["event"].removeprefix(_SKIPPED)}
        else:
            values["events"] = (*held.events, row["event"])
        self.steps.append(Step(**values))

    def count(self) -> str:
        """Say how many images were predicted and refused; where some were answered again, of how many answers."""
        refused = len(self.refused)
        if self.images is None or self.images == self.predicted + refused:
            return f"{self.predicted:,} images predicted, {refused:,} refused"
        return f"{self.predicted:,} predictions and {refused:,} refusals of {self.images:,} different images"

    @property
    def measured(self) -> bool:
        """Whether any step holds drift."""
        return any(step.drift for step in self.steps)

    def events(self) -> list[tuple[int, str]]:
        """Return (batch, text) of each event and each skipped step, in order."""
        return [
            (step.batch, text)
            for step in self.steps
            for text in (*step.events, *([f"{_SKIPPED}{step.reason}"] if step.skipped else []))
        ]

    def reasons(self) -> dict[str, list[str]]:
        """Gather the names of refused images by reason, numbers and addresses left out; the commonest first."""
        found: dict[str, list[str]] = {}
        for name, reason in self.refused:
            found.setdefault(_class(reason), []).append(name)
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _silent(batch):
    return Step(batch, 0, None, None, False, None, "logits", 0.0)


def _known(drift):
    """Leave out what was not finite, which stands as null."""
    layers = {name: row for name, row in drift["layers"].items() if None not in row.values()}
    return {"layers": layers, "norms": {name: value for name, value in drift["norms"].items() if value is not None}}


def _class(reason):
    """Write a reason without what differs between two images of one kind."""
    return re.sub(r"\d+", "N", re.sub(r"\s*<[^>]*>|\s*'[^']*'", "", reason))
