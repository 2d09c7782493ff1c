"""Linear layer on packed low-bit weights.

Float activations: ``y = x @ ((code - zero) * scale).T + bias``. Activation codes: the sum over k of
``(code_x - zero_x) * (code_w - zero_w)`` is an exact integer, times ``scale_x * scale_w`` in float32, plus bias.
"""

import torch

from .codes import exact_dtype, stored_codes


def reference(x, words, scale, zero, bias, bits, group, x_scale, x_zero, x_bits, dtype):
    """Compute the layer: the specification of the op."""
    k = x.shape[-1]
    if x_scale is None:
        weight = dequantise(words, scale, zero, bits, group, k).to(x.dtype)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype)).to(dtype)
    exact = exact_dtype(group or k, bits, x_bits)
    x = x.to(exact) - x_zero.unsqueeze(-1)
    weight = stored_codes(words, bits, k).to(exact)
    step = x_scale.unsqueeze(-1)
    if group == 0:
        y = (x @ (weight - zero.unsqueeze(-1)).T).float() * (step * scale)
    else:
        y = torch.zeros(*x.shape[:-1], words.shape[0], device=x.device)
        for g in range(k // group):
            part = slice(g * group, (g + 1) * group)
            y = y + (x[..., part] @ (weight[:, part] - zero[:, g, None]).T).float() * (step * scale[:, g])
    return (y if bias is None else y + bias.float()).to(dtype)


def reference_backward(grad, words, scale, zero, bits, group, k):
    """Return grad @ weight: the gradient of the dequantised input."""
    return grad @ dequantise(words, scale, zero, bits, group, k).to(grad.dtype)


def dequantise(words, scale, zero, bits, group, k):
    """Return the float32 weight (N, k) behind `words`; it must not outlive the call."""
    codes = stored_codes(words, bits, k)
    if group:
        scale, zero = scale.repeat_interleave(group, -1), zero.repeat_interleave(group, -1)
    else:
        scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    return (codes.float() - zero) * scale
