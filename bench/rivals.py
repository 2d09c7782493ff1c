"""What ours is compared with: the same computation as a user of torch would write it, or torch's own op."""

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ttaq import ops

ZETA, GAMMA = 1.2, -0.1  # the stretch of the rectified sigmoid


def lsq(
    x: Tensor, scale: Tensor, zero: Tensor, *, qmin: int, qmax: int, axis: int | None = None, group: int = 0
) -> Tensor:
    """Compose learned step size quantisation of torch ops in the order of its paper (arXiv:1902.08153).

    It clamps before it rounds: up to half a step beyond the range, where ours still passes the gradient, it does not.
    """
    wide, scale, zero = _aligned(x.float(), scale, zero, axis, group)
    code = torch.clamp(wide / scale + zero, qmin, qmax)
    code = code + (torch.round(code) - code).detach()
    return ((code - zero) * scale).reshape(x.shape).to(x.dtype)


def learnable(x: Tensor, scale: Tensor, zero: Tensor, *, qmin: int, qmax: int, axis: int | None, group: int) -> Tensor:
    """Call torch's own learnable fake quantisation, which takes float32; groups become channels of a flat view."""
    wide, zero = x.float(), zero.float()
    if group:
        rows = wide.reshape(-1, group)
        scales = scale.reshape(-1), zero.reshape(-1)
        y = torch._fake_quantize_learnable_per_channel_affine(rows, *scales, 0, qmin, qmax, 1.0).reshape(x.shape)
    elif axis is None:
        scales = scale.reshape(1), zero.reshape(1)
        y = torch._fake_quantize_learnable_per_tensor_affine(wide, *scales, qmin, qmax, 1.0)
    else:
        y = torch._fake_quantize_learnable_per_channel_affine(wide, scale, zero, axis, qmin, qmax, 1.0)
    return y.to(x.dtype)


def fixed(x: Tensor, scale: Tensor, zero: Tensor, *, qmin: int, qmax: int, axis: int | None, group: int) -> Tensor:
    """Call torch's own fake quantisation on a fixed grid: it stores a mask and gives no gradient of the scale."""
    wide, scale = x.float(), scale.detach()
    if group:
        rows = wide.reshape(-1, group)
        y = torch.fake_quantize_per_channel_affine(rows, scale.reshape(-1), zero.reshape(-1), 0, qmin, qmax)
        return y.reshape(x.shape).to(x.dtype)
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(wide, scale, zero, qmin, qmax).to(x.dtype)
    return torch.fake_quantize_per_channel_affine(wide, scale, zero, axis, qmin, qmax).to(x.dtype)


def brevitas(x: Tensor, scale: Tensor, zero: Tensor, *, qmin: int, qmax: int, axis: int | None, group: int) -> Tensor:
    """Call the integer quantiser of brevitas, which passes no gradient through what it clamps but to the scale."""
    wide, scale, zero = _aligned(x.float(), scale, zero.float(), axis, group)
    return _brevitas()(scale, zero, wide.new_full((), qmax.bit_length()), wide).reshape(x.shape).to(x.dtype)


@cache
def _brevitas():
    from brevitas.core.function_wrapper import RoundSte, TensorClamp
    from brevitas.core.quant.int_base import IntQuant

    parts = {"float_to_int_impl": RoundSte(), "tensor_clamp_impl": TensorClamp()}
    return IntQuant(narrow_range=False, signed=False, input_view_impl=torch.nn.Identity(), **parts)


def installed(name: str) -> bool:
    """Say whether a rival's package is there."""
    return importlib.util.find_spec(name) is not None


def perturbed(
    x: Tensor, scale: Tensor, zero: Tensor, spread: Tensor, seed: Tensor, *, qmin, qmax, axis, kind
) -> Tensor:
    """Compose perturbed fake quantisation of ours without a perturbation and of torch's random numbers."""
    if axis is not None:
        spread = spread.reshape([-1 if d == axis else 1 for d in range(x.ndim)])
    if kind == "step":
        x = x + spread * scale.detach() * (torch.rand_like(x) - 0.5)
    if kind == "gauss":
        x = x + spread * torch.randn_like(x)
    y = ops.fake_quant(x, scale, zero, qmin=qmin, qmax=qmax)
    return torch.where(torch.rand_like(x) < spread, x, y) if kind == "drop" else y


def prologue(
    x: Tensor, residual, gain, shift, scale: Tensor, zero: Tensor, *, qmin, qmax, axis, before, eps, observe,
    quantise: Callable = lsq,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compose the residual, GELU or LayerNorm, alignment, quantiser and what is seen of torch ops."""
    u = x if residual is None else x + residual
    if before == "layer_norm":
        weights = (None if t is None else t.to(u.dtype) for t in (gain, shift))
        v = torch.nn.functional.layer_norm(u, u.shape[-1:], *weights, eps)
    else:
        v = torch.nn.functional.gelu(u) if before == "gelu" else u
        if gain is not None:
            along = [-1 if d == axis else 1 for d in range(x.ndim)]
            v = v * gain.reshape(along) + shift.reshape(along)
    grid = {"qmin": qmin, "qmax": qmax, "axis": None, "group": 0}
    outputs = (quantise(v, scale, zero, **grid), *(() if residual is None else (u,)))
    return (*outputs, _seen(v.float(), scale, zero, qmin, qmax, axis)) if observe else outputs


def _seen(v, scale, zero, qmin, qmax, axis):
    others = [d for d in range(v.ndim) if d != axis]
    code = torch.round(v / scale) + zero
    clipped = ((code < qmin) | (code > qmax)).sum(others)
    return torch.stack([v.sum(others), v.square().sum(others), v.amin(others), v.amax(others), clipped])


def log2(x: Tensor, scale: Tensor, *, qmax: int, roots: int) -> Tensor:
    """Compose the logarithmic grid of torch ops, the rounding straight through."""
    raw = -roots * torch.log2(x.float() / scale)
    code = torch.clamp(raw + (torch.round(raw) - raw).detach(), 0, qmax)
    return torch.where(code < qmax, scale * torch.exp2(-code / roots), 0.0).to(x.dtype)


def log2_codes(x: Tensor, scale: Tensor, *, qmax: int, roots: int) -> Tensor:
    """Compose the codes of the logarithmic grid of torch ops; it counts no bad inputs."""
    return torch.clamp(torch.round(-roots * torch.log2(x.float() / scale)), 0, qmax).to(torch.uint8)


def soft_round(
    w: Tensor, v: Tensor, scale: Tensor, zero: Tensor, beta: Tensor, *, energy: bool = False
) -> tuple[Tensor, ...]:
    """Compose AdaRound (arXiv:2004.10568) of torch ops, one scale a row, 4 bits; with `energy` sums of y^2 by input."""
    _, scale, zero = _aligned(w, scale, zero, 0, 0)
    h = torch.clamp(torch.sigmoid(v) * ZETA + GAMMA, 0, 1)
    code = torch.clamp(torch.floor(w / scale) + h + zero, 0, 15)
    y, penalty = (code - zero) * scale, (1 - (2 * h - 1).abs().pow(beta)).sum()
    return (y, penalty, y.square().sum([d for d in range(w.ndim) if d != 1])) if energy else (y, penalty)


def codes(x: Tensor, scale: Tensor, zero: Tensor, *, qmax: int, axis: int | None, group: int) -> Tensor:
    """Compose the quantisation to codes of torch ops; it counts no bad inputs."""
    wide, scale, zero = _aligned(x.float(), scale, zero, axis, group)
    return torch.clamp(torch.round(wide / scale) + zero, 0, qmax).to(torch.uint8).reshape(x.shape)


def quantize_per_tensor(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Call torch's own quantisation to 8 bits."""
    return torch.quantize_per_tensor(x.float(), scale, zero, torch.quint8).int_repr()


def activation_codes(x: Tensor, scale: Tensor | None = None, zero: Tensor | None = None, *, bits, packed) -> Tensor:
    """Compose codes of torch ops, on one scale or on one that is measured a row; it sums and counts nothing."""
    wide, qmax = x.float(), (1 << bits) - 1
    if scale is None:
        low, high = wide.amin(-1, keepdim=True).clamp(max=0), wide.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / qmax).clamp(min=1e-8)
        zero = torch.round(-low / scale).clamp(0, qmax)
    codes = torch.clamp(torch.round(wide / scale) + zero, 0, qmax).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4 if packed else codes


def quantize_per_token(x: Tensor) -> Tensor:
    """Call torch's own asymmetric quantisation of tokens to 8 bits, that of its export flow."""
    import torch.ao.quantization.fx._decomposed  # registers the ops

    decomposed = torch.ops.quantized_decomposed
    scale, zero = decomposed.choose_qparams_per_token_asymmetric(x, torch.int8)
    return decomposed.quantize_per_token(x, scale, zero, -128, 127, torch.int8)


class Int8Linear(torch.nn.Module):
    """A linear layer of W8A8 by `torch._int_mm`, symmetric, a scale a row of both sides, in plain torch around it."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.scale = weight.float().abs().amax(1).clamp(min=1e-12) / 127
        self.codes = torch.round(weight.float() / self.scale[:, None]).to(torch.int8)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Quantise each row, multiply, dequantise; the product wants more than 16 rows, so few are padded."""
        rows = x.reshape(-1, x.shape[-1])
        scale = rows.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / 127
        codes = torch.round(rows / scale).to(torch.int8)
        sums = torch._int_mm(torch.nn.functional.pad(codes, (0, 0, 0, max(0, 32 - len(codes)))), self.codes.T)
        y = sums[: len(codes)] * (scale * self.scale)
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def int8_linears(model: torch.nn.Module) -> torch.nn.Module:
    """Replace every linear layer of a model, in place, by an `Int8Linear`."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, torch.nn.Linear):
                setattr(parent, name, Int8Linear(layer.weight.detach(), layer.bias))
    return model


def compiled(function: Callable) -> Callable:
    """Compile a rival, at its first call, for the sizes that it is called with."""
    compile_once = cache(lambda: torch.compile(lambda *args: function(*args), dynamic=False))
    return lambda *args: compile_once()(*args)


def _aligned(x, scale, zero, axis, group):
    """Shape x and its scales so that they broadcast."""
    if group:
        return x.unflatten(-1, (-1, group)), scale.unsqueeze(-1), zero.unsqueeze(-1)
    if axis is None:
        return x, scale, zero
    shape = [1] * x.ndim
    shape[axis] = -1
    return x, scale.reshape(shape), zero.reshape(shape)
