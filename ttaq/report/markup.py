"""Pieces of a page: sections, tables that scroll by themselves, numbers in cells, facts."""

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import Any

from .canvas import Picture


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        title: Its heading.
        lead: Sentences under it.
        body: HTML after the pictures.
        pictures: Its figures.
    """

    title: str
    lead: str = ""
    body: str = ""
    pictures: tuple[Picture, ...] = ()

    def html(self) -> str:
        """Return a <section>."""
        lead = f"<p>{escape(self.lead)}</p>" if self.lead else ""
        pictures = "".join(picture.html() for picture in self.pictures)
        return f"<section><h2>{escape(self.title)}</h2>{lead}{pictures}{self.body}</section>"


def table(what: str, head: str, rows: Iterable[str], kind: str = "") -> str:
    """Return a table in a box that scrolls by itself, with the keyboard too.

    Args:
        what: It holds.
        head: Cells of its first row.
        rows: Each a <tr>.
        kind: Its class.
    """
    shown = f' class="{kind}"' if kind else ""
    box = f'<div class="scroll" role="region" aria-label="{escape(what)}" tabindex="0">'
    return (
        f'<p class="about">{escape(what)}</p>{box}'
        f"<table{shown}><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def heads(words: Iterable[str] = (), numbers: Iterable[str] = ()) -> str:
    """Return the heads of columns of words, then those of columns of numbers."""
    texts = "".join(f'<th scope="col">{escape(name)}</th>' for name in words)
    return texts + "".join(f'<th class="n" scope="col">{escape(name)}</th>' for name in numbers)


def row(first: str, *cells: str, kind: str = "") -> str:
    """Return a row that its first cell, a text, names."""
    return f'<tr{kind}><th scope="row">{escape(first)}</th>{"".join(cells)}</tr>'


def word(text: str) -> str:
    """Return a cell of text."""
    return f"<td>{escape(text)}</td>"


def number(text: str, bold: bool = False) -> str:
    """Return a cell whose digits stand below those of the others."""
    return f'<td class="n">{f"<b>{escape(text)}</b>" if bold else escape(text)}</td>'


def card(figure: str, caption: str) -> str:
    """Return a large figure with what it is."""
    return f'<div class="card"><b>{escape(figure)}</b><span>{escape(caption)}</span></div>'


def items(sentences: Iterable[str]) -> str:
    """Return a list of sentences."""
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>"


def folded(summary: str, body: str) -> str:
    """Return what opens on demand, and in print."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def facts(values: dict[str, Any]) -> str:
    """Return names with their values."""
    shown = {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in values.items()}
    return f"<dl>{''.join(f'<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>' for k, v in shown.items())}</dl>"


def spark(values: Iterable[float], what: str) -> str:
    """Return a cell with a small curve from 0 to its highest value."""
    values = list(values)
    top = max([*values, 1e-30])
    points = " ".join(
        f"{2 + 92 * k / max(1, len(values) - 1):.1f},{22 - 20 * v / top:.1f}" for k, v in enumerate(values)
    )
    return (
        f'<td class="n"><svg class="spark" viewBox="0 0 96 24" role="img" aria-label="{escape(what)}">'
        f'<polyline points="{points}"/></svg></td>'
    )
