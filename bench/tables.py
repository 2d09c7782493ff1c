"""Tables made from rows: what the README shows, and one commit against another. Losses are said in words."""

import re
from collections.abc import Iterable
from itertools import groupby
from statistics import median

from .rows import Row


def report(rows: list[Row]) -> str:
    """Lay the rows out as Markdown: a table for each machine and op, a line for each case, a column for each rival."""
    parts = []
    for (machine, op), found in _grouped(rows, lambda r: (r.machine, r.op)).items():
        rivals = list(dict.fromkeys(r.rival for r in found if r.rival))
        lines = [f"### {op} on {machine}", "", _origin(found), ""]
        heads = ["case", "dtype", "backend", "median", "GB/s", "of the ceiling", *(f"against {r}" for r in rivals)]
        lines += [_line(heads), _line(["---"] * len(heads))]
        for line in _grouped(found, lambda r: r.measured).values():
            lines.append(_line(_cells(line, rivals)))
        parts.append("\n".join([*lines, "", _tally(found)]))
    return "\n\n".join(parts) + "\n"


def short(rows: list[Row]) -> str:
    """Lay out a line for each machine and op: how near the ceiling, how many losses, and the worst of them."""
    heads = ["machine", "op", "cases", "of the ceiling: least", "median", "losses", "worst"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for (machine, op), found in _grouped(rows, lambda r: (r.machine, r.op)).items():
        cases = {r.measured: r.percent_of_roofline for r in found}
        shares = [share for share in cases.values() if share is not None]
        least, middle = (_percent(f(shares)) if shares else "-" for f in (min, median))
        compared = [r for r in found if r.ratio is not None]
        worst = min(compared, key=lambda r: r.ratio, default=None)
        said = f"{_ratio(worst.ratio)}: {worst.case}, {worst.dtype}, against {worst.rival}" if worst else "-"
        losses = f"{sum(r.ratio < 1 for r in compared)} of {len(compared)}"
        lines.append(_line([machine, op, str(len(cases)), least, middle, losses, said]))
    return "\n".join(lines) + "\n"


def compare(before: list[Row], after: list[Row]) -> str:
    """Lay out what two commits took for the same cases on the same machine.

    The share of the ceiling was measured within each run and so survives a busy machine, which the times do not.
    """
    old = {r.measured: r for r in before}
    heads = ["op", "case", "dtype", "backend", "before", "after", "speed", "of the ceiling before", "after"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    new = {r.measured: r for r in after}
    for key in [k for k in new if k in old]:
        b, a = old[key], new[key]
        shares = [_percent(b.percent_of_roofline), _percent(a.percent_of_roofline)]
        times = [_time(b.p50_us), _time(a.p50_us)]
        lines.append(_line([a.op, a.case, a.dtype, a.backend, *times, _ratio(b.p50_us / a.p50_us), *shares]))
    missing = len(old.keys() - new.keys()), len(new.keys() - old.keys())
    lines += ["", f"{len(lines) - 2} cases in both, {missing[0]} only before, {missing[1]} only after."]
    return "\n".join(lines) + "\n"


def networks(rows: list[Row]) -> str:
    """Lay out the rows of `bench models`: a line for each network and batch, a column for each rival."""
    found = {}
    for row in rows:
        name = re.fullmatch(r"(.+), W4A8(, fused)?, batch (\d+), (.+) of (.+) MiB(, graph)?", row.case)
        if row.op == "model" and name:
            network, fused, batch, packed, whole, graph = name.groups(default="")
            found[network + fused, int(batch), graph] = (f"{packed}, {whole}", row.case)
    lines = {key: [r for r in rows if (r.op, r.case) == ("model", case)] for key, (_, case) in found.items()}
    rivals = list(dict.fromkeys(r.rival for line in lines.values() for r in line))
    heads = ["network", "batch", "weights, MiB: packed, float", "peak of the rest, MiB", "latency", "images/s"]
    text = [_line([*heads, *(f"against {r}" for r in rivals)]), _line(["---"] * (len(heads) + len(rivals)))]
    for (network, batch, graph), line in lines.items():
        took, ratios = line[-1].p50_us, {r.rival: r.ratio for r in line}
        cells = [network, f"{batch}{graph}", found[network, batch, graph][0], f"{line[-1].peak_mib:.0f}"]
        cells += [_time(took), f"{batch / took * 1e6:.1f}"]
        text.append(_line([*cells, *(_ratio(ratios[r]) if r in ratios else "-" for r in rivals)]))
    return "\n".join(text)


def summary(rows: list[Row]) -> str:
    """Say in one line what one case took, against all its rivals."""
    row = rows[-1]
    against = [f"{_ratio(r.ratio)} ({r.rival})" for r in rows if r.ratio is not None]
    took = f"{row.op}, {row.case}, {row.dtype}, {row.backend}: {_time(row.p50_us)}"
    return "; ".join([f"{took}, {_percent(row.percent_of_roofline)} of the ceiling", *against])


def _grouped(rows: Iterable[Row], key) -> dict:
    found = {}
    for value, part in groupby(rows, key):
        found.setdefault(value, []).extend(part)
    return found


def _origin(rows):
    last = rows[-1]
    versions = [f"torch {last.torch}"]
    versions += [f"triton {last.triton}"] if last.cuda and last.triton else []
    versions += [f"CUDA {last.cuda}, driver {last.driver}"] if last.cuda else []
    commits = dict.fromkeys(row.commit + ("" if row.dirty == "no" else " with changes") for row in rows)
    return f"{', '.join(versions)}; commit {', '.join(commits)}."


def _cells(line, rivals):
    row, ratios = line[-1], {r.rival: r.ratio for r in line}
    against = [_ratio(ratios[r]) if ratios.get(r) is not None else "-" for r in rivals]
    rate = "-" if row.gbps is None else f"{row.gbps:.3g}"
    return [row.case, row.dtype, row.backend, _time(row.p50_us), rate, _percent(row.percent_of_roofline), *against]


def _tally(rows):
    ratios = [r.ratio for r in rows if r.ratio is not None]
    lost = sum(ratio < 1 for ratio in ratios)
    return f"{lost} of {len(ratios)} comparisons are losses."


def _ratio(value):
    return f"{value:.2f}x" if value >= 1 else f"{value:.2g}x, a loss"


def _time(microseconds):
    unit, size = next((u, s) for u, s in (("s", 1e6), ("ms", 1e3), ("µs", 1)) if microseconds >= s or s == 1)
    return f"{microseconds / size:.3g} {unit}"


def _percent(value):
    return "-" if value is None else f"{value:.3g} %"


def _line(cells):
    return f"| {' | '.join(cells)} |"
