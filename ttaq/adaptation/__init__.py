"""Adapt a model to the stream it predicts on; every method is one class over shared pieces."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import Extent
from .adapter import Adapter
from .alignment import Align
from .bank import DomainBank
from .ensemble import ROID
from .forward_only import LAME, T3A
from .gradient import GradientMethod, Tent
from .guard import Settled, Skip
from .history import Step, read_history, write_history
from .losses import ABL, DOT, Loss, entropy
from .method import Forward, Method
from .norm import Norm, Source
from .normalisation import Record
from .parameters import collect_params, configure_model, share_model
from .selection import EATA, ETA, DeYO
from .sharpness import SAR
from .statistics import AdaptiveBatchNorm
from .teacher import CoTTA, RoTTA
from .telemetry import Telemetry
from .zeroth_order import ZerothOrder

__all__ = [
    "ABL",
    "DOT",
    "EATA",
    "ETA",
    "LAME",
    "METHODS",
    "ROID",
    "SAR",
    "T3A",
    "Adapter",
    "AdaptiveBatchNorm",
    "Align",
    "CoTTA",
    "DeYO",
    "DomainBank",
    "GradientMethod",
    "Loss",
    "Method",
    "Norm",
    "RoTTA",
    "Settled",
    "Skip",
    "Source",
    "Step",
    "Telemetry",
    "Tent",
    "ZerothOrder",
    "adapt",
    "collect_params",
    "configure_model",
    "entropy",
    "options_of",
    "read_history",
    "write_history",
]

METHODS: dict[str, type[Method]] = {
    "source": Source,
    "norm": Norm,
    "tent": Tent,
    "eta": ETA,
    "eata": EATA,
    "sar": SAR,
    "deyo": DeYO,
    "cotta": CoTTA,
    "rotta": RoTTA,
    "roid": ROID,
    "lame": LAME,
    "t3a": T3A,
    "zeroth-order": ZerothOrder,
    "align": Align,
}


def adapt(
    model: nn.Module,
    method: str | type[Method] = "tent",
    *,
    forward: Forward | None = None,
    guard: bool | str = True,
    history: int = 1000,
    telemetry: int = 0,
    reference: Iterable[Tensor] | None = None,
    bank: int | DomainBank = 0,
    inplace: bool = False,
    **options: Any,
) -> Adapter:
    """Make a model that goes on learning while it predicts.

    ``logits = adapter(x)`` for ever. The caller's model is left as it is: what adapts is copied, weights and packed
    codes are shared with it.

    Args:
        model: A classifier: float, prepared or packed.
        method: A name in `METHODS`, the user's own among them, or a `Method` class.
        forward: Called as ``forward(model, x)``, returns logits (batch, classes); None calls ``model(x)``.
        guard: True, "finite" or False: whether NaN and Inf skip the step and restore the last good state, and whether
            correlated batches and collapse are answered and a wrong normalisation is noticed, see `Adapter`.
        history: How many of the latest steps `adapter.history` remembers.
        telemetry: Batches from one measurement of drift to the next, 0 for none; see `Telemetry`.
        reference: Batches of calibration images that drift is measured against, and the normalisation of the first
            batch where the model was not calibrated; None takes the first of the stream.
        bank: How many domains to remember, or a `DomainBank`, which several streams may share; 0 for none.
        inplace: Adapt the caller's own model instead of a copy.
        options: Arguments of the method, such as lr, optimizer, parameters, steps, statistics and loss of `Tent`, or
            statistics, alpha, prior and momentum of `Norm`.

    Returns:
        The Adapter, in eval mode.

    Raises:
        ValueError: The method is unknown, does not take an option, or finds nothing to adapt.
    """
    name, chosen = _choose(method, options)
    if guard not in (True, False, "finite"):
        raise ValueError(f'adapt: guard must be True, "finite" or False, got {guard!r}; use True')
    reference = list(reference) if isinstance(reference, Iterator) else reference  # it may be read twice
    with torch.inference_mode(False), torch.no_grad():
        flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
        own = model if inplace else share_model(model)
        made = chosen(own.eval().requires_grad_(False), forward or _call, **options)
        drift = Telemetry(own, every=telemetry, reference=reference, forward=forward) if telemetry else None
        domains = DomainBank(bank) if isinstance(bank, int) and bank else bank or None
        parts = {"telemetry": drift, "bank": domains, "inputs": _inputs(model, forward, reference)}
        return Adapter(own, made, name=name, flags=flags, guard=guard, history=history, **parts)


def _inputs(model: nn.Module, forward: Forward | None, reference: Iterable[Tensor] | None) -> Record | None:
    """Return what the images of calibration were, of the model's report or else of the reference."""
    known = getattr(model, "ttaq_report", {}).get("calibration", {}).get("inputs")
    if known is None and forward is None and reference is not None:
        extent = Extent()
        for x in reference:
            extent.add(x)
        known = extent.record()
    return known


def _call(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def _choose(method: str | type[Method], options: dict[str, Any]) -> tuple[str, type[Method]]:
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(f"adapt: method must be one of {', '.join(METHODS)}, got {method!r}; add yours to METHODS")
    name, chosen = (method, METHODS[method]) if isinstance(method, str) else (method.__name__, method)
    known = options_of(chosen)
    if unknown := sorted(options.keys() - set(known)):
        takes = ", ".join(known) or "no options"
        raise ValueError(f"adapt: {name} does not know {', '.join(unknown)}; it takes {takes}")
    return name, chosen


def options_of(method: type[Method]) -> list[str]:
    """List the options that `adapt` hands to a method; where it hands others on, its parent's follow its own."""
    found = list(inspect.signature(method).parameters.values())[2:]
    names = [option.name for option in found if option.kind is not option.VAR_KEYWORD]
    if len(names) < len(found):
        holder = next(one for one in method.__mro__ if "__init__" in vars(one))
        names += [name for name in options_of(holder.__mro__[1]) if name not in names]
    return names
