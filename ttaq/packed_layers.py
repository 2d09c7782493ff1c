"""PackedLinear and PackedConv2d, the twins of the quantised layers that store their weights as low-bit codes."""

import copy
import math

import torch
from torch import Tensor, nn

from . import ops
from .dispatch import explain
from .layers import QuantConv2d, QuantLinear, activation_grid, counted, pad_input, row_grid
from .quantizers import ActivationQuantizer, Gridded, dequantise
from .spec import QuantSpec, Recipe


class _PackedLayer(Gridded):
    """What PackedLinear and PackedConv2d share: words, scale, zero, bias and the quantiser of the input."""

    def __init__(self, spec: QuantSpec, rows: int, k: int, bias: bool, x_spec: QuantSpec | None, device=None):
        super().__init__()
        self.spec = spec
        scales = (rows, k // spec.group) if spec.group else (rows,)
        self.register_buffer("words", torch.zeros(rows, ops.row_bytes(k, spec.bits), dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.ones(scales, device=device))
        self.register_buffer("zero", torch.zeros(scales, dtype=torch.int32, device=device))
        self.bias = nn.Parameter(torch.zeros(rows, device=device)) if bias else None
        self.input_quantizer = ActivationQuantizer(x_spec, device=device) if x_spec else None
        self.register_buffer("nonfinite", torch.zeros((), dtype=torch.int64, device=device), persistent=False)

    @classmethod
    @torch.no_grad()
    def from_quantized(cls, layer: QuantLinear | QuantConv2d):
        """Pack the codes of a calibrated layer; grid, bias and input quantiser are copied.

        Raises:
            ValueError: The layer has no ranges yet, or weights of 5 to 7 bits.
        """
        new = cls.like(layer, _ready_specs(layer), device="meta")
        codes, scale, zero = layer.weight_quantizer.integer(layer.weight)
        new.words = ops.pack_codes(ops.to_rows(codes) if codes.ndim == 4 else codes, new.spec.bits)
        new.scale, new.zero = scale.detach().clone(), zero
        if layer.bias is not None:
            new.bias = nn.Parameter(layer.bias.detach().clone())
        new.input_quantizer = copy.deepcopy(layer.input_quantizer)
        new.nonfinite = torch.zeros((), dtype=torch.int64, device=layer.weight.device)
        return new.train(layer.training)

    def codes(self) -> Tensor:
        """Return the codes of the weight, uint8, in its shape."""
        shape = self.weight_shape()
        codes = ops.unpack_codes(self.words, self.spec.bits, math.prod(shape[1:]))
        return ops.from_rows(codes, shape) if len(shape) == 4 else codes

    @property
    def weight(self) -> Tensor:
        """The dequantised weight, made anew at each look, for models that ask a layer for its weight's dtype."""
        weight = dequantise(self.codes(), self.scale, self.zero, self.spec.group)
        return weight if self.bias is None else weight.to(self.bias.dtype)

    @torch.no_grad()
    def explain(self, x: Tensor) -> str:
        """Say which implementation multiplies an input such as `x` here, and why the others do not.

        Args:
            x: As for the layer.
        """
        op, args = self._raw(x)
        return f"{op}, {self.spec.bits} bits, on {x.device}\n{explain(op, *args)}"


class PackedLinear(_PackedLayer):
    """Linear layer whose weight is a bit stream of 2-, 3-, 4- or 8-bit codes; differentiable in its input.

    Args:
        in_features: K.
        out_features: N.
        bias: Whether to add one.
        recipe: As in QuantLinear; weights must have 2, 3, 4 or 8 bits.
        device: Where the buffers live; "meta" waits for `load`.
    """

    def __init__(self, in_features, out_features, bias=True, *, recipe="w4a4", device=None):
        spec, x_spec = _packed_specs(recipe)
        super().__init__(spec, out_features, in_features, bias, x_spec, device)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def like(cls, layer: nn.Linear, recipe, device=None) -> "PackedLinear":
        """Build an empty packed layer of the sizes of `layer`."""
        return cls(layer.in_features, layer.out_features, layer.bias is not None, recipe=recipe, device=device)

    def weight_shape(self) -> tuple[int, ...]:
        """Return (N, K)."""
        return self.out_features, self.in_features

    def forward(self, x: Tensor, **follows) -> Tensor:
        """Map (..., K) to (..., N); `follows` and codes for `x` are those of `ops.packed_linear`."""
        _check_inputs("PackedLinear", x, -1, self.in_features)
        grid = row_grid(self.input_quantizer, x)
        y, count = ops.packed_linear(
            x, self.words, self.scale, self.zero, self.bias, bits=self.spec.bits, group=self.spec.group, **grid,
            **follows,
        )  # fmt: skip
        return counted(self, y, count)

    def _raw(self, x):
        codes, grid = _codes_like(x, row_grid(self.input_quantizer, x), x.shape[:-1])
        weight = (self.words, self.scale, self.zero, self.bias, self.spec.bits, self.spec.group)
        return "packed_linear", (codes, *weight, *grid, x.dtype)

    def extra_repr(self):
        return f"{self.in_features} -> {self.out_features}, {self.spec.bits} bits"


class PackedConv2d(_PackedLayer):
    """Convolution whose weight is a bit stream of 2-, 3-, 4- or 8-bit codes; differentiable in its input.

    Args:
        in_channels: As nn.Conv2d, and so the others up to padding_mode.
        recipe: As in PackedLinear.
        device: Where the buffers live; "meta" waits for `load`.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True,
        padding_mode="zeros", *, recipe="w4a4", device=None,
    ):  # fmt: skip
        spec, x_spec = _packed_specs(recipe)
        with torch.device("meta"):
            geometry = nn.Conv2d(
                in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
            )
        super().__init__(spec, out_channels, geometry.weight[0].numel(), bias, x_spec, device)
        for name in _GEOMETRY:
            setattr(self, name, getattr(geometry, name))

    @classmethod
    def like(cls, layer: nn.Conv2d, recipe, device=None) -> "PackedConv2d":
        """Build an empty packed layer of the sizes of `layer`."""
        arguments = {name: getattr(layer, name) for name in _GEOMETRY if not name.startswith("_")}
        return cls(**arguments, bias=layer.bias is not None, recipe=recipe, device=device)

    def weight_shape(self) -> tuple[int, ...]:
        """Return (O, C / groups, R, S)."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def forward(self, x: Tensor, **follows) -> Tensor:
        """Map (B, C, H, W) to (B, O, H', W'); `follows` and codes for `x` are those of `ops.packed_conv2d`."""
        _check_inputs("PackedConv2d", x, -3, self.in_channels)
        x, padding = pad_input(self, x)
        grid = activation_grid(self.input_quantizer, x)
        y, count = ops.packed_conv2d(
            x, self.words, self.scale, self.zero, self.bias, bits=self.spec.bits, kernel_size=self.kernel_size,
            stride=self.stride, padding=padding, dilation=self.dilation, groups=self.groups, **grid, **follows,
        )  # fmt: skip
        return counted(self, y, count)

    def _raw(self, x):
        x, padding = pad_input(self, x)
        codes, grid = _codes_like(x, activation_grid(self.input_quantizer, x), ())
        weight = (self.words, self.scale, self.zero, self.bias, self.spec.bits)
        geometry = (*map(list, (self.kernel_size, self.stride, padding, self.dilation)), self.groups)
        return "packed_conv2d", (codes, *weight, *grid, *geometry, x.dtype)

    def extra_repr(self):
        return f"{self.in_channels} -> {self.out_channels}, kernel {self.kernel_size}, {self.spec.bits} bits"


_GEOMETRY = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
    "_reversed_padding_repeated_twice",
)  # fmt: skip


def _codes_like(x, grid, rows):
    """Give what the raw op would take of an input: its codes, not computed, and their (x_scale, x_zero, x_bits)."""
    if not grid:
        return x, (None, None, 8)
    if "token" in grid:
        grid |= {"x_scale": x.new_ones(rows, dtype=torch.float32), "x_zero": x.new_zeros(rows, dtype=torch.int32)}
    return torch.empty_like(x, dtype=torch.uint8), (grid["x_scale"], grid["x_zero"], grid["x_bits"])


def _check_inputs(kind, x, axis, wanted):
    """Refuse another number of inputs: the bytes of a packed row could be read as codes of a shorter one."""
    if x.ndim < -axis or x.shape[axis] != wanted:
        raise ValueError(f"{kind}: axis {axis} of the input must hold {wanted}, got {tuple(x.shape)}; check the layer")


def _packed_specs(recipe):
    spec, x_spec = recipe if isinstance(recipe, tuple) else Recipe.parse(recipe).specs("")
    if spec is None or spec.bits not in ops.PACKABLE:
        raise ValueError(
            f"pack: weights must have 2, 3, 4 or 8 bits, got {spec.bits if spec else 'float'}; "
            "5 to 7 bits are simulated only: choose 4 or 8 for this layer"
        )
    return spec, x_spec


def _ready_specs(layer):
    quantizers = [q for q in (layer.weight_quantizer, layer.input_quantizer) if q is not None]
    if not all(q.ready or q.auto for q in quantizers[:1]) or not all(q.ready for q in quantizers[1:]):
        raise ValueError(
            "pack: the layer has no calibrated ranges; run ttaq.calibrate, or the layer once, first, "
            "and exclude a layer that is never reached in the recipe"
        )
    return _packed_specs(tuple(q and q.spec for q in (layer.weight_quantizer, layer.input_quantizer)))
