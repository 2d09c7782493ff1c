"""Fake quantisation of an activation under a random perturbation that is stored nowhere: the backward draws it again.

``y = fake_quant(x + perturbation)`` with one scale and one zero, float32 inside, in three kinds:

- "drop": ``y = x`` with probability `spread`, in steps of 2^-16, else ``fake_quant(x)``. Source: Wei et al., QDrop,
  arXiv:2203.05740. What is dropped passes its gradient and gives nothing to the scale and the zero.
- "step": ``y = fake_quant(x + spread * scale * u)``, u uniform in [-1/2, 1/2), of 16 bits.
- "gauss": ``y = fake_quant(x + spread * n)``, n the sum of four random bytes, of mean 0 and variance 1 (Irwin-Hall).

The gradients are those of `fake_quant` at what was quantised; the perturbation is a constant to them.

The numbers are those of Philox4x32-10: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011; the key is
`seed`. The number of an element depends only on the seed and on its place e in memory, as ``torch.empty_like(x)`` lays
x out; so a channels-last x draws others than its contiguous copy. A call gives S = 8 numbers, 4 for "gauss": that of e
has the counter ``e // (32 S) * 32 + e % 32`` and lies in slot ``e // 32 % S`` of the call. So the elements of a slot
lie together, 32 at a time, and a call serves S of them without moving a value between vector lanes.
"""

import torch

from . import _native
from ._tiles import canonical, clamp, expand, in_order_of, round_half_even
from ._triton import jit, tl, triton
from ._triton import refuses as refuses_triton

KINDS = tuple(_native.KINDS)
LANES = 32
UNIT = 0.006765875034034252  # 1 / sqrt(21845) in float32; 21845 is the variance of the sum of four bytes
CALLS = 512  # a tile of a Triton program: calls of Philox, 4 a thread, each for 4 or 8 elements
ENOUGH_PROGRAMS, MOST_STEPS = 2048, 16
_WORD = 0xFFFFFFFF


def philox(counter: tuple, key: tuple) -> tuple:
    """Return the four words of Philox4x32-10.

    Args:
        counter: Four int64 tensors, or numbers, that hold 32 bits each.
        key: Two of the same kind.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # of 64 bits, of which int64 keeps every one
        c0, c1, c2, c3 = (b >> 32 & _WORD) ^ c1 ^ k0, b & _WORD, (a >> 32 & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def numbers(seed: torch.Tensor, count: int, kind: str) -> torch.Tensor:
    """Return the numbers of the elements 0 to count - 1, int64: 0 to 65535, or for "gauss" 0 to 1020.

    Args:
        seed: (), int64.
        count: How many.
        kind: One of `KINDS`.
    """
    slots = 4 if kind == "gauss" else 8
    call = torch.arange(triton.cdiv(count, slots * LANES) * LANES, device=seed.device)
    rest = torch.zeros_like(call)
    words = torch.stack(philox((call & _WORD, call >> 32, rest, rest), (seed & _WORD, seed >> 32 & _WORD)))
    if kind == "gauss":
        found = sum(words >> shift & 0xFF for shift in (0, 8, 16, 24))
    else:
        found = torch.stack([words & 0xFFFF, words >> 16], 1).flatten(0, 1)
    return found.unflatten(1, (-1, LANES)).transpose(0, 1).flatten()[:count]


def reference(x, scale, zero, spread, seed, qmin, qmax, axis, kind):
    """Perturb, quantise and dequantise `x`: the specification of the op."""
    wide, kept = _perturbed(x, scale, spread, seed, axis, kind)
    origin = torch.round(zero)
    code = torch.clamp(torch.round(wide / scale) + origin, qmin, qmax)
    return torch.empty_like(x).copy_(torch.where(kept, wide, (code - origin) * scale))


def reference_backward(grad, x, scale, zero, spread, seed, qmin, qmax, axis, kind):
    """Return (dx, dscale, dzero): the specification of the backward op, with the terms of `fake_quant`'s."""
    wide, kept = _perturbed(x, scale, spread, seed, axis, kind)
    upstream, origin = grad.to(wide.dtype), torch.round(zero)
    ratio = wide / scale
    rounded = torch.round(ratio)
    code = rounded + origin
    inside = (code >= qmin) & (code <= qmax)
    dx = torch.empty_like(x).copy_(torch.where(inside | kept, upstream, 0.0))
    dscale = upstream * torch.where(inside, rounded - ratio, torch.clamp(code, qmin, qmax) - origin)
    dzero = torch.where(inside, 0.0, -upstream * scale)
    return dx, *(torch.where(kept, 0.0, terms).sum().to(scale.dtype) for terms in (dscale, dzero))


def _perturbed(x, scale, spread, seed, axis, kind):
    """Return (what is quantised, where it passes as it is)."""
    wide = x if x.dtype == torch.float64 else x.float()
    number, amount = torch.empty_like(wide), expand(spread, x, axis, 0)
    number.as_strided((x.numel(),), (1,)).copy_(numbers(seed, x.numel(), kind))
    if kind == "drop":
        return wide, number < amount * 65536
    if kind == "step":
        wide = wide + amount * scale * (number * 2.0**-16 - 0.5)
    else:
        wide = wide + amount * ((number - 510) * UNIT)
    return wide, torch.zeros_like(wide, dtype=torch.bool)


@jit
def _draw(seed_ptr, tile, CALLS: tl.constexpr):
    """Return the words of the calls of a tile of numbers."""
    call = tile * CALLS + tl.arange(0, CALLS)
    return tl.philox(tl.load(seed_ptr), (call & 0xFFFFFFFF).to(tl.uint32), (call >> 32).to(tl.uint32), 0, 0)


@jit
def _number(w0, w1, w2, w3, SLOT: tl.constexpr, GAUSS: tl.constexpr):
    WORD: tl.constexpr = SLOT if GAUSS else SLOT // 2
    word = w0 if WORD == 0 else (w1 if WORD == 1 else (w2 if WORD == 2 else w3))
    if GAUSS:
        number = (word & 0xFF) + (word >> 8 & 0xFF) + (word >> 16 & 0xFF) + (word >> 24)
    else:
        number = word >> (SLOT % 2 * 16) & 0xFFFF
    return number.to(tl.int32).to(tl.float32)


@jit
def _load(
    x_ptr, spread_ptr, at, mask, number, scale, C, inner, KIND: tl.constexpr, UNIT: tl.constexpr, CHANNELS: tl.constexpr
):
    """Load (what is quantised, where it passes as it is). CHANNELS: 0 for one spread, or the bits of an index."""
    if CHANNELS == 0:
        spread = tl.load(spread_ptr)
    else:
        channel = (at.to(tl.int32) if CHANNELS == 32 else at) // inner % C
        spread = tl.load(spread_ptr + channel, mask=mask, other=0.0)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    kept = (number < spread * 65536.0) & (KIND == 0)
    if KIND == 1:
        x += spread * scale * (number * 0.0000152587890625 - 0.5)
    if KIND == 2:
        x += spread * ((number - 510.0) * UNIT)
    return x, kept


@jit
def _perturb_kernel(
    x_ptr, scale_ptr, zero_ptr, spread_ptr, seed_ptr, y_ptr, n, C, inner, qmin, qmax,
    KIND: tl.constexpr, UNIT: tl.constexpr, CHANNELS: tl.constexpr, CALLS: tl.constexpr,
):  # fmt: skip
    SLOTS: tl.constexpr = 4 if KIND == 2 else 8
    tile, lane = tl.program_id(0).to(tl.int64), tl.arange(0, CALLS)
    w0, w1, w2, w3 = _draw(seed_ptr, tile, CALLS)
    scale, zero = tl.load(scale_ptr), round_half_even(tl.load(zero_ptr).to(tl.float32))
    for slot in tl.static_range(SLOTS):
        at = tile * (CALLS * SLOTS) + (lane // 32 * (32 * SLOTS) + slot * 32 + lane % 32)
        number = _number(w0, w1, w2, w3, slot, KIND == 2)
        x, kept = _load(x_ptr, spread_ptr, at, at < n, number, scale, C, inner, KIND, UNIT, CHANNELS)
        code = clamp(round_half_even(tl.div_rn(x, scale)) + zero, qmin, qmax)
        tl.store(y_ptr + at, tl.where(kept, x, (code - zero) * scale), mask=at < n)


@jit
def _perturb_backward_kernel(
    grad_ptr, x_ptr, scale_ptr, zero_ptr, spread_ptr, seed_ptr, dx_ptr, dscale_ptr, dzero_ptr, n, C, inner, qmin, qmax,
    KIND: tl.constexpr, UNIT: tl.constexpr, CHANNELS: tl.constexpr, CALLS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    SLOTS: tl.constexpr = 4 if KIND == 2 else 8
    lane = tl.arange(0, CALLS)
    scale, zero = tl.load(scale_ptr), round_half_even(tl.load(zero_ptr).to(tl.float32))
    dscale, dzero = tl.zeros((CALLS,), tl.float32), tl.zeros((CALLS,), tl.float32)
    for step in range(STEPS):
        tile = tl.program_id(0).to(tl.int64) * STEPS + step
        w0, w1, w2, w3 = _draw(seed_ptr, tile, CALLS)
        for slot in tl.static_range(SLOTS):
            at = tile * (CALLS * SLOTS) + (lane // 32 * (32 * SLOTS) + slot * 32 + lane % 32)
            number = _number(w0, w1, w2, w3, slot, KIND == 2)
            x, kept = _load(x_ptr, spread_ptr, at, at < n, number, scale, C, inner, KIND, UNIT, CHANNELS)
            grad = tl.load(grad_ptr + at, mask=at < n, other=0.0).to(tl.float32)
            ratio = tl.div_rn(x, scale)
            code = round_half_even(ratio) + zero
            inside = (code >= qmin) & (code <= qmax)
            tl.store(dx_ptr + at, tl.where(inside | kept, grad, 0.0), mask=at < n)
            dscale += tl.where(kept, 0.0, grad * (clamp(code, qmin, qmax) - zero - tl.where(inside, ratio, 0.0)))
            dzero += tl.where(inside | kept, 0.0, -grad * scale)
    tl.store(dscale_ptr + tl.program_id(0), tl.sum(dscale))
    tl.store(dzero_ptr + tl.program_id(0), tl.sum(dzero))


def launch(x, scale, zero, spread, seed, qmin, qmax, axis, kind):
    """Run the Triton kernel over `x` in the order of its memory."""
    y = torch.empty_like(x)
    if x.numel():
        sizes, tile, constants = _tiling(y, qmin, qmax, axis, kind)
        with torch.cuda.device_of(x):
            _perturb_kernel[(triton.cdiv(x.numel(), tile),)](
                in_order_of(x, y), scale, zero, spread.contiguous(), seed, y, *sizes, **constants,
                num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return y


def launch_backward(grad, x, scale, zero, spread, seed, qmin, qmax, axis, kind):
    """Run the Triton kernel that leaves one float32 partial sum a program, then add these up in a fixed order."""
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx, torch.zeros_like(scale), torch.zeros_like(scale)
    sizes, tile, constants = _tiling(dx, qmin, qmax, axis, kind)
    spare = max(1, triton.cdiv(x.numel(), tile) // ENOUGH_PROGRAMS)
    steps = min(MOST_STEPS, 1 << (spare.bit_length() - 1))
    programs = triton.cdiv(x.numel(), tile * steps)
    partials = [torch.empty(programs, dtype=torch.float32, device=x.device) for _ in range(2)]
    with torch.cuda.device_of(x):
        _perturb_backward_kernel[(programs,)](
            in_order_of(grad, dx), in_order_of(x, dx), scale, zero, spread.contiguous(), seed, dx, *partials, *sizes,
            **constants, STEPS=steps, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return dx, *(p.sum() for p in partials)


def _tiling(y, qmin, qmax, axis, kind):
    """Return (the sizes, the elements of a tile, the constants) of a launch."""
    n, (_, channels, inner) = y.numel(), canonical(y, axis, 0)
    tile = CALLS * (4 if kind == "gauss" else 8)
    bits = 0 if channels == 1 else (32 if n < (1 << 31) - tile * MOST_STEPS else 64)
    constants = {"KIND": KINDS.index(kind), "UNIT": UNIT, "CHANNELS": bits, "CALLS": CALLS}
    return (n, channels, inner, float(qmin), float(qmax)), tile, constants


def launch_cpu(x, scale, zero, spread, seed, qmin, qmax, axis, kind):
    """Run the native CPU kernel over `x` in the order of its memory."""
    y = torch.empty_like(x)
    if x.numel():
        form = canonical(y, axis, 0)
        spread = spread.contiguous()
        _native.perturbed_fake_quant(in_order_of(x, y), y, scale, zero, spread, seed, kind, qmin, qmax, *form)
    return y


def launch_cpu_backward(grad, x, scale, zero, spread, seed, qmin, qmax, axis, kind):
    """Run the native CPU kernel that gives the three gradients; the bits do not depend on the number of threads."""
    dx, dscale, dzero = torch.empty_like(x), torch.zeros_like(scale), torch.zeros_like(scale)
    if x.numel():
        tensors = (in_order_of(grad, dx), in_order_of(x, dx), dx, scale, zero, spread.contiguous(), seed, dscale, dzero)
        _native.perturbed_fake_quant_backward(*tensors, kind, qmin, qmax, *canonical(dx, axis, 0))
    return dx, dscale, dzero


def refuses(x, scale, zero, spread, seed, *args):
    """Say why the Triton kernel cannot run, or None."""
    return refuses_triton() or _refuses_tensors(x, scale, zero, spread, seed)


def refuses_backward(grad, *args):
    """Say why the Triton kernel of the gradients cannot run, or None."""
    return refuses(*args)


def refuses_cpu(x, scale, zero, spread, seed, *args):
    """Say why the native CPU kernel cannot run, or None."""
    return _native.reason("cpu") or _refuses_tensors(x, scale, zero, spread, seed)


def refuses_cpu_backward(grad, x, *args):
    """Say why the native CPU kernel of the gradients cannot run, or None."""
    if grad.dtype != x.dtype:
        return f"grad is {grad.dtype} and x {x.dtype}; the native kernel takes one dtype"
    return refuses_cpu(x, *args)


def _refuses_tensors(x, scale, zero, spread, seed):
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"x is {x.dtype}; the kernel takes float32, float16 and bfloat16"
    if zero.dtype not in (torch.float32, torch.int32):
        return f"zero is {zero.dtype}; the kernel takes float32 and int32"
    for name, tensor in (("scale", scale), ("spread", spread), ("seed", seed)):
        wanted = torch.int64 if name == "seed" else torch.float32
        if tensor.dtype != wanted:
            return f"{name} is {tensor.dtype}; the kernel takes {wanted}"
    if x.is_neg():
        return "x is a negated view of memory; the kernel takes x.resolve_neg()"
    return None
