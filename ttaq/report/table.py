"""The table on the terminal."""

from rich import box
from rich.console import Console
from rich.table import Table

from . import words
from .results import Line, Results

_WIDE = Console(width=1000)  # on which a table shows how wide it would be
_SIZES = ("file", "of float", "seconds")


def tabulate(results: Results, columns: int = 100) -> Table:
    """Make the table of mean errors, file sizes and seconds.

    Args:
        results: Of any run.
        columns: Of the terminal; a narrow one gets fewer of the table's.

    Returns:
        A rich Table; the best adapter of each line stands out.
    """
    for sizes, short in ((3, False), (1, False), (0, False), (0, True)):
        table = _across(results, sizes, short)
        if _WIDE.measure(table).maximum <= columns:
            return table
    return _down(results)


def _table(results: Results) -> Table:
    caption = "errors in percent, mean over the stream"
    return Table(title=results.title, title_style="bold", caption=caption, box=box.SIMPLE_HEAD, show_edge=False)


def _across(results: Results, sizes: int, short: bool) -> Table:
    """Give each adapter a column, and so many of `_SIZES`; short: method and form in one, no clean error."""
    adapters, lines, table = results.adapters(), results.lines(), _table(results)
    floats = {line.model: line.bytes for line in lines if line.form == "float"}
    for name in ("model", "bits", *(("made by",) if short else ("method", "form"))):
        table.add_column(name, no_wrap=True)
    for name in (*(() if short else ("clean",)), *adapters, *_SIZES[:sizes]):
        table.add_column(name, justify="right", no_wrap=True)
    for number, line in enumerate(lines):
        how = [words.maker(line)] if short else [words.method(line.method), line.form.removesuffix("-quantised")]
        clean = [] if short else [words.percent(line.clean_error)]
        cells = [line.model, words.width(line.bits), *how, *clean, *_errors(line, adapters), *_size(line, floats)]
        last = number + 1 == len(lines) or lines[number + 1].model != line.model
        table.add_row(*cells[: len(table.columns)], end_section=last)
    return table


def _down(results: Results) -> Table:
    """Put the adapters of a line below one another."""
    table = _table(results)
    table.add_column("model", overflow="fold")
    table.add_column("adapter", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    for line in results.lines():
        what = f"{line.model}\n{words.width(line.bits)} {words.maker(line)}"
        table.add_row(what, "\n".join(line.rows), "\n".join(_errors(line, line.rows)), end_section=True)
    return table


def _size(line: Line, floats):
    whole = floats.get(line.model)
    share = f"{line.bytes / whole:.2f}" if whole and line.bytes else words.DASH
    return words.kilobytes(line.bytes), share, f"{line.seconds:.1f}"


def _errors(line: Line, adapters):
    best = min(row["mean_error"] for row in line.rows.values())
    for adapter in adapters:
        error = line.error(adapter)
        stands_out = error == best and len(line.rows) > 1
        yield f"[bold green]{words.percent(error)}[/]" if stands_out else words.percent(error)
