"""What the rows of the grid say: means over seeds with their deviation, differences paired by seed, and the figure."""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from .grid import DESCENDING, FLOAT, read

CELL = ("bits", "adapter", "loss", "statistics", "stream", "pass")


def show(path: Path, options: argparse.Namespace) -> int:
    """Print the table of a file, and draw its figure where one is asked for."""
    rows = [row for row in read(path) if _asked(row, options)]
    if not rows:
        raise ValueError(f"bench accuracy: {path} holds no rows of these steps and images; run the grid first")
    if options.figure:
        _draw(rows, Path(options.figure))
    print(table(rows), end="")
    if any(row["pass"] != "1" for row in rows):
        print("\n" + passes(rows), end="")
    return 0


def _asked(row, options):
    """Rows of other steps or of shorter streams are other measurements: one table holds one kind."""
    whole = row["stream"] == "clean" or row["images"] == str(options.stream_images)
    return whole and row["steps"] in ("0", str(options.steps))


def table(rows: list[dict]) -> str:
    """Draw Markdown: a line a cell, a column a method, each "mean +- standard deviation (seeds)" of the error, percent;
    behind it the difference to QDrop over the seeds that both have, with its standard error."""
    cells, methods = _cells(rows)
    head = [*CELL, *methods, "ttaq - qdrop"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for cell, found in cells.items():
        values = [_spread(found[method].values()) if method in found else "" for method in methods]
        lines.append("| " + " | ".join([*cell, *values, _paired(found.get("ttaq", {}), found.get("qdrop", {}))]) + " |")
    return "\n".join(lines) + "\n"


def passes(rows: list[dict]) -> str:
    """Draw Markdown: a line a loss, the mean error of each walk through a stream, over the seeds that have all of them.

    Behind it the difference of the last walk to the entropy loss, paired by seed with its standard error, and the share
    that it recovers of what the entropy loss gives away from its best walk to its last, where that is over a point.
    """
    last = max(row["pass"] for row in rows)
    walks = [str(number + 1) for number in range(int(last))]
    head = ["bits", "method", "adapter", "statistics", "stream", "loss", *walks, "- entropy", "recovered"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (*key, loss), found in (groups := _walks(rows, walks)).items():
        partner = groups.get((*key, "entropy"), {})
        means = [statistics.fmean(errors[walk] for errors in found.values()) for walk in range(len(walks))]
        gain = share = ""
        if partner and loss != "entropy":
            gain = _paired(*({seed: errors[-1] for seed, errors in side.items()} for side in (found, partner)))
            theirs = [statistics.fmean(partner[seed][walk] for seed in found) for walk in range(len(walks))]
            lost = theirs[-1] - min(theirs)
            share = f"{(theirs[-1] - means[-1]) / lost:.0%}" if lost > 1 else ""
        lines.append("| " + " | ".join([*key, loss, *(f"{mean:.2f}" for mean in means), gain, share]) + " |")
    return "\n".join(lines) + "\n"


def _walks(rows, walks):
    """Arrange the rows of what takes a loss as (bits, method, adapter, statistics, stream, loss) -> seed -> errors."""
    found: dict[tuple, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in (row for row in rows if row["adapter"] in DESCENDING):
        key = tuple(row[name] for name in ("bits", "method", "adapter", "statistics", "stream", "loss"))
        found[key][row["seed"]][row["pass"]] = float(row["error"])
    whole = {
        key: {seed: [errors[walk] for walk in walks] for seed, errors in seeds.items() if len(errors) == len(walks)}
        for key, seeds in sorted(found.items())
    }
    shared = {key: set(whole.get((*key[:-1], "entropy"), seeds)) & set(seeds) for key, seeds in whole.items()}
    return {key: {seed: seeds[seed] for seed in sorted(shared[key])} for key, seeds in whole.items() if shared[key]}


def paired(one: dict, other: dict) -> tuple[float, float, int]:
    """Return mean, standard error and number of the differences between two maps of seed to error."""
    both = [one[seed] - other[seed] for seed in one.keys() & other.keys()]
    error = statistics.stdev(both) / len(both) ** 0.5 if len(both) > 1 else float("nan")
    return (statistics.fmean(both) if both else float("nan")), error, len(both)


def _cells(rows):
    """Arrange the latest rows as cell -> method -> seed -> error; the float model stands beside every width."""
    cells: dict[tuple, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        cells[tuple(row[key] for key in CELL)][row["method"]][row["seed"]] = float(row["error"])
    widths = dict.fromkeys(row["bits"] for row in rows if row["bits"] != FLOAT)
    for cell, found in list(cells.items()):
        if cell[0] == FLOAT:
            for width in widths:
                cells[(width, *cell[1:])]["float"] = found["none"]
            del cells[cell]
    order = ("float", "rtn", "gptq", "qdrop", "pem", "pcr", "ttaq")
    there = {method for found in cells.values() for method in found}
    return dict(sorted(cells.items())), [method for method in order if method in there]


def _spread(values: Iterable[float]) -> str:
    values = list(values)
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation} ({len(values)})"


def _paired(one, other):
    mean, error, count = paired(one, other)
    return f"{mean:+.2f} ± {error:.2f} ({count})" if count > 1 else (f"{mean:+.2f} (1)" if count else "")


def _draw(rows, path):
    """Draw a group of bars a cell of the first pass, a bar a method, with the deviation over seeds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    cells, methods = _cells(rows)
    cells = {cell: found for cell, found in cells.items() if cell[5] == "1" and cell[2] in ("", "entropy")}
    widths = list(dict.fromkeys(cell[0] for cell in cells))
    figure, axes = pyplot.subplots(len(widths), 1, figsize=(11, 3.2 * len(widths)), squeeze=False, layout="constrained")
    for axis, width in zip(axes[:, 0], widths, strict=True):
        chosen = {cell: found for cell, found in cells.items() if cell[0] == width}
        for number, method in enumerate(methods):
            at = [place + number / (len(methods) + 1) for place in range(len(chosen))]
            values = [list(found.get(method, {}).values()) for found in chosen.values()]
            heights = [statistics.fmean(v) if v else 0 for v in values]
            spread = [statistics.stdev(v) if len(v) > 1 else 0 for v in values]
            axis.bar(at, heights, 1 / (len(methods) + 1), yerr=spread, label=method, color=f"C{number}")
        names = [" ".join(part for part in (cell[4], cell[1], cell[3]) if part) for cell in chosen]
        axis.set_xticks([place + 0.4 for place in range(len(chosen))], names, rotation=20, ha="right", fontsize=8)
        axis.set_ylabel("error, %")
        axis.set_title(width)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(ncols=len(methods), fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
