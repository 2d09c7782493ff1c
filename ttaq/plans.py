"""What quantising would do, found out by running the float model on one image and learning nothing: `--dry-run`."""

import warnings
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

from rich import box
from rich.table import Table

from .blocks import block_input, find_blocks
from .cards import card_path
from .jobs import Job, check
from .layers import QuantMatMul
from .pacing import seconds_of
from .pipeline import METHODS, SPLIT
from .preparation import prepare
from .schedules import Schedule
from .sources import describe_preprocessing
from .spec import Recipe

_MIB = 2**20
_BLOCKWISE, _REFINING = ("ttaq", "pem", "pcr", "qdrop", "gptq"), ("ttaq", "pcr")
_CACHED = 3  # tensors of a block that are kept: its input in the quantised and in the float model, and its target


@dataclass(frozen=True)
class Plan:
    """A plan to read before hours are spent.

    Attributes:
        facts: Name to text, in the order in which they are printed.
        blocks: For each block its name, number of layers, their widths, their weights and the bytes of its input on
            all images.
        left_out: What would stay in float, with the reason.
    """

    facts: dict[str, str]
    blocks: list[tuple[str, int, str, int, int]]
    left_out: dict[str, str] = field(default_factory=dict)


def plan(job: Job, out: str | Path, recipe: str | Recipe, *, method: str, steps=None, budget=None, **settings) -> Plan:
    """Say what `jobs.carry_out` would do with the same arguments.

    Args:
        job: From `open_job`, not one whose weights stay in their file.
        out: Where the checkpoint would be written.
        recipe: "w4a4" and the like, or a Recipe.
        method: One of `pipeline.METHODS`.
        steps: Of reconstruction.
        budget: Time to take.
        settings: The other arguments, which are repeated as they are.

    Raises:
        ValueError: The model, the recipe or the method does not serve.
    """
    if method not in METHODS:
        raise ValueError(f"quantize: method must be one of {', '.join(METHODS)}, got {method!r}")
    if job.streams:
        raise ValueError("quantize: --dry-run runs the float model on an image; leave out --low-memory")
    recipe = Recipe.parse(recipe)
    with warnings.catch_warnings(action="ignore"):  # what they say is in `left_out`
        prepared = prepare(job.model, recipe).eval()
    image, layers = job.batches[0][:1], prepared.ttaq_report["layers"]
    blocks = []
    for block in find_blocks(prepared, image):
        widths = [layers[name] for name in block.layers if name in layers]
        weights = sum(prepared.get_submodule(name).weight.numel() for name in block.layers)
        x, _ = block_input(prepared, block, image)
        held = x.numel() * x.element_size() * job.images
        blocks.append((block.name, len(block.layers), _widths(widths), weights, held))
    facts = {
        "model": f"{job.reference}, {job.float_bytes / _MIB:.1f} MiB in float"
        + ("" if job.weights else ", random weights"),
        "images": f"{job.images} of the {job.available} in {job.data}, {'x'.join(map(str, image.shape[2:]))}",
        "prepared": describe_preprocessing(job.preprocessing),
        "float error": _checked(check(job)),
        "recipe": str(recipe),
        "method": f"{method}: {METHODS[method]}",
        **_work(method, steps, budget, len(blocks)),
    }
    if method in _BLOCKWISE:
        facts["kept of a block"] = f"up to {_CACHED * max(row[4] for row in blocks) / _MIB:.1f} MiB on all images"
    facts |= {name: str(value) for name, value in settings.items() if value is not None}
    facts["checkpoint"] = f"{out}, about {_size(prepared) / _MIB:.1f} MiB" + (
        ", in place of the file that is there" if Path(out).exists() else ""
    )
    facts["card"] = str(card_path(out))
    return Plan(facts, blocks, prepared.ttaq_report["left_out"])


def tabulate_plan(found: Plan, columns: int = 100) -> Table:
    """Make a rich table of the blocks; a narrow terminal gets fewer columns."""
    table, wide = Table(box=box.SIMPLE_HEAD, show_edge=False), columns >= 72
    table.add_column("block", overflow="fold")
    for name in (*(("layers",) if wide else ()), "widths", "weights", *(("input, MiB",) if wide else ())):
        table.add_column(name, justify="right", no_wrap=name != "widths")
    for name, layers, widths, weights, held in found.blocks:
        more = ([str(layers)], [f"{held / _MIB:.1f}"]) if wide else ([], [])
        table.add_row(name, *more[0], widths, f"{weights:,}", *more[1])
    return table


def _checked(found):
    return f"{found['float_error']:.1f} % on {found['images']} of these images"


def _work(method, steps, budget, blocks):
    """Say how long learning lasts, in steps or in time."""
    if method == "rtn":
        return {"work": "nothing is learned"}
    if method == "gptq":
        return {"work": f"{blocks} blocks in closed form"}
    if budget is not None:
        refined = f", {1 - SPLIT:.0%} of it for the whole network" if method in _REFINING else ""
        return {"work": f"{seconds_of(budget):g} s{refined}; the steps are what fits"}
    whole = steps or Schedule.steps
    each = max(1, round(SPLIT * whole)) if method in _REFINING else whole
    more = f" and {each} of the whole network" if method in _REFINING else ""
    return {"work": f"{blocks} blocks of {each} steps{more}"}


def _widths(layers):
    """Name the widths of layers, the most frequent first."""
    texts = [f"W{row['weight_bits'] or 16}A{row['activation_bits'] or 16}" for row in layers]
    return ", ".join(sorted(set(texts), key=lambda text: -texts.count(text)))


def _size(prepared):
    """Estimate the bytes of the checkpoint, its header left out: codes, their grids, and what stays in float."""
    total, counted = 0, set()
    for module in prepared.modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is None or isinstance(module, QuantMatMul):
            continue
        spec, rows = quantizer.spec, module.weight.shape[0]
        row = module.weight[0].numel()
        total += rows * ceil(row * spec.bits / 8)
        counted.add(id(module.weight))
    rest = [t for t in (*prepared.parameters(), *prepared.buffers()) if id(t) not in counted]
    return total + sum(t.numel() * t.element_size() for t in rest)
