"""The sections on what was evaluated: errors, their costs, and what it ran on."""

from . import words
from .figure import picture_errors
from .findings import headline
from .markup import Section, card, facts, heads, items, number, row, table, word
from .results import Line, Results
from .tradeoff import COSTS, costs_of, front_of, picture_tradeoff, points_of


def cards_of(results: Results) -> list[str]:
    """Put the headline of each model in large figures."""
    lines, found = results.lines(), []
    for model in dict.fromkeys(line.model for line in lines):
        own = [line for line in lines if line.model == model]
        line = headline(own)
        whole = next((other for other in own if other.form == "float"), None)
        name = f"{line.model} {words.width(line.bits)}, {line.form}"
        best = min(line.rows, key=line.error)
        if best != "source" and line.error("source") is not None:
            change = f"{line.error('source'):.1f} → {line.error(best):.1f} %"
            found.append(card(change, f"{name}: error, as it is → {best}"))
        else:
            found.append(card(f"{line.error(best):.1f} %", f"{name}: error with {best}"))
        if whole and whole is not line and whole.bytes and line.bytes:
            sizes = f"{line.bytes / whole.bytes:.2f} of {words.kilobytes(whole.bytes)} in float"
            found.append(card(words.kilobytes(line.bytes), f"{name}: file, {sizes}"))
    return found


def errors_section(results: Results) -> Section:
    """Show the errors of every line: figure, table of means, table of domains."""
    lines = results.lines()
    best = "the best adapter of each line is bold; " if len(results.adapters()) > 1 else ""
    about = (
        f"Error in percent on clean images and mean on the stream; {best}seconds: predicting and adapting, all adapters"
    )
    tables = table(about, *_means(results, lines)) + table(
        "Error in each domain in percent; the stronger the colour, the more", *_domains(lines), kind="heat"
    )
    return Section("Error along the stream", body=tables, pictures=(picture_errors(results),))


def tradeoff_section(results: Results) -> Section | None:
    """Set error against bytes and seconds an image, where two points differ in one of them."""
    points = points_of(results)
    costs = costs_of(points)
    if not costs:
        return None
    fronts = {cost: front_of(points, cost) for cost in costs}
    names = {"bytes": "size", "seconds": "time"}
    rows = []
    for point in sorted(points, key=lambda p: p.error):
        on = [names[cost] for cost in costs if point in fronts[cost]]
        cells = [number(words.percent(point.error)), number(words.kilobytes(point.bytes))]
        cells += [number(words.milliseconds(point.seconds)), word(" and ".join(on) or words.DASH)]
        rows.append(row(point.model, word(words.width(point.bits)), word(point.form), word(point.adapter), *cells))
    head = heads(("model", "bits", "form", "adapter"), ("error, %", "file", "ms an image")) + heads(
        ("on the front of",)
    )
    what = " and ".join(COSTS[cost] for cost in costs)
    return Section(
        "What accuracy costs",
        f"Every packed and every float model with each adapter: mean error on the stream against {what}.",
        table("Points, by error", head, rows),
        (picture_tradeoff(points),),
    )


def findings_section(sentences: list[str]) -> Section | None:
    """Say what the numbers say."""
    return Section("What the numbers say", body=items(sentences)) if sentences else None


def environment_section(results: Results) -> Section | None:
    """Name the settings, the machine and what took how long."""
    stages = {name: f"{seconds:.1f}" for name, seconds in results.stages.items()}
    parts = {"Settings": results.settings, "Machine": results.machine, "Seconds": stages}
    shown = "".join(f"<div><h3>{name}</h3>{facts(values)}</div>" for name, values in parts.items() if values)
    return Section("Environment", body=f'<div class="facts">{shown}</div>') if shown else None


def _means(results, lines):
    adapters = results.adapters()
    head = heads(("model", "bits", "method", "form"), ("clean", *adapters, "file", "seconds"))
    rows = []
    for line, new in _with_breaks(lines):
        best = min(entry["mean_error"] for entry in line.rows.values())
        errors = [number(words.percent(line.error(a)), line.error(a) == best and len(line.rows) > 1) for a in adapters]
        ends = [number(words.kilobytes(line.bytes)), number(f"{line.seconds:.1f}")]
        clean = number(words.percent(line.clean_error))
        rows.append(row(line.model, *_names(line), clean, *errors, *ends, kind=new))
    return head, rows


def _domains(lines: list[Line]):
    names = list(dict.fromkeys(name for line in lines for errors in line.errors.values() for name in errors))
    head = heads(("model", "bits", "method", "form", "adapter"), map(words.domain, names))
    rows = []
    for line, new in _with_breaks(lines):
        for place, (adapter, errors) in enumerate(line.errors.items()):
            cells = [_heat(errors.get(name)) for name in names]
            rows.append(row(line.model, *_names(line), word(adapter), *cells, kind="" if place else new))
    return head, rows


def _with_breaks(lines):
    """Pair each line with the attribute that draws a rule above it where a model begins."""
    before = None
    for line in lines:
        yield line, "" if before in (None, line.model) else ' class="new"'
        before = line.model


def _names(line: Line):
    return [word(text) for text in (words.width(line.bits), words.method(line.method), line.form)]


def _heat(error: float | None) -> str:
    if error is None:
        return number(words.DASH)
    return f'<td class="n" style="--v:{min(1.0, error / 100):.3f}">{error:.0f}</td>'
