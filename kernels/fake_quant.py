"""Fake quantisation with straight-through gradients, in one pass over memory.

``t = round(x / scale) + round(zero)``, ``y = (clamp(t, qmin, qmax) - round(zero)) * scale``; the gradients are those of
Esser et al., Learned Step Size Quantization, arXiv:1902.08153 (scale), and Bhalgat et al., LSQ+, arXiv:2004.09576
(zero). Every backend gives the bits of `reference` while ``|zero| < 2^22``.
"""

import torch

from . import _native
from ._tiles import (
    canonical,
    clamp,
    expand,
    in_order_of,
    load_scales,
    load_tile,
    locate,
    matrix,
    partial_place,
    reduce,
    round_half_even,
    store_tile,
    tile_shape,
    walkable,
)
from ._triton import jit, tl, triton
from ._triton import refuses as refuses_triton

FORWARD_TILE, BACKWARD_TILE = 2048, 1024  # elements: 16 and 8 a thread
ENOUGH_PROGRAMS, MOST_STEPS = 2048, 64


def reference(x, scale, zero, qmin, qmax, axis, group):
    """Quantise and dequantise `x`: the specification of the op."""
    wide = _wide(x)
    step = expand(scale, x, axis, group)
    origin = torch.round(expand(zero, x, axis, group))
    code = torch.clamp(torch.round(wide / step) + origin, qmin, qmax)
    return torch.empty_like(x).copy_((code - origin) * step)


def reference_backward(grad, x, scale, zero, qmin, qmax, axis, group):
    """Return (dx, dscale, dzero): the specification of the backward op.

    Inside the range ``dx = grad``, ``dscale = sum grad * (round(x / scale) - x / scale)``, ``dzero = 0``; outside it
    ``dx = 0``, ``dscale = sum grad * (clamp(t) - zero)``, ``dzero = sum -grad * scale``. A NaN counts as outside.
    """
    wide, upstream = _wide(x), _wide(grad)
    step = expand(scale, x, axis, group)
    origin = torch.round(expand(zero, x, axis, group))
    ratio = wide / step
    rounded = torch.round(ratio)
    code = rounded + origin
    inside = (code >= qmin) & (code <= qmax)
    dx = torch.empty_like(x).copy_(torch.where(inside, upstream, 0.0))
    dscale = upstream * torch.where(inside, rounded - ratio, torch.clamp(code, qmin, qmax) - origin)
    dzero = torch.where(inside, 0.0, -upstream * step)
    return dx, reduce(dscale, axis, group).to(scale.dtype), reduce(dzero, axis, group).to(scale.dtype)


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


@jit
def _fake_quant_kernel(
    x_ptr,
    scale_ptr,
    zero_ptr,
    y_ptr,
    R,
    W,
    C,
    qmin,
    qmax,
    BY_ROW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row, column = locate(R, W, BLOCK_R, BLOCK_W)
    scale, zero = load_scales(scale_ptr, zero_ptr, row, column, C, W, BY_ROW, BLOCK_R, BLOCK_W)
    x = load_tile(x_ptr, row, column, R, W, BLOCK_R, BLOCK_W)
    code = clamp(round_half_even(tl.div_rn(x, scale)) + zero, qmin, qmax)
    store_tile(y_ptr, (code - zero) * scale, row, column, R, W, BLOCK_R, BLOCK_W)


@jit
def _fake_quant_backward_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    zero_ptr,
    dx_ptr,
    dscale_ptr,
    dzero_ptr,
    R,
    W,
    C,
    qmin,
    qmax,
    BY_ROW: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    # A program walks STEPS tiles that share their scales: along its rows, or down its columns.
    TALL: tl.constexpr = BLOCK_R if BY_ROW else BLOCK_R * STEPS
    WIDE: tl.constexpr = BLOCK_W * STEPS if BY_ROW else BLOCK_W
    row, column = locate(R, W, TALL, WIDE)
    scale, zero = load_scales(scale_ptr, zero_ptr, row, column, C, W, BY_ROW, BLOCK_R, BLOCK_W)
    dscale = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    dzero = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    for step in range(STEPS):
        r = row if BY_ROW else row + step * BLOCK_R
        c = column + step * BLOCK_W if BY_ROW else column
        grad = load_tile(grad_ptr, r, c, R, W, BLOCK_R, BLOCK_W)
        ratio = tl.div_rn(load_tile(x_ptr, r, c, R, W, BLOCK_R, BLOCK_W), scale)
        code = round_half_even(ratio) + zero
        inside = (code >= qmin) & (code <= qmax)
        store_tile(dx_ptr, tl.where(inside, grad, 0.0), r, c, R, W, BLOCK_R, BLOCK_W)
        dscale += grad * (clamp(code, qmin, qmax) - zero - tl.where(inside, ratio, 0.0))
        dzero += tl.where(inside, 0.0, -grad * scale)
    AXIS: tl.constexpr = 1 if BY_ROW else 0
    at, mask = partial_place(row, column, R, W, TALL, WIDE, BY_ROW, BLOCK_R, BLOCK_W)
    tl.store(dscale_ptr + at, tl.sum(dscale, axis=AXIS), mask=mask)
    tl.store(dzero_ptr + at, tl.sum(dzero, axis=AXIS), mask=mask)


def launch(x, scale, zero, qmin, qmax, axis, group):
    """Run the Triton kernel over `x` in the order of its memory."""
    return _forward(_run_triton, x, scale, zero, qmin, qmax, axis, group)


def launch_backward(grad, x, scale, zero, qmin, qmax, axis, group):
    """Run the Triton kernel that leaves one float32 partial sum a program, then add these up in a fixed order."""
    return _backward(_run_triton_backward, grad, x, scale, zero, qmin, qmax, axis, group)


def launch_cpu(x, scale, zero, qmin, qmax, axis, group):
    """Run the native CPU kernel over `x` in the order of its memory."""
    return _forward(_run_native, x, scale, zero, qmin, qmax, axis, group)


def launch_cpu_backward(grad, x, scale, zero, qmin, qmax, axis, group):
    """Run the native CPU kernel that gives the three gradients; the bits do not depend on the number of threads."""
    return _backward(_run_native_backward, grad, x, scale, zero, qmin, qmax, axis, group)


def refuses(x, scale, zero, *args):
    """Say why the Triton kernel cannot run, or None."""
    return refuses_triton() or _refuses_tensors(x, scale, zero)


def refuses_backward(grad, x, scale, zero, *args):
    """Say why the Triton kernel of the gradients cannot run, or None."""
    return refuses(x, scale, zero)


def refuses_cpu(x, scale, zero, *args):
    """Say why the native CPU kernel cannot run, or None."""
    return _native.reason("cpu") or _refuses_tensors(x, scale, zero)


def refuses_cpu_backward(grad, x, scale, zero, *args):
    """Say why the native CPU kernel of the gradients cannot run, or None."""
    if grad.dtype != x.dtype:
        return f"grad is {grad.dtype} and x {x.dtype}; the native kernel takes one dtype"
    return refuses_cpu(x, scale, zero)


def _refuses_tensors(x, scale, zero):
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"x is {x.dtype}; the kernel takes float32, float16 and bfloat16"
    if scale.dtype != torch.float32 or zero.dtype not in (torch.float32, torch.int32):
        return f"scale is {scale.dtype} and zero {zero.dtype}; the kernel takes float32 and, for zero, int32"
    if x.is_neg():
        return "x is a negated view of memory; the kernel takes x.resolve_neg()"
    return None


def _forward(run, x, scale, zero, qmin, qmax, axis, group):
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    target = walkable(y, group)
    source, form = in_order_of(x, target), canonical(target, axis, group)
    run(source, target, scale.contiguous(), zero.contiguous(), qmin, qmax, form)
    return y if target is y else y.copy_(target)


def _backward(run, grad, x, scale, zero, qmin, qmax, axis, group):
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx, torch.zeros_like(scale), torch.zeros_like(scale)
    target = walkable(dx, group)
    sources, form = (in_order_of(grad, target), in_order_of(x, target)), canonical(target, axis, group)
    sums = run(*sources, target, scale.contiguous(), zero.contiguous(), qmin, qmax, form)
    dscale, dzero = (s.reshape(scale.shape) for s in sums)
    if not scale.is_contiguous():
        dscale, dzero = torch.empty_like(scale).copy_(dscale), torch.empty_like(scale).copy_(dzero)
    return dx if target is dx else dx.copy_(target), dscale, dzero


def _run_triton(x, y, scale, zero, qmin, qmax, form):
    rows, columns, by_row = matrix(*form)
    block_r, block_w = tile_shape(rows, columns, FORWARD_TILE)
    grid = (triton.cdiv(rows, block_r) * triton.cdiv(columns, block_w),)
    sizes = rows, columns, form[1], float(qmin), float(qmax)
    tiles = {"BY_ROW": by_row, "BLOCK_R": block_r, "BLOCK_W": block_w}
    with torch.cuda.device_of(x):
        _fake_quant_kernel[grid](x, scale, zero, y, *sizes, **tiles, num_warps=4, enable_fp_fusion=False)


def _run_triton_backward(grad, x, dx, scale, zero, qmin, qmax, form):
    rows, columns, by_row = matrix(*form)
    block_r, block_w, steps = _strip(rows, columns, by_row)
    tall, wide = (block_r, block_w * steps) if by_row else (block_r * steps, block_w)
    strips = triton.cdiv(rows, tall), triton.cdiv(columns, wide)
    shape = (form[0], form[1], strips[1]) if by_row else (strips[0], form[1], 1)
    if form[1] == 1:
        shape = (1, 1, strips[1])
    partials = [torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2)]
    sizes = rows, columns, form[1], float(qmin), float(qmax)
    tiles = {"BY_ROW": by_row, "STEPS": steps, "BLOCK_R": block_r, "BLOCK_W": block_w}
    with torch.cuda.device_of(x):
        _fake_quant_backward_kernel[(strips[0] * strips[1],)](
            grad, x, scale, zero, dx, *partials, *sizes, **tiles, num_warps=4, enable_fp_fusion=False
        )
    return partials if shape[0] == shape[2] == 1 else [p.sum((0, 2)) for p in partials]


def _strip(rows, columns, by_row):
    """Choose (tile rows, tile columns, tiles a program): few programs leave few sums to add, too few an idle GPU."""
    block_r, block_w = tile_shape(rows, columns, BACKWARD_TILE)
    tiles = triton.cdiv(rows, block_r), triton.cdiv(columns, block_w)
    spare = max(1, tiles[0] * tiles[1] // ENOUGH_PROGRAMS)
    steps = min(MOST_STEPS, 1 << (spare.bit_length() - 1), triton.next_power_of_2(tiles[by_row]))
    return block_r, block_w, steps


def _run_native(x, y, scale, zero, qmin, qmax, form):
    _native.fake_quant(x, y, scale, zero, qmin, qmax, *form)


def _run_native_backward(grad, x, dx, scale, zero, qmin, qmax, form):
    dscale, dzero = torch.empty_like(scale), torch.empty_like(scale)
    _native.fake_quant_backward(grad, x, dx, scale, zero, dscale, dzero, qmin, qmax, *form)
    return dscale, dzero
