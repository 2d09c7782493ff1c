"""Adapt a model to the stream it predicts on; every method is one class over shared pieces."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..surgery import copy_model
from .adapter import Adapter, Step
from .alignment import Align
from .forward_only import LAME, T3A
from .gradient import GradientMethod, Tent
from .guard import Skip
from .losses import ABL, DOT, Loss, entropy
from .method import Forward, Method
from .statistics import AdaptiveBatchNorm, Norm, Source
from .zeroth_order import ZerothOrder

__all__ = [
    "ABL",
    "DOT",
    "LAME",
    "METHODS",
    "T3A",
    "Adapter",
    "AdaptiveBatchNorm",
    "Align",
    "GradientMethod",
    "Loss",
    "Method",
    "Norm",
    "Skip",
    "Source",
    "Step",
    "Tent",
    "ZerothOrder",
    "adapt",
    "entropy",
]

METHODS: dict[str, type[Method]] = {
    "source": Source,
    "norm": Norm,
    "tent": Tent,
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
    guard: bool = True,
    history: int = 1000,
    inplace: bool = False,
    **options: Any,
) -> Adapter:
    """Make a model that goes on learning while it predicts.

    ``logits = adapter(x)`` for ever. The caller's model is left as it is: what adapts is copied, weights and packed
    codes are shared with it.

    Args:
        model: A classifier: float, prepared or packed.
        method: A name in `METHODS` ("source", "norm", "tent", "lame", "t3a", "zeroth-order", "align", or one added to
            that dict), or a `Method` class.
        forward: Called as ``forward(model, x)``, returns logits (batch, classes); None calls ``model(x)``.
        guard: Whether NaN and Inf skip the step and restore the last good state.
        history: How many of the latest steps `adapter.history` remembers.
        inplace: Adapt the caller's own model instead of a copy.
        options: Arguments of the method, such as lr, optimizer, parameters, steps, statistics and loss of `Tent`, or
            statistics, alpha, prior and momentum of `Norm`.

    Returns:
        The Adapter, in eval mode.

    Raises:
        ValueError: The method is unknown, does not take an option, or finds nothing to adapt.
    """
    name, chosen = _choose(method, options)
    with torch.inference_mode(False), torch.no_grad():
        flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
        own = model if inplace else _share(model)
        made = chosen(own.eval().requires_grad_(False), forward or _call, **options)
        return Adapter(own, made, name=name, flags=flags, guard=guard, history=history)


def _call(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def _choose(method: str | type[Method], options: dict[str, Any]) -> tuple[str, type[Method]]:
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(f"adapt: method must be one of {', '.join(METHODS)}, got {method!r}; add yours to METHODS")
    name, chosen = (method, METHODS[method]) if isinstance(method, str) else (method.__name__, method)
    known = list(inspect.signature(chosen).parameters)[2:]
    if unknown := sorted(options.keys() - set(known)):
        takes = ", ".join(known) or "no options"
        raise ValueError(f"adapt: {name} does not know {', '.join(unknown)}; it takes {takes}")
    return name, chosen


def _share(model: nn.Module) -> nn.Module:
    """Copy a model whose parameters and packed codes stay where they are; all other buffers are copied."""

    def stays(name: str, tensor: Tensor) -> bool:
        return not tensor.is_inference() and (isinstance(tensor, nn.Parameter) or tensor.dtype == torch.uint8)

    own = copy_model(model, stays)
    views: dict[nn.Parameter, nn.Parameter] = {}  # parameters of our own: their requires_grad is not the caller's
    for module in own.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in views:
                    views[parameter] = nn.Parameter(parameter.detach(), requires_grad=False)
                module._parameters[key] = views[parameter]
    return own
