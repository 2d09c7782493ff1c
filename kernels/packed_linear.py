"""Linear layer on packed low-bit weights.

Float activations: ``y = x @ ((code - zero) * scale).T + bias``. Activation codes: the sum over k of
``(code_x - zero_x) * (code_w - zero_w)`` is an exact integer, times ``scale_x * scale_w`` in float32, plus bias.
What may follow is in `_epilogue`.
"""

import math

import torch
from torch.nn import functional as F

from . import _epilogue, _native, _products
from . import codes as cd
from ._epilogue import Epilogue, finish, store_finished
from ._operands import activation_operand, exact_sum, load_codes, weight_operand
from ._tiles import without_autocast
from ._triton import jit, tl, triton
from .codes import exact_product, refuses_sum, refuses_words, stored_codes, unpacked

FLOAT32_REGISTERS = 200  # a ceiling that is named keeps ptxas from spilling a few registers to fit more warps


@without_autocast
def reference(x, words, scale, zero, bias, bits, group, x_scale, x_zero, x_bits, dtype, *end):
    """Return (y, moments, nonfinite): the specification of the op."""
    end = Epilogue(*end)
    product = _integer_product if x_scale is not None else _float_product
    y, *seen = finish(product(x, words, scale, zero, bias, bits, group, x_scale, x_zero, x_bits), end, -1)
    return y.to(end.dtype(dtype)), *seen


def _float_product(x, words, scale, zero, bias, bits, group, *_):
    weight = dequantise(words, scale, zero, bits, group, x.shape[-1]).to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _integer_product(x, words, scale, zero, bias, bits, group, x_scale, x_zero, x_bits):
    k = x.shape[-1]
    x = x.float() - x_zero.unsqueeze(-1)
    weight = stored_codes(words, bits, k).float()
    step = x_scale.unsqueeze(-1)
    if group == 0:
        weight = weight - zero.unsqueeze(-1)
        y = exact_product(F.linear, x, weight, k, x_bits, bits) * (step * scale)
    else:
        y = torch.zeros(*x.shape[:-1], words.shape[0], device=x.device)
        for g in range(k // group):
            part = slice(g * group, (g + 1) * group)
            sums = exact_product(F.linear, x[..., part], weight[:, part] - zero[:, g, None], group, x_bits, bits)
            y = y + sums * (step * scale[:, g])
    return y if bias is None else y + bias.float()


@without_autocast
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


def fake(x, words, *args):
    """Allocate the outputs as the op does."""
    dtype, end = args[8], Epilogue(*args[9:])
    y = x.new_empty((*x.shape[:-1], words.shape[0]), dtype=end.dtype(dtype))
    return y, *_epilogue.allocate(y, words.shape[0], end)


@jit
def _packed_linear_kernel(
    x_ptr, word_ptr, scale_ptr, zero_ptr, bias_ptr, x_scale_ptr, x_zero_ptr, y_ptr,
    gain_ptr, shift_ptr, residual_ptr, y_scale_ptr, y_zero_ptr, moments_ptr, nonfinite_ptr, qmax, AFTER: tl.constexpr,
    M, N, K, row_bytes, group, stride_xm, token,
    INTEGER: tl.constexpr, BITS: tl.constexpr, WIDE_W: tl.constexpr, WIDE_X: tl.constexpr, GROUPED: tl.constexpr,
    BIAS: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # The weight is the first operand: its codes then stay in registers. Rows beyond N or M repeat the last one.
    tiles_n = tl.cdiv(N, BLOCK_N)
    offs_n = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = (tl.program_id(0) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.minimum(offs_n, N - 1).to(tl.int64)
    m = tl.minimum(offs_m, M - 1).to(tl.int64)
    rows, x_rows = word_ptr + n * row_bytes, x_ptr + m * stride_xm
    zero_x = tl.load(x_zero_ptr + m * token) if INTEGER else tl.zeros((BLOCK_M,), tl.int32)
    scale_x = tl.load(x_scale_ptr + m * token) if INTEGER else tl.full((BLOCK_M,), 1.0, tl.float32)
    y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    groups = K // group if GROUPED else 1
    for g in range(groups):
        zero = tl.load(zero_ptr + n * groups + g)
        total = _sum_codes(
            x_rows, rows, g * group, group, row_bytes, zero, zero_x, INTEGER, BITS, WIDE_W, WIDE_X, EVEN, BLOCK_K
        )
        scale = tl.load(scale_ptr + n * groups + g)
        y += total.to(tl.float32) * (scale_x[None, :] * scale[:, None])
    if BIAS:
        y += tl.load(bias_ptr + n).to(tl.float32)[:, None]
    offs = offs_m[None, :].to(tl.int64) * N + offs_n[:, None]
    store_finished(
        y, n, offs, offs_n < N, offs_m < M, tl.program_id(0) // tiles_n, tl.cdiv(M, BLOCK_M), N, y_ptr, gain_ptr,
        shift_ptr, residual_ptr, y_scale_ptr, y_zero_ptr, moments_ptr, nonfinite_ptr, qmax, AFTER,
    )  # fmt: skip


@jit
def _sum_codes(
    x_rows, rows, first, count, row_bytes, zero, zero_x,
    INTEGER: tl.constexpr, BITS: tl.constexpr, WIDE_W: tl.constexpr, WIDE_X: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum ``(code_w - zero) * x``, or times ``code_x - zero_x``, over k in first .. first + count - 1: (N, M)."""
    total = tl.zeros((zero.shape[0], zero_x.shape[0]), tl.int32 if INTEGER else tl.float32)
    sum_w = tl.zeros(zero.shape, tl.int32)
    sum_x = tl.zeros(zero_x.shape, tl.int32)
    for k in range(0, count, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        w = load_codes(rows, first + k, row_bytes, BITS, BLOCK_K, EVEN)
        pointers, mask = x_rows[None, :] + (first + offs_k)[:, None], (offs_k < count)[:, None]
        x = tl.load(pointers) if EVEN else tl.load(pointers, mask=mask, other=0)
        if INTEGER:
            if not EVEN:  # what lies beyond gets the code of 0.0
                x = tl.where(mask, x, zero_x[None, :].to(tl.uint8))
            w = weight_operand(w, zero, WIDE_W)
            x = activation_operand(x, WIDE_X)
            sum_w += tl.sum(w.to(tl.int32), axis=1)
            if WIDE_W:
                sum_x += tl.sum(x.to(tl.int32), axis=0)
            total = tl.dot(w, x, total, out_dtype=tl.int32)
        else:
            w = (w.to(tl.float32) - zero[:, None].to(tl.float32)).to(x.dtype)
            total = tl.dot(w, x, total, input_precision="ieee")
    if INTEGER:
        total = exact_sum(total, sum_w, sum_x, zero, zero_x, tl.cdiv(count, BLOCK_K) * BLOCK_K, WIDE_W, WIDE_X)
    return total


@jit
def _packed_linear_backward_kernel(
    grad_ptr, word_ptr, scale_ptr, zero_ptr, dx_ptr, M, N, K, row_bytes, group, stride_gm,
    BITS: tl.constexpr, GROUPED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_k = tl.cdiv(K, BLOCK_K)
    start = (tl.program_id(0) % tiles_k) * BLOCK_K
    offs_k = start + tl.arange(0, BLOCK_K)
    offs_m = (tl.program_id(0) // tiles_k) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = tl.minimum(offs_m, M - 1).to(tl.int64)
    dx = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for block in range(0, N, BLOCK_N):
        offs_n = block + tl.arange(0, BLOCK_N)
        n = tl.minimum(offs_n, N - 1).to(tl.int64)
        grad = tl.load(grad_ptr + m[:, None] * stride_gm + n[None, :], mask=(offs_n < N)[None, :], other=0.0)
        codes = load_codes(word_ptr + n * row_bytes, start, row_bytes, BITS, BLOCK_K, False)
        if GROUPED:
            at = n[:, None] * (K // group) + tl.minimum(offs_k, K - 1)[None, :] // group
        else:
            at = n[:, None]
        w = (codes.to(tl.float32) - tl.load(zero_ptr + at).to(tl.float32)) * tl.load(scale_ptr + at)
        dx = tl.dot(grad, w.to(grad.dtype), dx, input_precision="ieee")
    mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    tl.store(dx_ptr + offs_m[:, None].to(tl.int64) * K + offs_k[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


def launch(x, words, scale, zero, bias, bits, group, x_scale, x_zero, x_bits, dtype, *end):
    """Run the Triton kernel."""
    k, n, m, end = x.shape[-1], words.shape[0], math.prod(x.shape[:-1]), Epilogue(*end)
    rows, integer, span = _rows(x, m, k), x_scale is not None, group or k
    y = x.new_empty((*x.shape[:-1], n), dtype=end.dtype(dtype))
    if y.numel() == 0:
        return y, *(t.zero_() for t in _epilogue.allocate(y, n, end))
    block_n, block_m, block_k, warps, stages = _tiles(m, span, rows.dtype, group, end.transforms)
    tiles_m = triton.cdiv(m, block_m)
    programs = triton.cdiv(n, block_n) * tiles_m
    finishing = _epilogue.arguments(end, y, n, tiles_m, programs)
    weight = (t.contiguous() for t in (words, scale, zero))
    grid = (x_scale.contiguous(), x_zero.contiguous()) if integer else (None, None)
    sizes = (m, n, k, words.shape[-1], span, rows.stride(0), 1 if integer and x_scale.ndim else 0)
    with torch.cuda.device_of(x):
        _packed_linear_kernel[(programs,)](
            rows, *weight, bias, *grid, y, *finishing.values(), *sizes, INTEGER=integer,
            BITS=8 if words.shape[-1] == k else bits, WIDE_W=bits == 8, WIDE_X=x_bits == 8, GROUPED=group > 0,
            BIAS=bias is not None, EVEN=span % block_k == 0, BLOCK_N=block_n, BLOCK_M=block_m, BLOCK_K=block_k,
            num_warps=warps, num_stages=stages, enable_fp_fusion=not integer and not end.transforms,
            maxnreg=FLOAT32_REGISTERS if rows.dtype == torch.float32 else None,
        )  # fmt: skip
    return y, *_epilogue.gather(finishing, y)


def refuses(x, words, scale, zero, bias, bits, group, x_scale, x_zero, x_bits, dtype, *end):
    """Say why the Triton kernel cannot run, or None."""
    if x_scale is not None:
        return refuses_sum(group or x.shape[-1], bits, x_bits) or refuses_words(words, bits, group, x.shape[-1])
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"x is {x.dtype}; the kernel takes float16, bfloat16 and float32"
    return refuses_words(words, bits, group, x.shape[-1])


def launch_backward(grad, words, scale, zero, bits, group, k):
    """Run the Triton kernel: no float weight is held in memory."""
    n, m = words.shape[0], math.prod(grad.shape[:-1])
    rows = _rows(grad, m, n)
    dx = grad.new_empty((*grad.shape[:-1], k))
    if dx.numel() == 0:
        return dx
    block_m, block_n, block_k = _backward_tiles(grad.dtype)
    with torch.cuda.device_of(grad):
        _packed_linear_backward_kernel[(triton.cdiv(k, block_k) * triton.cdiv(m, block_m),)](
            rows,
            words.contiguous(),
            scale.contiguous(),
            zero.contiguous(),
            dx,
            m,
            n,
            k,
            words.shape[-1],
            group,
            rows.stride(0),
            BITS=8 if words.shape[-1] == k else bits,
            GROUPED=group > 0,
            BLOCK_N=block_n,
            BLOCK_M=block_m,
            BLOCK_K=block_k,
            num_warps=4,
            num_stages=2,
        )
    return dx


def refuses_backward(grad, words, scale, zero, bits, group, k):
    """Say why the Triton kernel cannot run, or None."""
    if grad.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"grad is {grad.dtype}; the kernel takes float16, bfloat16 and float32"
    return refuses_words(words, bits, 0, k)


def launch_cpu(x, words, scale, zero, bias, bits, group, x_scale, x_zero, x_bits, dtype, *end):
    """Run the native kernel on activation codes, or on floats; what it does not follow with, torch does."""
    m, k, end = math.prod(x.shape[:-1]), x.shape[-1], Epilogue(*end)
    ends = x_scale is not None and _products.follows(end)
    made = end.dtype(dtype) if ends else torch.float32 if end.transforms or end.moments else dtype
    y = x.new_empty((*x.shape[:-1], words.shape[0]), dtype=made)
    moments, nonfinite = _epilogue.allocate(y, words.shape[0], end) if ends else (None, None)
    if y.numel():
        weight = (words.contiguous(), scale.contiguous(), zero.contiguous())
        bias = None if bias is None else bias.float().contiguous()
        last = (y, _products.stored_bits(words, bits, k), group)
        if x_scale is None:
            _products.packed_linear_floats(_rows(x, m, k), *weight, bias, *last)
        else:
            ending = _products.Ending(end, y, nonfinite, dtype) if ends else None
            grid = (x_scale.contiguous(), x_zero.contiguous())
            _products.packed_linear(_rows(x, m, k), *weight, bias, *grid, *last, ending)
    if ends:
        return y, moments, nonfinite if y.numel() else nonfinite.zero_()
    y, *seen = finish(y, end, -1, cd.launch_cpu)
    return y.to(end.dtype(dtype)), *seen


def refuses_cpu(x, words, scale, zero, bias, bits, group, x_scale, x_zero, x_bits, dtype, *end):
    """Say why the native kernel cannot run, or None."""
    k = x.shape[-1]
    if x_scale is None:
        return _products.refuses_floats("x", x) or _products.refuses_words(words, bits, k)
    if reason := _products.refuses_words(words, bits, k):
        return reason
    stored = _products.stored_bits(words, bits, k)
    if group * (4 if stored == 3 else stored) % 32:
        return f"groups of {group} codes of {stored} bits start inside dwords of a panel; the kernel wants whole ones"
    return refuses_sum(group or k, bits, x_bits)


def launch_cpu_backward(grad, words, scale, zero, bits, group, k):
    """Run the native kernel: no more of the weight than a tile a thread is float at any time."""
    m, n = math.prod(grad.shape[:-1]), words.shape[0]
    dx = grad.new_empty((*grad.shape[:-1], k))
    if dx.numel():
        weight = (words.contiguous(), scale.contiguous(), zero.contiguous())
        _products.packed_linear_backward(
            _rows(grad, m, n), *weight, dx.view(m, k), _products.stored_bits(words, bits, k), group
        )
    return dx


def refuses_cpu_backward(grad, words, scale, zero, bits, group, k):
    """Say why the native kernel cannot run, or None."""
    return _products.refuses_floats("grad", grad) or _products.refuses_words(words, bits, k)


def launch_unpacked(x, words, *args):
    """Compute the reference on codes that the native kernel has unpacked."""
    return reference(x, unpacked(words, args[3], x.shape[-1]), *args)


def launch_unpacked_backward(grad, words, scale, zero, bits, group, k):
    """Compute the reference on codes that the native kernel has unpacked."""
    return reference_backward(grad, unpacked(words, bits, k), scale, zero, bits, group, k)


def refuses_unpacked(*args):
    """Say why the native kernel cannot unpack, or None."""
    return _native.reason("cpu")


def _rows(x, m, k):
    rows = x.reshape(m, k)
    return rows if k == 1 or rows.stride(1) == 1 else rows.contiguous()


def _tiles(m, span, dtype, group, follows):
    """Choose (BLOCK_N, BLOCK_M, BLOCK_K, warps, stages): large tiles once there are rows enough to fill a GPU.

    Where something `follows` floats, what it holds beside 128 x 128 sums would spill registers.
    """
    block_m = min(64, max(16, triton.next_power_of_2(m)))
    if dtype == torch.float32 or (group and span % 32):
        return 64, min(32 if dtype == torch.float32 else 16, block_m), 32, 4, 2
    if group or span % 64:
        return 64, block_m, 32, 4, 3
    if m < 1024:
        return 64, block_m, 64, 4, 3
    return 128, 64 if follows and dtype != torch.uint8 else 128, 64, 8, 3


def _backward_tiles(dtype):
    """Choose (BLOCK_M, BLOCK_N, BLOCK_K)."""
    return (32, 16, 64) if dtype == torch.float32 else (64, 64, 64)
