"""What several kernels share: the canonical view of a tensor and its scales, broadcast and reduced."""

import torch

from ._triton import jit, tl


def expand(values: torch.Tensor, x: torch.Tensor, axis: int | None, group: int) -> torch.Tensor:
    """Broadcast one value per scale over the elements of `x` that the scale covers.

    Args:
        values: () for axis None, (x.shape[axis],) for an axis, x.shape[:-1] + (K / group,) for groups.
        x: The tensor that is quantised.
        axis: The axis the values run along, or None.
        group: Elements of the last axis that share a value, or 0.

    Returns:
        A tensor that broadcasts against `x`.
    """
    if group:
        return values.repeat_interleave(group, dim=-1)
    if axis is None:
        return values
    shape = [1] * x.ndim
    shape[axis] = -1
    return values.reshape(shape)


def reduce(terms: torch.Tensor, axis: int | None, group: int) -> torch.Tensor:
    """Sum `terms` over the elements that share a scale: the transpose of `expand`."""
    if group:
        return terms.unflatten(-1, (-1, group)).sum(-1)
    if axis is None:
        return terms.sum()
    others = [d for d in range(terms.ndim) if d != axis % terms.ndim]
    return terms.sum(others) if others else terms.clone()


def dense(x: torch.Tensor) -> torch.Tensor:
    """Return `x`, or its contiguous copy where its elements do not fill one stretch of memory in some axis order."""
    return x if _physical_order(x) is not None else x.contiguous()


def canonical(x: torch.Tensor, axis: int | None, group: int) -> tuple[int, int, int]:
    """View a dense tensor, in the order of its memory, as (outer, channels, inner): element (p, c, i) has scale c.

    Args:
        x: A dense tensor: contiguous in some order of its axes.
        axis: The axis the scales run along, or None for one scale.
        group: Elements of the last axis that share a scale, or 0; needs a contiguous `x`.

    Returns:
        The three sizes; their product is x.numel().
    """
    if group:
        return 1, x.numel() // group, group
    if axis is None:
        return 1, 1, x.numel()
    order = _physical_order(x)
    sizes = [x.shape[d] for d in order]
    at = order.index(axis % x.ndim)
    outer, inner = 1, 1
    for size in sizes[:at]:
        outer *= size
    for size in sizes[at + 1 :]:
        inner *= size
    return outer, x.shape[axis], inner


def _physical_order(x: torch.Tensor) -> list[int] | None:
    """List the axes from slowest to fastest in memory, or None where `x` is not dense."""
    if x.is_contiguous():
        return list(range(x.ndim))
    order = sorted(range(x.ndim), key=lambda d: (x.stride(d), x.shape[d]), reverse=True)
    expected = 1
    for d in reversed(order):
        if x.shape[d] != 1 and x.stride(d) != expected:
            return None
        expected *= x.shape[d]
    return order


@jit
def round_half_even(value):
    """Round float32 to the nearest whole number, halves to even, exactly while ``|value| < 2^22``.

    Beyond that it stays beyond: what is clamped to a code afterwards is clamped alike.
    """
    return (value + 12582912.0) - 12582912.0


@jit
def gather_codes(row_ptr, position, mask, BITS: tl.constexpr):
    """Load the codes (int32) at any `position` of the rows that start at `row_ptr`; 0 where `mask` is false."""
    bit = position * BITS
    word = tl.load(row_ptr + bit // 8, mask=mask, other=0).to(tl.int32)
    shift = (bit % 8).to(tl.int32)
    if 8 % BITS:  # a code may straddle two bytes
        straddles = mask & (shift + BITS > 8)
        word |= tl.load(row_ptr + bit // 8 + 1, mask=straddles, other=0).to(tl.int32) << 8
    return (word >> shift) & ((1 << BITS) - 1)
