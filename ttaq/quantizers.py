"""The quantisers that layers hold: a calibrated or learned scale; `roundings` has the learned rounding of weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from . import ops
from .observers import EPSILON, choose_range, dynamic_range
from .spec import QuantSpec

_SAMPLE = 1 << 13


class Gridded(nn.Module):
    """A module whose scale and zero keep their dtype when the model changes its own, as under `model.half()`."""

    def _apply(self, fn, recurse=True):
        before = {name: getattr(self, name).data for name in ("scale", "zero")}
        super()._apply(fn, recurse)
        for name, values in before.items():
            held = getattr(self, name)
            if held.dtype != values.dtype:
                held.data = values.to(held.device)
        return self


class Quantizer(Gridded):
    """What both quantisers share: a scale, a zero, and whether they are set.

    Until it is `ready` a quantiser passes its input through, unless it is told to set itself from the first (`auto`).
    """

    def __init__(self, spec: QuantSpec, shape: tuple[int, ...], auto: bool, device=None):
        super().__init__()
        self.spec = spec
        self.auto = auto
        self.ready = False
        self.enabled = True
        self.scale = nn.Parameter(torch.full(shape, torch.nan, device=device))
        self.register_buffer("zero", torch.zeros(shape, device=device))

    @property
    def active(self) -> bool:
        """Whether it quantises now."""
        return self.enabled and (self.ready or self.auto)

    def set_range(self, scale: Tensor, zero: Tensor) -> None:
        """Set scale and zero, any shape of the right size, in place; from now on the quantiser is ready."""
        with torch.no_grad():
            self.scale.copy_(scale.reshape(self.scale.shape))
            self.zero.copy_(zero.reshape(self.zero.shape))
        self.ready = True

    def _load_from_state_dict(self, state_dict, prefix, *args):
        own = [prefix + name for name in ("scale", "zero")]
        if not any(key in state_dict for key in own):
            return  # a float layer's state: the scales stay as they are
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.ready = self.scale.is_meta or not bool(self.scale.isnan().any())

    def extra_repr(self):
        return f"{self.spec.bits} bits, per {self.spec.granularity}{'' if self.ready else ', not calibrated'}"


class ActivationQuantizer(Quantizer):
    """Quantise an activation with one learned scale, or with one measured scale a token.

    Source: Esser et al., arXiv:1902.08153 (scale and its gradient factor 1 / sqrt(n qmax), n elements a sample);
    Wei et al., QDrop, arXiv:2203.05740 (`drop`: the share of elements that stay in float while blocks are learned).
    `perturbation` takes its place where it is set: ("step", codes) or ("gauss", dB), see `ops.perturbed_fake_quant`.

    Args:
        spec: Granularity "tensor" or "token".
        auto: Set the range from the first input instead of waiting for calibration.

    Raises:
        ValueError: Another granularity.
    """

    def __init__(self, spec: QuantSpec, auto: bool = False, device=None):
        if spec.granularity not in ("tensor", "token"):
            raise ValueError(f'activations: granularity must be "tensor" or "token", got {spec.granularity!r}')
        super().__init__(spec, (), auto, device)
        self.drop = 0.0
        self.perturbation: tuple[str, float] | None = None
        self.share = None  # `sharding.Share` of a batch whose random numbers several processes draw alike
        if auto and spec.granularity == "token":
            self.fit(self.scale)

    def sample(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Draw some thousand values of `x`, float32, its extremes among them; all where there are no more."""
        flat = x.detach().float().flatten()
        if flat.numel() <= _SAMPLE:
            return flat
        picked = torch.randint(flat.numel(), (_SAMPLE,), generator=generator)
        return torch.cat([flat[picked.to(flat.device)], flat.min()[None], flat.max()[None]])

    def fit(self, values: Tensor) -> None:
        """Choose the range for these values, any shape; per token there is nothing to choose."""
        if self.spec.granularity == "token":
            self.set_range(torch.ones(()), torch.zeros(()))
        else:
            self.set_range(*choose_range(values.detach().reshape(1, -1), self.spec))

    @property
    def measures_rows(self) -> bool:
        """Whether `ops.activation_codes` measures the grid that `grid` gives."""
        return self.spec.granularity == "token" and not self.spec.symmetric

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give (scale, zero) for `x`: () each, or x.shape[:-1] per token; zero is int32."""
        if self.spec.granularity == "token":
            return dynamic_range(x, self.spec)
        if not self.ready:
            self.fit(self.sample(x, torch.Generator().manual_seed(0)))
        return self.scale, self.zero.int()

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantise `x`; the scale learns when it requires a gradient."""
        if not self.active:
            return x
        scale, zero = self.grid(x)
        grid = {"qmin": 0, "qmax": self.spec.qmax}
        if self.spec.granularity == "token":
            return ops.fake_quant(x, scale[..., None], zero[..., None], group=x.shape[-1], **grid)
        scale = learning_scale(self, x.numel() // max(len(x), 1))
        if not self.perturbed:
            return ops.fake_quant(x, scale, zero, **grid)
        kind, spread, axis = self._spread(x)
        grid |= {"kind": kind, "spread": spread, "seed": torch.randint(1 << 62, (), device=x.device), "axis": axis}
        if self.share is None:
            return ops.perturbed_fake_quant(x, scale, zero, **grid)
        return self.share.within(x, lambda whole: ops.perturbed_fake_quant(whole, scale, zero, **grid))

    @property
    def perturbed(self) -> bool:
        """Whether its passes are random: while blocks are learned."""
        return bool(self.drop or self.perturbation)

    def _spread(self, x):
        """Return (kind, spread, axis) of the perturbation; the noise of "gauss" lies so many dB below each channel."""
        kind, amount = self.perturbation or ("drop", self.drop)
        if kind != "gauss":
            return kind, torch.full((), amount, device=x.device), None
        axis = 1 if x.ndim == 4 else x.ndim - 1
        rms = x.detach().float().square().mean([d for d in range(x.ndim) if d != axis]).sqrt()
        return kind, rms * 10 ** (-amount / 20), axis


class WeightQuantizer(Quantizer):
    """Quantise a weight (N, ...) per output channel or per group of inputs, to nearest or to learned codes.

    Args:
        spec: Granularity "channel" or "group".
        shape: Shape of the weight; groups need a linear weight (N, K).
        auto: Set the range from the weight when it is first used.

    Raises:
        ValueError: Another granularity, or groups that do not fit.
    """

    def __init__(self, spec: QuantSpec, shape: torch.Size, auto: bool = False, device=None):
        if spec.granularity not in ("channel", "group"):
            raise ValueError(f'weights: granularity must be "channel" or "group", got {spec.granularity!r}')
        if spec.group and (len(shape) != 2 or shape[1] % spec.group):
            raise ValueError(
                f"weights: groups of {spec.group} need a linear weight with K a multiple of it, got {tuple(shape)}; "
                "use a group that divides K, or one scale a channel"
            )
        super().__init__(spec, (shape[0], shape[1] // spec.group) if spec.group else (shape[0],), auto, device)
        self.register_buffer("codes", None)
        self.rounding: nn.Module | None = None

    @property
    def layout(self) -> dict:
        """The axis and group arguments of the ops."""
        return {"axis": None, "group": self.spec.group} if self.spec.group else {"axis": 0, "group": 0}

    def fit(self, weight: Tensor) -> None:
        """Choose the range of every channel or group."""
        rows = weight.detach().reshape(-1, self.spec.group) if self.spec.group else weight.detach().flatten(1)
        self.set_range(*choose_range(rows, self.spec))
        self.codes = None

    def integer(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give (codes, scale, zero): uint8 of the weight's shape, and the grid with zero as int32."""
        if not self.ready:
            self.fit(weight)
        codes = self.codes
        if codes is None:
            codes, _ = ops.quantize_codes(weight.detach(), self.scale, self.zero, qmax=self.spec.qmax, **self.layout)
        return codes, self.scale, self.zero.int()

    def forward(self, weight: Tensor) -> Tensor:
        """Fake-quantise the weight: through its rounding while that is learned, from its codes once it has been."""
        if not self.active:
            return weight
        if not self.ready:
            self.fit(weight)
        if self.rounding is not None:
            return self.rounding(weight, self)
        if self.codes is None:
            scale = learning_scale(self, weight.numel() // self.scale.numel())
            return ops.fake_quant(weight, scale, self.zero, qmin=0, qmax=self.spec.qmax, **self.layout)
        return dequantise(self.codes, self.scale, self.zero, self.spec.group).to(weight.dtype)

    def harden(self) -> None:
        """Turn the learned rounding into codes."""
        self.codes = self.rounding.codes(self)
        self.rounding = None

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + "scale" in state_dict:
            codes = state_dict.get(prefix + "codes")
            self.codes = None if codes is None else codes.to(self.scale.device, copy=True)
        super()._load_from_state_dict(state_dict, prefix, *args)


class ScaleGradient(torch.autograd.Function):
    """Pass a tensor on unchanged and multiply its gradient by a factor."""

    @staticmethod
    def forward(ctx, tensor, factor):
        """Return the tensor."""
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        """Scale the gradient."""
        return grad * ctx.factor, None


def learning_scale(quantizer: Quantizer, count: int) -> Tensor:
    """Return the scale with its gradient times ``1 / sqrt(count qmax)``, `count` the values that share it."""
    return ScaleGradient.apply(quantizer.scale, 1 / math.sqrt(max(count, 1) * quantizer.spec.qmax))


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Run `model` as the float model while the context is open."""
    found = [m for m in model.modules() if isinstance(m, Quantizer)]
    before = [m.enabled for m in found]
    norms = [m._buffers for m in model.modules() if "float_mean" in m._buffers]  # see norms.measure_again
    moments = [(held["running_mean"], held["running_var"]) for held in norms]
    for m in found:
        m.enabled = False
    for held in norms:
        held["running_mean"], held["running_var"] = held["float_mean"], held["float_var"]
    try:
        yield
    finally:
        for held, (mean, var) in zip(norms, moments, strict=True):
            held["running_mean"], held["running_var"] = mean, var
        for m, enabled in zip(found, before, strict=True):
            m.enabled = enabled


def dequantise(codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:
    """Return ``(code - zero) * scale``, float32, for a weight's codes."""
    return (codes.float() - broadcast(zero, codes, group)) * broadcast(scale, codes, group)


def clamp_scales(quantizers) -> None:
    """Keep learned scales positive."""
    with torch.no_grad():
        for quantizer in quantizers:
            quantizer.scale.clamp_(min=EPSILON)


def broadcast(values: Tensor, weight: Tensor, group: int) -> Tensor:
    """Spread one value a channel (N,), or a group (N, K / group), over the elements of a weight."""
    if group:
        return values.repeat_interleave(group, dim=-1)
    return values.reshape(-1, *[1] * (weight.ndim - 1))
