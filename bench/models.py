"""Whole networks: latency of packed W4A8 models, and of their fused form, against torch, and the bytes they hold.

Weights are random and ranges are those of two images: neither changes what is computed. Convolutional networks run
channels-last, as torch is fastest too. On a GPU the packed model computes in bfloat16 between its products.
"""

import argparse
import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import ttaq

from . import machine, rivals, rows, tables
from .rows import Row
from .timing import in_turn, peak_bytes

OP = "model"
MODELS = {
    "ResNet-50": "resnet50",
    "MobileNetV2": "mobilenetv2_100",
    "ViT-B": "vit_base_patch16_224",
    "ViT-L": "vit_large_patch16_224",
}
_FORMS = ("packed", "fused")
_MIB = 2**20


@dataclass
class Subject:
    """A network in float32 and packed, in eval mode.

    Args:
        name: In the rows.
        floating: In float32.
        packed: In `dtype`.
        fused: What `ttaq.fuse` makes of it.
        layout: Of the images.
        device: "cpu" or "cuda".
    """

    name: str
    floating: nn.Module
    packed: nn.Module
    fused: nn.Module
    layout: torch.memory_format
    device: str

    @property
    def dtype(self) -> torch.dtype:
        """What the packed model computes in between its products."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    def images(self, batch: int) -> Tensor:
        """Draw a batch in float32."""
        return torch.randn(batch, 3, 224, 224, device=self.device).contiguous(memory_format=self.layout)


def size_of(model: nn.Module) -> int:
    """Count the bytes of the tensors of a model."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def quantise(model: nn.Module) -> nn.Module:
    """Round a model to W4A8, with the ranges of two random images; the products of attention stay in float."""
    widths = ttaq.QuantSpec(4, "channel", observer="minmax"), ttaq.QuantSpec(8, observer="minmax")
    images = [torch.randn(1, 3, 224, 224) for _ in range(2)]
    return ttaq.quantize(model, images, ttaq.Recipe(*widths), method="rtn", progress=False, attention=False)


def build(name: str, device: str, batch: int) -> Subject:
    """Build a network of timm with random weights, quantise and pack it.

    The fake-quantised twin is given up once the logits of a batch are compared, so that a large network fits memory.

    Raises:
        RuntimeError: The packed model does not give the bits of its fake-quantised twin.
    """
    import timm

    torch.manual_seed(0)
    floating = timm.create_model(MODELS[name], pretrained=False).eval()
    twin = quantise(floating).eval()
    layout = torch.contiguous_format if name.startswith("ViT") else torch.channels_last
    packed = ttaq.pack(twin)
    subject = Subject(name, floating, packed, packed, layout, device)
    for model in (floating, packed, twin):
        model.to(device=device, memory_format=layout)
    for model in (packed, twin):
        model.to(subject.dtype)
    images = subject.images(batch).to(subject.dtype)
    with torch.no_grad():
        if not torch.equal(packed(images), twin(images)):
            raise RuntimeError(f"bench: the packed {name} does not give the logits of its fake-quantised twin")
    subject.fused = ttaq.fuse(packed, images[:1])
    return subject


def measure(subject: Subject, batch: int, origin: dict[str, str], *, seconds: float, compiled: bool) -> Iterator[Row]:
    """Time a batch through the packed model and its rivals, in turn; on a GPU once more as CUDA graphs.

    Yields:
        A row for each rival.
    """
    images, device = subject.images(batch), subject.device
    # A stream of our own, since what the ordinary one has run cannot be captured in a graph.
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext():
        found = _contestants(subject, images)
        if compiled:
            found |= _inductor(subject, images)
        logits = {form: found[form]().float() for form in _FORMS}
        error = (logits["fused"] - logits["packed"]).abs().max() / logits["packed"].abs().max()
        held = {form: peak_bytes(found[form], device) for form in _FORMS}
        for graph in (False, True) if device == "cuda" else (False,):
            calls = {name: [call] for name, call in found.items() if not (graph and "compile" in name)}
            timings = in_turn(calls, device, seconds, graph)
            for form, differs in (("packed", 0.0), ("fused", error.item())):
                facts = {"peak_mib": held[form] / _MIB, "max_error": differs}
                yield from _rows(subject, form, batch, graph, timings, origin | facts)


def _rows(subject, form, batch, graph, timings, facts):
    ours, others = timings[form], {name: timing for name, timing in timings.items() if name not in _FORMS}
    whole, held = size_of(subject.floating) / _MIB, size_of(getattr(subject, form)) / _MIB
    words = [subject.name, "W4A8", *(["fused"] if form == "fused" else []), f"batch {batch}"]
    words += [f"{held:.1f} of {whole:.1f} MiB", *(["graph"] if graph else [])]
    common = facts | {
        "op": OP,
        "backend": "cpu" if subject.device == "cpu" else "triton",
        "dtype": str(subject.dtype).removeprefix("torch."),
        "case": ", ".join(words),
        "p20_us": ours.p20 * 1e6,
        "p50_us": ours.p50 * 1e6,
        "p80_us": ours.p80 * 1e6,
        "gbps": None,
        "tflops": None,
        "percent_of_roofline": None,
    }
    return [Row(**common, rival=name, ratio=timing.p50 / ours.p50) for name, timing in others.items()]


def _contestants(subject, images) -> dict[str, Callable[[], Tensor]]:
    def cast(dtype):
        model, batch = copy.deepcopy(subject.floating).to(dtype), images.to(dtype)
        return lambda: model(batch)

    entering = images.to(subject.dtype)
    found = {
        "packed": lambda: subject.packed(entering),
        "fused": lambda: subject.fused(entering),
        "torch float32": lambda: subject.floating(images),
        "torch bfloat16": cast(torch.bfloat16),
    }
    linear = subject.name.startswith("ViT")
    if subject.device == "cuda":
        found["torch float16"] = cast(torch.float16)
        if linear:
            int8 = rivals.int8_linears(copy.deepcopy(subject.floating).bfloat16())
            found["torch._int_mm linears"] = lambda: int8(entering)
    elif linear:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the rival is deprecated
            dynamic = torch.ao.quantization.quantize_dynamic(subject.floating, {nn.Linear}, torch.qint8)
        found["torch dynamic int8"] = lambda: dynamic(images)
    return found


def _inductor(subject, images) -> dict[str, Callable[[], Tensor]]:
    """Compile the float model; where that fails, print why and leave it out."""
    torch.compiler.reset()
    inductor, batch = torch.compile(copy.deepcopy(subject.floating).to(subject.dtype)), images.to(subject.dtype)
    try:
        inductor(batch)
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        print(f"bench models: torch.compile fails for {subject.name} and is left out: {why}", file=sys.stderr)
        return {}
    return {f"torch.compile {str(subject.dtype).removeprefix('torch.')}": lambda: inductor(batch)}


def run(options: argparse.Namespace) -> int:
    """Measure the models asked for, and append the rows; with `--table` print the table of those there are."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.table:
        print(tables.networks(rows.latest(rows.read(options.results / f"{machine.name(device)}.csv"))))
        return 0
    names = options.models or [n for n in MODELS if device == "cuda" or n != "ViT-L"]
    if unknown := [n for n in names if n not in MODELS]:
        raise ValueError(f"bench models: wanted some of {', '.join(MODELS)}, got {unknown[0]!r}")
    origin = machine.commit(options.commit) | machine.facts(device)
    batches = options.batches or ([1, 8] if device == "cpu" else [1, 8, 64])
    seconds = options.seconds or (5.0 if device == "cpu" else 0.5)
    for name in names:
        subject = build(name, device, max(batches))
        for batch in batches:
            found = list(measure(subject, batch, origin, seconds=seconds, compiled=options.compiled))
            rows.append(found, options.results)
            for case in dict.fromkeys(row.case for row in found):
                print(tables.summary([row for row in found if row.case == case]), flush=True)
    return 0


def add_command(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser("models", help="latency of whole packed networks against torch")
    names = f"of {', '.join(MODELS)}; by default all, on the CPU without ViT-L"
    parser.add_argument("--models", type=lambda text: text.split(","), help=names)
    sizes = "by default 1,8, on a GPU 1,8,64"
    parser.add_argument("--batches", type=lambda text: [int(b) for b in text.split(",")], help=sizes)
    parser.add_argument("--seconds", type=float, help="for each contestant; by default 5, on a GPU 0.5")
    parser.add_argument("--compiled", action="store_true", help="also against torch.compile, which takes minutes")
    parser.add_argument("--table", action="store_true", help="measure nothing; print this machine's latest rows")
    parser.add_argument("--commit", help="of a tree that travels without its history")
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="the folder of the CSV files")
    parser.set_defaults(command=run)
