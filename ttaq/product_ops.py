"""The products of codes, as typed functions with their gradients; `ops` has them beside the others."""

from torch import Tensor

from .checks import check_conv2d, check_linear, check_operands
from .gradients import PackedConv2d, PackedLinear, QuantizedMatmul


def packed_linear(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int,
    group: int = 0,
    x_scale: Tensor | None = None,
    x_zero: Tensor | None = None,
    x_bits: int = 8,
    token: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Apply a linear layer whose weight is packed codes.

    On floats: ``y = x @ ((code - zero) * scale).T + bias``. With `x_scale` or `token` the input is quantised first and
    ``y = (sum_k (code_x - x_zero) (code - zero)) * (x_scale * scale) + bias`` with an exact integer sum.
    The input, its scale and the bias receive gradients; the weight does not.

    Args:
        x: (..., K), float16, bfloat16 or float32.
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

    Returns:
        (y, nonfinite): (..., N), dtype of `x`; int32 (), the NaN and infinite inputs that codes hide (None without
        codes).

    Raises:
        ValueError: A shape does not fit.
    """
    check_linear(x, words, scale, bits, group, x_scale, token)
    return PackedLinear.apply(x, words, scale, zero, bias, bits, group, x_scale, x_zero, x_bits, token)


def packed_conv2d(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    x_scale: Tensor | None = None,
    x_zero: Tensor | None = None,
    x_bits: int = 8,
) -> tuple[Tensor, Tensor | None]:
    """Apply a convolution whose weight is packed codes; the law is that of `packed_linear`, padding is the value 0.0.

    Args:
        x: (B, C, H, W), float16, bfloat16 or float32; contiguous or channels-last.
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

    Returns:
        (y, nonfinite), as `packed_linear`.

    Raises:
        ValueError: A shape does not fit.
    """
    check_conv2d(x, words, scale, bits, kernel_size, padding, dilation, groups)
    geometry = (list(kernel_size), list(stride), list(padding), list(dilation), groups)
    return PackedConv2d.apply(x, words, scale, zero, bias, bits, x_scale, x_zero, x_bits, *geometry)


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
