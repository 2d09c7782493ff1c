"""allocate: weight bits for each layer under a budget of bytes or of seconds, from measured sensitivities.

The sensitivity of a layer at a width is the divergence ``KL(float || quantised)`` of the network's predictions when the
weight of that layer alone is rounded to that width; sums over layers stand for the whole (Dong et al., HAWQ,
arXiv:1905.03696, choose by curvature in the same way).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .batches import Forward, call, collect, count
from .calibration import calibrate
from .layers import QuantLinear
from .learning import quant_layers
from .moments import inputs_of
from .packed_layers import PackedConv2d, PackedLinear
from .preparation import prepare
from .quantizers import WeightQuantizer, disabled
from .spec import Recipe
from .surgery import device_of, evaluating

WIDTHS = (2, 3, 4, 8)
_UNITS = 1 << 16  # that the spare budget is counted in
_CALLS = 7  # of a layer, of which the median counts as its seconds


@dataclass(frozen=True)
class Choice:
    """One width of one layer.

    Args:
        layer: Its name.
        bits: Of its weight.
        divergence: Of the network's predictions, nats an image.
        cost: Bytes of codes and scales, or seconds a call.
    """

    layer: str
    bits: int
    divergence: float
    cost: float


@dataclass(frozen=True)
class Allocation:
    """Bits a layer, and what they were chosen from.

    Args:
        recipe: For `prepare` or `quantize`: the given one with an override for each layer.
        chosen: A `Choice` a layer.
        measured: All that were looked at.
        budget: What the costs of `chosen` sum up to at most.
    """

    recipe: Recipe
    chosen: tuple[Choice, ...]
    measured: tuple[Choice, ...]
    budget: float

    @property
    def cost(self) -> float:
        """The sum of the costs of what was chosen."""
        return sum(choice.cost for choice in self.chosen)


@torch.no_grad()
def allocate(
    model: nn.Module,
    batches: Iterable,
    recipe: str | Recipe = "w4a8",
    *,
    budget: float,
    cost: str = "bytes",
    widths: tuple[int, ...] = WIDTHS,
    forward: Forward | None = None,
) -> Allocation:
    """Choose weight bits for each layer so that the predictions suffer least within a budget.

    Args:
        model: The float model, a classifier; left as it is.
        batches: A re-iterable of tensors, (x, y) pairs or dicts; some dozen images suffice.
        recipe: Activation bits, policy for the first and the last layer, exclusions; layers that its own overrides
            name keep their widths and count for nothing.
        budget: Bytes of packed weights with their scales, or seconds of all layers together on this machine.
        cost: "bytes", or "seconds": each packed layer is timed by itself on what it meets.
        widths: To choose from; of those that pack, 2, 3, 4 and 8.
        forward: Runs the model on one batch, `forward(model, x)`, when `model(x)` does not.

    Returns:
        An `Allocation`.

    Raises:
        ValueError: An argument is not as described, or even the lowest widths exceed the budget.
    """
    recipe = Recipe.parse(recipe)
    if cost not in ("bytes", "seconds"):
        raise ValueError(f'allocate: cost must be "bytes" or "seconds", got {cost!r}; use "bytes"')
    if not widths or not set(widths) <= set(WIDTHS):
        raise ValueError(f"allocate: widths must be among {WIDTHS}, which pack, got {widths}")
    prepared = prepare(model, recipe).eval()
    inputs = collect("allocate", batches, device_of(prepared))
    calibrate(prepared, inputs, forward=forward)
    measured = []
    with evaluating(prepared), disabled(prepared):
        reference = [call(prepared, entry, forward).float().log_softmax(-1) for entry in inputs]
        given = inputs_of(quant_layers(prepared), lambda: call(prepared, inputs[0], forward))
        for name, layer in _free(prepared, recipe).items():
            for bits in sorted(set(widths)):
                if bits < _least(prepared, name, recipe):
                    continue
                quantizer = WeightQuantizer(replace(layer.weight_quantizer.spec, bits=bits), layer.weight.shape)
                quantizer.to(layer.weight.device).fit(layer.weight)
                price = _price(layer, quantizer, given[name]) if cost == "seconds" else _bytes(layer, quantizer)
                rounded = _divergence(prepared, layer, quantizer, inputs, reference, forward)
                measured.append(Choice(name, bits, rounded, price))
    chosen = choose(measured, budget, cost)
    overrides = {c.layer: f"w{c.bits}a{_activation(prepared, c.layer)}" for c in chosen}
    made = replace(recipe, overrides=overrides | dict(recipe.overrides))
    return Allocation(made, tuple(chosen), tuple(measured), budget)


def choose(measured: list[Choice], budget: float, unit: str = "bytes") -> list[Choice]:
    """Choose one width a layer so that the divergences sum up to the least that the budget allows.

    A knapsack of multiple choices, solved exactly for costs that are rounded up to a 65,536th of the budget.

    Raises:
        ValueError: The lowest widths exceed the budget.
    """
    curves: dict[str, list[Choice]] = {}
    for one in measured:
        curves.setdefault(one.layer, []).append(one)
    least = sum(min(one.cost for one in curve) for curve in curves.values())
    if least > budget:
        raise ValueError(
            f"allocate: budget must be at least {least:.4g} {unit}, what the lowest widths take, got {budget:.4g}; "
            "raise it or allow lower widths"
        )
    spare, picked = max(budget - least, 1e-30), []
    best = np.zeros(_UNITS + 1)  # the least divergence of the layers so far, with so much of the spare budget spent
    for curve in curves.values():
        low = min(one.cost for one in curve)
        extra = [math.ceil((one.cost - low) / spare * _UNITS) if one.cost > low else 0 for one in curve]
        sums = np.full((len(curve), _UNITS + 1), np.inf)
        for row, (one, more) in enumerate(zip(curve, extra, strict=True)):
            if more <= _UNITS:
                sums[row, more:] = best[: _UNITS + 1 - more] + one.divergence
        picked.append((curve, extra, sums.argmin(0)))
        best = sums.min(0)
    at, chosen = _UNITS, []
    for curve, extra, rows in reversed(picked):
        chosen.append(curve[rows[at]])
        at -= extra[rows[at]]
    return chosen[::-1]


def _divergence(model, layer, quantizer, inputs, reference, forward):
    weight = layer.weight.data
    layer.weight.data = quantizer(weight)
    try:
        total = sum(
            F.kl_div(call(model, x, forward).float().log_softmax(-1), p, log_target=True, reduction="sum").item()
            for x, p in zip(inputs, reference, strict=True)
        )
    finally:
        layer.weight.data = weight
    return total / sum(count(entry) for entry in inputs)


def _free(model, recipe):
    """Name the layers whose widths are to be chosen."""
    fixed = replace(recipe, overrides={})
    return {
        name: layer
        for name, layer in quant_layers(model).items()
        if layer.weight_quantizer and recipe.specs(name) == fixed.specs(name)
    }


def _least(model, name, recipe):
    """Return the least bits of a layer: the policy for the edges raises what the recipe gives."""
    given = model.ttaq_report["layers"][name]["weight_bits"]
    return given if recipe.first_last and recipe.weight and given > recipe.weight.bits else 2


def _activation(model, name):
    return model.ttaq_report["layers"][name]["activation_bits"] or 16


def _bytes(layer, quantizer):
    """Count the bytes of the codes, a row in whole bytes, and of scales and zeros."""
    rows, width = len(layer.weight), layer.weight[0].numel()
    return rows * -(-width * quantizer.spec.bits // 8) + quantizer.scale.numel() * 8


def _price(layer, quantizer, x):
    """Time the packed layer on what it meets, in seconds: a median of calls."""
    held = layer.weight_quantizer
    layer.weight_quantizer = quantizer
    enabled = [q for q in (layer.input_quantizer, quantizer) if q is not None]
    try:
        packed = (PackedLinear if isinstance(layer, QuantLinear) else PackedConv2d).from_quantized(layer)
    finally:
        layer.weight_quantizer = held
    for q in enabled:
        q.enabled = True
    try:
        return statistics.median(_timed(packed, x) for _ in range(_CALLS))
    finally:
        for q in enabled:
            q.enabled = False


def _timed(layer, x):
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    start = time.perf_counter()
    layer(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start
