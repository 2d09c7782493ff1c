"""`python -m bench overhead`: what a batch costs each adaptation method, against plain inference of the packed model.

Each method and plain inference take turns on the same batches, so that what else the machine does meets both; the ratio
of their median times is told beside passes an image and the bytes of the state that `Adapter.save` writes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

import ttaq
from ttaq.adaptation import METHODS
from ttaq.evaluation import evaluate
from ttaq.streams import Corrupted
from ttaq.tracing import leaves

from . import accuracy, machine
from .adapters import ANCHORED, GUARDS
from .grid import append, packed_model, read

COLUMNS = (
    "commit", "dirty", "machine", "model", "bits", "adapter", "guard", "batch", "ratio", "plain_ms", "adapter_ms",
    "forwards", "backwards", "state_bytes",
)  # fmt: skip


def measure(model: torch.nn.Module, name: str, guard: str, stream, settings: dict, rounds: int) -> dict:
    """Walk a stream once, plain inference and the adapter in turn; return what a row holds.

    Args:
        model: Packed.
        name: Of the method.
        guard: A name in `GUARDS`.
        stream: Of equal batches, at least `rounds` and a third more, which warm up.
        settings: Of the method.
        rounds: That count.
    """
    adapter = ttaq.adapt(model, name, guard=GUARDS[guard], **settings)
    plain, adapted = [], []
    for number, batch in enumerate(stream):
        if number == rounds + rounds // 3:
            break
        for run, times in ((model, plain), (adapter, adapted)):
            start = time.perf_counter()
            with torch.no_grad():
                run(batch.images)
            times.append(time.perf_counter() - start)
    counted = evaluate(ttaq.adapt(model, name, guard=GUARDS[guard], **settings), list(stream)[:20])
    one, other = (statistics.median(times[rounds // 3 :]) * 1e3 for times in (plain, adapted))
    return {
        "ratio": round(other / one, 2),
        "plain_ms": round(one, 1),
        "adapter_ms": round(other, 1),
        "forwards": round(counted.forwards, 2),
        "backwards": round(counted.backwards, 2),
        "state_bytes": sum(t.numel() * t.element_size() for t in leaves(adapter.state_dict())),
    }


def run(options: argparse.Namespace) -> int:
    """Measure every method; append a row each, or print the rows that there are."""
    path = Path(options.out or accuracy.FOLDER / f"overhead-{options.model}.csv")
    if options.table:
        print(table(read(path)))
        return 0
    subject, _ = accuracy.open_subject(options)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    base = {"model": subject.name, "bits": options.bits, "method": options.method, "steps": options.steps, "seed": 0}
    model, _ = packed_model(subject, Path(options.cache), "cpu", base, options.images)
    anchor = [x for x, _ in subject.calibration.batches(200)]
    corrupted = Corrupted(subject.test, seed=0)
    for size in options.batch_sizes:
        needed = size * (options.rounds + options.rounds // 3)
        stream = list(ttaq.continual(corrupted, corruptions=("fog",), images=needed, batch_size=size))
        for name in options.adapters:
            settings = {"anchor": anchor[: ANCHORED[name]]} if name in ANCHORED else {}
            found = measure(model, name, options.guard, stream, settings, options.rounds)
            row = machine.commit(options.commit) | {"machine": machine.facts("cpu")["machine"], "model": subject.name}
            row |= {"bits": options.bits, "adapter": name, "guard": options.guard, "batch": size} | found
            append(row, path, COLUMNS)
            print("  ".join(f"{key}={row[key]}" for key in COLUMNS[5:]), flush=True)
    return 0


def table(rows: list[dict]) -> str:
    """Draw a Markdown table: methods down; ratios by batch, passes and state across. Later rows count."""
    sizes = sorted({row["batch"] for row in rows}, key=int)
    head = ["method", *(f"batch {size}" for size in sizes), "forwards", "backwards", "state, KiB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in dict.fromkeys(row["adapter"] for row in rows):
        own = {row["batch"]: row for row in rows if row["adapter"] == name}
        last = own[max(own, key=int)]
        ratios = [own[size]["ratio"] if size in own else "" for size in sizes]
        kib = f"{int(last['state_bytes']) / 1024:.0f}"
        lines.append("| " + " | ".join([name, *ratios, last["forwards"], last["backwards"], kib]) + " |")
    return "\n".join(lines)


def add_command(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser("overhead", help="what a batch costs each adaptation method")
    accuracy.add_subject(parser)
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--guard", choices=GUARDS, default="on")
    parser.add_argument("--adapters", type=accuracy.list_of(METHODS), default=list(METHODS))
    parser.add_argument("--batch-sizes", type=accuracy.list_of(read=accuracy.whole, made=True), default=[1, 64])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--table", action="store_true", help="print the rows and measure nothing")
    parser.set_defaults(command=run)
