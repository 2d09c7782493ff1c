"""Learned rounding of weights and its regulariser (AdaRound).

``h = clip(1.2 sigmoid(v) - 0.1, 0, 1)``, ``y = (clamp(floor(w / scale) + h + zero, qmin, qmax) - zero) * scale``,
``penalty = sum(1 - |2h - 1|^beta)``. Source: Nagel et al., Up or Down?, arXiv:2004.10568, equations 21 to 24.
"""

import torch

from ._tiles import (
    canonical,
    clamp,
    expand,
    in_order_of,
    load_scales,
    load_tile,
    locate,
    matrix,
    store_tile,
    tile_mask,
    tile_shape,
    walkable,
)
from ._triton import jit, tl, triton
from ._triton import refuses as refuses_triton

STRETCH, SHIFT = 1.2, -0.1
TILE = 1024  # elements: 8 a thread


def reference(w, v, scale, zero, beta, qmin, qmax, axis, group):
    """Return (y, penalty): the softly rounded weight and the pull towards 0 or 1."""
    step, origin = expand(scale, w, axis, group), expand(zero, w, axis, group)
    h = torch.clamp(torch.sigmoid(v) * STRETCH + SHIFT, 0, 1)
    code = torch.clamp(torch.floor(w / step) + h + origin, qmin, qmax)
    penalty = (1 - (2 * h - 1).abs() ** beta).sum()
    return torch.empty_like(w).copy_((code - origin) * step), penalty


def reference_backward(grad, dpenalty, w, v, scale, zero, beta, qmin, qmax, axis, group):
    """Return dv; h passes no gradient where the sigmoid or the code is clipped."""
    step, origin = expand(scale, w, axis, group), expand(zero, w, axis, group)
    s = torch.sigmoid(v)
    h = s * STRETCH + SHIFT
    free = (h > 0) & (h < 1)
    code = torch.floor(w / step) + h + origin
    inside = (code >= qmin) & (code <= qmax)
    centred = 2 * h - 1
    pull = -2 * beta * centred.abs() ** (beta - 1) * torch.sign(centred)
    dh = torch.where(inside, grad * step, 0.0) + dpenalty * pull
    return torch.empty_like(v).copy_(torch.where(free, dh * s * (1 - s) * STRETCH, 0.0))


@jit
def _power(base, exponent):
    """Raise a base in [0, 1] to a power; 0 stays 0, which its logarithm would turn into NaN."""
    return tl.where(base > 0.0, tl.exp2(exponent * tl.log2(base)), 0.0)


@jit
def _soft_round_kernel(
    w_ptr,
    v_ptr,
    scale_ptr,
    zero_ptr,
    beta_ptr,
    y_ptr,
    penalty_ptr,
    R,
    W,
    C,
    qmin,
    qmax,
    STRETCH: tl.constexpr,
    SHIFT: tl.constexpr,
    BY_ROW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row, column = locate(R, W, BLOCK_R, BLOCK_W)
    scale, zero = load_scales(scale_ptr, zero_ptr, row, column, C, W, BY_ROW, BLOCK_R, BLOCK_W)
    w = load_tile(w_ptr, row, column, R, W, BLOCK_R, BLOCK_W)
    v = load_tile(v_ptr, row, column, R, W, BLOCK_R, BLOCK_W)
    h = clamp(tl.div_rn(1.0, 1.0 + tl.exp(-v)) * STRETCH + SHIFT, 0.0, 1.0)
    code = clamp(tl.floor(tl.div_rn(w, scale)) + h + zero, qmin, qmax)
    store_tile(y_ptr, (code - zero) * scale, row, column, R, W, BLOCK_R, BLOCK_W)
    penalty = 1.0 - _power(tl.abs(2.0 * h - 1.0), tl.load(beta_ptr))
    penalty = tl.where(tile_mask(row, column, R, W, BLOCK_R, BLOCK_W), penalty, 0.0)
    tl.store(penalty_ptr + tl.program_id(0), tl.sum(penalty))


@jit
def _soft_round_backward_kernel(
    grad_ptr,
    dpenalty_ptr,
    w_ptr,
    v_ptr,
    scale_ptr,
    zero_ptr,
    beta_ptr,
    dv_ptr,
    R,
    W,
    C,
    qmin,
    qmax,
    STRETCH: tl.constexpr,
    SHIFT: tl.constexpr,
    BY_ROW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row, column = locate(R, W, BLOCK_R, BLOCK_W)
    scale, zero = load_scales(scale_ptr, zero_ptr, row, column, C, W, BY_ROW, BLOCK_R, BLOCK_W)
    w = load_tile(w_ptr, row, column, R, W, BLOCK_R, BLOCK_W)
    v = load_tile(v_ptr, row, column, R, W, BLOCK_R, BLOCK_W)
    grad = load_tile(grad_ptr, row, column, R, W, BLOCK_R, BLOCK_W)
    s = tl.div_rn(1.0, 1.0 + tl.exp(-v))
    h = s * STRETCH + SHIFT
    code = tl.floor(tl.div_rn(w, scale)) + h + zero
    centred = 2.0 * h - 1.0
    beta = tl.load(beta_ptr)
    pull = -2.0 * beta * _power(tl.abs(centred), beta - 1.0)
    pull = tl.load(dpenalty_ptr) * tl.where(centred < 0.0, -pull, pull)
    dh = tl.where((code >= qmin) & (code <= qmax), grad * scale, 0.0) + pull
    dv = tl.where((h > 0.0) & (h < 1.0), dh * s * (1.0 - s) * STRETCH, 0.0)
    store_tile(dv_ptr, dv, row, column, R, W, BLOCK_R, BLOCK_W)


def launch(w, v, scale, zero, beta, qmin, qmax, axis, group):
    """Run the Triton kernel: y in one pass, the penalty from one float32 partial sum a program."""
    y = torch.empty_like(w)
    if w.numel() == 0:
        return y, torch.zeros((), dtype=torch.float32, device=w.device)
    target = walkable(y, group)
    sizes, tiles, programs = _tiling(target, qmin, qmax, axis, group)
    partials = torch.empty(programs, dtype=torch.float32, device=w.device)
    sources = (in_order_of(w, target), in_order_of(v, target), scale.contiguous(), zero.contiguous(), beta)
    with torch.cuda.device_of(w):
        _soft_round_kernel[(programs,)](
            *sources, target, partials, *sizes, **tiles, num_warps=4, enable_fp_fusion=False
        )
    return y if target is y else y.copy_(target), partials.sum()


def launch_backward(grad, dpenalty, w, v, scale, zero, beta, qmin, qmax, axis, group):
    """Run the Triton kernel that gives the gradient of the rounding and of its penalty in one pass."""
    dv = torch.empty_like(v)
    if v.numel() == 0:
        return dv
    target = walkable(dv, group)
    sizes, tiles, programs = _tiling(target, qmin, qmax, axis, group)
    sources = (in_order_of(grad, target), dpenalty, in_order_of(w, target), in_order_of(v, target))
    scales = (scale.contiguous(), zero.contiguous(), beta)
    with torch.cuda.device_of(v):
        _soft_round_backward_kernel[(programs,)](
            *sources, *scales, target, *sizes, **tiles, num_warps=4, enable_fp_fusion=False
        )
    return dv if target is dv else dv.copy_(target)


def _tiling(target, qmin, qmax, axis, group):
    form = canonical(target, axis, group)
    rows, columns, by_row = matrix(*form)
    block_r, block_w = tile_shape(rows, columns, TILE)
    tiles = {"STRETCH": STRETCH, "SHIFT": SHIFT, "BY_ROW": by_row, "BLOCK_R": block_r, "BLOCK_W": block_w}
    programs = triton.cdiv(rows, block_r) * triton.cdiv(columns, block_w)
    return (rows, columns, form[1], float(qmin), float(qmax)), tiles, programs


def refuses(w, v, scale, zero, beta, *args):
    """Say why the Triton kernel cannot run, or None."""
    for name, tensor in (("w", w), ("v", v), ("scale", scale), ("beta", beta)):
        if tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype}; the kernel takes float32"
    if zero.dtype not in (torch.float32, torch.int32):
        return f"zero is {zero.dtype}; the kernel takes float32 and int32"
    return refuses_triton()


def refuses_backward(grad, dpenalty, *args):
    """Say why the Triton kernel of the gradient cannot run, or None."""
    if grad.dtype != torch.float32 or dpenalty.dtype != torch.float32:
        return f"grad is {grad.dtype} and dpenalty {dpenalty.dtype}; the kernel takes float32"
    return refuses(*args)
