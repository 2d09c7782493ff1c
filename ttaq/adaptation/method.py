"""The shape of an adaptation method: what it predicts with, what it changes, what it remembers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .guard import Guard

Forward = Callable[[nn.Module, Tensor], Tensor]


def rate_share(images: int, full_batch: int) -> float:
    """Return the share of its learning rate that a batch of so many images gets: ``min(1, images / full_batch)``.

    Below a full batch a gradient carries more noise. A full batch of 0 images always gets all.
    """
    return min(1.0, images / full_batch) if full_batch else 1.0


class Method:
    """Predict with a model and adapt it to what it sees.

    The Adapter owns the model (a copy in eval mode in which nothing requires a gradient), the guard, the history
    and the state; a method says which tensors adapt and how. To write one: choose the tensors in `__init__`
    (plain keyword arguments with defaults), override `update`, and add the class to `ttaq.adaptation.METHODS`.

    Args:
        model: The Adapter's own copy; a method may swap its norm layers.
        forward: Called as ``forward(model, x)``; returns logits (batch, classes).
    """

    needs_graph = False
    optimizer: Optimizer | None = None
    # Whether neighbours in the stream may share their classes; a guard that watches says so before each batch.
    correlated: bool = True

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        self.model = model
        self.forward = forward

    @classmethod
    def needs_anchor(cls, model: nn.Module) -> bool:
        """Tell whether the method cannot be made on a model without source images, ``anchor=``."""
        return False

    def predict(self, x: Tensor) -> Tensor:
        """Return the logits of a batch, leaving every tensor that adapts as it is."""
        return self.forward(self.model, x)

    def update(self, x: Tensor, logits: Tensor, guard: Guard) -> Tensor | None:
        """Adapt once to a batch.

        Args:
            x: The batch, finite and not empty.
            logits: What `predict` returned for it, with its graph where `needs_graph` says so.
            guard: Its `check` raises `Skip` on NaN or Inf; the Adapter then restores what was before the batch.

        Returns:
            The loss, (), detached; None where there is none.

        Raises:
            Skip: The batch is no good; the Adapter restores.
            Settled: There was no step, and nothing is to be restored.
        """
        raise NotImplementedError

    def answer(self, logits: Tensor) -> tuple[Tensor, str]:
        """Return what the caller gets for the logits of `predict`, (batch, classes), and what was done to them.

        The same and "", unless overridden.
        """
        return logits, ""

    def evidence(self, logits: Tensor) -> Tensor:
        """Return the logits that a guard judges the stream by, those of `predict` unless overridden."""
        return logits

    def tensors(self) -> dict[str, Tensor]:
        """Name the tensors that adapt, as the model's state_dict does."""
        return {}

    def reset(self) -> None:
        """Forget everything that is not in `tensors`."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the method remembers besides `tensors`: plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned; refuse without having changed anything."""
