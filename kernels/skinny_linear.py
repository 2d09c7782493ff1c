"""What packed_linear runs for at most 8 rows on a GPU: csrc/cuda/skinny_linear.cu, bound by the words it reads.

The law is that of kernels/packed_linear.py: exact sums of codes, or float32 sums of ``(code - zero) * x``, and scales.
"""

import math

import torch
from torch import Tensor

from . import _epilogue, _products
from ._epilogue import Epilogue
from ._library import BITS, DTYPES, reason
from .codes import refuses_sum

ROWS = 8  # columns of the tensor core's second operand
GROUPS = 96  # whose sums of codes fit shared memory
FLOATS = (torch.float16, torch.bfloat16)


def launch(x, words, scale, zero, bias, bits, group, x_scale, x_zero, x_bits, dtype, *end):
    """Run the CUDA kernel; x is copied where its rows do not begin and end at multiples of 16 bytes."""
    k, n, end = x.shape[-1], words.shape[0], Epilogue(*end)
    y = x.new_empty((*x.shape[:-1], n), dtype=dtype)
    if y.numel():
        weight = (words.contiguous(), scale.contiguous(), zero.contiguous())
        bias = None if bias is None else bias.float().contiguous()
        grid = (None, None) if x_scale is None else (x_scale.contiguous(), x_zero.contiguous())
        stored = _products.stored_bits(words, bits, k)
        _products.skinny_linear(_aligned(x.reshape(-1, k)), *weight, bias, *grid, y, stored, group, k)
    return y, *_epilogue.allocate(y, n, end)


def _aligned(rows: Tensor) -> Tensor:
    """Return `rows`, or a copy with zeros behind each, that begin and end at multiples of 16 bytes."""
    whole, (m, k) = 16 // rows.element_size(), rows.shape
    apart = m == 1 or rows.stride(0) % whole == 0
    if k % whole == 0 and rows.stride(1) == 1 and apart and rows.data_ptr() % 16 == 0:
        return rows
    room = rows.new_zeros(m, k + -k % whole)
    room[:, :k] = rows
    return room


def refuses(x, words, scale, zero, bias, bits, group, x_scale, x_zero, x_bits, dtype, *end):
    """Say why the CUDA kernel cannot run, or None."""
    k, end = x.shape[-1], Epilogue(*end)
    if (m := math.prod(x.shape[:-1])) > ROWS:
        return f"x has {m} rows; the CUDA kernel takes at most {ROWS}"
    if end.transforms or end.moments:
        return "something follows the product, and the CUDA kernel makes the product alone"
    if x_scale is None and x.dtype not in FLOATS:
        return f"x is {x.dtype}; the CUDA kernel takes codes, float16 and bfloat16"
    if dtype not in DTYPES:
        return f"y is {dtype}; the CUDA kernel writes float16, bfloat16 and float32"
    if x_scale is not None and (why := refuses_sum(group or k, bits, x_bits)):
        return why
    return _refuses_words(words, bits, 0 if group == k else group, k, x_scale is not None) or reason("cuda")


def _refuses_words(words, bits, group, k, integer):
    stored = _products.stored_bits(words, bits, k)
    if stored not in BITS:
        return f"the words hold {bits} bits a code; the CUDA kernel reads 2, 3, 4 and 8"
    step = 128 if stored == 3 else 64
    if group % step:
        return f"groups of {group} codes of {stored} bits are not whole steps of {step}, which the CUDA kernel takes"
    if integer and group and k // group > GROUPS:
        return f"there are {k // group} groups; the CUDA kernel keeps the sums of {GROUPS}"
    together = 16 if stored == 8 else 8 if stored == 4 else 4
    if words.shape[-1] % together or (words.is_contiguous() and words.data_ptr() % together):
        return f"the rows of words do not begin at multiples of {together} bytes, which the CUDA kernel loads at once"
    return None


def refuses_backward(*args):
    """Say why there is no CUDA kernel of the gradient."""
    return "the CUDA kernels of few rows have no gradient of their own"
