"""Results: one row for each model, width, method, form and adapter, and the file that holds them."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ..evaluation import Result, as_csv
from ..files import write_atomically

KEYS = ("model", "bits", "method", "form", "adapter", "clean_error", "mean_error", "bytes", "seconds")
FORMAT = 1


@dataclass(frozen=True)
class Line:
    """The rows that differ in their adapter alone.

    Attributes:
        model: Its name.
        bits: "float", "w4a4" and the like.
        method: "none", "rtn", or a method of `pipeline`.
        form: "float", "fake-quantised" or "packed".
        rows: Adapter to its row.
        errors: Adapter to its errors, domain to percent.
    """

    model: str
    bits: str
    method: str
    form: str
    rows: dict[str, dict]
    errors: dict[str, dict[str, float]]

    @property
    def bytes(self) -> int | None:
        """The size of the file, where this form has one."""
        return next((row["bytes"] for row in self.rows.values()), None)

    @property
    def seconds(self) -> float:
        """The time all adapters took, predicting and adapting."""
        return sum(row["seconds"] for row in self.rows.values())

    @property
    def clean_error(self) -> float | None:
        """The error on clean images of the model as it is, or under the first adapter there is."""
        first = self.rows.get("source") or next(iter(self.rows.values()))
        return first["clean_error"]

    def error(self, adapter: str) -> float | None:
        """The mean error on the stream with an adapter, None where it did not run."""
        row = self.rows.get(adapter)
        return row and row["mean_error"]


@dataclass
class Results:
    """Everything that one run, or several, measured.

    Args:
        title: Of the page.
        settings: What the run was asked for.
        machine: What it ran on.
        rows: Each with `KEYS`; errors in percent.
        errors: For each row, domain to error in percent.
        stages: What else took time, in seconds.
        notes: Sentences for the reader.
        images: For each row, how many images it saw; None where nobody counted.
    """

    title: str
    settings: dict = field(default_factory=dict)
    machine: dict = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    errors: list[dict] = field(default_factory=list)
    stages: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    images: list[int | None] = field(default_factory=list)

    def __post_init__(self):
        self.images += [None] * (len(self.rows) - len(self.images))  # files of before have none

    def add(self, result: Result, *, clean_error: float | None, **values) -> None:
        """Append the row of one evaluation.

        Args:
            result: On the stream.
            clean_error: On clean images, in percent, or None.
            values: The other entries of `KEYS` but mean_error and seconds.
        """
        clean = None if clean_error is None else round(clean_error, 3)
        values |= {"clean_error": clean, "mean_error": round(result.mean_error, 3), "seconds": round(result.seconds, 3)}
        self.rows.append({key: values[key] for key in KEYS})
        self.errors.append({domain: round(error, 3) for domain, error in result.errors.items()})
        self.images.append(sum(result.images.values()) or None)

    def lines(self) -> list[Line]:
        """Gather the rows that differ in their adapter alone, in the order in which they came."""
        found: dict[tuple, Line] = {}
        for row, errors in zip(self.rows, self.errors, strict=True):
            key = tuple(row[k] for k in ("model", "bits", "method", "form"))
            line = found.setdefault(key, Line(*key, {}, {}))
            line.rows[row["adapter"]] = row
            line.errors[row["adapter"]] = errors
        return list(found.values())

    def adapters(self) -> list[str]:
        """Name every adapter once, in the order in which they came."""
        return list(dict.fromkeys(row["adapter"] for row in self.rows))

    def write(self, path: str | os.PathLike) -> Path:
        """Write a JSON file, whole or not at all."""
        return write_atomically(path, (json.dumps({"format": FORMAT} | asdict(self), indent=1) + "\n").encode())

    def write_csv(self, path: str | os.PathLike) -> Path:
        """Write a CSV file, whole or not at all: each row once a domain, with that domain and its error."""
        found = zip(self.rows, self.errors, strict=True)
        return write_atomically(
            path, as_csv([row | {"domain": d, "error": e} for row, errors in found for d, e in errors.items()])
        )

    @classmethod
    def read(cls, *paths: str | os.PathLike) -> "Results":
        """Read one file that `write` wrote, or several into one.

        A row of the stream "clean" gives its error to the same row of another stream, which has none on clean images
        yet, and is no row of its own then.

        Raises:
            ValueError: A file is missing or of another kind, or two hold the same row.
        """
        first, *others = sorted([_read(Path(path)) for path in paths], key=_is_clean)
        for other in others:
            if _is_clean(other) and not _is_clean(first):
                other = first._take_clean(other)
            first._refuse_repeated(other.rows)
            first.rows += other.rows
            first.errors += other.errors
            first.images += other.images
            first.settings, first.machine = (
                _joined(getattr(first, name), getattr(other, name)) for name in ("settings", "machine")
            )
            first.stages |= other.stages
            first.notes += [note for note in other.notes if note not in first.notes]
        return first

    def _take_clean(self, other: "Results") -> "Results":
        """Fill in the clean errors that another run measured of the same files; return what is left of it."""
        left = replace(other, rows=[], errors=[], images=[], notes=[f"clean images, {note}" for note in other.notes])
        for row, errors, images in zip(other.rows, other.errors, other.images, strict=True):
            same = [own for own in self.rows if all(row[key] == own[key] for key in (*KEYS[:5], "bytes"))]
            if same and same[0]["clean_error"] is None:
                same[0]["clean_error"] = row["mean_error"]
            else:
                left.rows.append(row)
                left.errors.append(errors)
                left.images.append(images)
        return left

    def _refuse_repeated(self, rows):
        for row in rows:
            if any(all(row[key] == own[key] for key in KEYS[:5]) for own in self.rows):
                what = " ".join(row[key] for key in KEYS[:5])
                raise ValueError(f"report: two files hold the row {what}; give one of them")


def _is_clean(results: Results) -> bool:
    return results.settings.get("stream") == "clean"


def _joined(one: dict, other: dict) -> dict:
    """Say of each key what both say; where they differ, both."""
    found = dict(one)
    for key, value in other.items():
        known = found.setdefault(key, value)
        if known != value and str(value) not in str(known).split(" | "):
            found[key] = f"{known} | {value}"
    return found


def _read(path: Path) -> Results:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"report: cannot read {path} ({error.strerror}); give the results.json of a run") from error
    except ValueError as error:
        raise ValueError(f"report: {path} is no JSON file ({error}); give the results.json of a run") from error
    if not isinstance(content, Mapping) or content.pop("format", None) != FORMAT or not _fits(content):
        raise ValueError(
            f"report: {path} must hold rows with {', '.join(KEYS)} and their errors, in format {FORMAT}; "
            "give the results.json of `ttaq demo` or the --json file of `ttaq evaluate`"
        )
    return Results(**content)


def _fits(content: Mapping) -> bool:
    rows, errors = content.get("rows"), content.get("errors")
    return (
        content.keys() <= Results.__dataclass_fields__.keys()
        and isinstance(content.get("title"), str)
        and isinstance(rows, list)
        and isinstance(errors, list)
        and len(rows) == len(errors) > 0
        and all(isinstance(row, Mapping) and tuple(row) == KEYS for row in rows)
        and all(isinstance(row["mean_error"], int | float) for row in rows)
        and isinstance(content.get("images", []), list)
        and len(content.get("images", rows)) == len(rows)
        and all(isinstance(entry, Mapping) and entry for entry in errors)
    )
