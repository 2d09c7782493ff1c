"""Fake quantisation with straight-through gradients, in one pass over memory.

``t = round(x / scale) + round(zero)``, ``y = (clamp(t, qmin, qmax) - round(zero)) * scale``; the gradients are those of
Esser et al., Learned Step Size Quantization, arXiv:1902.08153 (scale) and Bhalgat et al., LSQ+, arXiv:2004.09576 (zero).
"""

import torch

from ._tiles import expand, reduce


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
