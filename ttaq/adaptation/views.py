"""What methods with several passes a batch share: seeded views, other tensors in the model's place, averages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .gradient import GradientMethod
from .method import Forward
from .statistics import AdaptiveBatchNorm

Augment = Callable[[Tensor, torch.Generator], Tensor]
Places = dict[str, list[tuple[nn.Module, str]]]


class ViewMethod(GradientMethod):
    """Look at augmented views of a batch; the seed and the number of draws are all the randomness there is.

    Args:
        model: See `GradientMethod`, as is `forward`.
        forward: Returns logits.
        augment: Called as ``augment(x, generator)``; returns a batch like x.
        seed: Any whole number.
        options: Of `GradientMethod`.
    """

    remembers: tuple[str, ...] = ("draws",)
    draws = 0

    def __init__(self, model: nn.Module, forward: Forward, *, augment: Augment, seed: int, **options: Any) -> None:
        self.augment, self.seed = augment, seed
        super().__init__(model, forward, **options)

    def view(self, x: Tensor) -> Tensor:
        """Return a new view of a batch."""
        with torch.no_grad():
            return self.augment(x, self.generator(x.device))

    def generator(self, device: torch.device) -> torch.Generator:
        """Return the generator of the next draw, on the device of the images: a state goes on on any other."""
        self.draws += 1
        return numbered(self.seed, self.draws, device)


def numbered(seed: int, draw: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the generator of one draw of many, each its own."""
    mixed = (seed * 0x9E3779B97F4A7C15 + draw * 0xBF58476D1CE4E5B9) % 2**64
    return torch.Generator(device).manual_seed(mixed >> 32)  # a CPU takes 32 bits


def places(model: nn.Module, parameters: Mapping[str, nn.Parameter], norms: Mapping[str, AdaptiveBatchNorm]) -> Places:
    """Find every module that holds a parameter, or the running statistics of a norm layer.

    Args:
        model: Where to look.
        parameters: By name.
        norms: By name; their statistics are named as `statistics.running` does.

    Returns:
        (module, key) pairs by the name of the tensor.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: Places = {name: [] for name in parameters}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if id(parameter) in names:
                found[names[id(parameter)]].append((module, key))
    for name, norm in norms.items():
        found |= {f"{name}.{key}": [(norm, key)] for key in ("running_mean", "running_var")}
    return found


@contextmanager
def worn(where: Places, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors into their places in the model until the block ends."""
    spots = [(module, key, tensor) for name, tensor in tensors.items() for module, key in where[name]]
    homes = [module._parameters if key in module._parameters else module._buffers for module, key, _ in spots]
    own = [home[key] for home, (_, key, _) in zip(homes, spots, strict=True)]
    try:
        for home, (_, key, tensor) in zip(homes, spots, strict=True):
            home[key] = tensor
        yield
    finally:
        for home, (_, key, _), tensor in zip(homes, spots, own, strict=True):
            home[key] = tensor


@contextmanager
def still(norms: Iterable[AdaptiveBatchNorm]) -> Iterator[None]:
    """Normalise with the stored moving average alone until the block ends, and leave nothing to commit."""
    held = [(norm, norm.momentum) for norm in norms]
    try:
        for norm, _ in held:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in held:
            norm.momentum, norm.pending = momentum, None


@torch.no_grad()
def approach(tensors: Iterable[Tensor], goals: Iterable[Tensor], share: float) -> None:
    """Move tensors, in place, a share of the way to their goals: ``t <- (1 - share) t + share g``."""
    pairs = [(tensor, goal.to(tensor)) for tensor, goal in zip(tensors, goals, strict=True)]
    if pairs:
        torch._foreach_lerp_([tensor for tensor, _ in pairs], [goal for _, goal in pairs], share)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return ``-sum_c q_c log softmax(z)_c`` of each image, (batch,), float32, of logits and probabilities alike."""
    return -(target * logits.float().log_softmax(-1)).sum(-1)


def check_share(name: str, value: float, usual: float) -> None:
    """Refuse what does not lie in 0 to 1, naming the usual value."""
    if not 0 <= value <= 1:
        raise ValueError(f"adapt: {name} must lie in 0 to 1, got {value}; use {usual:g}")
