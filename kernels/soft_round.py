"""Learned rounding of weights and its regulariser (AdaRound).

``h = clip(1.2 sigmoid(v) - 0.1, 0, 1)``, ``y = (clamp(floor(w / scale) + h + zero, qmin, qmax) - zero) * scale``,
``penalty = sum(1 - |2h - 1|^beta)``. Source: Nagel et al., Up or Down?, arXiv:2004.10568, equations 21 to 24.
"""

import torch

from ._tiles import expand

STRETCH, SHIFT = 1.2, -0.1


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
