"""The page: one HTML file with everything inside, for wide and narrow screens, by day and by night, and for print."""

import os
from collections.abc import Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template

from ..files import write_atomically
from .canvas import Look, as_png, as_svg
from .checkpoints import Checkpoint
from .findings import find
from .markup import Section
from .model_sections import checkpoint_cards, curves_section, describe_checkpoints, layers_section
from .results import Results
from .sections import cards_of, environment_section, errors_section, findings_section, tradeoff_section
from .stream_sections import stream_cards, stream_sections
from .streams import Stream
from .style import STYLE

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<header><p class="brand">ttaq</p><h1>$title</h1><p class="lead">$lead</p></header>
<section class="cards" aria-label="In short">$cards</section>
$sections
<footer>$footer</footer>
</main>
</body>
</html>
""")


def render(
    results: Results | None = None, checkpoints: Sequence[Checkpoint] = (), streams: Sequence[Stream] = ()
) -> bytes:
    """Make the page; it needs no network and no other file. A section stands where there is something to show.

    Args:
        results: Of any run; None where nothing was evaluated.
        checkpoints: Packed models: their layers and blocks.
        streams: That adapters met: counts, refusals, events and drift.

    Returns:
        UTF-8 HTML.

    Raises:
        ValueError: There is nothing to show, or matplotlib is not installed.
    """
    checkpoints, streams = list(checkpoints), list(streams)
    sections = sections_of(results, checkpoints, streams)
    cards = cards_of(results) if results else checkpoint_cards(checkpoints)
    text = _PAGE.substitute(
        title=escape(_title(results, checkpoints, streams)),
        style=STYLE.strip(),
        lead=escape(_lead(results, checkpoints, streams)),
        cards="".join([*cards, *stream_cards(streams)]),
        sections="\n".join(section.html() for section in sections),
        footer=escape(f"Written by ttaq {_version()}. This file holds all it shows."),
    )
    return text.encode()


def read(*paths: str | os.PathLike) -> tuple[Results | None, list[Checkpoint], list[Stream]]:
    """Read what `render` takes from files, each by its ending.

    Args:
        paths: .safetensors for packed checkpoints, .jsonl for JSON lines of `ttaq adapt` or `write_history`; others are
            results of `ttaq demo` and `ttaq evaluate --json`, which become one.

    Returns:
        Results, None without such a file; checkpoints; streams.

    Raises:
        ValueError: A file is missing or of another kind.
    """
    paths = [Path(path) for path in paths]
    checkpoints = [Checkpoint.read(path) for path in paths if path.suffix == ".safetensors"]
    streams = [Stream.read(path) for path in paths if path.suffix == ".jsonl"]
    others = [path for path in paths if path.suffix not in (".safetensors", ".jsonl")]
    return Results.read(*others) if others else None, checkpoints, streams


def write_figures(
    folder: str | os.PathLike,
    results: Results | None = None,
    checkpoints: Sequence[Checkpoint] = (),
    streams: Sequence[Stream] = (),
) -> list[Path]:
    """Write each figure of the page as a PNG and an SVG file, dark ink on light paper.

    Args:
        folder: Made if it is not there.
        results: As in `render`, as are checkpoints and streams.

    Returns:
        The files.

    Raises:
        ValueError: As in `render`.
    """
    written = []
    for section in sections_of(results, list(checkpoints), list(streams)):
        for picture in section.pictures:
            for kind, made in (("png", as_png), ("svg", as_svg)):
                path = Path(folder) / f"{picture.name}.{kind}"
                written.append(write_atomically(path, made(picture.plot(Look.of()))))
    return written


def sections_of(results: Results | None, checkpoints: list[Checkpoint], streams: list[Stream]) -> list[Section]:
    """Return the sections that there is something for, in the order of the page.

    Raises:
        ValueError: There is nothing.
    """
    if not (results or checkpoints or streams):
        raise ValueError("report: there is nothing to show; give results, checkpoints or streams")
    found = [findings_section(say(results))]
    if results:
        found += [errors_section(results), tradeoff_section(results)]
    if checkpoints:
        found += [layers_section(checkpoints), curves_section(checkpoints)]
    found += stream_sections(streams)
    if results:
        found.append(environment_section(results))
    return [section for section in found if section]


def say(results: Results | None, checkpoints: Sequence[Checkpoint] = ()) -> list[str]:
    """Say in sentences what was found: of results, then their notes, then of checkpoints."""
    sentences = [*find(results), *results.notes] if results else []
    return [*sentences, *describe_checkpoints(checkpoints)]


def _title(results, checkpoints, streams):
    if results:
        return results.title
    return ", ".join(one.name for one in (*checkpoints, *streams))


def _lead(results, checkpoints, streams):
    found = []
    if results:
        count = len(dict.fromkeys(name for errors in results.errors for name in errors))
        found.append(
            f"{len(results.rows)} evaluation{'s' * (len(results.rows) > 1)} on a stream of {count} "
            f"domain{'s, met one after another' if count > 1 else ''}. Models adapt while they predict; every error "
            "counts the prediction made before the update."
        )
    if checkpoints:
        found.append(f"{len(checkpoints)} packed checkpoint{'s' * (len(checkpoints) > 1)}: layers and reconstruction.")
    if streams:
        found.append(f"{len(streams)} stream{'s' * (len(streams) > 1)} of images: counts, events and drift.")
    return " ".join(found)


def _version():
    try:
        return version("ttaq")
    except PackageNotFoundError:
        return "of a source tree"
