"""`python -m bench adapters`: every adaptation method on every kind of stream, with and without the guard.

Walks methods x streams x guards for packed models and the float one, appends a row a cell, and goes on where an
earlier call stopped. The models come from the cache of `bench accuracy`, or are quantised into it.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import ttaq
from ttaq.adaptation import METHODS
from ttaq.evaluation import evaluate
from ttaq.spec import Recipe
from ttaq.streams import STREAMS, Corrupted, Stream
from ttaq.tracing import leaves

from . import accuracy, machine
from .grid import FLOAT, append, packed_model, read

KEY = ("model", "bits", "seed", "adapter", "guard", "stream")
COLUMNS = (
    "commit", "dirty", "machine", *KEY, "images", "error", "class_error", "ece", "forwards", "backwards", "seconds",
    "state_bytes", "skipped", "events",
)  # fmt: skip
GUARDS = {"on": True, "finite": "finite", "off": False}
ANCHORED = {"eata": 8, "zeroth-order": 4, "align": 4}  # batches of calibration images for methods that want some
VISITED = ("gaussian_noise", "motion_blur", "fog", "contrast", "jpeg_compression")


def orders(images: int, batch_size: int) -> dict[str, Callable[..., Stream]]:
    """Name the streams: `images` a corruption; 20 visits of 500 images; a fifteenth of 1,000 single images each."""
    kinds = ("continual", "mixed", "correlated", "long-tailed")
    return {
        **{name: partial(STREAMS[name], images=images, batch_size=batch_size) for name in kinds},
        "recurring": partial(
            STREAMS["recurring"], images=100, corruptions=VISITED, visits=20, concentration=None, batch_size=100
        ),
        "batch-1": partial(STREAMS["continual"], images=67, batch_size=1),
    }


def measure(model: torch.nn.Module, stream: Stream, anchor: list, cell: dict) -> dict:
    """Walk one stream with one method; return what a row holds beside its cell."""
    settings = {"anchor": anchor[: ANCHORED[cell["adapter"]]]} if cell["adapter"] in ANCHORED else {}
    torch.manual_seed(cell["seed"])
    adapter = ttaq.adapt(model, cell["adapter"], guard=GUARDS[cell["guard"]], history=10**6, **settings)
    start = time.perf_counter()
    result = evaluate(adapter, stream)
    events = Counter(_kind(event) for step in adapter.history for event in step.events)
    return {
        "images": sum(result.images.values()),
        "error": round(result.mean_error, 3),
        "class_error": round(result.mean_class_error, 3),
        "ece": None if result.ece is None else round(result.ece, 3),
        "forwards": round(result.forwards, 3),
        "backwards": round(result.backwards, 3),
        "seconds": round(time.perf_counter() - start, 1),
        "state_bytes": sum(t.numel() * t.element_size() for t in leaves(adapter.state_dict())),
        "skipped": adapter.skipped,
        "events": "; ".join(f"{count} x {kind}" for kind, count in sorted(events.items())),
    }


def _kind(event: str) -> str:
    """Leave out of an event what it counts and measures: of a collapse remains what was done."""
    kind, _, told = event.partition(": ")
    return f"{kind}: {told.rpartition('; ')[2]}" if kind == "collapse" else event.partition(" (")[0]


def run(options: argparse.Namespace) -> int:
    """Measure the cells that have no row yet; or print those that have."""
    path = Path(options.out or accuracy.FOLDER / f"adapters-{options.model.replace(':', '-')}.csv")
    if options.table:
        print(table(read(path)))
        return 0
    subject, source = accuracy.open_subject(options)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    anchor = [x for x, _ in subject.calibration.batches(options.batch_size)]
    done = {tuple(row[k] for k in KEY) for row in read(path)}
    kinds = orders(options.stream_images, options.batch_size)
    for seed, bits in itertools.product(options.seeds, options.bits):
        corrupted, model = source or Corrupted(subject.test, seed=seed), None
        for stream, name, guard in itertools.product(options.streams, options.adapters, options.guards):
            cell = dict(zip(KEY, (subject.name, bits, seed, name, guard, stream), strict=True))
            if tuple(str(cell[k]) for k in KEY) in done:
                continue
            if model is None:
                method = "none" if bits == FLOAT else options.method
                base = {"model": subject.name, "bits": bits, "method": method, "steps": options.steps, "seed": seed}
                model, _ = packed_model(subject, Path(options.cache), "cpu", base, options.images)
            found = measure(model, kinds[stream](corrupted, seed=seed), anchor, cell)
            row = machine.commit(options.commit) | {"machine": machine.facts("cpu")["machine"]} | cell | found
            append(row, path, COLUMNS)
            print("  ".join(f"{k}={row[k]}" for k in COLUMNS[4:] if row.get(k, "") != ""), flush=True)
    return 0


def table(rows: list[dict]) -> str:
    """Draw a Markdown table of errors a width and guard: methods down, streams across, means over seeds."""
    lines = []
    for bits, guard in sorted({(row["bits"], row["guard"]) for row in rows}):
        some = [row for row in rows if (row["bits"], row["guard"]) == (bits, guard)]
        streams = list(dict.fromkeys(row["stream"] for row in some))
        lines += ["", f"{bits}, guard {guard}", "", f"| method | {' | '.join(streams)} |"]
        lines.append("|---" * (len(streams) + 1) + "|")
        for name in dict.fromkeys(row["adapter"] for row in some):
            cells = [
                [float(r["error"]) for r in some if (r["adapter"], r["stream"]) == (name, stream)] for stream in streams
            ]
            lines.append(f"| {name} | {' | '.join(f'{sum(c) / len(c):.2f}' if c else '' for c in cells)} |")
    return "\n".join(lines).strip()


def add_command(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser("adapters", help="every adaptation method on every kind of stream")
    accuracy.add_subject(parser)
    parser.add_argument("--bits", type=accuracy.list_of(read=Recipe.parse), default=[FLOAT, "w4a4", "w2a2"])
    parser.add_argument("--seeds", type=accuracy.list_of(read=accuracy.whole, made=True), default=[0])
    parser.add_argument("--adapters", type=accuracy.list_of(METHODS), default=list(METHODS))
    parser.add_argument("--streams", type=accuracy.list_of(orders(1, 1)), default=list(orders(1, 1)))
    parser.add_argument("--guards", type=accuracy.list_of(GUARDS), default=["on", "off"])
    parser.add_argument("--stream-images", type=int, default=500, help="a corruption")
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--table", action="store_true", help="print the rows and measure nothing")
    parser.set_defaults(command=run)
