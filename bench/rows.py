"""Rows of results/<machine>.csv: written by the tool alone, only ever appended."""

import csv
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from . import machine

RESULTS = machine.ROOT / "bench/results"


@dataclass(frozen=True)
class Row:
    """One op on one machine against one rival; times in microseconds, `ratio` is the rival's median over ours."""

    commit: str
    dirty: str
    machine: str
    driver: str
    cuda: str
    torch: str
    triton: str
    op: str
    backend: str
    dtype: str
    case: str
    p20_us: float
    p50_us: float
    p80_us: float
    gbps: float | None
    tflops: float | None
    percent_of_roofline: float | None
    peak_mib: float | None
    max_error: float | None
    rival: str
    ratio: float | None

    @property
    def measured(self) -> tuple[str, ...]:
        """What was measured; a later run of it replaces an earlier one in the tables."""
        return self.machine, self.op, self.case, self.dtype, self.backend


COLUMNS = [f.name for f in fields(Row)]
_NUMBERS = [f.name for f in fields(Row) if f.type is not str]


def append(rows: list[Row], folder: Path = RESULTS) -> Path:
    """Append rows of one machine to its file, which is begun with the names of the columns.

    Raises:
        ValueError: The file has other columns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{rows[0].machine}.csv"
    fresh = not path.exists()
    if not fresh:
        _check_columns(path)
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows({k: _text(v) for k, v in asdict(row).items()} for row in rows)
    return path


def read(path: Path) -> list[Row]:
    """Read the rows of one file, the oldest first.

    Raises:
        ValueError: The file is missing or has other columns.
    """
    if not path.is_file():
        raise ValueError(f"bench: there is no file {path}; `python -m bench run <op>` writes it")
    _check_columns(path)
    with open(path, newline="", encoding="utf-8") as file:
        return [Row(**{k: _value(k, v) for k, v in line.items()}) for line in csv.DictReader(file)]


def latest(rows: list[Row]) -> list[Row]:
    """Keep the last run of whatever was measured, in the order in which it was first measured."""
    runs = {}
    for row in rows:
        run = runs.get(row.measured, [])
        goes_on = run and replace(row, rival="", ratio=None) == replace(run[-1], rival="", ratio=None)
        runs[row.measured] = [*run, row] if goes_on else [row]
    return [row for run in runs.values() for row in run]


def select(text: str, machine_name: str, folder: Path = RESULTS) -> list[Row]:
    """Read the latest rows of a revision, "REV", of a file, "FILE.csv", or of both, "FILE.csv@REV".

    Raises:
        ValueError: There are none.
    """
    path, _, revision = text.rpartition("@") if ".csv@" in text else (text, "", "")
    if not path.endswith(".csv"):
        path, revision = folder / f"{machine_name}.csv", path
    rows = read(Path(path))
    if revision:
        commit = machine.rev_parse(revision) or revision
        rows = [row for row in rows if commit.startswith(row.commit) or row.commit.startswith(commit)]
    if not rows:
        measured = ", ".join(dict.fromkeys(row.commit for row in read(Path(path)))) or "nothing"
        raise ValueError(f"bench: {path} holds no rows of {revision or 'any commit'}; it holds {measured}")
    return latest(rows)


def _check_columns(path):
    with open(path, newline="", encoding="utf-8") as file:
        found = next(csv.reader(file), [])
    if found != COLUMNS:
        raise ValueError(f"bench: {path} has other columns than {', '.join(COLUMNS)}; move the file away")


def _text(value):
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else value


def _value(column, text):
    if column not in _NUMBERS:
        return text
    return float(text) if text else None
