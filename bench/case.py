"""A case: ours, its rivals and the ceiling, bound to the same inputs.

A binder takes `Inputs` and returns the call that is timed; what it does itself (building a graph, packing a weight for
a rival) is not timed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .timing import Call

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PASSES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Inputs:
    """The arguments of a function, those of them that receive gradients, and the gradients of its outputs."""

    args: tuple
    leaves: tuple[torch.Tensor, ...] = ()
    grads: tuple[torch.Tensor, ...] = ()


Binder = Callable[[Inputs], Call]


@dataclass(frozen=True)
class Case:
    """One op on one kind of inputs.

    Args:
        op: The raw op that runs, whose backend the row names.
        name: Shape, granularity and pass in words.
        dtype: Of the float inputs.
        make: Builds one set of inputs on a device from a generator.
        raw: The raw op's arguments for a set of inputs.
        ours: Binds the typed function.
        rivals: Bind what it is compared with, by name.
        ceiling: Binds a copy that moves as many bytes, with the same allocations where the op only moves bytes.
        exact: What the call should return, for `max_error`.
        bytes: The fewest that the call can move.
        flops: Of the matrix product in it, or 0.
        integer: The product is one of integers.
        graph: Time replays of a CUDA graph.
        quick: Keep it in a quick run.
    """

    op: str
    name: str
    dtype: str
    make: Callable[[torch.Generator, str], Inputs]
    raw: Callable[[Inputs], tuple]
    ours: Binder
    rivals: dict[str, Binder]
    ceiling: Binder
    exact: Callable[[Inputs], tuple[torch.Tensor, ...]]
    bytes: int
    flops: int = 0
    integer: bool = False
    graph: bool = False
    quick: bool = False


def forward(function: Callable) -> Binder:
    """Bind the function alone, without a graph."""

    def bind(inputs):
        def call():
            with torch.no_grad():
                return function(*inputs.args)

        return call

    return bind


def backward(function: Callable) -> Binder:
    """Bind the gradients alone: the graph is built once. A rival may give fewer of them."""

    def bind(inputs):
        outputs = function(*inputs.args)
        return lambda: torch.autograd.grad(outputs, inputs.leaves, inputs.grads, retain_graph=True, allow_unused=True)

    return bind


def both(function: Callable) -> Binder:
    """Bind the function and then its gradients."""
    return lambda inputs: (
        lambda: torch.autograd.grad(function(*inputs.args), inputs.leaves, inputs.grads, allow_unused=True)
    )


BINDERS = dict(zip(PASSES, (forward, backward, both), strict=True))


def drawn(shape, generator, device, dtype, layout="") -> torch.Tensor:
    """Draw a normal tensor; `layout` ends with "channels-last" for an image in that order."""
    x = torch.randn(shape, generator=generator, device=device).to(DTYPES[dtype])
    return x.to(memory_format=torch.channels_last) if layout.endswith("channels-last") else x


def copy_bytes(count: int) -> Binder:
    """Bind a copy that moves `count` bytes, half of them read and half written to fresh memory."""

    def bind(inputs):
        tensors = [t for t in inputs.args if isinstance(t, torch.Tensor)]
        source = torch.randint(0, 256, (max(1, count // 2),), dtype=torch.uint8, device=tensors[0].device)
        return source.clone

    return bind
