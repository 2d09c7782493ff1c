"""Alignment of the inputs of quantisers with those of the source: one forward pass, no gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..packed_layers import PackedConv2d
from ..quantizers import ActivationQuantizer
from .features import LINEAR, Moments, channel_axis, input_quantizer, moments_of, source_moments
from .guard import Guard
from .method import Forward, Method

LAYERS = (*LINEAR, nn.Conv2d, PackedConv2d)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Layers = Sequence[str] | Callable[[str, nn.Module], bool] | None


class Align(Method):
    """Move the channels that enter the quantisers towards their moments on source images.

    ``x <- (1 - l) x + l [(x - mu_t) r + mu_s]`` with ``r = min(sigma_s / (sigma_t + eps), ratio)``, per channel, as
    ``x gain + shift`` with ``gain = 1 - l + l r`` and ``shift = l (mu_s - r mu_t)``. mu_s and sigma_s come from the
    anchor; mu_t and sigma_t are running moments of what the layer is given, the batch itself included with the share
    ``b / (prior + b)``, b being its images, or `momentum`: what is predicted is aligned with its own domain, and single
    images with those before them. They start at the source. The variance is that of the mixture, and so counts how far
    the batches lie from each other.

    Where the layer quantises its input with one calibrated scale, `ops.prologue_fake_quant` aligns and quantises in one
    pass; the layer then finds the same codes again, bit for bit. Where the scale is measured a token, nothing is
    quantised, or bfloat16 meets 8 bits, the affine runs apart, before the layer.
    Products of two activations (`QuantMatMul`) stay as they are. Nothing in the model changes: `export` gives it
    without the alignment.
    Source: QuAR, arXiv:2610.08358, there of later blocks; docs/adaptation.md says what all layers gain.

    Args:
        model: See `Method`, as is `forward`.
        forward: Returns logits.
        anchor: Batches of source images, some hundred in all, measured once.
        strength: l, from 0 to below 1.
        ratio: Most that a channel is stretched by, before `strength`.
        momentum: Share of a batch, above 0 and up to 1; None for ``b / (prior + b)``.
        prior: Images that those before a batch count for; with 0 each batch stands for itself.
        layers: Name patterns or a predicate ``(name, module) -> bool``; None takes all layers that quantise their
            input, or the linear and convolutional ones if none does.
        eps: Added to sigma_t.

    Raises:
        ValueError: There is no anchor, no layer is chosen, or an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        *,
        anchor: Iterable | None = None,
        strength: float = 0.5,
        ratio: float = 3.0,
        momentum: float | None = None,
        prior: float = 64,
        layers: Layers = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(model, forward)
        _check(strength, ratio, momentum, prior)
        self.strength, self.ratio, self.momentum, self.prior, self.eps = strength, ratio, momentum, prior, eps
        names = _candidates(model)
        found = source_moments("align", model, forward, anchor, names)
        called = {names[module]: module for module in found}
        self.layers = {name: called[name] for name in _chosen(called, layers)}
        self.source = {name: found[module] for name, module in self.layers.items()}
        self.reset()

    @classmethod
    def needs_anchor(cls, model: nn.Module) -> bool:
        """Tell that it does, on every model."""
        return True

    def predict(self, x: Tensor) -> Tensor:
        """Return the logits of a batch whose activations are aligned by what was seen up to it."""
        self._now: dict[str, Moments] = {}
        self._share = self.momentum or len(x) / (self.prior + len(x))
        hooks = [module.register_forward_pre_hook(self._hook(name)) for name, module in self.layers.items()]
        try:
            return super().predict(x)
        finally:
            for hook in hooks:
                hook.remove()

    def update(self, x: Tensor, logits: Tensor, guard: Guard) -> None:
        """Keep the moments that `predict` aligned with."""
        guard.check(logits=[logits], moments=[part for found in self._now.values() for part in found[:2]])
        self.running |= self._now

    def affine(self, name: str, target: Moments) -> tuple[Tensor, Tensor]:
        """Return the (gain, shift), (C,) each, that bring the input of a layer from moments to those of the source."""
        source = self.source[name].to(target.mean.device)
        stretch = (source.var.sqrt() / (target.var.sqrt() + self.eps)).clamp(max=self.ratio)
        gain = 1 - self.strength + self.strength * stretch
        return gain, self.strength * (source.mean - stretch * target.mean)

    def reset(self) -> None:
        """Go back to the moments of the source."""
        self.running = dict(self.source)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the running moments, (mean, variance) by layer."""
        return {"moments": {name: (found.mean.clone(), found.var.clone()) for name, found in self.running.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the running moments."""
        wanted = {name: found.mean.shape for name, found in self.source.items()}
        got = {name: mean.shape for name, (mean, _) in state["moments"].items()}
        if got != wanted:
            raise ValueError(
                f"Adapter.load_state_dict: moments must be those of {', '.join(wanted)}, got {', '.join(got)}; "
                "adapt the same model with the same layers first"
            )
        self.running = {name: Moments(mean.clone(), var.clone()) for name, (mean, var) in state["moments"].items()}

    def _hook(self, name: str) -> Callable[[nn.Module, tuple], tuple | None]:
        def align(module: nn.Module, args: tuple) -> tuple | None:
            if not args:
                return None
            found = moments_of(module, args[0])
            before = self._now.get(name) or self.running[name].to(found.mean.device)  # of this pass: called again
            self._now[name] = before.mixed(found, self._share)
            return aligned(module, args[0], *self.affine(name, self._now[name])), *args[1:]

        return align


def aligned(module: nn.Module, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Apply a gain and a shift a channel to the input of a layer.

    Args:
        module: Tells the axis of the channels, and the quantiser that follows.
        x: The layer's input.
        gain: (C,), positive, float32 or wider.
        shift: (C,).

    Returns:
        What the layer is to be given, shape and dtype of `x`, already on the grid of its quantiser where one pass can
        do both.
    """
    axis, quantizer = channel_axis(module, x), input_quantizer(module)
    if quantizer is None or not _fuses(quantizer, x.dtype):
        along = [-1 if d == axis else 1 for d in range(x.dim())]
        return (x.to(gain.dtype) * gain.view(along) + shift.view(along)).to(x.dtype)
    scale, zero = quantizer.grid(x)
    grid = {"qmin": 0, "qmax": quantizer.spec.qmax, "axis": axis}
    return ops.prologue_fake_quant(x, scale, zero, gain=gain, shift=shift, **grid)[0]


def _fuses(quantizer: ActivationQuantizer, dtype: torch.dtype) -> bool:
    """Tell whether values on the grid, rounded to a dtype, get their codes back: bfloat16 is too coarse for 8 bits."""
    one_scale = quantizer.ready and quantizer.spec.granularity == "tensor"
    return one_scale and dtype in DTYPES and quantizer.spec.qmax * torch.finfo(dtype).eps < 1


def _candidates(model: nn.Module) -> dict[nn.Module, str]:
    """Name the layers that quantise their input; where none does, the linear and convolutional ones."""
    quantised = {module: name for name, module in model.named_modules() if input_quantizer(module) is not None}
    return quantised or {module: name for name, module in model.named_modules() if isinstance(module, LAYERS)}


def _chosen(called: dict[str, nn.Module], layers: Layers) -> list[str]:
    """Choose of the layers, in the order of their calls."""
    names = list(called)
    if layers is None:
        chosen = names
    elif callable(layers):
        chosen = [name for name in names if layers(name, called[name])]
    else:
        patterns = [layers] if isinstance(layers, str) else list(layers)
        chosen = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
    if not chosen:
        some = ", ".join(names[:3]) or "none"
        raise ValueError(
            f"adapt: layers={layers!r} matches none of the layers that can be aligned (there are {some}, ...); "
            "name others, or pass layers=None for all"
        )
    return chosen


def _check(strength: float, ratio: float, momentum: float | None, prior: float) -> None:
    if not 0 <= strength < 1:
        raise ValueError(f"adapt: strength must lie in 0 to below 1, got {strength}; use 0.5")
    if not ratio > 0:
        raise ValueError(f"adapt: ratio must be above 0, got {ratio}; use 3")
    if momentum is not None and not 0 < momentum <= 1:
        raise ValueError(f"adapt: momentum must lie above 0 and up to 1, got {momentum}; use 0.1 or None")
    if prior < 0:
        raise ValueError(f"adapt: prior must be a number of images from 0, got {prior}; use 64")
