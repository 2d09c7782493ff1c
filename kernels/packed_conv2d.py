"""Two-dimensional convolution on packed low-bit weights; padding stands for the value 0.0.

The integer law is that of `packed_linear`: exact integer sums, times ``scale_x * scale_w`` in float32, plus bias.
"""

import torch
from torch.nn import functional as F

from .codes import exact_dtype, stored_codes


def reference(
    x,
    words,
    scale,
    zero,
    bias,
    bits,
    x_scale,
    x_zero,
    x_bits,
    kernel_size,
    stride,
    padding,
    dilation,
    groups,
    dtype,
):
    """Compute the layer: the specification of the op."""
    layout = fake(
        x,
        words,
        scale,
        zero,
        bias,
        bits,
        x_scale,
        x_zero,
        x_bits,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        dtype,
    )
    per_group = x.shape[1] // groups
    shape = (words.shape[0], per_group, *kernel_size)
    if x_scale is None:
        weight = dequantise(words, scale, zero, bits, shape).to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        return layout.copy_(F.conv2d(x, weight, bias, stride, padding, dilation, groups))
    exact = exact_dtype(per_group * kernel_size[0] * kernel_size[1], bits, x_bits)
    codes = stored_codes(words, bits, shape[1] * shape[2] * shape[3])
    weight = (codes.to(exact) - zero.unsqueeze(-1)).reshape(shape)
    with torch.backends.cudnn.flags(enabled=False):  # Winograd and TF32 sums of integers are not exact
        sums = F.conv2d(x.to(exact) - x_zero, weight, None, stride, padding, dilation, groups)
    y = sums.float() * (x_scale * scale).reshape(-1, 1, 1)
    return layout.copy_(y if bias is None else y + bias.float().reshape(-1, 1, 1))


def reference_backward(grad, words, scale, zero, bits, input_shape, kernel_size, stride, padding, dilation, groups):
    """Return the gradient of the dequantised input, shape `input_shape`."""
    shape = (words.shape[0], input_shape[1] // groups, *kernel_size)
    weight = dequantise(words, scale, zero, bits, shape).to(grad.dtype)
    return torch.nn.grad.conv2d_input(input_shape, weight, grad, stride, padding, dilation, groups).contiguous()


def dequantise(words, scale, zero, bits, shape):
    """Return the float32 weight of `shape` behind `words`; it must not outlive the call."""
    codes = stored_codes(words, bits, shape[1] * shape[2] * shape[3])
    return ((codes.float() - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).reshape(shape)


def fake(
    x,
    words,
    scale,
    zero,
    bias,
    bits,
    x_scale,
    x_zero,
    x_bits,
    kernel_size,
    stride,
    padding,
    dilation,
    groups,
    dtype,
):
    """Allocate the output as the op does: contiguous, or channels-last where `x` is."""
    sizes = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    ]
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((x.shape[0], words.shape[0], *sizes), dtype=dtype, device=x.device, memory_format=layout)
