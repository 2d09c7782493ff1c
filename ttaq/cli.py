"""The command line: ttaq demo | quantize | evaluate | adapt | inspect | compare | export | report | doctor."""

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from typer.core import TyperGroup

from . import __version__, inspection
from .adaptation import METHODS
from .demo import Settings, make_bars, run_demo
from .deployment import MOST_PIXELS, Stop, line, receive, walk
from .distributed import join
from .doctor import print_report
from .export import export_onnx, export_torch
from .files import write_atomically
from .pipeline import decisions
from .report import Results, find, render, tabulate
from .serving import adapt_stream
from .streams import STREAMS
from .workbench import ANCHORED, evaluate_file, open_checkpoint, quantize_reference


class _Sentences(TyperGroup):
    """Commands whose bad input ends in one sentence and exit code 2."""

    def invoke(self, ctx):
        """Run the command; turn what it refuses into a sentence."""
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"ttaq: {error}")
            raise typer.Exit(2) from error


app = typer.Typer(cls=_Sentences, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


def main() -> None:
    """Run the command line: the console script `ttaq`."""
    sys.path.insert(0, os.getcwd())  # "package.module:function" may lie where the user stands
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ttaq {__version__}")
        raise typer.Exit()


@app.callback(
    help="Quantise vision models to 2-8 bits, and keep them accurate while the world they look at changes.",
)
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same numbers.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Data = Annotated[Path, typer.Option(help="Class folders or an .npz file; evaluate also takes CIFAR-C and ImageNet-C.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Classes = Annotated[
    Path | None, typer.Option(help="Text file: one class folder's name a line, in the order of the model's outputs.")
]
Triple = Annotated[str | None, typer.Option(help="Three numbers with commas between, of each channel, in 0..1.")]


@app.command()
def demo(
    out: Out = Path("ttaq-demo"),
    images: Annotated[int, typer.Option(min=1, max=500, help="Of each corruption.")] = Settings.images,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that adapt at once.")] = Settings.batch_size,
    severity: Annotated[int, typer.Option(min=1, max=5)] = Settings.severity,
    steps: Annotated[
        int, typer.Option(min=1, help="Of reconstruction; ttaq gives half to each block, half to the whole.")
    ] = Settings.steps,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of training; default: what each needs.")] = None,
    seed: Seed = Settings.seed,
    quiet: Quiet = False,
) -> None:
    """Show the whole road on handwritten digits: train, quantise, pack, and adapt on a stream of 15 corruptions."""
    settings = Settings(
        images=images, batch_size=batch_size, severity=severity, steps=steps, epochs=epochs, seed=seed
    )  # fmt: skip
    results = run_demo(out, settings, console=_progress_console(quiet))
    _print(results)
    Console(soft_wrap=True, highlight=False).print(f"wrote {out}/results.json, figure.png and index.html")


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="timm:NAME, torchvision:NAME or package.module:function.")],
    data: Data,
    out: Out = Path("model.safetensors"),
    bits: Annotated[str, typer.Option(help="Weight and activation bits.")] = "w4a4",
    weights: Annotated[Path | None, typer.Option(help="Local .safetensors or .pth state_dict.")] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Handed to the model's builder.")] = None,
    images: Annotated[int, typer.Option(min=1, help="To calibrate on.")] = 1024,
    method: Annotated[
        str, typer.Option(help="ttaq, pem, pcr, qdrop, gptq (seconds a block) or rtn (round to nearest).")
    ] = "ttaq",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of reconstruction; ttaq gives half to each block, half to the whole.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Time to quantise in, such as 90s, 5min or 1h.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="File written after each block; a killed run goes on from it.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Side of the images; default: the model's own.")] = None,
    mean: Triple = None,
    std: Triple = None,
    classes: Classes = None,
    seed: Seed = 0,
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Quantise a model on a few hundred clean images and write one packed checkpoint.

    Under `torchrun --nproc-per-node N -m ttaq quantize ...` N processes share the images and the work.
    """
    with join(device) as team:
        report = quantize_reference(
            model, data, out, bits=bits, method=method, weights=weights, num_classes=num_classes, images=images,
            steps=steps, size=size, mean=_triple("mean", mean), std=_triple("std", std), classes=_names(classes),
            seed=seed, device=str(team.device) if team else device, budget=budget, resume=resume, team=team,
            progress=not quiet and Console().is_terminal,
        )  # fmt: skip
    if team and not team.leads:
        return
    if weights is None:
        typer.echo("note: no --weights were given, so the model's weights are random", err=True)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    share = report["file_bytes"] / report["float_bytes"]
    console.print(
        f"{model} at {bits} ({method}): {len(report['packed'])} layers packed, calibrated on "
        f"{report['calibration']['images']} images"
    )
    console.print(f"{out}: {report['file_bytes']:,} bytes, {share:.3f} of {report['float_bytes']:,} in float")
    for decision in decisions(report):
        console.print(decision)
    for name, reason in report["left_out"].items():
        console.print(f"left in float: {name}: {reason}")


@app.command()
def evaluate(
    file: Annotated[Path, typer.Argument(help="A checkpoint that `ttaq quantize` wrote.")],
    data: Data,
    adapter: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}.")] = "source",
    stream: Annotated[
        str,
        typer.Option(
            help=f"clean, corruptions (all, one after another), {', '.join(STREAMS)}, or names with commas between."
        ),
    ] = "corruptions",
    severity: Annotated[int, typer.Option(min=1, max=5)] = 5,
    images: Annotated[int | None, typer.Option(min=1, help="A domain; default: 1,000 or all there are.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that adapt at once.")] = 64,
    lr: Annotated[float | None, typer.Option(help="Of what learns with one; default: its own.")] = None,
    anchor: Annotated[
        Path | None,
        typer.Option(
            help=f"Clean images, class folders or an .npz file, a few hundred of which {ANCHORED} take for the source."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="What builds the architecture, if not what the file says.")] = None,
    classes: Classes = None,
    seed: Seed = 0,
    device: Device = "cpu",
    json: Annotated[Path | None, typer.Option(help="Write the results here; `ttaq report` reads them.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the error of each domain here.")] = None,
    quiet: Quiet = False,
) -> None:
    """Measure a packed checkpoint, adapting or not, on clean or corrupted images."""
    bars = make_bars(_progress_console(quiet))

    def track(name, total):
        task = bars.add_task(name, total=total)
        return lambda count: bars.advance(task, count)

    with bars:
        results = evaluate_file(
            file, data, adapter=adapter, stream=stream, severity=severity, images=images, batch_size=batch_size,
            lr=lr, anchor=anchor, reference=model, classes=_names(classes), seed=seed, device=device, track=track,
        )  # fmt: skip
    console = Console(highlight=False)
    for name, error in results.errors[0].items():
        console.print(f"{name:<20}{error:6.1f} %")
    _print(results)
    if json is not None:
        results.write(json)
    if csv is not None:
        results.write_csv(csv)


@app.command()
def adapt(
    file: Annotated[Path, typer.Argument(help="A checkpoint that `ttaq quantize` wrote.")],
    source: Annotated[
        str, typer.Argument(help="A folder of images; or - for standard input: paths, one a line, or a tar archive.")
    ],
    adapter: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}.")] = "tent",
    state: Annotated[
        Path | None,
        typer.Option(help="Of the adapter: read if it exists, written now and then and at the end."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON lines; default: standard output.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that adapt at once.")] = 32,
    save_every: Annotated[int, typer.Option(min=1, help="Batches from one state to the next.")] = 50,
    telemetry: Annotated[int, typer.Option(min=0, help="Batches from one measurement of drift to the next.")] = 10,
    bank: Annotated[int, typer.Option(min=0, help="Domains to remember.")] = 0,
    anchor: Annotated[
        Path | None, typer.Option(help="Clean images for a method that takes an anchor: class folders or an .npz file.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Of what descends a gradient; default: its own.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Side of the images; default: what the file says.")] = None,
    most_pixels: Annotated[int, typer.Option(min=1, help="Of one image; larger ones are refused.")] = MOST_PIXELS,
    model: Annotated[str | None, typer.Option(help="What builds the architecture, if not what the file says.")] = None,
    classes: Classes = None,
    device: Device = "cpu",
) -> None:
    """Predict images as they come and adapt to them: predictions, refusals and drift events as JSON lines."""
    stop = Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop.handle)
    images = receive(sys.stdin.buffer) if source == "-" else walk(Path(source))
    with open(out, "a", encoding="utf-8") if out else nullcontext(sys.stdout) as target:
        counts = adapt_stream(
            file, images, lambda found: print(line(found), file=target, flush=True), adapter=adapter, state=state,
            anchor=anchor, lr=lr, telemetry=telemetry, bank=bank, batch_size=batch_size, save_every=save_every,
            most_pixels=most_pixels, size=size, reference=model, classes=_names(classes), device=device, stop=stop,
        )  # fmt: skip
    ended = ", stopped by a signal" if stop.asked else ""
    before = f", after {counts['resumed']} before" if counts["resumed"] else ""
    typer.echo(f"{counts['predicted']} images predicted{before}, {counts['refused']} refused{ended}", err=True)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A checkpoint that `ttaq quantize` wrote.")],
    json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Say what a packed checkpoint is: bits, sizes, SQNR of each layer, recipe, what was decided and left out."""
    found = inspection.inspect(file)
    if json:
        typer.echo(line(found.to_json()))
        return
    console = Console(highlight=False, markup=False)
    for name, text in found.facts.items():
        console.print(f"{name}: {text}", soft_wrap=True)
    console.print(inspection.tabulate_layers(found, console.width))
    for note in found.notes:
        console.print(f"• {note}", soft_wrap=True)


@app.command()
def compare(
    one: Annotated[Path, typer.Argument(help="A checkpoint.")],
    other: Annotated[Path, typer.Argument(help="Another.")],
) -> None:
    """Set two checkpoints side by side: bits and SQNR of the layers that differ, sizes, recipes."""
    table, said = inspection.compare(inspection.inspect(one), inspection.inspect(other))
    console = Console(highlight=False, markup=False)
    for sentence in said:
        console.print(sentence, soft_wrap=True)
    if table.row_count:
        console.print(table)


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="A checkpoint that `ttaq quantize` wrote.")],
    out: Out = Path("model.onnx"),
    target: Annotated[str, typer.Option(help="onnx, tensorrt or torch (.pt2, with ttaq's own ops).")] = "onnx",
    fold: Annotated[bool, typer.Option(help="Fold BatchNorm into scales and biases (not for torch).")] = True,
    size: Annotated[int | None, typer.Option(min=1, help="Side of the images; default: what the file says.")] = None,
    model: Annotated[str | None, typer.Option(help="What builds the architecture, if not what the file says.")] = None,
) -> None:
    """Write a packed checkpoint as a file for other runtimes."""
    packed, _, _, chosen = open_checkpoint(file, model)
    side = size or chosen["size"]
    if side is None:
        raise ValueError(f"export: {file} does not say how large its images are; pass --size")
    images = torch.zeros(2, 3, side, side)
    if target == "torch":
        export_torch(packed, images, out)
    else:
        said = export_onnx(packed, images, out, fold=fold, target=target)
        for name, reason in said["kept"].items():
            typer.echo(f"not folded: {name}: {reason}", err=True)
    typer.echo(f"wrote {out}, {out.stat().st_size:,} bytes; {file} has {file.stat().st_size:,}")


@app.command()
def report(
    files: Annotated[list[Path], typer.Argument(help="results.json of a demo, or --json files of evaluate.")],
    out: Out = Path("index.html"),
) -> None:
    """Render results, of one file or several, into one self-contained page."""
    results = Results.read(*files)
    write_atomically(out, render(results))
    _print(results)
    Console(soft_wrap=True, highlight=False).print(f"wrote {out}")


@app.command()
def doctor() -> None:
    """Say for every op which implementation runs on this machine, and why the others do not."""
    print_report(Console(highlight=False))


def _print(results: Results) -> None:
    console = Console(highlight=False)
    console.print(tabulate(results, console.width))
    for sentence in [*find(results), *results.notes]:
        console.print(f"• {sentence}", markup=False)


def _progress_console(quiet: bool) -> Console | None:
    return None if quiet else Console(stderr=True)


def _triple(name: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3:
        raise ValueError(f"--{name}: wanted three numbers such as 0.485,0.456,0.406, got {text!r}")
    return values


def _names(path: Path | None) -> list[str] | None:
    return None if path is None else path.read_text(encoding="utf-8").splitlines()
