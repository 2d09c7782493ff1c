"""BatchNorm while a quantised model is learned: batch statistics for a while, and statistics measured anew.

The float model's statistics are kept beside the new ones, so that `quantizers.disabled` still gives the float model.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .surgery import replace

MOMENTS = ("running_mean", "running_var")

Summed = Callable[[Tensor], Tensor]
"""Sums a tensor over the processes that share a batch, with its gradient: `distributed.Team.summed`."""


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """List the BatchNorm layers that hold running statistics."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


class FrozenBatchNorm(nn.Module):
    """BatchNorm with the statistics it holds, as ``x * gain + shift`` in float32: two operations, each rounded.

    Args:
        norm: BatchNorm of any number of axes, with running statistics.
    """

    def __init__(self, norm: _BatchNorm):
        super().__init__()
        mean, var = norm.running_mean.double(), norm.running_var.double()
        weight, bias = (
            (1.0, 0.0) if norm.weight is None else (norm.weight.detach().double(), norm.bias.detach().double())
        )
        gain = (weight * (var + norm.eps).rsqrt()).float()
        self.register_buffer("gain", gain)
        self.register_buffer("shift", (bias - mean * gain.double()).float())

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, ...) to the same shape and dtype."""
        shape = (-1, *(1,) * (x.ndim - 2))
        return (x.float() * self.gain.view(shape) + self.shift.view(shape)).to(x.dtype)


def freeze(model: nn.Module) -> nn.Module:
    """Put FrozenBatchNorm in the place of every BatchNorm that holds statistics, in place.

    A layer that goes on with an activation of its own, as timm's do, becomes a sequence of both.
    """
    norms = set(batch_norms(model))
    for name, norm in [(name, module) for name, module in model.named_modules() if module in norms]:
        frozen = FrozenBatchNorm(norm)
        more = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
        replace(model, name, nn.Sequential(frozen, *more) if more else frozen)
    return model


@contextmanager
def live(norms: Iterable[_BatchNorm], summed: Summed | None = None) -> Iterator[None]:
    """Normalise with the statistics of each batch while the context is open; what is stored stays.

    Args:
        norms: Of a model.
        summed: Makes the statistics those of a batch that several processes share.
    """
    norms = list(norms)
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        norm.train()
        norm.track_running_stats = False
        if summed is not None:
            norm.forward = partial(_shared, norm, summed)
    try:
        yield
    finally:
        for norm, (training, tracks) in zip(norms, before, strict=True):
            norm.train(training)
            norm.track_running_stats = tracks
            vars(norm).pop("forward", None)


def _shared(norm: _BatchNorm, summed: Summed, x: Tensor) -> Tensor:
    """Normalise this process's part of a batch with the moments of all of it, which are summed in float64."""
    axes, shape = [d for d in range(x.ndim) if d != 1], (-1, *(1,) * (x.ndim - 2))
    centre = norm.running_mean.detach().clone()  # any value does; near the mean nothing cancels
    d = x.float() - centre.view(shape)
    count = torch.full((1,), d.numel() / d.shape[1], dtype=torch.float64, device=d.device)
    sums = summed(torch.cat([d.sum(axes, dtype=torch.float64), d.square().sum(axes, dtype=torch.float64), count]))
    mean, square = (part / sums[-1] for part in sums[:-1].chunk(2))
    var = square - mean.square()
    if norm.track_running_stats:
        with torch.no_grad():
            unbiased = var * (sums[-1] / (sums[-1] - 1))
            norm.running_mean.lerp_((mean + centre).to(centre.dtype), norm.momentum)
            norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)
    y = (d - mean.float().view(shape)) * (var + norm.eps).rsqrt().float().view(shape)
    if norm.weight is not None:
        y = y * norm.weight.float().view(shape) + norm.bias.float().view(shape)
    y = y.to(x.dtype)
    for part in (getattr(norm, "drop", None), getattr(norm, "act", None)):  # as timm's norms go on
        y = y if part is None else part(y)
    return y


@torch.no_grad()
def measure_again(
    norms: Iterable[_BatchNorm], passes: Iterable[Callable[[], object]], summed: Summed | None = None
) -> None:
    """Replace running statistics by the mean of those of `passes`, each with the statistics of its own batch.

    Source: the mean over calibration batches, as in Sun et al., Hybrid 8-bit Training, arXiv:1906.08871, and Nagel et
    al., Overcoming Oscillations, arXiv:2203.11086, section 3 ("batch-norm re-estimation").

    Args:
        norms: Changed in place; the float model's statistics move to the buffers `float_mean` and `float_var`.
        passes: Calls that run the model once on a batch each.
        summed: As in `live`.
    """
    norms = list(norms)
    if not norms:
        return
    for norm in norms:
        _keep_float(norm)
    sums = [[torch.zeros_like(getattr(norm, name)) for name in MOMENTS] for norm in norms]
    count = 0
    with live(norms, summed), _tracking(norms):
        for run in passes:
            run()
            count += 1
            for norm, totals in zip(norms, sums, strict=True):
                for total, name in zip(totals, MOMENTS, strict=True):
                    total += getattr(norm, name)
    for norm, totals in zip(norms, sums, strict=True):
        for total, name in zip(totals, MOMENTS, strict=True):
            getattr(norm, name).copy_(total / count)


def forget_float(model: nn.Module) -> None:
    """Drop the float model's statistics, whose weights are gone once a model is packed."""
    for norm in batch_norms(model):
        for name in ("float_mean", "float_var"):
            norm._buffers.pop(name, None)
            norm._non_persistent_buffers_set.discard(name)


@contextmanager
def _tracking(norms: list[_BatchNorm]) -> Iterator[None]:
    """Store the statistics of the latest batch alone while the context is open."""
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.track_running_stats, norm.momentum = True, 1.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


def _keep_float(norm: _BatchNorm) -> None:
    if not hasattr(norm, "float_mean"):
        for kept, name in zip(("float_mean", "float_var"), MOMENTS, strict=True):
            norm.register_buffer(kept, getattr(norm, name).clone(), persistent=False)
