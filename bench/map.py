"""Who wins where: packed linear layers of N = K against the fastest of torch's, over sizes and numbers of rows."""

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from ttaq.kernels import dequantised as dq
from ttaq.kernels import packed_linear as pl

from . import machine, packed, rivals, rows
from .case import Case, forward
from .measure import measure
from .rows import Row

OP = "map"
SIZES = (256, 512, 768, 1024, 2048, 3072, 4096)
ROWS = (1, 4, 16, 64, 197, 788, 1576)  # images of a ViT: 197 tokens each
WIDTHS = {"W4A8": (4, 8), "W4, float input": (4, None)}
_SHORT = {
    "torch float32": "float32",
    "torch bfloat16": "bfloat16",
    "torch dynamic int8": "int8",
    "torch._int_mm": "int8",
}


def case(size: int, m: int, widths: str, device: str) -> Case:
    """Build the case of one cell; on a GPU bfloat16, `torch._int_mm` and our other way are the rivals."""
    found = packed._linear_case(f"{size}x{size}", m, size, size, *WIDTHS[widths], device)
    if device == "cpu":
        return found
    against = {name: bind for name, bind in found.rivals.items() if name != "torch float32"}
    if WIDTHS[widths][1] is None:  # the other side of the rule that chooses between our two, to find where they cross
        name, other = ("dequantised", dq.launch) if m < dq.LEAST_ROWS else ("Triton", pl.launch)
        against[name] = lambda inputs: forward(lambda *_: other(*found.raw(inputs)))(inputs)
    return replace(found, rivals=against | {"torch._int_mm": _int_mm})


def _int_mm(inputs):
    weight, bias = packed._float_linear(inputs, 4, torch.bfloat16).args[1:]
    return forward(rivals.Int8Linear(weight, bias))(replace(inputs, args=inputs.args[:1]))


def table(found: list[Row], widths: str) -> str:
    """Lay out the winner of each cell and ours against the fastest rival: above 1 we win."""
    cells: dict[tuple[int, int], dict[str, float]] = {}
    for row in found:
        at = re.fullmatch(rf"(\d+)x\d+, M=(\d+), {re.escape(widths)}", row.case)
        if row.op == OP and at:
            cells.setdefault((int(at[2]), int(at[1])), {})[row.rival] = row.ratio
    sizes = sorted({size for _, size in cells})
    lines = ["| " + " | ".join([f"{widths}: M \\ N = K", *map(str, sizes)]) + " |", "|---" * (len(sizes) + 1) + "|"]
    for m in sorted({m for m, _ in cells}):
        line = [_winner(cells[m, size]) if (m, size) in cells else "-" for size in sizes]
        lines.append("| " + " | ".join([str(m), *line]) + " |")
    return "\n".join(lines)


def _winner(ratios):
    name = min(ratios, key=ratios.get)
    return f"{'ours' if ratios[name] >= 1 else _SHORT.get(name, name)} {ratios[name]:.2f}"


def run(options: argparse.Namespace, gate: Callable[[Path], bool]) -> int:
    """Measure the grid once the tests of packed_linear are green, append the rows and print the tables."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.table:
        found = rows.latest(rows.read(options.results / f"{machine.name(device)}.csv"))
        print("\n\n".join(table(found, widths) for widths in WIDTHS))
        return 0
    origin = machine.commit(options.commit) | machine.facts(device)
    if not gate(machine.ROOT / "tests/test_packed_linear.py"):
        print("bench: the tests of packed_linear are not green, so nothing was measured and no row was written")
        return 1
    failed = 0
    for widths in WIDTHS:
        found = []
        for size, m in product(options.sizes, options.rows):
            try:
                timed = measure(case(size, m, widths, device), device, origin, backend=None, seconds=options.seconds)
            except RuntimeError as error:  # one cell that cannot run here leaves the others standing
                failed += 1
                print(f"bench map: {size}x{size}, M={m}, {widths}: failed: {error}", file=sys.stderr)
                continue
            found += [replace(row, op=OP) for row in timed]
        if found:
            rows.append(found, options.results)
            print(table(found, widths), flush=True)
    return 1 if failed else 0


def add_command(commands: argparse._SubParsersAction, gate: Callable[[Path], bool]) -> None:
    """Declare the command and its options; `gate` runs the tests that come first."""
    parser = commands.add_parser("map", help="who wins at which size and number of rows of a packed linear layer")
    numbers = {"type": lambda text: [int(n) for n in text.split(",")]}
    parser.add_argument("--sizes", default=SIZES, help="N = K, as 256,512", **numbers)
    parser.add_argument("--rows", default=ROWS, help="M, as 1,197", **numbers)
    parser.add_argument("--seconds", type=float, default=0.1, help="for each contestant of a cell")
    parser.add_argument("--table", action="store_true", help="measure nothing; print this machine's latest rows")
    parser.add_argument("--commit", help="of a tree that travels without its history")
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="the folder of the CSV files")
    parser.set_defaults(command=partial(run, gate=gate))
