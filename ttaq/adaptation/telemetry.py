"""Drift of a stream as the quantisers and norms of a model see it, against calibration or the stream's beginning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..layers import QuantConv2d, QuantLinear
from ..packed_layers import PackedConv2d, PackedLinear
from .statistics import AdaptiveBatchNorm

_CLIPPED, _OCCUPIED = (2.0, 0.01), 0.25  # clip rate that makes an event: times the reference plus; total variation
_ENOUGH = 100  # values a code of a layer, in a batch, for an event


class Telemetry:
    """Measure every few batches what the quantisers of a model clip, which codes they use and how far norms moved.

    Of the input of each quantised layer: the share of values outside the codes, and the share of each code
    (occupancy), whose distance to the reference is the total variation, ``sum |p - q| / 2``, 0 to 1. Of each adaptive
    BatchNorm: ``mean_c |mu - mu_s| / sigma_s`` against the source. The reference is what `reference` gives, or what the
    first `first` batches of the stream show.

    Args:
        model: The Adapter's network; layers with one activation scale are measured, in the pass that predicts.
        every: Batches from one measurement to the next.
        reference: Batches of calibration, each an argument of `forward`.
        forward: Called as ``forward(model, x)``.
        first: Batches that stand for calibration where `reference` is None.
    """

    def __init__(
        self, model: nn.Module, *, every: int = 10, reference: Iterable[Tensor] | None = None,
        forward: Callable[[nn.Module, Tensor], Tensor] | None = None, first: int = 3,
    ) -> None:  # fmt: skip
        if every < 1 or first < 1:
            raise ValueError(f"Telemetry: every and first must be at least 1, got {every} and {first}; use 10 and 3")
        self.model, self.every, self.first = model, every, first
        self.layers = {name: layer for name, layer in model.named_modules() if _measured(layer)}
        self.norms = {name: norm for name, norm in model.named_modules() if isinstance(norm, AdaptiveBatchNorm)}
        self.given = False
        self.reset()
        for x in reference or ():
            with torch.no_grad(), self._hooks():
                model(x) if forward is None else forward(model, x)
            self._take_reference()
        self.given = self.settled = reference is not None

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Measure the pass inside where it is time to."""
        self.batches += 1
        self.seen = {}
        due = not self.settled or self.batches % self.every == 0
        if not due:
            yield
            return
        with self._hooks():
            yield

    def report(self) -> tuple[dict[str, Any] | None, list[str]]:
        """Return what the latest pass showed, None where nothing was measured, and what of it is an event, in words."""
        if not self.seen:
            return None, []
        if not self.settled:
            self._take_reference()
            self.settled = self.taken >= self.first
            return None, []
        layers = {
            name: {
                "clipped": clipped,
                "reference": self.reference[name][0] / self.taken,
                "moved": (counts - self.reference[name][1] / self.taken).abs().sum().item() / 2,
            }
            for name, (clipped, counts) in self.seen.items()
            if name in self.reference
        }
        norms = {name: _distance(norm) for name, norm in self.norms.items()}
        telling = {name: row for name, row in layers.items() if self.values[name] >= _ENOUGH}
        return {"layers": layers, "norms": norms}, _events(telling)

    def reset(self) -> None:
        """Forget the stream, and a reference that came from it."""
        self.seen: dict[str, tuple[float, Tensor]] = {}
        self._found: dict[str, Tensor] = {}  # the same on the device: the share that is clipped, and of each code
        self.values: dict[str, float] = {}  # of a code, in the latest batch
        self.batches = 0
        if not self.given:
            self.reference: dict[str, tuple[float, Tensor]] = {}
            self.taken, self.settled = 0, False

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the reference and of where the stream is; `every` is told, not taken up."""
        reference = {name: (clipped, counts.clone()) for name, (clipped, counts) in self.reference.items()}
        where = {"batches": self.batches, "taken": self.taken, "settled": self.settled}
        return {"every": self.every, **where, "reference": reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.batches, self.taken, self.settled = state["batches"], state["taken"], state["settled"]
        self.reference = {name: (clipped, counts.clone()) for name, (clipped, counts) in state["reference"].items()}

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        self.seen, self._found = {}, {}
        hooks = [layer.register_forward_pre_hook(self._look(name)) for name, layer in self.layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        shares = torch.cat(list(self._found.values())).cpu() if self._found else torch.zeros(0)  # one transfer
        for name, part in zip(self._found, shares.split([len(f) for f in self._found.values()]), strict=True):
            self.seen[name] = (part[0].item(), part[1:])

    def _look(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            quantizer = layer.input_quantizer
            with torch.no_grad():
                x = args[0].detach()
                scale, zero = quantizer.grid(x)
                qmax = quantizer.spec.qmax
                _, _, seen = ops.prologue_fake_quant(x, scale, zero, qmin=0, qmax=qmax, axis=None, observe=True)
                codes, _ = ops.quantize_codes(x, scale, zero, qmax=qmax)
                counts = torch.bincount(codes.flatten().int(), minlength=qmax + 1).double()
                self._found[name] = torch.cat([seen[4].sum().double()[None], counts]) / x.numel()
                self.values[name] = x.numel() / (qmax + 1)

        return look

    def _take_reference(self) -> None:
        for name, (clipped, counts) in self.seen.items():
            before = self.reference.get(name, (0.0, torch.zeros_like(counts)))
            self.reference[name] = (before[0] + clipped, before[1] + counts)
        self.taken += 1


def _measured(layer: nn.Module) -> bool:
    kinds = (QuantLinear, QuantConv2d, PackedLinear, PackedConv2d)
    quantizer = getattr(layer, "input_quantizer", None)
    return isinstance(layer, kinds) and quantizer is not None and quantizer.spec.granularity == "tensor"


def _distance(norm: AdaptiveBatchNorm) -> float:
    spread = (norm.source_var + norm.eps).sqrt()
    return ((norm.running_mean - norm.source_mean).abs() / spread).mean().item()


def _events(layers: dict[str, dict[str, float]]) -> list[str]:
    events = []
    clipping = {n: v for n, v in layers.items() if v["clipped"] > _CLIPPED[0] * v["reference"] + _CLIPPED[1]}
    if clipping:
        name, worst = max(clipping.items(), key=lambda item: item[1]["clipped"])
        events.append(
            f"drift: {len(clipping)} layers clip more, {name} {worst['clipped']:.1%} of its values instead of "
            f"{worst['reference']:.1%}"
        )
    moved = {n: v["moved"] for n, v in layers.items() if v["moved"] > _OCCUPIED}
    if moved:
        name = max(moved, key=moved.get)
        events.append(f"drift: {len(moved)} layers use other codes, {name} for {moved[name]:.0%} of its values")
    return events
