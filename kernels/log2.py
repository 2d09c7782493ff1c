"""Fake quantisation on a logarithmic grid with one scale, for probabilities: what a softmax gives spans octaves.

``code = clamp(round(-roots log2(x / scale)), 0, qmax)``, ``y = scale 2^(-code / roots)``, but code qmax is 0.0.
`roots` is 1 (powers of 2) or 2 (powers of sqrt 2). Source: Lin et al., FQ-ViT, arXiv:2111.13824 (roots 1); Li et al.,
RepQ-ViT, arXiv:2212.08254 (roots 2); the code for 0.0 is ours. No logarithm is taken: the code follows from the
exponent of ``x / scale`` and where its mantissa lies among powers of 2^(1/4), so every backend gives the same bits.
"""

import torch

from . import _native
from ._tiles import in_order_of
from ._triton import jit, tl, triton
from ._triton import refuses as refuses_triton

MOST_CODES = 63
TILE = 1024  # elements: 8 a thread
ENOUGH_PROGRAMS, MOST_STEPS = 2048, 64
# The mantissa bits of the largest float32 up to 2^(1/4), 2^(1/2) and 2^(3/4); a mantissa above rounds to the next code.
QUARTER, HALF, THREE_QUARTERS = 0x1837F0, 0x3504F3, 0x5744FC
SQRT_HALF = 0.7071067690849304  # in float32


def codes_reference(x, scale, qmax, roots):
    """Return (codes, nonfinite): uint8 like `x`, where what is negative or NaN has the code of 0.0; int32 ()."""
    raw = torch.where(x.isnan(), qmax, _raw_code(_ratio(x, scale), roots))
    codes = torch.empty_like(x, dtype=torch.uint8).copy_(torch.clamp(raw, 0, qmax))
    return codes, (~torch.isfinite(x)).sum(dtype=torch.int32)


def reference(x, scale, qmax, roots):
    """Quantise and dequantise `x`: the specification of the op."""
    ratio = _ratio(x, scale)
    y = _level(_raw_code(ratio, roots), qmax, roots) * scale
    return torch.empty_like(x).copy_(torch.where(ratio.isnan(), ratio, y))


def reference_backward(grad, x, scale, qmax, roots):
    """Return (dx, dscale): the specification of the backward op; rounding passes its gradient straight through.

    Within the grid ``y = x`` but for the rounding of the exponent: ``dx = grad y / x`` and nothing for the scale. Above
    it ``y = scale``: ``dscale = sum grad``. What becomes 0.0 gives nothing. A NaN counts as above.
    """
    ratio = _ratio(x, scale)
    raw, wide = _raw_code(ratio, roots), x.to(ratio.dtype)
    upstream = grad.to(ratio.dtype)
    inside = (raw >= 0) & (raw < qmax) & ~ratio.isnan()
    dx = torch.where(inside, upstream * (_level(raw, qmax, roots) * scale / wide), 0.0)
    above = torch.where(raw < 0, upstream, 0.0)
    return torch.empty_like(x).copy_(dx), torch.where(ratio.isnan(), ratio, above).sum().to(scale.dtype)


def _ratio(x, scale):
    """Return x / scale, cut to where a code can still tell values apart."""
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.clamp(wide / scale, 2.0**-100, 2.0)


def _raw_code(ratio, roots):
    """Return ``round(-roots log2(ratio))`` for ratios of 2^-100 to 2; any number for a NaN."""
    mantissa, exponent = torch.frexp(ratio)  # the mantissa lies in [1/2, 1)
    bounds = (HALF,) if roots == 1 else (QUARTER, THREE_QUARTERS)
    return roots * (1 - exponent) - sum((mantissa * 2 > 1 + bits * 2.0**-23).int() for bits in bounds)


def _level(raw, qmax, roots):
    """Return ``2^(-code / roots)`` of a raw code."""
    steps = [2.0 ** -(code // roots) * (SQRT_HALF if code % roots else 1.0) for code in range(qmax)]
    return torch.tensor([*steps, 0.0], device=raw.device)[torch.clamp(raw, 0, qmax).long()]


@jit
def _load(x_ptr, at, n, scale):
    """Load (x, x / scale cut as the reference does)."""
    x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    ratio = tl.maximum(tl.div_rn(x, scale), 7.888609052210118e-31, propagate_nan=tl.PropagateNan.ALL)
    return x, tl.minimum(ratio, 2.0, propagate_nan=tl.PropagateNan.ALL)


@jit
def _code(ratio, ROOTS: tl.constexpr):
    bits = ratio.to(tl.int32, bitcast=True)
    octave, mantissa = 127 - (bits >> 23), bits & 0x7FFFFF
    if ROOTS == 1:
        return octave - (mantissa > 0x3504F3).to(tl.int32)
    return 2 * octave - (mantissa > 0x1837F0).to(tl.int32) - (mantissa > 0x5744FC).to(tl.int32)


@jit
def _value(code, qmax, scale, ROOTS: tl.constexpr):
    """Return ``scale 2^(-code / ROOTS)`` of a code from 0 to qmax, which means 0.0."""
    level = ((127 - code // ROOTS) << 23).to(tl.float32, bitcast=True)
    if ROOTS == 2:
        level = tl.where(code % 2 == 1, level * 0.7071067690849304, level)
    return tl.where(code == qmax, 0.0, level) * scale


@jit
def _log2_fake_quant_kernel(x_ptr, scale_ptr, y_ptr, n, qmax, ROOTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr)
    _, ratio = _load(x_ptr, at, n, scale)
    code = tl.minimum(tl.maximum(_code(ratio, ROOTS), 0), qmax)
    y = tl.where(ratio == ratio, _value(code, qmax, scale, ROOTS), ratio)
    tl.store(y_ptr + at, y, mask=at < n)


@jit
def _log2_codes_kernel(x_ptr, scale_ptr, code_ptr, partial_ptr, n, qmax, ROOTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x, ratio = _load(x_ptr, at, n, tl.load(scale_ptr))
    code = tl.minimum(tl.maximum(_code(ratio, ROOTS), 0), qmax)
    tl.store(code_ptr + at, tl.where(x == x, code, qmax).to(tl.uint8), mask=at < n)
    finite = tl.abs(x) <= 3.4028234663852886e38
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.where(finite, 0, 1)))


@jit
def _log2_fake_quant_backward_kernel(
    grad_ptr, x_ptr, scale_ptr, dx_ptr, dscale_ptr, n, qmax,
    ROOTS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    scale, dscale = tl.load(scale_ptr), tl.zeros((BLOCK,), tl.float32)
    for step in range(STEPS):
        at = (tl.program_id(0).to(tl.int64) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + at, mask=at < n, other=0.0).to(tl.float32)
        x, ratio = _load(x_ptr, at, n, scale)
        raw = _code(ratio, ROOTS)
        inside = (raw >= 0) & (raw < qmax) & (ratio == ratio)
        y = _value(tl.minimum(tl.maximum(raw, 0), qmax), qmax, scale, ROOTS)
        tl.store(dx_ptr + at, tl.where(inside, grad * tl.div_rn(y, x), 0.0), mask=at < n)
        dscale += tl.where(ratio == ratio, tl.where(raw < 0, grad, 0.0), ratio)
    tl.store(dscale_ptr + tl.program_id(0), tl.sum(dscale))


def launch(x, scale, qmax, roots):
    """Run the Triton kernel over `x` in the order of its memory."""
    y = torch.empty_like(x)
    if x.numel():
        grid = (triton.cdiv(x.numel(), TILE),)
        with torch.cuda.device_of(x):
            _log2_fake_quant_kernel[grid](
                in_order_of(x, y), scale, y, x.numel(), qmax, roots, TILE, num_warps=4, enable_fp_fusion=False
            )
    return y


def launch_codes(x, scale, qmax, roots):
    """Run the Triton kernel that gives codes and counts what is not finite."""
    codes = torch.empty_like(x, dtype=torch.uint8)
    if x.numel() == 0:
        return codes, torch.zeros((), dtype=torch.int32, device=x.device)
    programs = triton.cdiv(x.numel(), TILE)
    partial = torch.empty(programs, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        _log2_codes_kernel[(programs,)](
            in_order_of(x, codes), scale, codes, partial, x.numel(), qmax, roots, TILE, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return codes, partial.sum(dtype=torch.int32)


def launch_backward(grad, x, scale, qmax, roots):
    """Run the Triton kernel that leaves one float32 partial sum a program, then add these up in a fixed order."""
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx, torch.zeros_like(scale)
    spare = max(1, triton.cdiv(x.numel(), TILE) // ENOUGH_PROGRAMS)
    steps = min(MOST_STEPS, 1 << (spare.bit_length() - 1))
    programs = triton.cdiv(x.numel(), TILE * steps)
    partial = torch.empty(programs, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _log2_fake_quant_backward_kernel[(programs,)](
            in_order_of(grad, dx), in_order_of(x, dx), scale, dx, partial, x.numel(), qmax, roots, steps, TILE,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return dx, partial.sum()


def launch_cpu(x, scale, qmax, roots):
    """Run the native CPU kernel over `x` in the order of its memory."""
    y = torch.empty_like(x)
    _native.log2_fake_quant(in_order_of(x, y), y, scale, qmax, roots)
    return y


def launch_cpu_codes(x, scale, qmax, roots):
    """Run the native CPU kernel that gives codes and counts what is not finite."""
    codes, nonfinite = torch.empty_like(x, dtype=torch.uint8), torch.empty((), dtype=torch.int32)
    _native.log2_codes(in_order_of(x, codes), codes, scale, nonfinite, qmax, roots)
    return codes, nonfinite


def launch_cpu_backward(grad, x, scale, qmax, roots):
    """Run the native CPU kernel that gives both gradients; the bits do not depend on the number of threads."""
    dx, dscale = torch.empty_like(x), torch.empty_like(scale)
    _native.log2_fake_quant_backward(in_order_of(grad, dx), in_order_of(x, dx), dx, scale, dscale, qmax, roots)
    return dx, dscale


def refuses(x, scale, *args):
    """Say why the Triton kernels cannot run, or None."""
    return refuses_triton() or _refuses_tensors(x, scale)


def refuses_backward(grad, *args):
    """Say why the Triton kernel of the gradients cannot run, or None."""
    return refuses(*args)


def refuses_cpu(x, scale, *args):
    """Say why the native CPU kernels cannot run, or None."""
    return _native.reason("cpu") or _refuses_tensors(x, scale)


def refuses_cpu_backward(grad, x, *args):
    """Say why the native CPU kernel of the gradients cannot run, or None."""
    if grad.dtype != x.dtype:
        return f"grad is {grad.dtype} and x {x.dtype}; the native kernel takes one dtype"
    return refuses_cpu(x, *args)


def _refuses_tensors(x, scale):
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"x is {x.dtype}; the kernel takes float32, float16 and bfloat16"
    if scale.dtype != torch.float32:
        return f"scale is {scale.dtype}; the kernel takes float32"
    return None
