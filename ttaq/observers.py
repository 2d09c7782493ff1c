"""From values to a range: scale and zero by min-max, percentile, or a vectorised search for the least error."""

import torch
from torch import Tensor

from .spec import QuantSpec

EPSILON = 1e-8
_POWER = 2.4
_SHRINKS = 48
_CHUNK = 1 << 21


def choose_range(rows: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Choose a scale and a zero for each row.

    The range always includes 0.0, so that zero lies in the codes. "mse" minimises ``sum |x - q(x)|^2.4`` over shrunken
    ranges and, at 2 to 4 bits, the zeros around the proportional one (exponent: Nagel et al., arXiv:2106.08295).

    Args:
        rows: (R, n), float: the values that share a scale lie in one row.
        spec: Width, symmetry and observer.

    Returns:
        (scale, zero): (R,), float32 both; zero holds whole numbers in 0 .. qmax.

    Raises:
        ValueError: There is no value, or one is NaN or infinite.
    """
    if rows.numel() == 0 or not torch.isfinite(rows).all():
        what = "NaN or infinite values" if rows.numel() else "no value"
        raise ValueError(f"ranges: wanted finite values to choose a range from, got {what}; check weights and images")
    rows = rows.float()
    low, high = _extremes(rows, spec)
    scale, zero = _affine(low, high, spec)
    if spec.observer == "mse":
        scale, zero = _search(rows, low, high, spec)
    return scale, zero


def dynamic_range(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Measure (scale, zero), shape x.shape[:-1], of each row of `x` by min-max; zero is int32, and 0 for a NaN."""
    x = x.detach().float()
    scale, zero = _affine(x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0), spec)
    return scale, zero.nan_to_num(0.0).int()


def _extremes(rows, spec):
    if spec.observer == "percentile":
        last = rows.shape[1] - 1
        ordered = rows.sort(dim=1).values
        low, high = ordered[:, round(0.0005 * last)], ordered[:, round(0.9995 * last)]
    else:
        low, high = rows.amin(1), rows.amax(1)
    return low.clamp(max=0), high.clamp(min=0)


def _affine(low, high, spec):
    """Turn bounds that include 0.0 into (scale, zero)."""
    if spec.symmetric:
        middle = (spec.qmax + 1) // 2
        scale = (torch.maximum(high, -low) / (spec.qmax - middle)).clamp(min=EPSILON)
        return scale, torch.full_like(scale, middle)
    scale = ((high - low) / spec.qmax).clamp(min=EPSILON)
    return scale, torch.round(-low / scale).clamp(0, spec.qmax)


def _search(rows, low, high, spec):
    """Try every candidate range on chunks of rows; keep the best of each row."""
    best = [
        _search_chunk(r, lo, hi, spec)
        for r, lo, hi in zip(
            *(t.split(max(1, _CHUNK // max(rows.shape[1], 1))) for t in (rows, low, high)), strict=True
        )
    ]
    return tuple(torch.cat(parts) for parts in zip(*best, strict=True))


def _search_chunk(rows, low, high, spec):
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_zero = _affine(low, high, spec)
    shifts = (0,) if spec.symmetric or spec.bits > 4 else (-1, 0, 1)
    for shrink in torch.linspace(1.0, 0.15 if spec.bits <= 4 else 0.5, _SHRINKS).tolist():
        scale, middle = _affine(low * shrink, high * shrink, spec)
        for shift in shifts:
            zero = (middle + shift).clamp(0, spec.qmax)
            code = (rows / scale[:, None]).round_().add_(zero[:, None]).clamp_(0, spec.qmax)
            error = code.sub_(zero[:, None]).mul_(scale[:, None]).sub_(rows).abs_().pow_(_POWER).sum(1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero
