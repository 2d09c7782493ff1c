"""The products of codes, as typed functions with their gradients; `ops` has them beside the others."""

import torch
from torch import Tensor

from .checks import check_conv2d, check_entering, check_epilogue, check_linear, check_operands
from .declarations import RAW
from .gradients import PackedConv2d, PackedLinear, QuantizedMatmul, entering_codes
from .kernels._epilogue import Epilogue
from .kernels.packed_conv2d import output_shape


def packed_linear(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None = None, *, bits: int, group: int = 0,
    x_scale: Tensor | None = None, x_zero: Tensor | None = None, x_bits: int = 8, token: bool = False,
    dtype: torch.dtype | None = None, gain: Tensor | None = None, shift: Tensor | None = None,
    residual: Tensor | None = None, after: str = "none", y_scale: Tensor | None = None, y_zero: Tensor | None = None,
    y_bits: int = 8, moments: bool = False,
) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Apply a linear layer whose weight is packed codes, and in the same pass what follows it.

    On floats: ``y = x @ ((code - zero) * scale).T + bias``. With `x_scale` or `token` the input is quantised first and
    ``y = (sum_k (code_x - x_zero) (code - zero)) * (x_scale * scale) + bias`` with an exact integer sum.
    Then, in float32 and each only where it is given, ``y * gain + shift``, ``+ residual``, `after`, and the codes
    ``clamp(round(y / y_scale) + y_zero, 0, 2^y_bits - 1)``, which the next layer takes as they are.
    The input, its scale and the bias receive gradients; the weight does not. What follows the layer, and an input of
    codes, is for inference.

    Args:
        x: (..., K), float16, bfloat16 or float32; or uint8, the codes whose grid is `x_scale` and `x_zero`.
        words: (N, ceil(K * bits / 8)), uint8, as `pack_codes` makes them; or (N, K), one code a byte.
        scale: (N,), float32; (N, K / group) with groups.
        zero: Shape of `scale`, int32.
        bias: (N,) or None.
        bits: Width of the weight's codes, 2 to 8.
        group: Inputs that share a weight scale, or 0.
        x_scale: () or x.shape[:-1], float32, or None for float activations.
        x_zero: Shape of `x_scale`, int32.
        x_bits: Width of the activation's codes, 2 to 8.
        token: Measure the grid of each row instead, in the pass that makes its codes (`activation_codes`).
        dtype: Of y and the residual where `x` is codes; float32 by default.
        gain: (N,), float, a frozen BatchNorm's; None for none, and so shift.
        shift: (N,), float.
        residual: Shape of y, in its dtype.
        after: "none", "relu", "relu6" or "gelu".
        y_scale: (), float32, to return codes; None for floats.
        y_zero: (), int32.
        y_bits: Width of the codes, 2 to 8.
        moments: Return the sum and the sum of squares of each output, before gain and all that follows.

    Returns:
        (y, nonfinite), or (y, nonfinite, moments): (..., N), dtype of `x`, or uint8; int32 (), the NaN and infinite
        values that codes hide, of x and of y (None without codes); (2, N), float32, without a gradient.

    Raises:
        ValueError: A shape does not fit, or a call that is for inference would have to give a gradient.
    """
    check_linear(x, words, scale, bits, group, x_scale, token)
    dtype = check_entering("packed_linear", x, x_scale, token, dtype)
    end = Epilogue(gain, shift, residual, after, y_scale, y_zero, y_bits, moments)
    if not end.transforms and x.dtype != torch.uint8:
        args = (x, words, scale, zero, bias, bits, group, x_scale, x_zero, x_bits, token, moments)
        return PackedLinear.apply(*args)[: 3 if moments else 2]
    shape = (*x.shape[:-1], words.shape[0])
    check_epilogue("packed_linear", shape, dtype, x.device, end, x, bias, x_scale)
    codes, x_scale, x_zero, count = entering_codes(x, x_scale, x_zero, x_bits, token)
    weight = (words, scale, zero, bias, bits, group)
    return _counted(end, count, *RAW.packed_linear(codes, *weight, x_scale, x_zero, x_bits, dtype, *end))


def packed_conv2d(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None = None, *, bits: int,
    kernel_size: tuple[int, int], stride: tuple[int, int] = (1, 1), padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1), groups: int = 1, x_scale: Tensor | None = None, x_zero: Tensor | None = None,
    x_bits: int = 8, dtype: torch.dtype | None = None, gain: Tensor | None = None, shift: Tensor | None = None,
    residual: Tensor | None = None, after: str = "none", y_scale: Tensor | None = None, y_zero: Tensor | None = None,
    y_bits: int = 8, moments: bool = False,
) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Apply a convolution whose weight is packed codes; the law is that of `packed_linear`, padding is the value 0.0.

    Args:
        x: (B, C, H, W), float16, bfloat16 or float32; or uint8, codes; contiguous or channels-last.
        words: (O, bytes of R * S * C / groups codes, channels last as `to_rows` gives them), uint8; or one code a byte.
        scale: (O,), float32.
        zero: (O,), int32.
        bias: (O,) or None.
        bits: Width of the weight's codes, 2 to 8.
        kernel_size: (R, S).
        stride: As in torch.nn.functional.conv2d, and so padding, dilation and groups.
        padding: Rows and columns of 0.0 on each side.
        dilation: Steps between the taps.
        groups: Groups of channels.
        x_scale: (), float32, or None for float activations.
        x_zero: (), int32.
        x_bits: Width of the activation's codes, 2 to 8.
        dtype: As in `packed_linear`, and so the others; gain and shift are (O,), moments (2, O).

    Returns:
        (y, nonfinite), or (y, nonfinite, moments), as `packed_linear`.

    Raises:
        ValueError: As `packed_linear`.
    """
    check_conv2d(x, words, scale, bits, kernel_size, padding, dilation, groups)
    dtype = check_entering("packed_conv2d", x, x_scale, False, dtype)
    end = Epilogue(gain, shift, residual, after, y_scale, y_zero, y_bits, moments)
    geometry = (list(kernel_size), list(stride), list(padding), list(dilation), groups)
    weight = (words, scale, zero, bias, bits)
    if not end.transforms and x.dtype != torch.uint8:
        return PackedConv2d.apply(x, *weight, x_scale, x_zero, x_bits, moments, *geometry)[: 3 if moments else 2]
    shape = output_shape(x, words.shape[0], *geometry[:4])
    check_epilogue("packed_conv2d", shape, dtype, x.device, end, x, bias, x_scale)
    codes, _, _, count = entering_codes(x, x_scale, x_zero, x_bits)
    return _counted(end, count, *RAW.packed_conv2d(codes, *weight, x_scale, x_zero, x_bits, *geometry, dtype, *end))


def _counted(end, count, y, moments, nonfinite):
    """Add what the codes of y hide to what those of x do."""
    if end.y_scale is not None:
        count = nonfinite if count is None else count + nonfinite
    return (y, count, moments) if end.moments else (y, count)


def quantized_matmul(
    a: Tensor, b: Tensor, a_scale: Tensor, a_zero: Tensor, b_scale: Tensor, b_zero: Tensor, *, a_bits: int, b_bits: int
) -> Tensor:
    """Multiply two activations by the integer law: ``((code_a - a_zero) @ (code_b - b_zero)) * (a_scale * b_scale)``.

    Args:
        a: (..., M, K), float.
        b: (..., K, N), float.
        a_scale: (), float32, and so b_scale; they learn.
        a_zero: (), int32, and so b_zero.
        a_bits: Width of a's codes, 2 to 8, and so b_bits.

    Returns:
        (..., M, N), dtype of `a`.

    Raises:
        ValueError: The operands do not fit, or are on several devices.
    """
    check_operands(a, b, a_scale, b_scale)
    return QuantizedMatmul.apply(a, b, a_scale, a_zero, b_scale, b_zero, a_bits, b_bits)
