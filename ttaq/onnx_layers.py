"""Twins of the quantised layers in the operators of ONNX: QuantizeLinear and DequantizeLinear around float products.

A twin computes ``(code - zero) * scale`` of its input and of its weight, and multiplies these; the integers are stored
in the narrowest type that holds them. Source of the operators: ONNX, QuantizeLinear and DequantizeLinear, versions 13
to 21 (4-bit types and `block_size`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import MatMul, QuantConv2d, QuantLinear, QuantMatMul, pad_input
from .observers import dynamic_range
from .packed_layers import PackedConv2d, PackedLinear
from .quantizers import ActivationQuantizer, dequantise
from .spec import QuantSpec

LAYERS = (QuantLinear, QuantConv2d, PackedLinear, PackedConv2d, QuantMatMul)
NARROW = {"int4": torch.int8, "uint4": torch.uint8}  # what torch has no type for, by what holds it until it is written
COARSE = "coarse_"  # begins the names of weights beside which runtimes would round the bias to whole products of codes
_DTYPES = {"int8": torch.int8, "uint8": torch.uint8} | NARROW
_COPIED = (
    "in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
    "groups", "padding_mode", "_reversed_padding_repeated_twice",
)  # fmt: skip


@dataclass(frozen=True)
class Codes:
    """The weight of a layer: codes (N, ...), uint8, and its grid, as `quantizers.dequantise` takes them."""

    spec: QuantSpec
    codes: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def centred(self) -> Tensor:
        """Codes whose zero is 0, int16."""
        zero = self.zero.repeat_interleave(self.spec.group, 1) if self.spec.group else self.zero
        return self.codes.short() - zero.short().view(*zero.shape, *(1,) * (self.codes.ndim - zero.ndim))


def codes_of(layer: nn.Module) -> Codes | None:
    """Return the weight's codes of a quantised or packed layer, None where its weight is in float."""
    if isinstance(layer, (PackedLinear, PackedConv2d)):
        return Codes(layer.spec, layer.codes(), layer.scale.detach(), layer.zero)
    quantizer = getattr(layer, "weight_quantizer", None)
    if quantizer is None or not quantizer.active:
        return None
    codes, scale, zero = quantizer.integer(layer.weight)
    return Codes(quantizer.spec, codes, scale.detach(), zero)


def quantizers_of(layer: nn.Module) -> list[ActivationQuantizer]:
    """List the quantisers of a layer's inputs."""
    if isinstance(layer, QuantMatMul):
        return [layer.left_quantizer, layer.right_quantizer]
    return [layer.input_quantizer] if layer.input_quantizer is not None else []


class Steps(nn.Module):
    """Quantise and dequantise an activation on one constant grid, by two operators.

    Fewer bits than the type holds are cut off in float before: the bounds are codes times the scale, so that rounding
    gives the same codes.

    Args:
        quantizer: Calibrated, one scale a tensor.
        narrow: Whether 4-bit types may be used.
    """

    def __init__(self, quantizer: ActivationQuantizer, narrow: bool):
        super().__init__()
        bits, qmax = quantizer.spec.bits, quantizer.spec.qmax
        scale, zero = (t.detach().cpu().clone() for t in quantizer.grid(torch.empty(0)))
        middle = (qmax + 1) // 2
        signed = int(zero) == middle
        width = 4 if narrow and bits <= 4 else 8
        zero = zero - middle if signed else zero
        low = -middle if signed else 0
        bounds = (low - int(zero)) * scale, (low + qmax - int(zero)) * scale
        self.bounds = None if bits == width else tuple(float(bound) for bound in bounds)
        self.kind = f"{'' if signed else 'u'}int{width}"
        self.register_buffer("scale", scale)
        self.register_buffer(f"zero_{self.kind}", zero.to(_DTYPES[self.kind]))

    def forward(self, x: Tensor) -> Tensor:
        """Map x to the nearest values of the grid."""
        grid = self.scale, getattr(self, f"zero_{self.kind}")
        x = x if self.bounds is None else x.clamp(*self.bounds)
        codes = _operator("QuantizeLinear", (x, *grid), {}, _DTYPES[self.kind])
        return _operator("DequantizeLinear", (codes, *grid), {}, torch.float32)


class TokenSteps(nn.Module):
    """Quantise and dequantise an activation on grids measured for each token, by arithmetic in float.

    Args:
        quantizer: Of granularity "token".
    """

    def __init__(self, quantizer: ActivationQuantizer):
        super().__init__()
        self.spec, self.kind = quantizer.spec, "a grid a token, in float"

    def forward(self, x: Tensor) -> Tensor:
        """Map x to the nearest values of the grid of each row."""
        scale, zero = (t[..., None] for t in dynamic_range(x, self.spec))
        zero = zero.float()
        return (((x / scale).round() + zero).clamp(0, self.spec.qmax) - zero) * scale


class Stored(nn.Module):
    """A weight, dequantised by an operator from integers, one scale an output channel or a block of inputs.

    Args:
        held: The weight.
        narrow: Whether 4-bit types may be used.
        centred: Whether every zero must be 0; the integers then fit in int8.
        turned: Whether a linear weight is stored as (K, N).
        coarse: Whether `onnx_graph` is to keep the layer's bias out of the product.
    """

    def __init__(self, held: Codes, narrow: bool, centred: bool, turned: bool, coarse: bool):
        super().__init__()
        spec, middle = held.spec, (held.spec.qmax + 1) // 2
        signed = centred or bool((held.zero == middle).all())
        small = spec.bits <= 4 and (not centred or bool(spec.group))  # TensorRT reads int4 in blocks alone
        self.kind = f"{'' if signed else 'u'}int{4 if narrow and small else 8}"
        codes, zero = (held.centred, torch.zeros_like(held.zero)) if signed else (held.codes, held.zero)
        scale = held.scale
        if turned:
            codes = codes.mT
            scale, zero = (scale.mT, zero.mT) if spec.group else (scale, zero)
        self.attributes = {"axis": 0, "block_size": spec.group} if spec.group else {"axis": int(turned)}
        dtype = _DTYPES[self.kind]
        self.register_buffer("scale", scale.float().contiguous().clone())
        self.name = f"{COARSE if coarse else ''}codes_{self.kind}"
        self.register_buffer(self.name, codes.to(dtype).contiguous())
        self.register_buffer(f"zero_{self.kind}", zero.to(dtype).contiguous())

    def forward(self) -> Tensor:
        """Return the weight, float32."""
        codes, zero = getattr(self, self.name), getattr(self, f"zero_{self.kind}")
        return _operator("DequantizeLinear", (codes, self.scale, zero), self.attributes, torch.float32)


class _Twin(nn.Module):
    """What the twins of layers with a weight share."""

    def __init__(self, layer: nn.Module, narrow: bool, centred: bool):
        super().__init__()
        for name in _COPIED:
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        self.steps = steps_of(layer.input_quantizer, narrow)
        held, turned = codes_of(layer), not hasattr(layer, "stride")
        self.coarse = held is not None and isinstance(self.steps, Steps) and not centred
        self.coarse = self.coarse and min(held.spec.bits, layer.input_quantizer.spec.bits) < 8
        self.stored = None if held is None else Stored(held, narrow, centred, turned, self.coarse)
        self.values = layer.weight.detach() if held is None else None
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().float())
        self._held = held

    @property
    def weight(self) -> Tensor:
        """The weight in float, for models that look at it."""
        held = self._held
        return self.values if held is None else dequantise(held.codes, held.scale, held.zero, held.spec.group)


class LinearTwin(_Twin):
    """QuantLinear or PackedLinear in the operators of ONNX."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., K) to (..., N)."""
        y = self.steps(x) @ (self.values.mT if self.stored is None else self.stored())
        if self.bias is None:
            return y
        return y - (-self.bias) if self.coarse else y + self.bias  # a sum would become part of the product, see COARSE


class ConvTwin(_Twin):
    """QuantConv2d or PackedConv2d in the operators of ONNX."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, O, H', W')."""
        x, padding = pad_input(self, x)
        weight = self.values if self.stored is None else self.stored()
        return F.conv2d(self.steps(x), weight, self.bias, self.stride, padding, self.dilation, self.groups)


class ProductTwin(MatMul):
    """QuantMatMul in the operators of ONNX; it keeps the quantisers, by which opened attention knows that it counts."""

    def __init__(self, layer: QuantMatMul, narrow: bool):
        super().__init__()
        self.left_quantizer, self.right_quantizer = layer.left_quantizer, layer.right_quantizer
        self.left, self.right = steps_of(self.left_quantizer, narrow), steps_of(self.right_quantizer, narrow)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply (..., M, K) by (..., K, N)."""
        return self.left(a) @ self.right(b)


def steps_of(quantizer: ActivationQuantizer | None, narrow: bool) -> nn.Module:
    """Return what quantises an activation as `quantizer` does; what does nothing where there is none."""
    if quantizer is None or not quantizer.active:
        return nn.Identity()
    return TokenSteps(quantizer) if quantizer.spec.granularity == "token" else Steps(quantizer, narrow)


def twin_of(layer: nn.Module, *, narrow: bool, centred: bool) -> nn.Module:
    """Build the twin of one of `LAYERS`.

    Args:
        layer: Calibrated.
        narrow: Whether 4-bit types may be used: from opset 21 on.
        centred: Whether the zeros of weights must be 0, as TensorRT wants.
    """
    if isinstance(layer, QuantMatMul):
        return ProductTwin(layer, narrow)
    kind = LinearTwin if isinstance(layer, (QuantLinear, PackedLinear)) else ConvTwin
    return kind(layer, narrow, centred)


def _operator(name, operands, attributes, dtype):
    """Call an operator of ONNX that keeps the shape of its first operand."""
    from torch.onnx import ops  # takes a tenth of a second

    return ops.symbolic(name, operands, attributes, dtype=dtype, shape=operands[0].shape)
