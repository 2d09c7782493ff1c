"""The sample inputs of fake quantisation with what stands before it."""

from itertools import product

import torch
from packed_cases import FLOATS, Samples

# What each case asks for: (before, residual, alignment, observation).
PLAIN = {"bare": "none", "add": "none+", "aligned": "none*", "observed": "none?", "all": "none+*?"}
TOKENS = {"gelu": "gelu", "gelu-all": "gelu+*?", "norm": "layer_norm", "norm-affine": "layer_norm*"} | {
    "norm-all": "layer_norm+*?"
}


def prologue(layouts, not_finite) -> Samples:
    """Yield every line of the op on every order of memory, and GELU and LayerNorm on tokens.

    Args:
        layouts: `cases._layouts`.
        not_finite: `cases._not_finite`.
    """
    for name, dtype in FLOATS.items():
        random = torch.Generator().manual_seed(21)

        def draw(*shape, dtype=dtype, random=random):
            return torch.randn(shape, generator=random).to(dtype)

        for layout, x, axis, group in layouts(draw):
            if group:
                continue
            few = layout in ("per_tensor", "rows", "columns", "images-channels_last")
            for what, wanted in PLAIN.items() if few else [("all", PLAIN["all"])]:
                yield f"{what}-{layout}-{name}", _args(wanted, x, axis, random)
        shapes = {"tokens": (2, 13, 48), "odd": (5, 130), "long": (3, 1000), "short": (40, 5), "wide": (2, 2500)}
        for (what, wanted), (size, shape) in product(TOKENS.items(), shapes.items()):
            yield f"{what}-{size}-{name}", _args(wanted, draw(*shape), len(shape) - 1, random)
        for where, x in (("patches", draw(2, 8, 3, 4).flatten(2).transpose(1, 2)), ("transposed", draw(9, 6).T)):
            yield f"norm-all-{where}-{name}", _args(TOKENS["norm-all"], x, x.ndim - 1, random)
        yield f"all-row-{name}", _args(PLAIN["all"], draw(17), 0, random)
        yield f"norm-all-empty-{name}", _args(TOKENS["norm-all"], draw(0, 6), 1, random)
        yield f"norm-one-{name}", _args(TOKENS["norm"], draw(4, 1), 1, random)
        x = not_finite(dtype)[0]
        yield f"observed-not_finite-{name}", _args(PLAIN["observed"], x, 1, random)


def _args(wanted, x, axis, random):
    channels = 1 if axis is None else x.shape[axis]
    gain, shift = torch.rand(channels, generator=random) + 0.5, torch.randn(channels, generator=random) * 0.3
    residual = torch.randn(x.shape, generator=random).to(x.dtype) if "+" in wanted else None
    aligned = (gain, shift) if "*" in wanted else (None, None)
    zero = torch.tensor(4.3) if "+" in wanted else torch.tensor(5, dtype=torch.int32)
    return (x, residual, *aligned, torch.tensor(0.23), zero, wanted.rstrip("+*?"), 1e-5, "?" in wanted, 0, 15, axis)


def prologue_backward(forward) -> Samples:
    """Yield the arguments of the backward op for every case of the forward one."""
    random = torch.Generator().manual_seed(22)
    for name, (x, residual, gain, shift, scale, zero, before, eps, _, *grid) in forward:
        grad, du = (torch.empty_like(x).copy_(torch.randn(x.shape, generator=random)) for _ in range(2))
        u = x if residual is None else torch.add(x, residual, out=torch.empty_like(x))
        rest = (u, gain, shift, scale, zero, before, eps, *grid)
        yield name, (grad, None if residual is None else du, *rest)
        if name == "all-images-channels_last-f32":
            yield f"{name}-grad_in_another_layout", (grad.mT.contiguous().mT, du.contiguous(), *rest)
