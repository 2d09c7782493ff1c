"""Codes of activations for the packed kernels: one grid for all, or one that is measured for each row in the same pass.

Measured over each row: ``low = min(x, 0)``, ``high = max(x, 0)``, ``scale = max((high - low) / qmax, EPSILON)``,
``zero = clamp(round(-low / scale), 0, qmax)``. Then ``code = clamp(round(x / scale) + zero, 0, qmax)``.
A measured row that holds a NaN or an infinity, or whose ``high - low`` overflows, has a scale of NaN or infinity, and
codes and zero of 0: what is computed from it is NaN throughout, and no other row is touched.
The sums of the codes of a row serve products with a weight that has zeros:
``sum (c - z) (w - v) = sum c w - v sum c - z sum w + K z v``.
"""

import math

import torch

from . import _native
from ._tiles import clamp, round_half_even
from ._triton import jit, tl, triton
from ._triton import refuses as refuses_triton
from .codes import pack_reference, row_bytes
from .codes import reference as quantize

EPSILON = 1e-8  # that of observers
PACKABLE = (2, 4, 8)


def reference(x, scale, zero, bits, packed, sums):
    """Return (codes, row_scale, row_zero, row_sums, nonfinite): the specification of the op."""
    qmax, measured = (1 << bits) - 1, (x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.int32))
    if scale is None:
        scale, zero = measured = measure(x, qmax)
    grid = (scale, zero, 0, qmax, None, 0)
    if scale.ndim:
        grid = (scale.unsqueeze(-1), zero.unsqueeze(-1), 0, qmax, None, x.shape[-1])
    codes, nonfinite = quantize(x.contiguous(), *grid)
    row_sums = codes.sum(-1, dtype=torch.int32) if sums else x.new_empty(0, dtype=torch.int32)
    return pack_reference(codes, bits) if packed else codes, *measured, row_sums, nonfinite


def measure(x, qmax):
    """Return (scale, zero) of each row of `x` (..., K)."""
    x = torch.nn.functional.pad(x.float(), (0, 1))  # every range includes 0.0, that of an empty row nothing else
    low, high = x.amin(-1), x.amax(-1)
    scale = ((high - low) / qmax).clamp(min=EPSILON)
    return scale, torch.round(-low / scale).clamp(0, qmax).nan_to_num(0.0).int()


def allocate(x, scale, zero, bits, packed, sums):
    """Allocate the outputs of the op, as empty as they are on meta tensors."""
    *lead, k = x.shape
    measured = lead if scale is None else (0,)
    return (
        x.new_empty((*lead, row_bytes(k, bits) if packed else k), dtype=torch.uint8),
        x.new_empty(measured, dtype=torch.float32),
        x.new_empty(measured, dtype=torch.int32),
        x.new_empty(lead if sums else (0,), dtype=torch.int32),
        x.new_empty((), dtype=torch.int32),
    )


@jit
def _activation_codes_kernel(
    x_ptr, scale_ptr, zero_ptr, code_ptr, sum_ptr, partial_ptr, M, K, row_bytes, stride_xm, token, qmax,
    EPSILON: tl.constexpr, MEASURE: tl.constexpr, SUMS: tl.constexpr, BITS: tl.constexpr, LONG: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # A program holds its rows in registers; LONG: it walks the one row it has, twice where the range is measured.
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    x_rows, code_rows = x_ptr + offs_m * stride_xm, code_ptr + offs_m * row_bytes
    if not LONG:
        x = _load_rows(x_rows, mask_m, 0, K, BLOCK_K)
    if MEASURE:
        low = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
        high = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
        if LONG:
            for start in range(0, K, BLOCK_K):
                low, high = _widen(low, high, _load_rows(x_rows, mask_m, start, K, BLOCK_K))
        else:
            low, high = _widen(low, high, x)
        low = _ordered(tl.min(low, axis=1)).to(tl.float32, bitcast=True)
        high = _ordered(tl.max(high, axis=1)).to(tl.float32, bitcast=True)
        scale = tl.div_rn(high - low, qmax)
        scale = tl.where(scale < EPSILON, EPSILON, scale)
        zero = round_half_even(tl.div_rn(-low, scale))
        zero = clamp(tl.where(zero == zero, zero, 0.0), 0.0, qmax)
        tl.store(scale_ptr + offs_m, scale, mask=mask_m)
        tl.store(zero_ptr + offs_m, zero.to(tl.int32), mask=mask_m)
    else:
        scale = tl.load(scale_ptr + offs_m * token, mask=mask_m, other=1.0)
        zero = tl.load(zero_ptr + offs_m * token, mask=mask_m, other=0).to(tl.float32)
    if LONG:
        total = tl.zeros((BLOCK_M,), tl.int32)
        bad = tl.zeros((BLOCK_M,), tl.int32)
        for start in range(0, K, BLOCK_K):
            x = _load_rows(x_rows, mask_m, start, K, BLOCK_K)
            more, worse = _store_codes(x, code_rows, mask_m, start, K, row_bytes, scale, zero, qmax, BITS)
            total += more
            bad += worse
    else:
        total, bad = _store_codes(x, code_rows, mask_m, 0, K, row_bytes, scale, zero, qmax, BITS)
    if SUMS:
        tl.store(sum_ptr + offs_m, total, mask=mask_m)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(bad, axis=0))


@jit
def _load_rows(rows, mask_m, start, K, BLOCK_K: tl.constexpr):
    """Load (M, BLOCK_K) float32 from column `start` on, 0 beyond the edges."""
    offs_k = start + tl.arange(0, BLOCK_K)
    return tl.load(rows[:, None] + offs_k[None, :], mask_m[:, None] & (offs_k < K)[None, :], 0.0).to(tl.float32)


@jit
def _ordered(bits):
    """Map the bits of float32 to int32 in the order of the numbers, NaN outermost, 0.0 to 0; and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _widen(low, high, x):
    """Take the elements of `x` into the bounds, as `_ordered` integers: they keep a NaN, a warp reduces them fast."""
    key = _ordered(x.to(tl.int32, bitcast=True))
    return tl.minimum(low, key), tl.maximum(high, key)


@jit
def _store_codes(x, rows, mask_m, start, K, row_bytes, scale, zero, qmax, BITS: tl.constexpr):
    """Store the codes of `x`, columns `start` and on, 8 / BITS in a byte, the first one lowest.

    Returns:
        The sum of the codes of each row, and how many of its inputs are NaN or infinite.
    """
    RUN: tl.constexpr = 8 // BITS
    code = round_half_even(tl.div_rn(x, scale[:, None])) + zero[:, None]
    code = clamp(tl.where(code == code, code, zero[:, None]), 0.0, qmax).to(tl.int32)
    code = tl.where((start + tl.arange(0, x.shape[1]) < K)[None, :], code, 0)  # a row is padded with zeros
    word = code
    if RUN > 1:
        shifts = (tl.arange(0, RUN) * BITS)[None, None, :]
        word = tl.sum(tl.reshape(code, (x.shape[0], x.shape[1] // RUN, RUN)) << shifts, axis=2)
    offs_b = start // RUN + tl.arange(0, word.shape[1])
    mask = mask_m[:, None] & (offs_b < row_bytes)[None, :]
    tl.store(rows[:, None] + offs_b[None, :], word.to(tl.uint8), mask=mask)
    return tl.sum(code, axis=1), tl.sum(tl.where(x - x == 0.0, 0, 1), axis=1)


def launch(x, scale, zero, bits, packed, sums):
    """Run the Triton kernel: one pass, and the count from one int32 a program."""
    outputs = codes, row_scale, row_zero, row_sums, _ = allocate(x, scale, zero, bits, packed, sums)
    rows = _rows(x)
    m, k = rows.shape
    block_m, block_k, warps = _tiles(k)
    partial = torch.empty(triton.cdiv(m, block_m), dtype=torch.int32, device=x.device)
    if len(partial):
        with torch.cuda.device_of(x):
            _activation_codes_kernel[(len(partial),)](
                rows,
                row_scale if scale is None else scale.contiguous(),
                row_zero if scale is None else zero.contiguous(),
                codes,
                row_sums,
                partial,
                m,
                k,
                codes.shape[-1],
                rows.stride(0),
                1 if scale is not None and scale.ndim else 0,
                float((1 << bits) - 1),
                EPSILON=EPSILON,
                MEASURE=scale is None,
                SUMS=sums,
                BITS=bits if packed else 8,
                LONG=k > block_k,
                BLOCK_M=block_m,
                BLOCK_K=block_k,
                num_warps=warps,
                enable_fp_fusion=False,
            )
    return *outputs[:4], partial.sum(dtype=torch.int32)


def refuses(x, scale, zero, bits, packed, sums):
    """Say why the Triton kernel cannot run, or None."""
    if packed and bits not in PACKABLE:
        return f"codes of {bits} bits lie across bytes; the kernel packs 2, 4 and 8"
    return _refuses_tensors(x, scale, zero) or refuses_triton()


def launch_cpu(x, scale, zero, bits, packed, sums):
    """Run the native CPU kernel; each row stays in the cache between its two loops."""
    outputs = codes, row_scale, row_zero, row_sums, nonfinite = allocate(x, scale, zero, bits, packed, sums)
    grid = (row_scale, row_zero) if scale is None else (scale.contiguous(), zero.contiguous())
    _native.activation_codes(
        _rows(x), codes, *grid, row_sums if sums else None, nonfinite, bits, packed=packed, measure=scale is None
    )
    return outputs


def refuses_cpu(x, scale, zero, bits, packed, sums):
    """Say why the native CPU kernel cannot run, or None."""
    return _refuses_tensors(x, scale, zero) or _native.reason("cpu")


def _refuses_tensors(x, scale, zero):
    if x.dtype not in _native.DTYPES:
        return f"x is {x.dtype}; the kernel takes float32, float16 and bfloat16"
    if scale is not None and (scale.dtype, zero.dtype) != (torch.float32, torch.int32):
        return f"scale is {scale.dtype} and zero {zero.dtype}; the kernel takes float32 and int32"
    return None


def _rows(x):
    """View or copy `x` as rows (M, K) whose elements lie side by side."""
    rows = x.resolve_neg().reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.shape[1] < 2 or rows.stride(1) == 1 else rows.contiguous()


TILE, WHOLE, PART = 2048, 8192, 4096  # elements that a program holds; of the longest row it holds; of longer ones


def _tiles(k):
    """Choose (BLOCK_M, BLOCK_K, warps): several short rows, or one; 16 elements a thread, or 32 of a long row."""
    block_k = max(16, triton.next_power_of_2(k)) if k <= WHOLE else PART
    return max(1, TILE // block_k), block_k, 4 if block_k < PART else 8
