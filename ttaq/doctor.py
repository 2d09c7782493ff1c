"""doctor: which implementation of each op runs on this machine, and why the others do not."""

import os
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from . import declarations, dispatch
from .kernels import _library, _native, _triton


def describe_machine() -> dict[str, str]:
    """Say what a run depends on: versions, processor, native libraries, threads, GPUs."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "ttaq": f"{_version('ttaq')}{_commit()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": f"{torch.get_num_threads()} of torch, {os.cpu_count()} in the machine",
        "native cpu": _native.reason("cpu") or f"runs at level {_native.cpu_level()} of {', '.join(_native.LEVELS)}",
        "products": _describe_products(_library.product_level(), _native.cpu_level()),
        "native cuda": _native.reason("cuda") or "runs",
        "triton kernels": _triton.refuses() or ("interpreted" if _triton.INTERPRETED else "compiled where a GPU is"),
        "gpus": ", ".join(gpus) or "none that torch can use",
    }


def examine(device: str = "cpu") -> dict[str, list[tuple[str, str]]]:
    """Ask every op which implementation would run on small tensors.

    Args:
        device: "cpu", or "cuda" where there is one.

    Returns:
        Op to (implementation, verdict) in the order of trial; the verdict of the one that runs is "runs".
    """
    found = {}
    for op in dispatch.OPS:
        args = [a.to(device) if isinstance(a, Tensor) else a for a in SAMPLES[op]()]
        found[op] = [tuple(line.split(": ", 1)) for line in dispatch.explain(op, *args).splitlines()]
    return found


def print_report(console: Console) -> None:
    """Print the machine, then for each device every op with its implementations."""
    console.print("[bold]machine[/]")
    facts = Table.grid(padding=(0, 2))
    for name, value in describe_machine().items():
        facts.add_row(f"[dim]{name}[/]", value)
    console.print(facts)
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        console.print(f"\n[bold]ops on a {device} tensor[/]")
        for verdicts, ops in _group(examine(device)).items():
            console.print("\n" + ", ".join(ops), style="cyan")
            console.print(_tabulate(verdicts))


def _group(examined):
    """Gather the ops that get the same verdicts."""
    groups: dict[tuple, list[str]] = {}
    for op, verdicts in examined.items():
        groups.setdefault(tuple(verdicts), []).append(op)
    return groups


def _tabulate(verdicts):
    rows = Table.grid(padding=(0, 2))
    for name, verdict in verdicts:
        rows.add_row(f"  [bold green]{name}[/]" if verdict == "runs" else f"  {name}", verdict)
    return rows


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit():
    """Name the commit of a source tree, and whether it was changed since; nothing where there is no repository."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=, changed since"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f", commit {found.stdout.strip()}" if found.returncode == 0 else ""


def _processor():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _describe_products(level, processor):
    """Name the instructions that multiply codes on the CPU, by the level of the products and of the processor."""
    if level is None:
        return "multiplied by torch, on codes that are unpacked first: there is no native library"
    if level == "v4":
        return "AVX-512 VNNI: this processor multiplies and adds 64 pairs of 8-bit codes in one instruction"
    if level == "v3":
        lacks = "AVX-512 without its VNNI part" if processor == "v4" else "no AVX-512 VNNI"
        return f"AVX2: 16 pairs of codes in one instruction; this processor has {lacks}, which would multiply 64"
    return "base: ordinary C++, slow; this processor has neither AVX2 nor AVX-512 VNNI, which take many codes at once"


def _grid():
    """Give (scale, zero, qmin, qmax, axis, group) of 4 bits a row of 8."""
    return torch.full((8,), 0.25), torch.full((8,), 8, dtype=torch.int32), 0, 15, 0, 0


def _perturbation():
    """Give (scale, zero, spread, seed, qmin, qmax, axis, kind) of 4 bits, a tenth of the elements dropped."""
    return torch.tensor(0.25), torch.tensor(8.0), torch.tensor(0.1), torch.tensor(1), 0, 15, None, "drop"


def _rows():
    return torch.linspace(-1, 1, 8 * 16).reshape(8, 16)


def _codes():
    return (torch.arange(8 * 16) % 16).to(torch.uint8).reshape(8, 16)


def _packed():
    """Give (words, scale, zero) of eight rows of 16 codes of 4 bits."""
    return declarations.cd.pack_reference(_codes(), 4), *_grid()[:2]


def _activations(*shape):
    """Give (codes, scale, zero, bits) of 8-bit activations."""
    codes = torch.arange(torch.Size(shape).numel()).remainder(256).to(torch.uint8).reshape(shape)
    return codes, torch.tensor(0.1), torch.tensor(128, dtype=torch.int32), 8


def _single():
    return torch.tensor(0.1), torch.tensor(7, dtype=torch.int32)


_GEOMETRY = ([1, 1], [1, 1], [0, 0], [1, 1], 1)  # kernel_size, stride, padding, dilation, groups


def _packed_linear():
    x, x_scale, x_zero, x_bits = _activations(4, 16)
    return x, *_packed(), None, 4, 0, x_scale, x_zero, x_bits, torch.float32


def _packed_conv2d():
    x, x_scale, x_zero, x_bits = _activations(1, 16, 4, 4)
    return x, *_packed(), None, 4, x_scale, x_zero, x_bits, *_GEOMETRY, torch.float32


SAMPLES: dict[str, Callable[[], tuple]] = {
    "fake_quant": lambda: (_rows(), *_grid()),
    "fake_quant_backward": lambda: (_rows(), _rows(), *_grid()),
    "perturbed_fake_quant": lambda: (_rows(), *_perturbation()),
    "perturbed_fake_quant_backward": lambda: (_rows(), _rows(), *_perturbation()),
    "prologue_fake_quant": lambda: (_rows(), None, None, None, *_single(), "gelu", 1e-6, True, 0, 15, 1),
    "prologue_fake_quant_backward": lambda: (
        _rows(), None, _rows(), None, None, *_single(), "gelu", 1e-6, 0, 15, 1,
    ),
    "log2_fake_quant": lambda: (_rows(), torch.tensor(1.0), 15, 1),
    "log2_fake_quant_backward": lambda: (_rows(), _rows(), torch.tensor(1.0), 15, 1),
    "log2_codes": lambda: (_rows(), torch.tensor(1.0), 15, 1),
    "soft_round": lambda: (_rows(), _rows(), *_grid()[:2], torch.tensor(2.0), *_grid()[2:], 1),
    "soft_round_backward": lambda: (
        _rows(), torch.tensor(1.0), torch.ones(16), _rows(), _rows(), *_grid()[:2], torch.tensor(2.0), *_grid()[2:], 1,
    ),
    "quantize_codes": lambda: (_rows(), *_grid()),
    "activation_codes": lambda: (_rows(), None, None, 4, True, True),
    "pack_codes": lambda: (_codes(), 4),
    "unpack_codes": lambda: (_packed()[0], 4, 16),
    "packed_linear": _packed_linear,
    "packed_linear_backward": lambda: (torch.ones(4, 8), *_packed(), 4, 0, 16),
    "packed_conv2d": _packed_conv2d,
    "packed_conv2d_backward": lambda: (torch.ones(1, 8, 4, 4), *_packed(), 4, [1, 16, 4, 4], *_GEOMETRY),
}  # fmt: skip
