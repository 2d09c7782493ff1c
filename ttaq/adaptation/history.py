"""What an Adapter did, step by step, and how to write it down."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import write_atomically


@dataclass(frozen=True, slots=True)
class Step:
    """Say what one batch did.

    Args:
        batch: Number of the batch since the last reset, from 0.
        images: Images in it.
        loss: What the method minimised; None where there is none or the step was skipped.
        entropy: Mean over the batch before the step, in nats; None where it is not finite.
        skipped: Whether no step was taken: the adapted tensors were left, or put back, as they were.
        reason: Why: NaN or Inf, no image that a method selects, a collapse from which it recovered.
        returned: What the caller got: "logits", or what else and why.
        seconds: Wall time, prediction included.
        events: What the guard, the bank and the telemetry found and did.
        drift: What `Telemetry.report` gave where it measured.
    """

    batch: int
    images: int
    loss: float | None
    entropy: float | None
    skipped: bool
    reason: str | None
    returned: str
    seconds: float
    events: tuple[str, ...] = ()
    drift: dict[str, Any] | None = None


def write_history(steps: Iterable[Step], path: str | os.PathLike) -> Path:
    """Write steps as JSON lines, one object with the fields of `Step` a line.

    Returns:
        `path`.
    """
    return write_atomically(path, "".join(f"{json.dumps(asdict(step))}\n" for step in steps).encode())


def read_history(path: str | os.PathLike) -> list[Step]:
    """Read the steps that `write_history` wrote.

    Raises:
        ValueError: There is no such file, or it holds something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"read_history: there is no file {path}; give the path that write_history wrote")
    try:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        return [Step(**(row | {"events": tuple(row["events"])})) for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"read_history: {path} holds no JSON lines of write_history; write it again") from error
