"""What follows a product of codes in the pass that makes it: the epilogue of `packed_linear` and `packed_conv2d`.

    moments[:, n] = sum y, sum y^2                                of an output channel, for a BatchNorm that adapts
    v = y gain[n] + shift[n]                                      a frozen BatchNorm
    u = v + residual
    u = max(u, 0), or min(max(u, 0), 6), or gelu(u) = u Phi(u)
    code = clamp(round(u / y_scale) + y_zero, 0, 2^y_bits - 1)    what `quantize_codes` would make of u

Every line is optional and computed in float32 without contraction; y is the product with its bias, not yet rounded.
Source: Hendrycks and Gimpel, arXiv:1606.08415 (GELU).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import codes as cd
from ._tiles import clamp, expand, gelu, in_order_of, round_half_even
from ._triton import jit, tl

KINDS = ("none", "relu", "gelu", "relu6")
SCHEMA = (
    'Tensor? gain=None, Tensor? shift=None, Tensor? residual=None, str after="none", Tensor? y_scale=None,'
    " Tensor? y_zero=None, int y_bits=8, bool moments=False"
)


class Epilogue(NamedTuple):
    """The last arguments of the packed products, as their schema orders them."""

    gain: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    after: str = "none"
    y_scale: Tensor | None = None
    y_zero: Tensor | None = None
    y_bits: int = 8
    moments: bool = False

    @property
    def transforms(self) -> bool:
        """Whether the output differs from the product."""
        given = self.gain is not None or self.residual is not None or self.y_scale is not None
        return given or self.after != "none"

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the output: that of codes where it is codes."""
        return dtype if self.y_scale is None else torch.uint8


def finish(y, end: Epilogue, axis: int, quantize=cd.reference):
    """Return (y, moments, nonfinite) for a product whose channels run along `axis`: the specification.

    Args:
        y: Float.
        end: What follows.
        axis: Of the channels.
        quantize: How codes are made, an implementation of `quantize_codes`.

    Returns:
        (y, moments, nonfinite): float32, or what came where nothing follows, or codes; (2, N) float32; int32 (); empty
        where nobody asks.
    """
    moments, nonfinite = allocate(y, y.shape[axis], end)
    if end.moments:
        rows = y.float().movedim(axis, 0).reshape(y.shape[axis], -1)
        moments = torch.stack([rows.sum(1), rows.square().sum(1)])
    if not end.transforms:
        return y, moments, nonfinite
    y = y.float()
    if end.gain is not None:
        y = y * expand(end.gain.float(), y, axis, 0) + expand(end.shift.float(), y, axis, 0)
    if end.residual is not None:
        y = y + end.residual.float()
    if end.after.startswith("relu"):
        y = torch.where(y <= 0, 0.0, y)  # no negative zero, and a NaN stays
        y = torch.where(y > 6, 6.0, y) if end.after == "relu6" else y
    if end.after == "gelu":
        y = F.gelu(y)
    if end.y_scale is not None:
        y, nonfinite = quantize(y, end.y_scale, end.y_zero, 0, (1 << end.y_bits) - 1, None, 0)
    return y, moments, nonfinite


def allocate(y, channels: int, end: Epilogue):
    """Allocate the (moments, nonfinite) that are returned beside `y`."""
    moments = y.new_empty((2, channels) if end.moments else 0, dtype=torch.float32)
    return moments, y.new_empty(() if end.y_scale is not None else 0, dtype=torch.int32)


@jit
def store_finished(
    y, n, offs, mask_n, mask_m, tile_m, tiles_m, channels, y_ptr, gain_ptr, shift_ptr, residual_ptr, y_scale_ptr,
    y_zero_ptr, moments_ptr, nonfinite_ptr, qmax, AFTER: tl.constexpr,
):  # fmt: skip
    """Take a tile (N, M) of a product through its epilogue, and store it at `offs` where both masks are true.

    Args:
        y: float32.
        n: (N,), the channels of the tile; those beyond the last repeat it.
        tile_m: Which of the `tiles_m` tiles along M this is: the place of its moments.
        channels: Of the whole output.
        residual_ptr: Like `y_ptr` in the order of its memory; None, as each other pointer, where nobody asks.
        moments_ptr: (2, tiles_m, channels), partial sums.
        nonfinite_ptr: One int32 a program.
    """
    mask = mask_n[:, None] & mask_m[None, :]
    if moments_ptr is not None:
        kept = tl.where(mask, y, 0.0)
        at = moments_ptr + tl.cast(tile_m, tl.int64) * channels + n
        tl.store(at, tl.sum(kept, axis=1), mask=mask_n)
        tl.store(at + tl.cast(tiles_m, tl.int64) * channels, tl.sum(kept * kept, axis=1), mask=mask_n)
    if gain_ptr is not None:
        y = y * tl.load(gain_ptr + n).to(tl.float32)[:, None] + tl.load(shift_ptr + n).to(tl.float32)[:, None]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if AFTER == 1 or AFTER == 3:
        y = tl.where(y <= 0.0, 0.0, y)
    if AFTER == 2:
        y = gelu(y)
    if AFTER == 3:
        y = tl.where(y > 6.0, 6.0, y)
    if y_scale_ptr is None:
        tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        zero = tl.load(y_zero_ptr).to(tl.float32)
        code = round_half_even(tl.div_rn(y, tl.load(y_scale_ptr))) + zero
        code = clamp(tl.where(code == code, code, zero), 0.0, qmax)
        tl.store(y_ptr + offs, code.to(tl.uint8), mask=mask)
        bad = tl.sum(tl.sum(tl.where(mask & (y - y != 0.0), 1, 0), axis=1), axis=0)  # NaN and infinity alike
        tl.store(nonfinite_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), bad)


def arguments(end: Epilogue, y, channels: int, tiles: int, programs: int) -> dict:
    """Give what a kernel passes on to `store_finished`, with room for the partial results of its programs."""
    gain, shift = (t if t is None else t.contiguous() for t in (end.gain, end.shift))
    return {
        "gain_ptr": gain,
        "shift_ptr": shift,
        "residual_ptr": None if end.residual is None else in_order_of(end.residual, y),
        "y_scale_ptr": end.y_scale,
        "y_zero_ptr": end.y_zero,
        "moments_ptr": y.new_empty((2, tiles, channels), dtype=torch.float32) if end.moments else None,
        "nonfinite_ptr": None if end.y_scale is None else y.new_empty(programs, dtype=torch.int32),
        "qmax": float((1 << end.y_bits) - 1),
        "AFTER": KINDS.index(end.after),
    }


def gather(given: dict, y):
    """Return (moments, nonfinite) from the partial results among the `arguments`, added in a fixed order."""
    moments, nonfinite = given["moments_ptr"], given["nonfinite_ptr"]
    return (
        y.new_empty(0, dtype=torch.float32) if moments is None else moments.sum(1),
        y.new_empty(0, dtype=torch.int32) if nonfinite is None else nonfinite.sum(dtype=torch.int32),
    )
