"""The cases of perturbed fake quantisation, on activations of real networks."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from ttaq.kernels import perturb as pt

from ttaq import ops

from . import rivals
from .case import BINDERS, DTYPES, PASSES, Case, Inputs, copy_bytes, drawn

_SPREADS = {"drop": 0.5, "step": 1.0, "gauss": 0.1}


def cases(device: str) -> Iterator[Case]:
    """List every kind on 1M and 4M elements, and noise of each channel on images."""
    images = "ResNet-50 layer1, channels-last"
    dtypes = ("float32",) if device == "cpu" else ("float32", "bfloat16")
    for dtype, (name, size), kind, which in product(dtypes, (("1M", 1 << 20), ("4M", 1 << 22)), pt.KINDS, PASSES):
        yield case(name, (size,), None, kind, dtype, which, quick=name == "4M")
    for dtype, which in product(dtypes, PASSES):
        yield case(images, (8, 256, 56, 56), 1, "gauss", dtype, which)


def case(name, shape, axis, kind, dtype, which, *, quick=False) -> Case:
    """Build one case; the rival draws its numbers with torch's generator, so that only its law is the same."""
    count, bind = torch.Size(shape).numel(), BINDERS[which]
    grid = {"qmin": 0, "qmax": 15, "axis": axis, "kind": kind}

    def make(generator, device):
        x, grad = (drawn(shape, generator, device, dtype, name) for _ in range(2))
        scale = torch.full((), 0.25, device=device).requires_grad_()
        spread = torch.full(() if axis is None else (shape[axis],), _SPREADS[kind], device=device)
        zero, seed = (torch.full((), 7, dtype=d, device=device) for d in (torch.int32, torch.int64))
        leaves = (x.requires_grad_(), scale)
        return Inputs((*leaves, zero, spread, seed), leaves, (grad,))

    def exact(inputs):
        args = (*(t.detach() for t in inputs.args), *grid.values())
        return (pt.reference(*args),) if which == "forward" else pt.reference_backward(*inputs.grads, *args)[:2]

    moved = count * DTYPES[dtype].itemsize * {"forward": 2, "backward": 3, "both": 5}[which]
    return Case(
        op="perturbed_fake_quant_backward" if which == "backward" else "perturbed_fake_quant",
        name=f"{name}, {kind}, {'forward + backward' if which == 'both' else which}",
        dtype=dtype,
        make=make,
        raw=lambda i: (*(i.grads if which == "backward" else ()), *i.args, *grid.values()),
        ours=bind(
            lambda x, scale, zero, spread, seed: ops.perturbed_fake_quant(
                x, scale, zero, spread=spread, seed=seed, **grid
            )
        ),
        rivals={"fake_quant and torch's numbers": bind(partial(rivals.perturbed, **grid))},
        ceiling=copy_bytes(moved),
        exact=exact,
        bytes=moved,
        quick=quick,
    )
