"""Commands that run models: evaluate, adapt."""

import signal
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..cards import add_evaluation
from ..demo import make_bars
from ..deployment import MOST_PIXELS, Stop, answered, line, receive, walk
from ..distributed import join
from ..measurement import evaluate_file
from ..serving import adapt_stream
from ._root import (
    Adapter,
    Adapters,
    Anchor,
    Classes,
    Data,
    Device,
    File,
    Model,
    Order,
    Quiet,
    Seed,
    Settings,
    Side,
    app,
    names,
    print_results,
    progress_console,
    say,
)


@app.command()
def evaluate(
    file: File,
    data: Data,
    adapter: Adapters = "source",
    stream: Order = "corruptions",
    severity: Annotated[int, typer.Option(min=1, max=5)] = 5,
    images: Annotated[int | None, typer.Option(min=1, help="A domain; default: 1,000 or all there are.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that adapt at once.")] = 64,
    lr: Annotated[float | None, typer.Option(help="Of what learns with one; default: its own.")] = None,
    anchor: Anchor = None,
    model: Model = None,
    floats: Annotated[
        Path | None, typer.Option("--float", help="Weights of the float model, to be measured on the same streams.")
    ] = None,
    classes: Classes = None,
    seed: Seed = 0,
    device: Device = "cpu",
    json: Annotated[Path | None, typer.Option(help="Write the results here; `ttaq report` reads them.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the error of each domain here.")] = None,
    card: Annotated[bool, typer.Option(help="Enter the results in the checkpoint's card, where it has one.")] = True,
    quiet: Quiet = False,
    config: Settings = None,
) -> None:
    """Measure a packed checkpoint, adapting or not, on clean or corrupted images."""
    bars = make_bars(progress_console(quiet))

    def track(name, total):
        task = bars.add_task(name, total=total)
        return lambda count: bars.advance(task, count)

    with join(device) as team, bars:
        results = evaluate_file(
            file, data, adapter=adapter, stream=stream, severity=severity, images=images, batch_size=batch_size,
            lr=lr, anchor=anchor, reference=model, classes=names(classes), seed=seed,
            device=str(team.device) if team else device, track=track, team=team,
            floats=floats,
        )  # fmt: skip
    if team and not team.leads:
        return
    _print_domains(results)
    print_results(results)
    if json is not None:
        results.write(json)
    if csv is not None:
        results.write_csv(csv)
    if card:
        _enter(file, results)


def _print_domains(results) -> None:
    """Print the error of each domain, a column an adapter."""
    console = Console(highlight=False, soft_wrap=True)
    adapters = [row["adapter"] for row in results.rows]
    if len({row["form"] for row in results.rows}) > 1:
        adapters = [f"{row['form']} {row['adapter']}" for row in results.rows]
    if len(adapters) > 1:
        console.print(" " * 20 + "".join(f"{name:>12}" for name in adapters))
    for name in results.errors[0]:
        cells = [f"{errors[name]:6.1f} %" for errors in results.errors]
        console.print(f"{name:<20}" + (cells[0] if len(cells) == 1 else "".join(f"{cell:>12}" for cell in cells)))


def _enter(file, results) -> None:
    try:
        add_evaluation(file, results)
    except OSError as error:
        say(f"warning: the card of {file} was not written ({error})")


@app.command()
def adapt(
    file: File,
    source: Annotated[
        str, typer.Argument(help="A folder of images; or - for standard input: paths, one a line, or a tar archive.")
    ],
    adapter: Adapter = "tent",
    state: Annotated[
        Path | None,
        typer.Option(help="Of the adapter: read if it exists, written now and then and at the end."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="JSON lines are appended here; default: standard output.")
    ] = None,
    skip_done: Annotated[
        bool, typer.Option("--skip-done", help="Leave out the images, by name, that --out answers already.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that adapt at once.")] = 32,
    save_every: Annotated[int, typer.Option(min=1, help="Batches from one state to the next.")] = 50,
    telemetry: Annotated[int, typer.Option(min=0, help="Batches from one measurement of drift to the next.")] = 10,
    bank: Annotated[int, typer.Option(min=0, help="Domains to remember.")] = 0,
    anchor: Anchor = None,
    lr: Annotated[float | None, typer.Option(help="Of what descends a gradient; default: its own.")] = None,
    size: Side = None,
    most_pixels: Annotated[int, typer.Option(min=1, help="Of one image; larger ones are refused.")] = MOST_PIXELS,
    model: Model = None,
    classes: Classes = None,
    device: Device = "cpu",
    config: Settings = None,
) -> None:
    """Predict images as they come and adapt to them: predictions, refusals and drift events as JSON lines."""
    stop = Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop.handle)
    left = Counter()
    images = _leave_out(_open_source(source), _done(out, skip_done), left)
    with open(out, "a", encoding="utf-8") if out else nullcontext(sys.stdout) as target:
        counts = adapt_stream(
            file, images, lambda found: print(line(found), file=target, flush=True), adapter=adapter, state=state,
            anchor=anchor, lr=lr, telemetry=telemetry, bank=bank, batch_size=batch_size, save_every=save_every,
            most_pixels=most_pixels, size=size, reference=model, classes=names(classes), device=device, stop=stop,
        )  # fmt: skip
    ended = ", stopped by a signal" if stop.asked else ""
    before = f", after {counts['resumed']} before" if counts["resumed"] else ""
    skipped = f", {left.total()} left out as answered before" if skip_done else ""
    typer.echo(f"{counts['predicted']} images predicted{before}, {counts['refused']} refused{skipped}{ended}", err=True)


def _open_source(source: str):
    """Return the names and images of standard input or of a folder, of which it is said if it is empty."""
    if source == "-":
        return receive(sys.stdin.buffer)
    folder = Path(source)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "is not there"
        raise ValueError(f"adapt: {source} {what}; give a folder of images, or - for paths on standard input")
    if not any(path.is_file() for path in folder.rglob("*")):
        say(f"warning: adapt: the folder {source} holds no file, so there is nothing to predict")
    return walk(folder)


def _done(out: Path | None, skip_done: bool) -> set[str]:
    if not skip_done:
        return set()
    if out is None:
        raise ValueError("adapt: --skip-done reads the file of --out, and none was given; pass --out FILE with it")
    return answered(out)


def _leave_out(images, done: set[str], left: Counter):
    """Give the images whose names are not among those that are done, and count the others."""
    for name, item in images:
        if name in done:
            left["images"] += 1
        else:
            yield name, item
