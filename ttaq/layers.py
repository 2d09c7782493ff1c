"""Drop-in layers that simulate low bits: QuantLinear, QuantConv2d and QuantMatMul.

In eval mode a quantised layer computes exact integer sums of codes, times the scales, plus bias: its twin in
`packed_layers` gives the same bits. In train mode, and while a rounding is learned, it computes with fake-quantised
floats, so that weights and scales receive gradients.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .quantizers import ActivationQuantizer, WeightQuantizer
from .spec import QuantSpec, Recipe


class _QuantLayer:
    """What QuantLinear and QuantConv2d share: two quantisers and the choice between floats and codes."""

    def set_quantizers(self, recipe: "str | Recipe | tuple[QuantSpec | None, QuantSpec | None]", auto: bool) -> None:
        """Attach new quantisers; with `auto` they set themselves from the first input."""
        w_spec, x_spec = recipe if isinstance(recipe, tuple) else Recipe.parse(recipe).specs("")
        device = self.weight.device
        self.weight_quantizer = WeightQuantizer(w_spec, self.weight.shape, auto, device) if w_spec else None
        self.input_quantizer = ActivationQuantizer(x_spec, auto, device) if x_spec else None
        self.register_buffer("nonfinite", torch.zeros((), dtype=torch.int64, device=device), persistent=False)

    @classmethod
    def from_float(cls, layer: nn.Module, recipe: "str | Recipe | tuple" = "w4a4", *, auto: bool = True):
        """Take over the parameters of a float layer, which are shared, not copied.

        Args:
            layer: nn.Linear or nn.Conv2d.
            recipe: A text such as "w4a4", a Recipe, or (weight spec, activation spec).
            auto: Let the quantisers set themselves from the first input; False waits for `calibrate`.
        """
        new = cls.__new__(cls)
        new.__dict__ = {k: v.copy() if isinstance(v, (dict, set)) else v for k, v in layer.__dict__.items()}
        new.set_quantizers(recipe, auto)
        return new

    def _simulates(self) -> bool:
        """Whether this call computes with fake-quantised floats instead of codes."""
        quantizer = self.weight_quantizer
        return self.training or quantizer is None or not quantizer.active or quantizer.rounding is not None

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if self.weight_quantizer is not None and prefix + "weight" in state_dict:
            self.weight_quantizer.codes = None  # those of the old weight; the state may bring its own
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _float_operands(self, x):
        x = x if self.input_quantizer is None else self.input_quantizer(x)
        return x, self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)


class QuantLinear(_QuantLayer, nn.Linear):
    """Linear layer on fake-quantised weights and inputs; takes the arguments and the state_dict of nn.Linear.

    Source of the scheme: Nagel et al., A White Paper on Neural Network Quantization, arXiv:2106.08295.

    Args:
        in_features: K.
        out_features: N.
        bias: Whether to add one.
        recipe: A text such as "w4a4", a Recipe, or (weight spec, activation spec).
        device: As nn.Linear.
        dtype: As nn.Linear.
    """

    def __init__(self, in_features, out_features, bias=True, *, recipe="w4a4", device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.set_quantizers(recipe, auto=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., K) to (..., N)."""
        if self._simulates():
            return F.linear(*self._float_operands(x), self.bias)
        codes, scale, zero = self.weight_quantizer.integer(self.weight)
        spec = self.weight_quantizer.spec
        grid = row_grid(self.input_quantizer, x)
        y, count = ops.packed_linear(x, codes, scale, zero, self.bias, bits=spec.bits, group=spec.group, **grid)
        return counted(self, y, count)


class QuantConv2d(_QuantLayer, nn.Conv2d):
    """Convolution on fake-quantised weights and inputs; takes the arguments and the state_dict of nn.Conv2d.

    Args:
        args: As nn.Conv2d.
        recipe: As in QuantLinear; one weight scale an output channel.
        kwargs: As nn.Conv2d.
    """

    def __init__(self, *args, recipe="w4a4", **kwargs):
        super().__init__(*args, **kwargs)
        self.set_quantizers(recipe, auto=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, O, H', W')."""
        if self._simulates():
            x, weight = self._float_operands(x)
            return self._conv_forward(x, weight, self.bias)
        x, padding = pad_input(self, x)
        codes, scale, zero = self.weight_quantizer.integer(self.weight)
        grid = activation_grid(self.input_quantizer, x)
        y, count = ops.packed_conv2d(
            x, ops.to_rows(codes), scale, zero, self.bias, bits=self.weight_quantizer.spec.bits,
            kernel_size=self.kernel_size, stride=self.stride, padding=padding, dilation=self.dilation,
            groups=self.groups, **grid,
        )  # fmt: skip
        return counted(self, y, count)


class MatMul(nn.Module):
    """Product of two activations as a module, so that attention written with it can be quantised."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply (..., M, K) by (..., K, N)."""
        return a @ b


class QuantMatMul(MatMul):
    """Product of two quantised activations, one scale each; exact integer sums in eval mode.

    Args:
        spec: Of both operands, granularity "tensor".
        auto: Set the ranges from the first inputs.
    """

    def __init__(self, spec: QuantSpec, auto: bool = True, device=None):
        super().__init__()
        self.left_quantizer = ActivationQuantizer(spec, auto, device)
        self.right_quantizer = ActivationQuantizer(spec, auto, device)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply (..., M, K) by (..., K, N)."""
        left, right = self.left_quantizer, self.right_quantizer
        if self.training or left.perturbed or not (left.active and right.active):
            return left(_batched(a)) @ right(_batched(b))
        (a_scale, a_zero), (b_scale, b_zero) = left.grid(a), right.grid(b)
        widths = {"a_bits": left.spec.bits, "b_bits": right.spec.bits}
        return ops.quantized_matmul(a, b, a_scale, a_zero, b_scale, b_zero, **widths)


def _batched(x):
    """Lay the matrices of an operand one after the other: the product would, after the quantiser and again backward."""
    return x.mT.contiguous().mT if x.stride(-2) == 1 else x.contiguous()


def activation_grid(quantizer, x):
    """Give the x_scale, x_zero and x_bits arguments of a packed op; none of them for float activations."""
    if quantizer is None or not quantizer.active:
        return {}
    scale, zero = quantizer.grid(x)
    return {"x_scale": scale, "x_zero": zero, "x_bits": quantizer.spec.bits}


def row_grid(quantizer, x):
    """Give what `activation_grid` gives; grids of tokens are left to the pass of packed_linear that makes the codes."""
    if quantizer is None or not quantizer.active or not quantizer.measures_rows:
        return activation_grid(quantizer, x)
    return {"token": True, "x_bits": quantizer.spec.bits}


def pad_input(layer: nn.Module, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Pad the input of a convolution where the op cannot: other modes than zeros, or unequal sides.

    Returns:
        The input, and the (rows, columns) of zeros that are left to add on each side.
    """
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    if not pads_apart(layer):
        return x, (top, left)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, (left, right, top, bottom), mode=mode), (0, 0)


def pads_apart(layer: nn.Module) -> bool:
    """Tell whether the input of a convolution is padded before the op, which takes equal sides of zeros alone."""
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    return layer.padding_mode != "zeros" or left != right or top != bottom


def counted(layer, y, count):
    """Add the non-finite inputs of this call to the layer's counter, which the adapter's guard reads."""
    if count is not None:
        layer.nonfinite.add_(count)
    return y
