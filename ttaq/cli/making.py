"""Commands that make models: demo, quantize."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .. import demo as show
from ..demo import run_demo
from ..distributed import join
from ..jobs import carry_out, open_job
from ..pipeline import decisions
from ..plans import plan, tabulate_plan
from ..sources import describe_preprocessing
from ..spec import Recipe
from ._root import (
    Classes,
    Data,
    Device,
    Method,
    Out,
    Quiet,
    Seed,
    Settings,
    Triple,
    app,
    names,
    print_results,
    progress_console,
    triple,
)

_DEMO, _RECIPE, _LOOP, _IMAGES = show.Settings, "Recipe", "Time and memory", "Images"


@app.command()
def demo(
    out: Out = Path("ttaq-demo"),
    images: Annotated[int, typer.Option(min=1, max=500, help="Of each corruption.")] = _DEMO.images,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that adapt at once.")] = _DEMO.batch_size,
    severity: Annotated[int, typer.Option(min=1, max=5)] = _DEMO.severity,
    steps: Annotated[
        int, typer.Option(min=1, help="Of reconstruction; ttaq gives half to each block, half to the whole.")
    ] = _DEMO.steps,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of training; default: what each needs.")] = None,
    seed: Seed = _DEMO.seed,
    quiet: Quiet = False,
    config: Settings = None,
) -> None:
    """Show the whole road on handwritten digits: train, quantise, pack, and adapt on a stream of 15 corruptions."""
    settings = _DEMO(
        images=images, batch_size=batch_size, severity=severity, steps=steps, epochs=epochs, seed=seed
    )  # fmt: skip
    results = run_demo(out, settings, console=progress_console(quiet))
    print_results(results)
    Console(soft_wrap=True, highlight=False).print(f"wrote {out}/results.json, figure.png and index.html")


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="timm:NAME, torchvision:NAME or package.module:function.")],
    data: Data,
    out: Out = Path("model.safetensors"),
    bits: Annotated[str, typer.Option(help="Weight and activation bits.")] = "w4a4",
    weights: Annotated[Path | None, typer.Option(help="Local .safetensors or .pth state_dict.")] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Handed to the model's builder.")] = None,
    method: Method = "ttaq",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of reconstruction; ttaq gives half to each block, half to the whole.")
    ] = None,
    safety: Annotated[
        str, typer.Option(help="Measures for transformers: auto, off, or names with commas between.")
    ] = "auto",
    seed: Seed = 0,
    device: Device = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, and write nothing.")] = False,
    quiet: Quiet = False,
    config: Settings = None,
    images: Annotated[int, typer.Option(min=1, help="To calibrate on.", rich_help_panel=_IMAGES)] = 1024,
    size: Annotated[
        int | None, typer.Option(min=1, help="Side; default: the model's own.", rich_help_panel=_IMAGES)
    ] = None,
    crop: Annotated[
        float | None,
        typer.Option(
            min=0.1, max=1, help="Share of the shorter side that is cut out; default: the model's own.",
            rich_help_panel=_IMAGES,
        ),
    ] = None,
    mean: Triple = None,
    std: Triple = None,
    classes: Classes = None,
    group: Annotated[
        int, typer.Option(min=0, help="Inputs that share a weight scale in linear layers.", rich_help_panel=_RECIPE)
    ] = 0,
    per_token: Annotated[
        bool, typer.Option("--per-token", help="A scale for each token, measured anew.", rich_help_panel=_RECIPE)
    ] = False,
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="Zeros at the middle code, for TensorRT.", rich_help_panel=_RECIPE)
    ] = False,
    first_last: Annotated[
        int, typer.Option(min=0, max=8, help="Least bits of the first and the last layer; 0: as the others.",
                          rich_help_panel=_RECIPE)
    ] = 8,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Pattern of layers that stay in float.", rich_help_panel=_RECIPE)
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option(help="Widths of layers, as in 'layer1.*=w8a8'.", rich_help_panel=_RECIPE)
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Time to quantise in, such as 90s, 5min or 1h.", rich_help_panel=_LOOP)
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="File written after each block; a killed run goes on from it.", rich_help_panel=_LOOP),
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="Bytes kept of a block on the device, such as 2GiB.", rich_help_panel=_LOOP)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of products while learning: float32 or bfloat16.", rich_help_panel=_LOOP)
    ] = None,
    low_memory: Annotated[
        bool,
        typer.Option("--low-memory", help="Read --weights block by block (qdrop, gptq, rtn).", rich_help_panel=_LOOP),
    ] = False,
) -> None:  # fmt: skip
    """Quantise a model on a few hundred clean images; write one packed checkpoint, and its card (.card.json).

    Under `torchrun --nproc-per-node N -m ttaq quantize ...` N processes share the images and the work.
    """
    recipe = Recipe.parse(
        bits, group=group, token=per_token, symmetric=symmetric, first_last=first_last or None,
        exclude=tuple(exclude or ()), overrides=_overrides(override or ()),
    )  # fmt: skip
    loop = {"steps": steps, "budget": budget, "resume": resume, "cache": cache, "dtype": dtype}
    loop |= {} if safety == "auto" else {"safety": safety if safety == "off" else safety.split(",")}
    with join(device) as team:
        job = open_job(
            model, data, weights=weights, low_memory=low_memory, num_classes=num_classes, images=images, size=size,
            crop=crop, mean=triple("mean", mean), std=triple("std", std), classes=names(classes), seed=seed,
            device=str(team.device) if team else device,
        )  # fmt: skip
        if dry_run:
            if not team or team.leads:
                _print_plan(plan(job, out, recipe, method=method, **loop))
            return
        shown = not quiet and Console().is_terminal
        report = carry_out(job, out, recipe, method=method, seed=seed, progress=shown, team=team, **loop)
    if not team or team.leads:
        _print_report(job, out, bits, method, report)


def _overrides(texts) -> dict[str, str]:
    """Read PATTERN=wXaY texts."""
    for text in texts:
        if "=" not in text:
            raise ValueError(f"--override: wanted a text such as layer1.*=w8a8, got {text!r}")
    return dict(text.rsplit("=", 1) for text in texts)


def _print_plan(found) -> None:
    console = Console(highlight=False, markup=False)
    for name, text in found.facts.items():
        console.print(f"{name}: {text}", soft_wrap=True)
    console.print(tabulate_plan(found, console.width))
    for name, reason in found.left_out.items():
        console.print(f"left in float: {name}: {reason}", soft_wrap=True)
    console.print("nothing was learned or written: leave out --dry-run to go", soft_wrap=True)


def _print_report(job, out, bits, method, report) -> None:
    if job.weights is None:
        typer.echo("note: no --weights were given, so the model's weights are random", err=True)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    share = report["file_bytes"] / report["float_bytes"]
    console.print(
        f"{job.reference} at {bits} ({method}): {len(report['packed'])} layers packed, calibrated on "
        f"{report['calibration']['images']} images"
    )
    console.print(f"{out}: {report['file_bytes']:,} bytes, {share:.3f} of {report['float_bytes']:,} in float")
    console.print(f"images: {describe_preprocessing(job.preprocessing)}")
    if found := report["check"]:
        console.print(
            f"on {found['images']} calibration images: {found['error']:.1f} % error, {found['float_error']:.1f} % in "
            f"float; the same prediction on {found['agreement']:.1f} %"
        )
    for decision in decisions(report):
        console.print(decision)
    for name, reason in report["left_out"].items():
        console.print(f"left in float: {name}: {reason}")
