"""What methods without gradients look at: the inputs of layers, their moments, and those of the source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..batches import collect
from ..packed_layers import PackedLinear
from ..quantizers import ActivationQuantizer
from .method import Forward, Method

LINEAR = (nn.Linear, PackedLinear)
CHANNELS_LAST = (*LINEAR, nn.LayerNorm, nn.RMSNorm)

T = TypeVar("T")


class Moments(NamedTuple):
    """Mean and biased variance of every channel, (C,) each, float32 or wider, and of how many values a channel."""

    mean: Tensor
    var: Tensor
    count: int = 0

    def mixed(self, other: Moments, share: float) -> Moments:
        """Return the moments of a mixture that holds `share` of the other: the variance counts how far the means lie.

        ``mean = (1 - s) m + s m'``; ``var = (1 - s) v + s v' + s (1 - s) (m' - m)^2``.
        """
        mean = torch.lerp(self.mean, other.mean, share)
        var = torch.lerp(self.var, other.var, share) + share * (1 - share) * (other.mean - self.mean).square()
        return Moments(mean, var, self.count + other.count)

    def to(self, device: torch.device) -> Moments:
        """Return the same on a device."""
        return Moments(self.mean.to(device), self.var.to(device), self.count)


class FeatureMethod(Method):
    """A method that looks at the input of one layer beside the logits.

    Args:
        model: See `Method`, as is `forward`.
        forward: Returns logits.
        features: Name of the module whose input is looked at; None takes the last linear layer, the head.

    Raises:
        ValueError: There is no such module.
    """

    def __init__(self, model: nn.Module, forward: Forward, features: str | None = None) -> None:
        super().__init__(model, forward)
        self.layer = find_layer(model, features)

    def look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of a batch and its features, (batch, width), averaged over positions and tokens."""
        with watching([self.layer], lambda layer, given: given) as seen:
            logits = self.forward(self.model, x)
        if self.layer not in seen:
            raise ValueError("adapt: features must name a module that the model calls; name another one")
        (features,) = seen[self.layer][-1:]
        if features.dim() < 2 or len(features) != len(x):
            raise ValueError(
                f"adapt: features must have shape (batch, ...) with {len(x)} images, got {tuple(features.shape)}; "
                "name another module with features="
            )
        axis = channel_axis(self.layer, features)
        return logits, features.movedim(axis, 1).flatten(2).mean(2) if features.dim() > 2 else features


def find_layer(model: nn.Module, name: str | None) -> nn.Module:
    """Return the module called `name`, or the last linear layer, in the order of registration.

    Raises:
        ValueError: There is none.
    """
    modules = dict(model.named_modules())
    if name is not None and name not in modules:
        raise ValueError(
            f"adapt: features must name a module of {type(model).__name__}, got {name!r}; "
            "take a name from model.named_modules()"
        )
    linear = [module for module in modules.values() if isinstance(module, LINEAR)]
    if name is None and not linear:
        raise ValueError(
            f"adapt: {type(model).__name__} has no linear layer whose input could be the features; "
            "name a module with features="
        )
    return linear[-1] if name is None else modules[name]


@contextmanager
def watching(
    modules: Iterable[nn.Module], take: Callable[[nn.Module, Tensor], T]
) -> Iterator[dict[nn.Module, list[T]]]:
    """Collect what `take` makes of a module's first argument, in the order of the calls, until the context closes."""
    seen: dict[nn.Module, list[T]] = {}

    def watch(module: nn.Module, args: tuple) -> None:
        if args:
            seen.setdefault(module, []).append(take(module, args[0]))

    hooks = [module.register_forward_pre_hook(watch) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def channel_axis(module: nn.Module, x: Tensor) -> int:
    """Tell which axis of a module's input holds the channels: 1 of images, the last of vectors and tokens."""
    if isinstance(module, CHANNELS_LAST):
        return x.dim() - 1
    tokens = x.dim() == 3 and not isinstance(module, (_BatchNorm, nn.GroupNorm, nn.Conv1d))
    return 2 if tokens else 1


def moments_of(module: nn.Module, x: Tensor) -> Moments:
    """Measure the channels of a module's input over all its images and positions."""
    axis = channel_axis(module, x)
    values = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(values, [d for d in range(x.dim()) if d != axis], correction=0)
    return Moments(mean, var, x.numel() // max(x.shape[axis], 1))


def pooled(parts: list[Moments]) -> Moments:
    """Return the moments of several sets of values taken together."""
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.mixed(part, part.count / (whole.count + part.count))
    return whole


def input_quantizer(module: nn.Module) -> ActivationQuantizer | None:
    """Return the quantiser of a layer's input, None where there is none or it does not quantise now."""
    quantizer = getattr(module, "input_quantizer", None)
    return quantizer if isinstance(quantizer, ActivationQuantizer) and quantizer.active else None


@torch.no_grad()
def source_moments(
    method: str, model: nn.Module, forward: Forward, anchor: Iterable, modules: Iterable[nn.Module]
) -> dict[nn.Module, Moments]:
    """Measure the inputs of modules over source images, all images together.

    Args:
        method: Named in messages.
        model: In eval mode.
        forward: Returns logits.
        anchor: Batches of source images, tensors or (images, labels), whose labels are not looked at.
        modules: Those to look at.

    Returns:
        By module, in the order of the calls.

    Raises:
        ValueError: The anchor is missing, empty or not finite.
    """
    if anchor is None:
        raise ValueError(
            f"adapt: {method} needs batches of source images, got anchor=None; "
            "pass anchor=[images, ...], some hundred without labels"
        )
    home = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
    modules = list(modules)
    found: dict[nn.Module, Moments] = {}
    for batch in collect("adapt", anchor, home):
        with watching(modules, moments_of) as seen:
            forward(model, batch)
        for module, calls in seen.items():
            found[module] = pooled([found[module], *calls] if module in found else calls)
    return found
