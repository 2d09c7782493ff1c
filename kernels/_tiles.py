"""What several kernels share: the canonical view of a tensor and its scales, broadcast and reduced."""

from functools import wraps

import torch

from ._triton import jit, tl, triton


def without_autocast(reference):
    """Keep autocast, which would round exact integers to half precision, out of a function of x and more."""

    @wraps(reference)
    def run(x, *args):
        with torch.autocast(x.device.type, enabled=False):
            return reference(x, *args)

    return run


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


def walkable(output: torch.Tensor, group: int) -> torch.Tensor:
    """Return where a kernel writes: the dense `output`, or contiguous scratch where groups lie scattered in it."""
    if group and not output.is_contiguous():
        return torch.empty_like(output, memory_format=torch.contiguous_format)
    return output


def in_order_of(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return `x`, or a copy of it, in the memory order of the dense `target`."""
    return x if x.stride() == target.stride() else torch.empty_like(target, dtype=x.dtype).copy_(x)


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


def matrix(outer: int, channels: int, inner: int) -> tuple[int, int, bool]:
    """View the canonical form as (rows, columns, by_row): each row has one scale, or else each column has."""
    if channels == 1:
        return 1, outer * inner, True
    if inner == 1:
        return outer, channels, False
    return outer * channels, inner, True


def tile_shape(rows: int, columns: int, elements: int) -> tuple[int, int]:
    """Choose the tile of a matrix: as long in memory as the rows allow, of `elements` (a power of two) in all."""
    width = elements if rows == 1 else min(elements, max(16, triton.next_power_of_2(columns)))
    return elements // width, width


@jit
def locate(R, W, TALL: tl.constexpr, WIDE: tl.constexpr):
    """Return the first (row, column) of this program's TALL x WIDE part of an (R, W) matrix.

    A single row is a constant 0: so the compiler sees that its addresses are aligned.
    """
    across = tl.cdiv(W, WIDE)
    row = (tl.program_id(0) // across * (R > 1)).to(tl.int64) * TALL
    return row, (tl.program_id(0) % across).to(tl.int64) * WIDE


@jit
def load_pair(
    first_ptr, second_ptr, row, column, C, W, BY_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Load two values a channel for a tile: as columns, where each row has them, or as rows, where each column has."""
    if BY_ROW:
        channel = ((row % C).to(tl.int32) + tl.arange(0, ROWS)) % C
        first, second = tl.load(first_ptr + channel)[:, None], tl.load(second_ptr + channel)[:, None]
    else:
        channel = column + tl.arange(0, COLUMNS)
        first = tl.load(first_ptr + channel, mask=channel < W, other=1.0)[None, :]
        second = tl.load(second_ptr + channel, mask=channel < W, other=0)[None, :]
    return first, second


@jit
def partial_place(row, column, R, W, TALL, WIDE, BY_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return (where, mask) of the partial sums of the program at (row, column): one a row of its tile, or a column."""
    if BY_ROW:
        rows = row + tl.arange(0, ROWS)
        at, mask = rows * tl.cdiv(W, WIDE) + column // WIDE, rows < R
    else:
        columns = column + tl.arange(0, COLUMNS)
        at, mask = row // TALL * W + columns, columns < W
    return at, mask


@jit
def load_scales(
    scale_ptr, zero_ptr, row, column, C, W, BY_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Load (scale, round(zero)) of a tile, as `load_pair` does."""
    scale, zero = load_pair(scale_ptr, zero_ptr, row, column, C, W, BY_ROW, ROWS, COLUMNS)
    return scale, round_half_even(zero.to(tl.float32))


@jit
def load_tile(ptr, row, column, R, W, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load the float32 tile at (row, column) of an (R, W) matrix, 0 beyond its edges; a whole tile without masks."""
    offs = tl.arange(0, ROWS)[:, None] * W + tl.arange(0, COLUMNS)[None, :]
    ptr += row * W + column
    if (row + ROWS <= R) & (column + COLUMNS <= W):
        tile = tl.load(ptr + offs)
    else:
        tile = tl.load(ptr + offs, mask=tile_mask(row, column, R, W, ROWS, COLUMNS), other=0.0)
    return tile.to(tl.float32)


@jit
def store_tile(ptr, tile, row, column, R, W, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store what `load_tile` loads, rounded to the dtype of `ptr`."""
    offs = tl.arange(0, ROWS)[:, None] * W + tl.arange(0, COLUMNS)[None, :]
    ptr += row * W + column
    if (row + ROWS <= R) & (column + COLUMNS <= W):
        tl.store(ptr + offs, tile)
    else:
        tl.store(ptr + offs, tile, mask=tile_mask(row, column, R, W, ROWS, COLUMNS))


@jit
def tile_mask(row, column, R, W, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Mark the elements of the tile at (row, column) that lie inside an (R, W) matrix."""
    return (row + tl.arange(0, ROWS) < R)[:, None] & (column + tl.arange(0, COLUMNS) < W)[None, :]


@jit
def clamp(value, low, high):
    """Clamp, letting NaN through."""
    value = tl.maximum(value, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(value, high, propagate_nan=tl.PropagateNan.ALL)


@jit
def gelu(x):
    """Return ``x Phi(x)``."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
