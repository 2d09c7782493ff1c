"""Learned rounding of weights and its regulariser (AdaRound).

``h = clip(1.2 sigmoid(v) - 0.1, 0, 1)``, ``y = (clamp(floor(w / scale) + h + zero, qmin, qmax) - zero) * scale``,
``penalty = sum(1 - |2h - 1|^beta)``. Source: Nagel et al., Up or Down?, arXiv:2004.10568, equations 21 to 24.
On request the same pass measures the input columns: ``energy[k I + i] = sum y[o, i, ...]^2`` over the outputs o of the
k-th group of a convolution.
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
    round_half_even,
    store_tile,
    tile_mask,
    tile_shape,
    walkable,
)
from ._triton import jit, tl, triton
from ._triton import refuses as refuses_triton

STRETCH, SHIFT = 1.2, -0.1
TILE, WIDTH = 1024, 128  # elements: 8 a thread; columns of a tile whose rows are added up
ENOUGH_PROGRAMS, MOST_STEPS = 1024, 64


def reference(w, v, scale, zero, beta, qmin, qmax, axis, group, conv_groups):
    """Return (y, penalty, energy): the softly rounded weight, the pull towards 0 or 1, and sums of y^2.

    `energy` is float32, (conv_groups * I,) for w (O, I, ...) and an ordinary (1) or grouped convolution; (0,) for 0.
    """
    step, origin = expand(scale, w, axis, group), expand(zero, w, axis, group)
    h = torch.clamp(torch.sigmoid(v) * STRETCH + SHIFT, 0, 1)
    code = torch.clamp(torch.floor(w / step) + h + origin, qmin, qmax)
    penalty = (1 - (2 * h - 1).abs() ** beta).sum()
    y = (code - origin) * step
    return torch.empty_like(w).copy_(y), penalty, _energy(y, conv_groups)


def reference_backward(grad, dpenalty, denergy, w, v, scale, zero, beta, qmin, qmax, axis, group, conv_groups):
    """Return dv; h passes no gradient where the sigmoid or the code is clipped."""
    step, origin = expand(scale, w, axis, group), expand(zero, w, axis, group)
    s = torch.sigmoid(v)
    h = s * STRETCH + SHIFT
    free = (h > 0) & (h < 1)
    code = torch.floor(w / step) + h + origin
    inside = (code >= qmin) & (code <= qmax)
    if conv_groups:
        y = (torch.clamp(code, qmin, qmax) - origin) * step
        grad = grad + 2 * y * _by_column(denergy, w, conv_groups)
    centred = 2 * h - 1
    pull = -2 * beta * centred.abs() ** (beta - 1) * torch.sign(centred)
    dh = torch.where(inside, grad * step, 0.0) + dpenalty * pull
    return torch.empty_like(v).copy_(torch.where(free, dh * s * (1 - s) * STRETCH, 0.0))


def _energy(y, conv_groups):
    if not conv_groups:
        return y.new_empty(0)
    grouped = y.square().unflatten(0, (conv_groups, y.shape[0] // conv_groups))
    return grouped.sum([d for d in range(grouped.ndim) if d not in (0, 2)]).flatten()


def _by_column(denergy, w, conv_groups):
    """Give every element of w (O, I, ...) the value of its column: a tensor (O, I, 1, ...)."""
    rows = denergy.reshape(conv_groups, 1, -1).expand(-1, w.shape[0] // conv_groups, -1)
    return rows.reshape(*w.shape[:2], *[1] * (w.ndim - 2))


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
    energy_ptr,
    P,
    W,
    C,
    inner,
    qmin,
    qmax,
    STRETCH: tl.constexpr,
    SHIFT: tl.constexpr,
    ENERGY: tl.constexpr,
    BY_ROW: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    # A program walks STEPS tiles down the P rows of one group of outputs; element e has scale e / inner % C.
    strips = tl.cdiv(P, BLOCK_R * STEPS)
    strip, column = tl.program_id(0) // tl.cdiv(W, BLOCK_W), tl.program_id(0) % tl.cdiv(W, BLOCK_W) * BLOCK_W
    first = (strip // strips).to(tl.int64) * P * ENERGY
    columns, beta = column + tl.arange(0, BLOCK_W), tl.load(beta_ptr)
    penalty = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    energy = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    for step in range(STEPS):
        row = ((strip % strips * STEPS + step) * (P > 1)).to(tl.int64) * BLOCK_R
        channel = (first + row + tl.arange(0, BLOCK_R))[:, None]
        channel = channel // (inner // W) % C if BY_ROW else (channel * (W // inner) + columns[None, :] // inner) % C
        scale = tl.load(scale_ptr + channel)
        zero = round_half_even(tl.load(zero_ptr + channel).to(tl.float32))
        w = load_tile(w_ptr + first * W, row, column, P, W, BLOCK_R, BLOCK_W)
        v = load_tile(v_ptr + first * W, row, column, P, W, BLOCK_R, BLOCK_W)
        h = clamp(tl.div_rn(1.0, 1.0 + tl.exp(-v)) * STRETCH + SHIFT, 0.0, 1.0)
        y = (clamp(tl.floor(tl.div_rn(w, scale)) + h + zero, qmin, qmax) - zero) * scale
        store_tile(y_ptr + first * W, y, row, column, P, W, BLOCK_R, BLOCK_W)
        inside = tile_mask(row, column, P, W, BLOCK_R, BLOCK_W)
        penalty += tl.where(inside, 1.0 - _power(tl.abs(2.0 * h - 1.0), beta), 0.0)
        energy += tl.where(inside, y * y, 0.0)
    tl.store(penalty_ptr + tl.program_id(0), tl.sum(penalty))
    if ENERGY:
        tl.store(energy_ptr + strip.to(tl.int64) * W + columns, tl.sum(energy, axis=0), mask=columns < W)


@jit
def _soft_round_backward_kernel(
    grad_ptr,
    dpenalty_ptr,
    denergy_ptr,
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
    stride_o,
    outputs,
    outputs_a_group,
    stride_i,
    inputs,
    STRETCH: tl.constexpr,
    SHIFT: tl.constexpr,
    ENERGY: tl.constexpr,
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
    if ENERGY:
        rows, columns = row + tl.arange(0, BLOCK_R), column + tl.arange(0, BLOCK_W)
        element = (rows[:, None] * W + columns[None, :]).to(tl.int32)
        at = element // stride_o % outputs // outputs_a_group * inputs + element // stride_i % inputs
        mask = tile_mask(row, column, R, W, BLOCK_R, BLOCK_W)
        grad += 2.0 * (clamp(code, qmin, qmax) - zero) * scale * tl.load(denergy_ptr + at, mask=mask, other=0.0)
    centred = 2.0 * h - 1.0
    beta = tl.load(beta_ptr)
    pull = -2.0 * beta * _power(tl.abs(centred), beta - 1.0)
    pull = tl.load(dpenalty_ptr) * tl.where(centred < 0.0, -pull, pull)
    dh = tl.where((code >= qmin) & (code <= qmax), grad * scale, 0.0) + pull
    dv = tl.where((h > 0.0) & (h < 1.0), dh * s * (1.0 - s) * STRETCH, 0.0)
    store_tile(dv_ptr, dv, row, column, R, W, BLOCK_R, BLOCK_W)


def launch(w, v, scale, zero, beta, qmin, qmax, axis, group, conv_groups):
    """Run the Triton kernel: y in one pass, penalty and energy from float32 partial sums that are added in order."""
    y = torch.empty_like(w)
    if w.numel() == 0:
        penalty, energy = (torch.zeros(n, dtype=torch.float32, device=w.device) for n in _sums(w, conv_groups))
        return y, penalty, energy
    target = _target(y, group, conv_groups)
    form = canonical(target, axis, group)
    rows, columns, strips, programs, tiles = _strips(target, form, conv_groups)
    count = conv_groups * strips * columns
    penalty, energy = (torch.empty(n, dtype=torch.float32, device=w.device) for n in (programs, count))
    sources = (in_order_of(w, target), in_order_of(v, target), scale.contiguous(), zero.contiguous(), beta)
    sizes = (rows, columns, *form[1:], float(qmin), float(qmax), STRETCH, SHIFT, conv_groups > 0)
    with torch.cuda.device_of(w):
        _soft_round_kernel[(programs,)](
            *sources, target, penalty, energy, *sizes, **tiles, num_warps=4, enable_fp_fusion=False
        )
    if conv_groups:  # a row of partial sums lies in memory as a row of y does
        parts = energy.as_strided(
            (conv_groups, strips, *y.shape[1:]), (strips * columns, columns, *target.stride()[1:])
        )
        energy = parts.sum([d for d in range(parts.ndim) if d not in (0, 2)]).flatten()
    return y if target is y else y.copy_(target), penalty.sum(), energy


def _sums(w, conv_groups):
    """Give the shapes of penalty and energy."""
    return (), (conv_groups * w.shape[1] if conv_groups else 0,)


def _target(y, group, conv_groups):
    """Return where the kernel writes: `y`, or contiguous scratch where it cannot walk the rows that it measures."""
    if conv_groups and y.shape[0] > 1 and y.stride(0) * y.shape[0] != y.numel():
        return torch.empty_like(y, memory_format=torch.contiguous_format)
    return walkable(y, group)


def _strips(y, form, conv_groups):
    """Choose (rows of a group, columns, strips of rows, programs, tiles); few strips leave few sums to add."""
    if not conv_groups:
        rows, columns, _ = matrix(*form)
        height, width = tile_shape(rows, columns, TILE)
    else:
        rows, columns = y.shape[0] // conv_groups, y.numel() // y.shape[0]
        width = min(WIDTH, max(16, triton.next_power_of_2(columns)))
        height = min(TILE // width, triton.next_power_of_2(rows))
    across, down = triton.cdiv(columns, width), triton.cdiv(rows, height)
    spare = max(1, across * down * conv_groups // ENOUGH_PROGRAMS)
    steps = min(MOST_STEPS, 1 << (spare.bit_length() - 1), triton.next_power_of_2(down)) if conv_groups else 1
    strips = triton.cdiv(rows, height * steps)
    tiles = {"BY_ROW": form[2] % columns == 0, "STEPS": steps, "BLOCK_R": height, "BLOCK_W": width}
    return rows, columns, strips, max(1, conv_groups) * strips * across, tiles


def launch_backward(grad, dpenalty, denergy, w, v, scale, zero, beta, qmin, qmax, axis, group, conv_groups):
    """Run the Triton kernel that gives the gradient of the rounding and of its sums in one pass."""
    dv = torch.empty_like(v)
    if v.numel() == 0:
        return dv
    target = walkable(dv, group)
    sizes, tiles, programs = _tiling(canonical(target, axis, group), qmin, qmax)
    sizes += _columns(target, conv_groups)
    sources = (in_order_of(grad, target), dpenalty, denergy.contiguous())
    weights = (in_order_of(w, target), in_order_of(v, target), scale.contiguous(), zero.contiguous(), beta)
    tiles["ENERGY"] = conv_groups > 0
    with torch.cuda.device_of(v):
        _soft_round_backward_kernel[(programs,)](
            *sources, *weights, target, *sizes, **tiles, num_warps=4, enable_fp_fusion=False
        )
    return dv if target is dv else dv.copy_(target)


def launch_cpu(w, v, scale, zero, beta, qmin, qmax, axis, group, conv_groups):
    """Run the native CPU kernel that gives y and both sums in one pass; the bits do not depend on the threads."""
    y = torch.empty_like(w)
    penalty, energy = (torch.zeros(n, dtype=torch.float32) for n in _sums(w, conv_groups))
    if w.numel() == 0:
        return y, penalty, energy
    target = _target(y, group, conv_groups)
    sources = (in_order_of(w, target), in_order_of(v, target), scale.contiguous(), zero.contiguous(), beta)
    form, columns = canonical(target, axis, group), _lines(target, conv_groups)
    _native.soft_round(*sources, target, penalty, energy, qmin, qmax, form, columns)
    return y if target is y else y.copy_(target), penalty, energy


def launch_cpu_backward(grad, dpenalty, denergy, w, v, scale, zero, beta, qmin, qmax, axis, group, conv_groups):
    """Run the native CPU kernel that gives the gradient of the rounding and of its sums in one pass."""
    dv = torch.empty_like(v)
    if v.numel() == 0:
        return dv
    target = _target(dv, group, conv_groups)
    sources = (in_order_of(grad, target), dpenalty, denergy.contiguous(), in_order_of(w, target))
    weights = (in_order_of(v, target), scale.contiguous(), zero.contiguous(), beta)
    form, columns = canonical(target, axis, group), _lines(target, conv_groups)
    _native.soft_round_backward(*sources, *weights, target, qmin, qmax, form, columns)
    return dv if target is dv else dv.copy_(target)


def _lines(y, conv_groups):
    """Say how the native kernel finds the columns: (outputs, groups, inputs, stride of the inputs)."""
    return (y.shape[0], conv_groups, y.shape[1], max(1, y.stride(1))) if conv_groups else (1, 0, 1, 1)


def _columns(y, conv_groups):
    """Say how the kernel finds the column of an element: (stride of outputs, all, a group's, stride of inputs, all)."""
    if not conv_groups:
        return 1, 1, 1, 1, 1
    strides = [max(stride, 1) for stride in y.stride()]
    return strides[0], y.shape[0], y.shape[0] // conv_groups, strides[1], y.shape[1]


def _tiling(form, qmin, qmax):
    rows, columns, by_row = matrix(*form)
    block_r, block_w = tile_shape(rows, columns, TILE)
    tiles = {"STRETCH": STRETCH, "SHIFT": SHIFT, "BY_ROW": by_row, "BLOCK_R": block_r, "BLOCK_W": block_w}
    programs = triton.cdiv(rows, block_r) * triton.cdiv(columns, block_w)
    return (rows, columns, form[1], float(qmin), float(qmax)), tiles, programs


def refuses(w, *args):
    """Say why the Triton kernel cannot run, or None."""
    if args[-1] and w.numel() >= 1 << 31:
        return f"w has {w.numel()} elements; the kernel finds the columns of less than 2^31"
    return _refuses_tensors(w, *args) or refuses_triton()


def refuses_backward(grad, dpenalty, denergy, *args):
    """Say why the Triton kernel of the gradient cannot run, or None."""
    return _refuses_gradients(grad, dpenalty, denergy) or refuses(*args)


def refuses_cpu(w, v, *args):
    """Say why the native CPU kernel cannot run, or None."""
    if w.is_neg() or v.is_neg():
        return "w or v is a negated view of memory; the kernel takes resolve_neg() of it"
    return _refuses_tensors(w, v, *args) or _native.reason("cpu")


def refuses_cpu_backward(grad, dpenalty, denergy, *args):
    """Say why the native CPU kernel of the gradient cannot run, or None."""
    if grad.is_neg():
        return "grad is a negated view of memory; the kernel takes grad.resolve_neg()"
    return _refuses_gradients(grad, dpenalty, denergy) or refuses_cpu(*args)


def _refuses_gradients(grad, dpenalty, denergy):
    for name, tensor in (("grad", grad), ("dpenalty", dpenalty), ("denergy", denergy)):
        if tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype}; the kernel takes float32"
    return None


def _refuses_tensors(w, v, scale, zero, beta, *args):
    for name, tensor in (("w", w), ("v", v), ("scale", scale), ("beta", beta)):
        if tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype}; the kernel takes float32"
    if zero.dtype not in (torch.float32, torch.int32):
        return f"zero is {zero.dtype}; the kernel takes float32 and int32"
    return None
