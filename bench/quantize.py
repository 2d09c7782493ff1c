"""A whole quantisation in a fresh process: the seconds of each block, and the peak of resident memory.

The model is built on `meta` and then given random weights, so that the process never holds more than one float model
of its own making; the copy that `quantize` learns on shares them. What the process grows by is set against the bytes
of the float model and of the images.
"""

import json
import subprocess
import sys
import time
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from . import machine
from .memory import _forget_peak, _resident, _wake

_MIB = 2**20
_PASSED = ("model", "size", "bits", "method", "steps", "images", "batch", "budget", "cache", "device", "threads")


def add_command(commands, gate) -> None:
    """Add `quantize` to the command line; the quantisation is a process of its own."""
    parser = commands.add_parser("quantize", help="time a whole quantisation, block by block, and its peak memory")
    parser.add_argument("--model", default="vit_small_patch16_224", help="of timm, random weights")
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--method", default="qdrop", help="as in ttaq.quantize")
    parser.add_argument("--steps", type=int, help="of each block; 100 without a budget")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32, help="images a step")
    parser.add_argument("--budget", help="time to take, such as 5min")
    parser.add_argument("--cache", help="bytes of inputs and targets on the device, such as 256MiB")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write what was measured here, too")
    parser.add_argument("--commit", help="of a tree that travels without its history")
    parser.add_argument("--child", action="store_true", help="do it in this process and print JSON")
    parser.set_defaults(command=lambda options: run(options, gate))


def run(options: Namespace, gate) -> int:
    """Quantise in a fresh process once the loop's tests are green, and print what it took."""
    if options.child:
        print(json.dumps(measure(options)))
        return 0
    kind = "cuda" if options.device.startswith("cuda") else "cpu"
    origin = machine.commit(options.commit) | machine.facts(kind)
    if not gate(machine.ROOT / "tests/test_loop.py"):
        print("bench: the tests of the loop are not green, so nothing was measured")
        return 1
    found = _fresh(options)
    print(table(found), end="")
    if options.json:
        options.json.write_text(json.dumps(origin | found, indent=1), encoding="utf-8")
    return 0


def measure(options: Namespace) -> dict:
    """Quantise in this process; return seconds, rows of the blocks and bytes.

    Args:
        options: Those of the command line.
    """
    import ttaq

    import_module("timm")  # what is imported later would count as the model's
    torch.set_num_threads(options.threads)
    _wake()
    device, zero = torch.device(options.device), _resident()["VmRSS"]
    model = random_model(options.model, options.size).to(device)
    torch.manual_seed(0)
    images = [torch.randn(part, 3, options.size, options.size) for part in _parts(options.images, options.batch)]
    settings = {"steps": options.steps or (None if options.budget else 100), "batch_size": options.batch}
    settings |= {"budget": options.budget, "cache": options.cache}
    settings = {name: value for name, value in settings.items() if value is not None}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    _forget_peak()
    start = time.perf_counter()
    quantised = ttaq.quantize(model, images, options.bits, method=options.method, progress=False, **settings)
    seconds = time.perf_counter() - start
    report = quantised.ttaq_report
    return {
        "options": {name: getattr(options, name) for name in _PASSED},
        "seconds": round(seconds, 3),
        "blocks": [{k: v for k, v in row.items() if k not in ("layers", "curve")} for row in report["blocks"]],
        "refinement": report.get("refinement", {}).get("seconds"),
        "float_bytes": sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())),
        "image_bytes": sum(x.numel() * x.element_size() for x in images),
        "peak_bytes": _resident()["VmHWM"] - zero,
        "device_peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }


def random_model(name: str, size: int) -> nn.Module:
    """Build a model of timm on `meta`, then give it room and random weights."""
    import timm

    sized = {"img_size": size} if "vit" in name or "swin" in name else {}
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, **sized)
    model = model.to_empty(device="cpu").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return model


def table(found: dict) -> str:
    """Show seconds and steps of each block, and memory against the float model's bytes."""
    options = found["options"]
    head = (
        f"{options['model']}, {options['bits']}, {options['method']}, {options['images']} images of {options['size']}"
    )
    lines = [f"{head}, batch {options['batch']}, {options['device']}, {options['threads']} threads"]
    width = max(len(row["name"]) for row in found["blocks"])
    for row in found["blocks"]:
        more = ", graph" if row.get("graph") else ""
        lines.append(f"{row['name']:<{width}} {row['steps']:>6} steps {row['seconds']:>9.2f} s{more}")
    blocks = sum(row["seconds"] for row in found["blocks"])
    lines.append(f"{'all blocks':<{width}} {'':>12} {blocks:>9.2f} s")
    if found["refinement"] is not None:
        lines.append(f"{'refinement':<{width}} {'':>12} {found['refinement']:>9.2f} s")
    lines.append(f"{'quantize':<{width}} {'':>12} {found['seconds']:>9.2f} s")
    floats = found["float_bytes"]
    share = f"{found['peak_bytes'] / floats:.2f} of the float model's {floats / _MIB:.1f}"
    peak, images = (found[name] / _MIB for name in ("peak_bytes", "image_bytes"))
    lines.append(f"peak {peak:.1f} MiB above import, {share}; images {images:.1f}")
    if found["device_peak_bytes"] is not None:
        lines.append(f"peak on the device {found['device_peak_bytes'] / _MIB:.1f} MiB")
    return "\n".join(lines) + "\n"


def _parts(images, batch):
    return [min(batch, images - start) for start in range(0, images, batch)]


def _fresh(options):
    given = [
        word
        for name in _PASSED
        if getattr(options, name) is not None
        for word in (f"--{name}", str(getattr(options, name)))
    ]
    command = [sys.executable, "-W", "ignore::UserWarning", "-m", "bench", "quantize", "--child", *given]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=machine.ROOT)
    if done.returncode:
        raise ValueError(f"bench quantize: the process failed with status {done.returncode}; see its error above")
    return json.loads(done.stdout.splitlines()[-1])
