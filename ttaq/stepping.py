"""How a step runs, as it is or captured once in a CUDA graph and replayed, and the curve that its error leaves."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .distributed import Team
from .sharding import Share

__all__ = ["Captured", "Curve", "cosine", "draws", "mix", "set_rates", "steady", "undone"]

_POINTS = 32  # of a curve: enough to see it by, few enough for the header of a checkpoint
_WARMUP = 3  # runs before the capture, in which libraries choose their kernels and take their workspaces

Run = Callable[..., Tensor]
"""One step: called with tensors alone, learns from them and returns the loss, ()."""


class Captured:
    """A step that is recorded once and then replayed on whatever is copied into its inputs.

    Everything that changes between steps must be a tensor: the inputs, the rates, the sharpness of roundings.

    Args:
        run: The step; must not wait for the device.
        inputs: Such as it is called with; each is copied.
        optimizer: Capturable; what runs before the capture learn and draw is undone.
    """

    def __init__(self, run: Run, inputs: tuple[Tensor | None, ...], optimizer: torch.optim.Optimizer):
        self.inputs = [t if t is None else t.clone() for t in inputs]
        with undone(optimizer, inputs[0].device):
            self._replay, self.loss = _record(run, self.inputs)

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """Run one step; the loss that is returned holds until the next one."""
        for held, new in zip(self.inputs, inputs, strict=True):
            if held is not None:
                held.copy_(new)
        self._replay()
        return self.loss


def _record(run, inputs):
    """Capture a step; return what replays it and where it leaves the loss."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(_WARMUP):
            run(*inputs)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = run(*inputs)
    return graph.replay, loss


@contextmanager
def undone(optimizer: torch.optim.Optimizer, device: torch.device) -> Iterator[None]:
    """Undo what steps inside learn and draw; the optimiser's own state starts from zero again, in place."""
    learned = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, before in learned:
                    parameter.copy_(before)
                for state in optimizer.state.values():
                    for tensor in state.values():
                        tensor.zero_()


class Curve:
    """The error of a block over its steps, as means over equal parts of them; on the device until it is read.

    Args:
        device: Where the errors are.
    """

    def __init__(self, device: torch.device):
        self._sums = torch.zeros(_POINTS, device=device)
        self._counts = [0] * _POINTS

    def add(self, step: int, total: int, error: Tensor) -> None:
        """Count the error of a step of so many, a tensor (), without waiting for it."""
        part = step if total <= _POINTS else step * _POINTS // total
        self._sums[part] += error
        self._counts[part] += 1

    def read(self, team: Team | None = None) -> list[float]:
        """Return the means to four digits, at most 32 of them; none where there were no steps.

        Args:
            team: The processes, each of which counted its part of every error.
        """
        sums = self._sums if team is None else team.add_up(self._sums.clone())
        return [
            float(f"{total / count:.4g}") for total, count in zip(sums.tolist(), self._counts, strict=True) if count
        ]


def set_rates(optimizer: torch.optim.Optimizer, rates: list[float]) -> None:
    """Set the rate of each group: in place where it is a tensor, which a captured step reads."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def cosine(base: float) -> Callable[[int, int], float]:
    """Return a rate, by step and number of steps, that falls from `base` to 0 along a cosine."""
    return lambda step, steps: base * ((1 + math.cos(math.pi * step / steps)) / 2)


def steady(base: float) -> Callable[[int, int], float]:
    """Return a rate, by step and number of steps, that stays what it is."""
    return lambda step, steps: base


def draws(total: int, size: int, steps: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw the images of each step: give their numbers (size,) on the device, and the same on the host.

    On a GPU all of them are drawn and brought to the host at once, so that no step waits for another.
    """
    if device.type == "cpu":
        for _ in range(steps):
            picked = torch.randint(total, (size,))
            yield picked, picked
        return
    picked = torch.randint(total, (steps, size), device=device)
    yield from zip(picked, picked.cpu(), strict=True)


def mix(x: Tensor, other: Tensor, share: float, part: Share | None = None) -> None:
    """Replace a share of the elements of `x` by those of `other`, both finite, at random with 15 bits an element.

    Args:
        x: Changed in place.
        other: Alike.
        share: 0 to 1.
        part: Which part of a batch `x` is; the numbers are those of the whole batch.
    """
    room = torch.empty_like(x, dtype=torch.int16) if part is None else part.room(x, torch.int16)
    chosen = room.random_() < share * (1 << 15)
    chosen = chosen if part is None else part.taken(chosen)
    x.lerp_(other, chosen.to(x.dtype))  # faster than torch.where
