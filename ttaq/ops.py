"""Every op as a typed function: what it computes, what it checks, with its gradient.

Call these: a raw torch.ops.ttaq call has no gradient. Each op is opaque to torch.compile. The implementations are
listed in `declarations`, the gradients in `gradients`.
"""

import torch
from torch import Tensor

from .declarations import RAW
from .gradients import FakeQuant, PackedConv2d, PackedLinear, QuantizedMatmul, SoftRound
from .kernels import codes as cd

PACKABLE = cd.PACKABLE
row_bytes = cd.row_bytes


def fake_quant(
    x: Tensor, scale: Tensor, zero: Tensor, *, qmin: int, qmax: int, axis: int | None = None, group: int = 0
) -> Tensor:
    """Quantise and dequantise in one pass, letting gradients straight through.

    ``t = round(x / scale) + round(zero)``; ``y = (clamp(t, qmin, qmax) - round(zero)) * scale``.
    Source: Esser et al., Learned Step Size Quantization, arXiv:1902.08153, section 2.1; Bhalgat et al.,
    LSQ+, arXiv:2004.09576.

    Args:
        x: Any shape, float16, bfloat16 or float32; any layout.
        scale: float32, positive: () for one scale, (x.shape[axis],) along an axis, x.shape[:-1] + (K / group,) for
            groups of the last axis (group = K: per token). Learns inside and outside the range.
        zero: Shape of `scale`, float32 (learns outside the range) or int32 (does not).
        qmin: Lowest code.
        qmax: Highest code; ties round to even before both bounds apply.
        axis: The axis `scale` runs along, or None.
        group: Elements of the last axis that share a scale, or 0.

    Returns:
        Shape, dtype and (for a dense x) strides of `x`.

    Raises:
        ValueError: `scale` or `zero` does not fit, or is elsewhere than `x`.
    """
    axis = _check_scales("fake_quant", x, scale, zero, axis, group)
    if _learns(x, scale, zero):
        return FakeQuant.apply(x, scale, zero, qmin, qmax, axis, group)
    return RAW.fake_quant(x, scale, zero, qmin, qmax, axis, group)


def soft_round(
    w: Tensor,
    v: Tensor,
    scale: Tensor,
    zero: Tensor,
    beta: Tensor,
    *,
    qmax: int,
    axis: int | None = None,
    group: int = 0,
) -> tuple[Tensor, Tensor]:
    """Quantise and dequantise a weight with learned rounding, and regularise the rounding.

    ``h = clip(1.2 sigmoid(v) - 0.1, 0, 1)``; ``y = (clamp(floor(w / scale) + h + zero, 0, qmax) - zero) * scale``;
    ``penalty = sum(1 - |2 h - 1|^beta)``. Source: Nagel et al., Up or Down?, arXiv:2004.10568.

    Args:
        w: The weight, float32, any shape; receives no gradient.
        v: Shape of `w`, float32: the rounding that is learned.
        scale: As in `fake_quant`; receives no gradient.
        zero: Shape of `scale`, whole numbers.
        beta: (), float32: the sharpness of the regulariser.
        qmax: Highest code.
        axis: The axis `scale` runs along, or None.
        group: Elements of the last axis that share a scale, or 0.

    Returns:
        (y, penalty): shape of `w`; ().

    Raises:
        ValueError: A shape does not fit.
    """
    axis = _check_scales("soft_round", w, scale, zero, axis, group)
    if v.shape != w.shape:
        raise ValueError(f"soft_round: v wants the shape of w {tuple(w.shape)}, got {tuple(v.shape)}; start it from w")
    return SoftRound.apply(w, v, scale, zero, beta, qmax, axis, group)


def quantize_codes(
    x: Tensor, scale: Tensor, zero: Tensor, *, qmax: int, axis: int | None = None, group: int = 0
) -> tuple[Tensor, Tensor]:
    """Quantise to integer codes, ``clamp(round(x / scale) + zero, 0, qmax)``.

    Args:
        x: Any shape, float16, bfloat16 or float32.
        scale: As in `fake_quant`.
        zero: Shape of `scale`.
        qmax: Highest code, at most 255.
        axis: The axis `scale` runs along, or None.
        group: Elements of the last axis that share a scale, or 0.

    Returns:
        (codes, nonfinite): uint8, shape of `x`; int32 (), the NaN and infinite inputs. A NaN gets the code of 0.0.

    Raises:
        ValueError: `scale` does not fit, or qmax is beyond 255.
    """
    axis = _check_scales("quantize_codes", x, scale, zero, axis, group)
    if not 0 < qmax < 256:
        raise ValueError(f"quantize_codes: qmax must be 1 to 255 to fit a byte, got {qmax}; use 2 to 8 bits")
    return RAW.quantize_codes(x, scale, zero, 0, qmax, axis, group)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (..., K), uint8, into words (..., ceil(K * bits / 8)): a little-endian bit stream a row.

    Args:
        codes: uint8, each below 2^bits.
        bits: 2, 3, 4 or 8.

    Raises:
        ValueError: `bits` or the dtype does not fit.
    """
    _check_packable("pack_codes", codes, bits)
    return RAW.pack_codes(codes, bits)


def unpack_codes(words: Tensor, bits: int, k: int) -> Tensor:
    """Unpack words (..., ceil(k * bits / 8)), uint8, into codes (..., k): the inverse of `pack_codes`.

    Raises:
        ValueError: `bits`, the dtype or the row length does not fit.
    """
    _check_packable("unpack_codes", words, bits)
    if words.shape[-1] != cd.row_bytes(k, bits):
        raise ValueError(
            f"unpack_codes: {k} codes of {bits} bits fill rows of {cd.row_bytes(k, bits)} bytes, "
            f"got {words.shape[-1]}; pass the k and bits that the words were packed with"
        )
    return RAW.unpack_codes(words, bits, k)


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
) -> tuple[Tensor, Tensor | None]:
    """Apply a linear layer whose weight is packed codes.

    Without `x_scale`: ``y = x @ ((code - zero) * scale).T + bias``. With it the input is quantised first and
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

    Returns:
        (y, nonfinite): (..., N), dtype of `x`; int32 (), the NaN and infinite inputs that codes hide (None without
        codes).

    Raises:
        ValueError: A shape does not fit.
    """
    k = x.shape[-1]
    _check_words("packed_linear", x, words, scale, bits, k, (words.shape[0], k // group) if group else words.shape[:1])
    if group and k % group:
        raise ValueError(f"packed_linear: K must be a multiple of group {group}, got {k}; use a group that divides K")
    if x_scale is not None and x_scale.shape not in ((), x.shape[:-1]):
        raise ValueError(
            f"packed_linear: x_scale wants shape () or {tuple(x.shape[:-1])}, got {tuple(x_scale.shape)}; "
            "use one scale or one a token"
        )
    return PackedLinear.apply(x, words, scale, zero, bias, bits, group, x_scale, x_zero, x_bits)


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
        words: (O, bytes of C / groups * R * S codes in OIHW order), uint8; or one code a byte.
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
    if x.ndim != 4 or x.shape[1] % groups:
        raise ValueError(
            f"packed_conv2d: x wants (B, C, H, W) with C a multiple of groups {groups}, got {tuple(x.shape)}; "
            "add the batch axis or check the channels"
        )
    _check_words(
        "packed_conv2d", x, words, scale, bits, x.shape[1] // groups * kernel_size[0] * kernel_size[1], words.shape[:1]
    )
    spans = zip(x.shape[2:], padding, dilation, kernel_size, strict=True)
    if any(size + 2 * p < d * (k - 1) + 1 for size, p, d, k in spans):
        raise ValueError(
            f"packed_conv2d: the kernel {tuple(kernel_size)} must fit into the padded input, got {tuple(x.shape)} "
            f"with padding {tuple(padding)} and dilation {tuple(dilation)}; pass larger images"
        )
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
    _check_devices("quantized_matmul", a, b, a_scale, b_scale)
    if min(a.ndim, b.ndim) < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"quantized_matmul: wanted (..., M, K) and (..., K, N), got {tuple(a.shape)} and {tuple(b.shape)}; "
            "transpose one or check K"
        )
    return QuantizedMatmul.apply(a, b, a_scale, a_zero, b_scale, b_zero, a_bits, b_bits)


def _learns(*tensors):
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _check_devices(op, x, *held):
    for tensor in held:
        if tensor.device != x.device:
            raise ValueError(
                f"{op}: x is on {x.device}, what it meets on {tensor.device}; move one with .to({str(x.device)!r})"
            )


def _check_scales(op, x, scale, zero, axis, group):
    """Raise one sentence when the scales do not fit; return the axis as a non-negative number or None."""
    _check_devices(op, x, scale, zero)
    if group:
        if x.shape[-1] % group:
            raise ValueError(
                f"{op}: the last axis must be a multiple of group {group}, got {x.shape[-1]}; use a divisor"
            )
        wanted = (*x.shape[:-1], x.shape[-1] // group)
    elif axis is None:
        wanted = ()
    elif -x.ndim <= axis < x.ndim:
        axis %= x.ndim
        wanted = (x.shape[axis],)
    else:
        raise ValueError(f"{op}: axis must lie in the {x.ndim} axes of x, got {axis}; use None for a single scale")
    if scale.shape != wanted or zero.shape != wanted:
        raise ValueError(
            f"{op}: scale and zero want shape {wanted} for axis={axis}, group={group}, "
            f"got {tuple(scale.shape)} and {tuple(zero.shape)}; reshape them or change axis and group"
        )
    return axis


def _check_packable(op, codes, bits):
    if bits not in cd.PACKABLE:
        raise ValueError(f"{op}: bits must be 2, 3, 4 or 8, got {bits}; 5 to 7 bits are simulated only, use 4 or 8")
    if codes.dtype != torch.uint8:
        raise ValueError(f"{op}: wanted uint8, got {codes.dtype}; quantize_codes makes such codes")


def _check_words(op, x, words, scale, bits, k, scales):
    _check_devices(op, x, words, scale)
    if words.shape[-1] not in (k, cd.row_bytes(k, bits)):
        raise ValueError(
            f"{op}: {k} inputs of {bits} bits need rows of {cd.row_bytes(k, bits)} bytes, got {words.shape[-1]}; "
            "the input does not fit this weight"
        )
    if scale.shape != torch.Size(scales):
        raise ValueError(
            f"{op}: scale wants shape {tuple(scales)}, got {tuple(scale.shape)}; use one per output or group"
        )
