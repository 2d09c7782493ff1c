"""The cases of fake quantisation on the logarithmic grid, on the attention probabilities of ViTs."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from ttaq.kernels import log2 as lg

from ttaq import ops

from . import rivals
from .case import BINDERS, DTYPES, PASSES, Case, Inputs, copy_bytes, forward


def cases(device: str) -> Iterator[Case]:
    """List both grids on ViT-S attention, and the codes."""
    dtypes = ("float32",) if device == "cpu" else ("float32", "bfloat16")
    for dtype, roots in product(dtypes, (1, 2)):
        for which in PASSES:
            yield case("ViT-S attention", (32, 6, 197, 197), roots, dtype, which)
        yield codes_case("ViT-S attention", (32, 6, 197, 197), roots, dtype)


def case(name, shape, roots, dtype, which) -> Case:
    """Build one case of the values and their gradients."""
    count, bind, grid = torch.Size(shape).numel(), BINDERS[which], {"qmax": 15, "roots": roots}

    def exact(inputs):
        args = (*(t.detach() for t in inputs.args), *grid.values())
        return (lg.reference(*args),) if which == "forward" else lg.reference_backward(*inputs.grads, *args)

    moved = count * DTYPES[dtype].itemsize * {"forward": 2, "backward": 3, "both": 5}[which]
    composed = partial(rivals.log2, **grid)
    against = {"composed eager": composed, "torch.compile": rivals.compiled(composed)}
    return Case(
        op="log2_fake_quant_backward" if which == "backward" else "log2_fake_quant",
        name=f"{name}, roots {roots}, {'forward + backward' if which == 'both' else which}",
        dtype=dtype,
        make=partial(_make, shape, dtype),
        raw=lambda i: (*(i.grads if which == "backward" else ()), *i.args, *grid.values()),
        ours=bind(partial(ops.log2_fake_quant, **grid)),
        rivals={rival: bind(function) for rival, function in against.items()},
        ceiling=copy_bytes(moved),
        exact=exact,
        bytes=moved,
        quick=roots == 1,
    )


def codes_case(name, shape, roots, dtype) -> Case:
    """Build one case of the codes."""
    moved = torch.Size(shape).numel() * (DTYPES[dtype].itemsize + 1)
    return Case(
        op="log2_codes",
        name=f"{name}, roots {roots}, codes",
        dtype=dtype,
        make=partial(_make, shape, dtype),
        raw=lambda i: (*i.args, 15, roots),
        ours=forward(partial(ops.log2_codes, qmax=15, roots=roots)),
        rivals={"composed eager": forward(partial(rivals.log2_codes, qmax=15, roots=roots))},
        ceiling=copy_bytes(moved),
        exact=lambda i: lg.codes_reference(*(t.detach() for t in i.args), 15, roots),
        bytes=moved,
    )


def _make(shape, dtype, generator, device):
    logits, grad = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    x, scale = (2 * logits).softmax(-1).to(DTYPES[dtype]).requires_grad_(), torch.ones((), device=device)
    leaves = (x, scale.requires_grad_())
    return Inputs(leaves, leaves, (grad.to(DTYPES[dtype]),))
