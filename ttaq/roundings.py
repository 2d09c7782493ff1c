"""The learned roundings of a weight: up or down (AdaRound), or the weight itself (straight-through)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from . import ops
from .quantizers import WeightQuantizer, broadcast, dequantise, learning_scale

_INNER = 0.25  # of a step: how far from its code a straight-through weight may start, so that noise does not flip it


class Rounding(nn.Module):
    """What both roundings share; a `WeightQuantizer` that holds one gives the weight that it makes.

    Attributes:
        penalty: What pulls the rounding of the latest pass towards a decision; None where nothing does.
        weight: The weight of the latest pass, with its graph.
        reused: Whether the next passes give that very weight, see `sharing`.
        energy_groups: Groups of the convolution whose column energies a pass is to give; 0 for none.
    """

    penalty: Tensor | None = None
    weight: Tensor | None = None
    energy: Tensor | None = None
    reused = False
    energy_groups = 0

    def forward(self, weight: Tensor, quantizer: WeightQuantizer) -> Tensor:
        """Return the weight that is learned, quantised."""
        if not self.reused:
            self.weight = self.make(weight, quantizer)
        return self.weight

    def column_energy(self) -> Tensor:
        """Return the sum of the squares of the latest weight over all that each input channel meets, (I,)."""
        if self.energy is not None:
            return self.energy
        by_group = self.weight.square().unflatten(0, (self.energy_groups, -1))  # (groups, O / groups, I / groups, ...)
        return by_group.flatten(3).sum((1, 3)).flatten() if self.weight.ndim > 2 else by_group.sum(1).flatten()


class AdaRound(Rounding):
    """Learn whether each weight rounds up or down. Source: Nagel et al., Up or Down?, arXiv:2004.10568.

    Args:
        weight: The weight to round; the rounding starts where it stands between its neighbours.
        quantizer: Its quantiser, ready.
    """

    def __init__(self, weight: Tensor, quantizer: WeightQuantizer):
        super().__init__()
        self.base = weight.detach()
        ratio = self.base / broadcast(quantizer.scale.detach(), weight, quantizer.spec.group)
        share = ((ratio - ratio.floor()) + 0.1) / 1.2
        self.v = nn.Parameter(torch.logit(share.clamp(1e-4, 1 - 1e-4)))
        self.register_buffer("beta", torch.tensor(20.0, device=weight.device), persistent=False)

    def make(self, weight: Tensor, quantizer: WeightQuantizer) -> Tensor:
        """Return the softly rounded weight; leave the regulariser in `penalty`."""
        tensors = (self.base, self.v, quantizer.scale.detach(), quantizer.zero, self.beta)
        grid = {"qmax": quantizer.spec.qmax, **quantizer.layout}
        y, self.penalty, energy = ops.soft_round(*tensors, **grid, conv_groups=self.energy_groups)
        self.energy = energy if self.energy_groups else None
        return y

    def codes(self, quantizer: WeightQuantizer) -> Tensor:
        """Decide: up where the learned rounding is at or above one half."""
        ratio = self.base / broadcast(quantizer.scale.detach(), self.base, quantizer.spec.group)
        zero = broadcast(quantizer.zero, self.base, quantizer.spec.group)
        return (ratio.floor() + (self.v >= 0) + zero).clamp(0, quantizer.spec.qmax).to(torch.uint8)


class StraightThrough(Rounding):
    """Learn the weight itself through rounding to nearest, and the scale with it. Source: arXiv:1902.08153.

    Args:
        weight: The weight to start from; a copy of it is learned, moved into the cells of the codes where there are
            codes.
        quantizer: Its quantiser, ready.
    """

    def __init__(self, weight: Tensor, quantizer: WeightQuantizer):
        super().__init__()
        start = weight.detach().float().clone()  # half precision would lose the steps
        if quantizer.codes is not None:
            scale = broadcast(quantizer.scale.detach(), weight, quantizer.spec.group)
            centre = dequantise(quantizer.codes, quantizer.scale.detach(), quantizer.zero, quantizer.spec.group)
            below = torch.where(quantizer.codes > 0, centre - _INNER * scale, -torch.inf)
            above = torch.where(quantizer.codes < quantizer.spec.qmax, centre + _INNER * scale, torch.inf)
            start = torch.minimum(torch.maximum(start, below), above)
        self.v = nn.Parameter(start)

    def make(self, weight: Tensor, quantizer: WeightQuantizer) -> Tensor:
        """Return the learned weight, fake-quantised, in the dtype of the float one."""
        scale = learning_scale(quantizer, weight.numel() // quantizer.scale.numel())
        y = ops.fake_quant(self.v, scale, quantizer.zero, qmin=0, qmax=quantizer.spec.qmax, **quantizer.layout)
        return y.to(weight.dtype)

    def codes(self, quantizer: WeightQuantizer) -> Tensor:
        """Round the learned weight to nearest."""
        grid = (quantizer.scale.detach(), quantizer.zero)
        return ops.quantize_codes(self.v.detach(), *grid, qmax=quantizer.spec.qmax, **quantizer.layout)[0]


@contextmanager
def sharing(roundings: Iterable[Rounding]) -> Iterator[None]:
    """Let a second branch of the same step use the weights that the first one made."""
    roundings = list(roundings)
    for rounding in roundings:
        rounding.reused = True
    try:
        yield
    finally:
        for rounding in roundings:
            rounding.reused = False
