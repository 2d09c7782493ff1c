"""Fake quantisation of an activation together with what stands before it, in one pass over memory.

    u = x + residual                                 rounded to the dtype of x and handed on, as the sum a block carries
    n = u, gelu(u) = u Phi(u), or (u - mean) / sqrt(var + eps) over the last axis
    v = n gain[c] + shift[c]                         a channel's alignment, or the affine of the LayerNorm
    y = fake_quant(v)                                with one scale and one zero
    seen[:, c] = sum v, sum v^2, min v, max v and how many v lie outside the codes

Every line but the fourth is optional. The gradients are those of `fake_quant` at v, taken back through the lines above.
Source: Hendrycks and Gimpel, arXiv:1606.08415 (GELU); Ba et al., arXiv:1607.06450 (LayerNorm).
"""

import torch
from torch.nn import functional as F

from . import _native
from ._tiles import (
    canonical,
    clamp,
    expand,
    gelu,
    in_order_of,
    load_pair,
    load_tile,
    locate,
    matrix,
    partial_place,
    reduce,
    round_half_even,
    store_tile,
    tile_mask,
    tile_shape,
)
from ._triton import jit, tl, triton
from ._triton import refuses as refuses_triton

KINDS = ("none", "gelu", "layer_norm")
SEEN = ("sum", "square_sum", "min", "max", "clipped")
TILE, LONGEST = 1024, 8192  # elements of a tile; of a row that a LayerNorm keeps in registers
ENOUGH_PROGRAMS, MOST_STEPS = 2048, 64


def reference(x, residual, gain, shift, scale, zero, before, eps, observe, qmin, qmax, axis):
    """Return (y, u, seen); u is () where there is no residual, seen (5, C) float32, or empty when nobody observes."""
    u = x if residual is None else torch.add(x, residual, out=torch.empty_like(x))
    v = _aligned(_normal(u, before, eps), gain, shift, axis)
    origin = torch.round(zero)
    code = torch.round(v / scale) + origin
    y = torch.empty_like(x).copy_((torch.clamp(code, qmin, qmax) - origin) * scale)
    inside = (code >= qmin) & (code <= qmax)
    return y, u if residual is not None else x.new_empty(0), _seen(v, inside, axis) if observe else _nothing(x)


def reference_backward(grad, du, u, gain, shift, scale, zero, before, eps, qmin, qmax, axis):
    """Return (dx, dgain, dshift, dscale, dzero); dx is also the residual's. `du` is what the sum itself receives."""
    n = _normal(u, before, eps)
    v, upstream, origin = _aligned(n, gain, shift, axis), grad.to(n.dtype), torch.round(zero)
    ratio = v / scale
    rounded = torch.round(ratio)
    code = rounded + origin
    inside = (code >= qmin) & (code <= qmax)
    dscale = (upstream * torch.where(inside, rounded - ratio, torch.clamp(code, qmin, qmax) - origin)).sum()
    dzero = torch.where(inside, 0.0, -upstream * scale).sum()
    dv = torch.where(inside, upstream, 0.0)
    sums = (reduce(t, axis, 0).reshape(-1) for t in (dv * n, dv))
    dgain, dshift = (_nothing(u) if gain is None else t.to(gain.dtype) for t in sums)
    du = _through(dv if gain is None else dv * _spread(gain, dv, axis), u, n, before, eps, du)
    return torch.empty_like(u).copy_(du), dgain, dshift, dscale.to(scale.dtype), dzero.to(scale.dtype)


def _normal(u, before, eps):
    wide = u if u.dtype == torch.float64 else u.float()
    if before == "gelu":
        return F.gelu(wide)
    return F.layer_norm(wide, wide.shape[-1:], eps=eps) if before == "layer_norm" else wide


def _aligned(n, gain, shift, axis):
    return n if gain is None else n * _spread(gain, n, axis) + _spread(shift, n, axis)


def _spread(values, x, axis):
    return values.reshape(()) if axis is None else expand(values, x, axis, 0)


def _through(dn, u, n, before, eps, du):
    """Take a gradient of n back to u, and add `du`."""
    wide = u.to(n.dtype)
    if before == "gelu":
        dn = torch.ops.aten.gelu_backward(dn, wide)
    if before == "layer_norm":
        _, mean, rstd = torch.native_layer_norm(wide, wide.shape[-1:], None, None, eps)
        held = (wide.shape[-1:], mean, rstd, None, None, [True, False, False])
        dn, _, _ = torch.ops.aten.native_layer_norm_backward(dn, wide, *held)
    return dn if du is None else dn.add_(du)


def _seen(v, inside, axis):
    """Return what is seen of every channel; the least and the greatest pass over a NaN."""
    if v.numel() == 0:
        seen = v.new_zeros((len(SEEN), 1 if axis is None else v.shape[axis]), dtype=torch.float32)
        seen[2], seen[3] = torch.inf, -torch.inf
        return seen
    rows, kept = (
        t.reshape(1, -1) if axis is None else t.movedim(axis, 0).reshape(v.shape[axis], -1) for t in (v, inside)
    )
    least, greatest = (rows.nan_to_num(end, torch.inf, -torch.inf) for end in (torch.inf, -torch.inf))
    found = (rows.sum(1), rows.square().sum(1), least.amin(1), greatest.amax(1), (~kept).sum(1))
    return torch.stack([t.float() for t in found])


def _nothing(x):
    return x.new_empty(0, dtype=torch.float32)


@jit
def _mean(tile, W):
    """Return the mean over W values of each row, as a column."""
    return (tl.sum(tile, axis=1) * tl.div_rn(1.0, W.to(tl.float32)))[:, None]


@jit
def _normal_tile(u, column, W, eps, BEFORE: tl.constexpr, BLOCK_W: tl.constexpr):
    """Return (n, 1 / sqrt(var + eps)) of a tile; a LayerNorm has its whole rows in it."""
    rstd = 0.0
    if BEFORE == 1:
        u = gelu(u)
    if BEFORE == 2:
        inside = (column + tl.arange(0, BLOCK_W) < W)[None, :]
        u = tl.where(inside, u - _mean(u, W), 0.0)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(_mean(u * u, W) + eps))
        u = u * rstd
    return u, rstd


@jit
def _prologue_kernel(
    x_ptr, residual_ptr, gain_ptr, shift_ptr, scale_ptr, zero_ptr, y_ptr, u_ptr, seen_ptr,
    R, W, C, parts, eps, qmin, qmax, ADD: tl.constexpr, BEFORE: tl.constexpr, ALIGN: tl.constexpr,
    OBSERVE: tl.constexpr, BY_ROW: tl.constexpr, STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    # A program walks STEPS tiles that share their channels: along its rows, or down its columns.
    TALL: tl.constexpr = BLOCK_R if BY_ROW else BLOCK_R * STEPS
    WIDE: tl.constexpr = BLOCK_W * STEPS if BY_ROW else BLOCK_W
    AXIS: tl.constexpr = 1 if BY_ROW else 0
    row, column = locate(R, W, TALL, WIDE)
    scale, zero = tl.load(scale_ptr), round_half_even(tl.load(zero_ptr).to(tl.float32))
    if ALIGN:
        gain, shift = load_pair(gain_ptr, shift_ptr, row, column, C, W, BY_ROW, BLOCK_R, BLOCK_W)
    total = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    squares, clipped, least, greatest = total, total, total + float("inf"), total - float("inf")
    for step in range(STEPS):
        r = row if BY_ROW else row + step * BLOCK_R
        c = column + step * BLOCK_W if BY_ROW else column
        u = load_tile(x_ptr, r, c, R, W, BLOCK_R, BLOCK_W)
        if ADD:
            u = (u + load_tile(residual_ptr, r, c, R, W, BLOCK_R, BLOCK_W)).to(u_ptr.dtype.element_ty)
            store_tile(u_ptr, u, r, c, R, W, BLOCK_R, BLOCK_W)
        v, _ = _normal_tile(u.to(tl.float32), c, W, eps, BEFORE, BLOCK_W)
        if ALIGN:
            v = v * gain + shift
        code = round_half_even(tl.div_rn(v, scale)) + zero
        store_tile(y_ptr, (clamp(code, qmin, qmax) - zero) * scale, r, c, R, W, BLOCK_R, BLOCK_W)
        if OBSERVE:
            there = tile_mask(r, c, R, W, BLOCK_R, BLOCK_W)
            total += tl.where(there, v, 0.0)
            squares += tl.where(there, v * v, 0.0)
            clipped += tl.where(there & ((code >= qmin) & (code <= qmax) == 0), 1.0, 0.0)
            least = tl.minimum(least, tl.where(there & (v == v), v, float("inf")))
            greatest = tl.maximum(greatest, tl.where(there & (v == v), v, -float("inf")))
    if OBSERVE:
        at, mask = partial_place(row, column, R, W, TALL, WIDE, BY_ROW, BLOCK_R, BLOCK_W)
        parts = tl.cast(parts, tl.int64)
        tl.store(seen_ptr + at, tl.sum(total, axis=AXIS), mask=mask)
        tl.store(seen_ptr + parts + at, tl.sum(squares, axis=AXIS), mask=mask)
        tl.store(seen_ptr + 2 * parts + at, tl.min(least, axis=AXIS), mask=mask)
        tl.store(seen_ptr + 3 * parts + at, tl.max(greatest, axis=AXIS), mask=mask)
        tl.store(seen_ptr + 4 * parts + at, tl.sum(clipped, axis=AXIS), mask=mask)


@jit
def _prologue_backward_kernel(
    grad_ptr, du_ptr, u_ptr, gain_ptr, shift_ptr, scale_ptr, zero_ptr, dx_ptr, dgrid_ptr, dalign_ptr,
    R, W, C, parts, eps, qmin, qmax, ADD: tl.constexpr, BEFORE: tl.constexpr, ALIGN: tl.constexpr,
    BY_ROW: tl.constexpr, STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    TALL: tl.constexpr = BLOCK_R if BY_ROW else BLOCK_R * STEPS
    WIDE: tl.constexpr = BLOCK_W * STEPS if BY_ROW else BLOCK_W
    AXIS: tl.constexpr = 1 if BY_ROW else 0
    LONG: tl.constexpr = BEFORE == 2 and BLOCK_W > 2048
    row, column = locate(R, W, TALL, WIDE)
    scale, zero = tl.load(scale_ptr), round_half_even(tl.load(zero_ptr).to(tl.float32))
    if ALIGN:
        gain, shift = load_pair(gain_ptr, shift_ptr, row, column, C, W, BY_ROW, BLOCK_R, BLOCK_W)
    dgain = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    dshift, dscale = dgain, tl.sum(dgain, axis=1) if LONG else dgain  # a long row has no registers to spare
    dzero = dscale
    for step in range(STEPS):
        r = row if BY_ROW else row + step * BLOCK_R
        c = column + step * BLOCK_W if BY_ROW else column
        u = load_tile(u_ptr, r, c, R, W, BLOCK_R, BLOCK_W)
        grad = load_tile(grad_ptr, r, c, R, W, BLOCK_R, BLOCK_W)
        n, rstd = _normal_tile(u, c, W, eps, BEFORE, BLOCK_W)
        ratio = tl.div_rn(n * gain + shift if ALIGN else n, scale)
        code = round_half_even(ratio) + zero
        inside = (code >= qmin) & (code <= qmax)
        to_scale = grad * (clamp(code, qmin, qmax) - zero - tl.where(inside, ratio, 0.0))
        to_zero = tl.where(inside, 0.0, -grad * scale)
        dscale += tl.sum(to_scale, axis=1) if LONG else to_scale
        dzero += tl.sum(to_zero, axis=1) if LONG else to_zero
        dn = tl.where(inside, grad, 0.0)
        if ALIGN:
            dgain += dn * n
            dshift += dn
            dn = dn * gain
        if BEFORE == 1:
            density = tl.exp(-0.5 * u * u) * 0.3989422804014327
            dn = dn * (0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * density)
        if BEFORE == 2:
            dn = rstd * (dn - _mean(dn, W) - n * _mean(dn * n, W))
        if ADD:
            dn += load_tile(du_ptr, r, c, R, W, BLOCK_R, BLOCK_W)
        store_tile(dx_ptr, dn, r, c, R, W, BLOCK_R, BLOCK_W)
    tl.store(dgrid_ptr + tl.program_id(0), tl.sum(dscale))
    tl.store(dgrid_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(dzero))
    if ALIGN:
        at, mask = partial_place(row, column, R, W, TALL, WIDE, BY_ROW, BLOCK_R, BLOCK_W)
        tl.store(dalign_ptr + at, tl.sum(dgain, axis=AXIS), mask=mask)
        tl.store(dalign_ptr + parts + at, tl.sum(dshift, axis=AXIS), mask=mask)


def fake(x, residual, gain, shift, scale, zero, before, eps, observe, qmin, qmax, axis):
    """Give the outputs' shapes on meta tensors."""
    channels = 1 if axis is None else x.shape[axis]
    u = x.new_empty(0) if residual is None else torch.empty_like(x)
    return torch.empty_like(x), u, x.new_empty((len(SEEN), channels) if observe else 0, dtype=torch.float32)


def fake_backward(grad, du, u, gain, shift, scale, zero, *args):
    """Give the gradients' shapes on meta tensors."""
    aligned = (_nothing(u) if gain is None else torch.empty_like(gain) for _ in range(2))
    return torch.empty_like(u), *aligned, torch.empty_like(scale), torch.empty_like(scale)


def launch(x, residual, gain, shift, scale, zero, before, eps, observe, qmin, qmax, axis):
    """Run the Triton kernel over `x` in the order of its memory; what is seen comes from partial results in order."""
    y, u = torch.empty_like(x), _nothing(x).to(x.dtype) if residual is None else torch.empty_like(x)
    if x.numel() == 0:
        return y, u, _seen(x.float(), x == x, axis) if observe else _nothing(x)
    if _scattered(y, before):
        near = (t if t is None else t.contiguous() for t in (x, residual))
        outputs = launch(*near, gain, shift, scale, zero, before, eps, observe, qmin, qmax, axis)
        return y.copy_(outputs[0]), u if residual is None else u.copy_(outputs[1]), outputs[2]
    sizes, shape, programs, tiles, warps = _tiling(y, before, eps, qmin, qmax, axis)
    seen = torch.empty((len(SEEN), *shape) if observe else 0, dtype=torch.float32, device=x.device)
    entering = (in_order_of(x, y), x if residual is None else in_order_of(residual, y))
    flags = {"ADD": residual is not None, "ALIGN": gain is not None, "OBSERVE": observe, **tiles}
    with torch.cuda.device_of(x):
        _prologue_kernel[(programs,)](
            *entering, *_pair(gain, shift, scale), scale, zero, y, y if residual is None else u, seen, *sizes, **flags,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return y, u, _gathered(seen) if observe else seen


def launch_backward(grad, du, u, gain, shift, scale, zero, before, eps, qmin, qmax, axis):
    """Run the Triton kernel of the gradients; sums come from float32 partial sums that are added in a fixed order."""
    dx = torch.empty_like(u)
    if u.numel() == 0:
        empty = [_nothing(u) if gain is None else torch.zeros_like(gain) for _ in range(2)]
        return dx, *empty, torch.zeros_like(scale), torch.zeros_like(scale)
    if _scattered(dx, before):
        near = (t if t is None else t.contiguous() for t in (grad, du, u))
        found, *sums = launch_backward(*near, gain, shift, scale, zero, before, eps, qmin, qmax, axis)
        return dx.copy_(found), *sums
    sizes, shape, programs, tiles, warps = _tiling(dx, before, eps, qmin, qmax, axis)
    dgrid = torch.empty((2, programs), dtype=torch.float32, device=u.device)
    dalign = torch.empty(0 if gain is None else (2, *shape), dtype=torch.float32, device=u.device)
    leaving = (in_order_of(grad, dx), u if du is None else in_order_of(du, dx), in_order_of(u, dx))
    with torch.cuda.device_of(u):
        _prologue_backward_kernel[(programs,)](
            *leaving, *_pair(gain, shift, scale), scale, zero, dx, dgrid, dalign, *sizes, ADD=du is not None,
            ALIGN=gain is not None, **tiles, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    aligned = (dalign, _nothing(u)) if gain is None else dalign.sum((1, 3)).unbind()
    return dx, *aligned, *dgrid.sum(1).unbind()


def _scattered(y, before):
    """Say whether the rows of a LayerNorm do not lie together in the memory of `y`."""
    return before == "layer_norm" and y.stride(-1) != 1


def _tiling(y, before, eps, qmin, qmax, axis):
    """Choose (sizes, shape of partial results, programs, tiles, warps); few programs leave few partial results."""
    form = canonical(y, axis, 0)
    rows, columns, by_row = matrix(*form)
    block_r, block_w = tile_shape(rows, columns, TILE)
    if before == "layer_norm":
        block_w = max(16, triton.next_power_of_2(columns))
        block_r = max(1, TILE // block_w)
    tiles = triton.cdiv(rows, block_r), triton.cdiv(columns, block_w)
    spare = max(1, tiles[0] * tiles[1] // ENOUGH_PROGRAMS)
    steps = min(MOST_STEPS, 1 << (spare.bit_length() - 1), triton.next_power_of_2(tiles[by_row]))
    tall, wide = (block_r, block_w * steps) if by_row else (block_r * steps, block_w)
    strips = triton.cdiv(rows, tall), triton.cdiv(columns, wide)
    shape = (form[0], form[1], strips[1]) if by_row else (strips[0], form[1], 1)
    shape = (1, 1, strips[1]) if form[1] == 1 else shape
    sizes = (rows, columns, form[1], shape[0] * shape[1] * shape[2], eps, float(qmin), float(qmax))
    constants = {
        "BEFORE": KINDS.index(before),
        "BY_ROW": by_row,
        "STEPS": steps,
        "BLOCK_R": block_r,
        "BLOCK_W": block_w,
    }
    return sizes, shape, strips[0] * strips[1], constants, _warps(block_r * block_w, y.dtype)


def _warps(elements, dtype):
    """Choose the warps of a tile so that a thread has 16 bytes, and spills no registers."""
    return min(16, max(4, elements // (128 if dtype == torch.float32 else 256)))


def _pair(gain, shift, scale):
    return (scale, scale) if gain is None else (gain.contiguous(), shift.contiguous())


def _gathered(seen):
    """Put partial results (5, outer, C, strips) together, (5, C)."""
    total, squares, least, greatest, clipped = seen
    extremes = (least.amin((0, 2)), greatest.amax((0, 2)))
    return torch.stack([total.sum((0, 2)), squares.sum((0, 2)), *extremes, clipped.sum((0, 2))])


def launch_cpu(x, residual, gain, shift, scale, zero, before, eps, observe, qmin, qmax, axis):
    """Run torch's own sum, GELU or LayerNorm, then the native kernel that aligns, quantises and observes at once."""
    u = x if residual is None else torch.add(x, residual, out=torch.empty_like(x))
    n = u if before == "none" else _normal(u, before, eps)
    y = torch.empty_like(x, dtype=n.dtype)
    form, n = canonical(y, axis, 0), in_order_of(n, y)
    seen = torch.empty(len(SEEN), form[1]) if observe else _nothing(x)
    if gain is None and not observe:
        _native.fake_quant(n, y, scale, zero, qmin, qmax, 1, 1, y.numel())
    else:
        _native.aligned_fake_quant(n, y, *_filled(gain, shift, form), scale, zero, seen, qmin, qmax, *form)
    return y.to(x.dtype), u if residual is not None else x.new_empty(0), seen


def launch_cpu_backward(grad, du, u, gain, shift, scale, zero, before, eps, qmin, qmax, axis):
    """Run the native kernel of the gradients up to n, then torch's own; the bits depend on no number of threads."""
    n = u if before == "none" and (du is None or u.dtype == torch.float32) else _normal(u, before, eps)
    dn, dscale, dzero = torch.empty_like(u, dtype=n.dtype), torch.empty_like(scale), torch.empty_like(scale)
    entering, form = (in_order_of(grad.to(n.dtype), dn), in_order_of(n, dn)), canonical(dn, axis, 0)
    if gain is None:
        dgain = dshift = None
        _native.fake_quant_backward(*entering, dn, scale, zero, dscale, dzero, qmin, qmax, 1, 1, dn.numel())
    else:
        dgain, dshift = torch.empty_like(gain), torch.empty_like(shift)
        sums = (dgain, dshift, dscale, dzero)
        pair = (gain.contiguous(), shift.contiguous())
        _native.aligned_fake_quant_backward(*entering, dn, *pair, scale, zero, *sums, qmin, qmax, *form)
    dx = _through(dn, u, n, before, eps, du)
    dx = dx if (dx.dtype, dx.stride()) == (u.dtype, dn.stride()) else torch.empty_like(u).copy_(dx)
    return dx, *(_nothing(u) if gain is None else t for t in (dgain, dshift)), dscale, dzero


def _filled(gain, shift, form):
    """Give the alignment of every channel; where there is none, one that changes nothing."""
    return (torch.ones(form[1]), torch.zeros(form[1])) if gain is None else (gain.contiguous(), shift.contiguous())


def refuses(x, residual, gain, shift, scale, zero, before, *args):
    """Say why the Triton kernel cannot run, or None."""
    if before == "layer_norm" and not 1 < x.shape[-1] <= LONGEST:
        return f"the LayerNorm is over {x.shape[-1]} values; the kernel takes 2 to {LONGEST}"
    return refuses_triton() or _refuses_tensors(x, scale, zero, residual, gain, shift)


def refuses_backward(grad, du, u, gain, shift, scale, zero, before, *args):
    """Say why the Triton kernel of the gradients cannot run, or None."""
    return refuses(u, du, gain, shift, scale, zero, before)


def refuses_cpu(x, residual, gain, shift, scale, zero, *args):
    """Say why the native CPU kernel cannot run, or None."""
    return _native.reason("cpu") or _refuses_tensors(x, scale, zero, residual, gain, shift)


def refuses_cpu_backward(grad, du, u, gain, shift, scale, zero, *args):
    """Say why the native CPU kernel of the gradients cannot run, or None."""
    return refuses_cpu(u, du, gain, shift, scale, zero)


def _refuses_tensors(x, scale, zero, residual, gain, shift):
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"x is {x.dtype}; the kernel takes float32, float16 and bfloat16"
    if zero.dtype not in (torch.float32, torch.int32):
        return f"zero is {zero.dtype}; the kernel takes float32 and int32"
    for name, tensor in (("scale", scale), ("gain", gain), ("shift", shift)):
        if tensor is not None and tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype}; the kernel takes float32"
    return None
