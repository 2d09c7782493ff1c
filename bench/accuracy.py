"""`python -m bench accuracy`: errors of the CIFAR ResNet-20, quantised, packed and adapting, on real images.

Reads cifar10_train.npz, cifar10_test.npz and resnet20_cifar10.safetensors from a folder.
"""

import argparse
import csv
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

import ttaq
from ttaq.evaluation import Result, evaluate
from ttaq.models import ResNet
from ttaq.streams import Corrupted, Images, Stream, continual, load_npz

from . import machine

FILE = machine.ROOT / "bench/results/accuracy/resnet20.csv"
COLUMNS = (
    "commit", "dirty", "machine", "model", "bits", "method", "steps", "seed", "form", "adapter", "stream", "images",
    "error", "equal", "bytes", "seconds",
)  # fmt: skip


def main(options: argparse.Namespace) -> int:
    """Walk through the recipes; print each row and append it to the file at once."""
    if options.table:
        print(table(Path(options.out)), end="")
        return 0
    if options.data is None:
        raise ValueError("bench accuracy: --data wants the folder with the images and the weights")
    folder = Path(options.data)
    model = ResNet(20)
    model.load_state_dict(load_file(folder / "resnet20_cifar10.safetensors"), strict=False)
    model.eval()
    train, test = (load_npz(folder / f"cifar10_{part}.npz") for part in ("train", "test"))
    shared = Corrupted(test.take(slice(options.stream_images)), seed=0)
    for row in _rows(options, model, train.take(slice(options.images)), test, shared):
        _append(row | {"model": "resnet20", "seed": options.seed, "steps": options.steps}, Path(options.out))
    return 0


def _rows(options, model, calibration: Images, test: Images, shared: Corrupted) -> Iterator[dict]:
    float_bytes = 4 * sum(p.numel() for p in model.parameters())
    clean = evaluate(model, _clean(test))
    yield _row("w32a32", "none", "float", "none", "clean", clean, bytes=float_bytes)
    for bits in options.bits.split(","):
        for method in options.methods.split(","):
            start = time.perf_counter()
            batches = calibration.batches(128)
            settings = {} if method == "rtn" else {"steps": options.steps, "seed": options.seed}
            quantised = ttaq.quantize(model, batches, bits, method=method, **settings)
            seconds = round(time.perf_counter() - start, 1)
            result = evaluate(quantised, _clean(test))
            yield _row(bits, method, "fake-quantised", "none", "clean", result, seconds=seconds)
            if method == "rtn":
                continue
            packed = ttaq.pack(quantised)
            facts = {"equal": _equal(quantised, packed, test.take(slice(1000))), "bytes": _file_bytes(packed)}
            yield _row(bits, method, "packed", "none", "clean", evaluate(packed, _clean(test)), **facts)
            for adapter in options.adapters.split(",") if bits in options.stream_bits.split(",") else ():
                stream = continual(shared, images=options.stream_images, batch_size=200, seed=options.seed)
                result = evaluate(ttaq.adapt(packed, adapter), stream)
                yield _row(bits, method, "packed", adapter, "continual", result, seconds=round(result.seconds, 1))


def table(path: Path) -> str:
    """Draw the latest row of each cell as a Markdown table."""
    with open(path, newline="", encoding="utf-8") as file:
        cells = {tuple(row[k] for k in COLUMNS[3:12]): row for row in csv.DictReader(file)}
    lines = ["| bits | method | form | adapter | stream | images | error % | bytes | seconds |", "|" + "---|" * 9]
    shown = ("bits", "method", "form", "adapter", "stream", "images", "error", "bytes", "seconds")
    lines += ["| " + " | ".join(row[k] for k in shown) + " |" for row in cells.values()]
    return "\n".join(lines) + "\n"


def add_command(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser("accuracy", help="errors of the CIFAR ResNet-20 on real images")
    parser.add_argument("--data", help="folder with the two .npz files and the weights")
    parser.add_argument("--table", action="store_true", help="print the rows of --out as Markdown and measure nothing")
    parser.add_argument("--bits", default="w8a8,w4a4,w2a4")
    parser.add_argument("--methods", default="rtn,qdrop")
    parser.add_argument("--images", type=int, default=1024, help="calibration images")
    parser.add_argument("--steps", type=int, default=1000, help="steps a block")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stream-bits", default="w4a4", help="recipes that meet the 15 corruptions, packed")
    parser.add_argument("--stream-images", type=int, default=1000, help="images a corruption")
    parser.add_argument("--adapters", default="source,norm,tent")
    parser.add_argument("--out", default=str(FILE), help="rows are appended to this file")
    parser.set_defaults(command=main)


def _clean(images: Images) -> Stream:
    return Stream([("clean", images)], [(0, list(range(len(images))))], 500)


def _row(bits, method, form, adapter, stream, result: Result, **facts) -> dict:
    row = {"bits": bits, "method": method, "form": form, "adapter": adapter, "stream": stream}
    return row | {"images": sum(result.images.values()), "error": round(result.mean_error, 2)} | facts


@torch.no_grad()
def _equal(quantised, packed, images: Images) -> bool:
    """Tell whether both give the same bits on every image."""
    return all(torch.equal(quantised(x), packed(x)) for x, _ in images.batches(250))


def _file_bytes(packed) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return ttaq.save(packed, Path(folder) / "model.safetensors").stat().st_size


def _append(row: dict, path: Path) -> None:
    row |= machine.commit(None) | {"machine": machine.facts("cpu")["machine"]}
    fresh = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", restval="")
        if fresh:
            writer.writeheader()
        writer.writerow(row)
    print("  ".join(f"{k}={row[k]}" for k in COLUMNS[4:] if row.get(k, "") != ""), flush=True)
