"""Commands that show and hand on what there is: inspect, compare, export, report, doctor."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch.nn.modules.batchnorm import _BatchNorm

from .. import inspection
from ..deployment import line
from ..doctor import print_report
from ..export import export_onnx, export_torch
from ..files import write_atomically
from ..report import read, render, say, write_figures
from ..serving import adapted_model
from ..workbench import open_checkpoint
from ._root import Anchor, File, Model, Out, Settings, Side, app, print_results


@app.command()
def inspect(
    file: File,
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
    file: File,
    out: Out = Path("model.onnx"),
    target: Annotated[str, typer.Option(help="onnx, tensorrt or torch (.pt2, with ttaq's own ops).")] = "onnx",
    fold: Annotated[bool, typer.Option(help="Fold BatchNorm into scales and biases (not for torch).")] = True,
    state: Annotated[
        Path | None, typer.Option(help="What `ttaq adapt` saved: the model is exported as it became.")
    ] = None,
    anchor: Anchor = None,
    size: Side = None,
    model: Model = None,
    config: Settings = None,
) -> None:
    """Write a packed checkpoint, as it is or adapted, as a file for other runtimes."""
    packed, _, _, chosen = open_checkpoint(file, model)
    side = size or chosen["size"]
    if side is None:
        raise ValueError(f"export: {file} does not say how large its images are; pass --size")
    if state is not None:
        packed = adapted_model(packed, state, anchor=anchor, preprocessing=chosen | {"size": side})
    images = torch.zeros(2, 3, side, side)
    if target == "torch":
        export_torch(packed, images, out)
    else:
        said = export_onnx(packed, images, out, fold=fold, target=target)
        for name, reason in said["kept"].items():
            typer.echo(f"not folded: {name}: {reason}", err=True)
    typer.echo(f"wrote {out}, {out.stat().st_size:,} bytes; {file} has {file.stat().st_size:,}")
    if state is not None:
        typer.echo(_adapted_note(packed, file), err=True)


def _adapted_note(model: torch.nn.Module, file: Path) -> str:
    """Say what a model that adapted, and adapts no more, holds and does not."""
    norms = any(isinstance(layer, _BatchNorm) for layer in model.modules())
    frozen = "with the statistics of BatchNorm as the adapter used them last, " if norms else ""
    return (
        f"note: it is the model as adapted, {frozen}and adapts no more; on images of other domains {file} may be better"
    )


@app.command()
def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="results.json of a demo, --json files of evaluate, .safetensors checkpoints, .jsonl of adapt."
        ),
    ],
    out: Out = Path("index.html"),
    figures: Annotated[Path | None, typer.Option(help="Folder for each figure as PNG and SVG.")] = None,
) -> None:
    """Render results, checkpoints and streams, of one file or several, into one self-contained page."""
    results, checkpoints, streams = read(*files)
    write_atomically(out, render(results, checkpoints, streams))
    if results:
        print_results(results)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for sentence in say(None, checkpoints):
        console.print(f"• {sentence}")
    for stream in streams:
        console.print(f"• {stream.name}: {stream.count()}.")
    console.print(f"wrote {out}, {out.stat().st_size:,} bytes")
    for path in write_figures(figures, results, checkpoints, streams) if figures else ():
        console.print(f"wrote {path}")


@app.command()
def doctor() -> None:
    """Say for every op which implementation runs on this machine, and why the others do not."""
    print_report(Console(highlight=False))
