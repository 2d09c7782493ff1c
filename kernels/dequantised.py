"""Linear layer on packed low-bit weights, many rows of floats at a time: dequantise the weight once, then cuBLAS.

``y = x @ weight.T + bias`` with ``weight = (code - zero) * scale`` in the dtype of x, which lives for the call alone.
A product that decodes as it goes decodes a weight once for every tile of rows; with many rows once is cheaper.
"""

import math

import torch
from torch.nn import functional as F

from ._epilogue import Epilogue, allocate
from ._operands import load_codes
from ._triton import jit, tl, triton
from .codes import refuses_words

# Rows of x (8 images of a ViT, 8 * 197) from which on cuBLAS should win by more than the 2.5 bytes a weight that
# dequantising to 16 bits moves: an estimate, which no GPU has measured.
LEAST_ROWS = 1576
WHY = f"from {LEAST_ROWS} rows of floats on, dequantising once for cuBLAS should be faster (not measured yet)"
_ROWS, _COLUMNS = 16, 128  # of the tile that a program dequantises


@jit
def _dequantise_kernel(
    word_ptr, scale_ptr, zero_ptr, weight_ptr, N, K, row_bytes, group,
    BITS: tl.constexpr, GROUPED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_k = tl.cdiv(K, BLOCK_K)
    start = (tl.program_id(0) % tiles_k) * BLOCK_K
    offs_n = (tl.program_id(0) // tiles_k) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = start + tl.arange(0, BLOCK_K)
    n = tl.minimum(offs_n, N - 1).to(tl.int64)
    codes = load_codes(word_ptr + n * row_bytes, start, row_bytes, BITS, BLOCK_K, False)
    if GROUPED:
        at = n[:, None] * (K // group) + tl.minimum(offs_k, K - 1)[None, :] // group
    else:
        at = n[:, None]
    weight = (codes.to(tl.float32) - tl.load(zero_ptr + at).to(tl.float32)) * tl.load(scale_ptr + at)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    tl.store(weight_ptr + n[:, None] * K + offs_k[None, :], weight.to(weight_ptr.dtype.element_ty), mask=mask)


def dequantise(words, scale, zero, bits, group, k, dtype):
    """Return the weight (N, k) behind `words` in `dtype`: the float32 one, rounded. It must not outlive the call."""
    n = words.shape[0]
    weight = torch.empty((n, k), dtype=dtype, device=words.device)
    if weight.numel():
        with torch.cuda.device_of(words):
            _dequantise_kernel[(triton.cdiv(n, _ROWS) * triton.cdiv(k, _COLUMNS),)](
                words.contiguous(), scale.contiguous(), zero.contiguous(), weight, n, k, words.shape[-1], group,
                BITS=8 if words.shape[-1] == k else bits, GROUPED=group > 0, BLOCK_N=_ROWS, BLOCK_K=_COLUMNS,
            )  # fmt: skip
    return weight


def launch(x, words, scale, zero, bias, bits, group, x_scale, x_zero, x_bits, dtype, *end):
    """Dequantise, and let torch multiply."""
    weight = dequantise(words, scale, zero, bits, group, x.shape[-1], x.dtype)
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return y, *allocate(y, words.shape[0], Epilogue(*end))


def refuses(x, words, scale, zero, bias, bits, group, x_scale, x_zero, x_bits, dtype, *end):
    """Say why the product should not go by way of a float weight, or None."""
    if x_scale is not None:
        return "x is codes; integer products read the packed words"
    if Epilogue(*end).transforms or Epilogue(*end).moments:
        return "something follows the product; the Triton kernel makes it in its own pass"
    return _refuses(x, words, bits, x.shape[-1])


def launch_backward(grad, words, scale, zero, bits, group, k):
    """Dequantise, and let torch multiply."""
    return grad @ dequantise(words, scale, zero, bits, group, k, grad.dtype)


def refuses_backward(grad, words, scale, zero, bits, group, k):
    """Say why the gradient should not go by way of a float weight, or None."""
    return _refuses(grad, words, bits, k)


def _refuses(x, words, bits, k):
    rows = math.prod(x.shape[:-1])
    if rows < LEAST_ROWS:
        return f"there are {rows} rows; below {LEAST_ROWS} the weight is decoded within the product (not measured yet)"
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"x is {x.dtype}; the kernel gives float16, bfloat16 and float32"
    return refuses_words(words, bits, 0, k)
