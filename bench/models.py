"""Whole networks on the CPU: latency of packed W4A8 models against the same models in torch, and the bytes they hold.

Weights are random and ranges are those of two images: neither changes what is computed. Convolutional networks run
channels-last, as torch is fastest too.
"""

import argparse
import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import ttaq

from . import machine, rows, tables
from .rows import Row
from .timing import in_turn, peak_bytes

OP = "model"
MODELS = {
    "ResNet-50": "resnet50",
    "MobileNetV2": "mobilenetv2_100",
    "ViT-B": "vit_base_patch16_224",
    "ViT-L": "vit_large_patch16_224",
}
_MIB = 2**20


@dataclass
class Subject:
    """A network in float32, and quantised, and packed.

    Args:
        name: In the rows.
        floating: In eval mode, and so the others.
        quantised: The fake-quantised twin.
        packed: Its packed form.
        layout: Of the images.
    """

    name: str
    floating: nn.Module
    quantised: nn.Module
    packed: nn.Module
    layout: torch.memory_format

    def images(self, batch: int) -> Tensor:
        """Draw a batch."""
        return torch.randn(batch, 3, 224, 224).contiguous(memory_format=self.layout)

    def bytes(self) -> tuple[int, int]:
        """Count what the tensors of the float model and of the packed one take."""
        return tuple(
            sum(t.numel() * t.element_size() for t in (*m.parameters(), *m.buffers()))
            for m in (self.floating, self.packed)
        )


def quantise(model: nn.Module) -> nn.Module:
    """Round a model to W4A8, with the ranges of two random images."""
    widths = ttaq.QuantSpec(4, "channel", observer="minmax"), ttaq.QuantSpec(8, observer="minmax")
    images = [torch.randn(1, 3, 224, 224) for _ in range(2)]
    return ttaq.quantize(model, images, ttaq.Recipe(*widths), method="rtn", progress=False)


def build(name: str) -> Subject:
    """Build a network of timm with random weights, quantise and pack it."""
    import timm

    torch.manual_seed(0)
    floating = timm.create_model(MODELS[name], pretrained=False).eval()
    quantised = quantise(floating).eval()
    convolves = name in ("ResNet-50", "MobileNetV2")
    layout = torch.channels_last if convolves else torch.contiguous_format
    models = (m.to(memory_format=layout) for m in (floating, quantised, ttaq.pack(quantised)))
    return Subject(name, *models, layout)


def measure(subject: Subject, batch: int, origin: dict[str, str], *, seconds: float, compiled: bool) -> list[Row]:
    """Time a batch through the packed model and its rivals, in turn; a row for each rival.

    Raises:
        RuntimeError: The packed model does not give the bits of its fake-quantised twin.
    """
    images = subject.images(batch)
    with torch.no_grad():
        if not torch.equal(subject.packed(images), subject.quantised(images)):
            raise RuntimeError(f"bench: the packed {subject.name} does not give the logits of its fake-quantised twin")
        calls = {name: [call] for name, call in _contestants(subject, images, compiled).items()}
        held = peak_bytes(calls["packed"][0], "cpu")
        timings = in_turn(calls, "cpu", seconds)
    ours = timings.pop("packed")
    whole, packed = subject.bytes()
    common = origin | {
        "op": OP,
        "backend": "cpu",
        "dtype": "float32",
        "case": f"{subject.name}, W4A8, batch {batch}, {packed / _MIB:.1f} of {whole / _MIB:.1f} MiB",
        "p20_us": ours.p20 * 1e6,
        "p50_us": ours.p50 * 1e6,
        "p80_us": ours.p80 * 1e6,
        "gbps": None,
        "tflops": None,
        "percent_of_roofline": None,
        "peak_mib": held / _MIB,
        "max_error": 0.0,
    }
    return [Row(**common, rival=name, ratio=timing.p50 / ours.p50) for name, timing in timings.items()]


def _contestants(subject, images, compiled) -> dict[str, Callable[[], Tensor]]:
    half, half_images = copy.deepcopy(subject.floating).bfloat16(), images.bfloat16()
    found = {
        "packed": lambda: subject.packed(images),
        "torch float32": lambda: subject.floating(images),
        "torch bfloat16": lambda: half(half_images),
    }
    if subject.name.startswith("ViT"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the rival is deprecated
            dynamic = torch.ao.quantization.quantize_dynamic(subject.floating, {nn.Linear}, torch.qint8)
        found["torch dynamic int8"] = lambda: dynamic(images)
    if compiled:
        torch.compiler.reset()
        inductor = torch.compile(copy.deepcopy(subject.floating))
        found["torch.compile float32"] = lambda: inductor(images)
    return found


def run(options: argparse.Namespace) -> int:
    """Measure the models asked for, and append the rows."""
    origin = machine.commit(options.commit) | machine.facts("cpu")
    for name in options.models.split(","):
        if name not in MODELS:
            raise ValueError(f"bench models: wanted some of {', '.join(MODELS)}, got {name!r}")
        subject = build(name)
        for batch in options.batches:
            found = measure(subject, batch, origin, seconds=options.seconds, compiled=options.compiled)
            rows.append(found, options.results)
            print(tables.summary(found), flush=True)
    return 0


def add_command(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser("models", help="latency of whole packed networks against torch, on the CPU")
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--batches", type=lambda text: [int(b) for b in text.split(",")], default=[1, 8])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each contestant")
    parser.add_argument("--compiled", action="store_true", help="also against torch.compile, which takes minutes")
    parser.add_argument("--commit", help="of a tree that travels without its history")
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="the folder of the CSV files")
    parser.set_defaults(command=run)
