"""The cases of fake quantisation with what stands before it, as blocks of ViTs and ResNets have it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from ttaq.kernels import prologue as pg

from ttaq import ops

from . import rivals
from .case import BINDERS, DTYPES, PASSES, Case, Inputs, copy_bytes, drawn


@dataclass(frozen=True)
class Place:
    """Where in a network a quantiser stands, and what stands before it."""

    name: str
    shape: tuple[int, ...]
    axis: int
    before: str = "none"
    residual: bool = False
    aligned: bool = False
    observe: bool = False


PLACES = (
    Place("ViT-B norm1", (32, 197, 768), 2, "layer_norm", aligned=True),
    Place("ViT-B norm2 with residual", (32, 197, 768), 2, "layer_norm", residual=True, aligned=True),
    Place("ViT-B GELU before fc2", (32, 197, 3072), 2, "gelu"),
    Place("ViT-B tokens, aligned and observed", (32, 197, 768), 2, aligned=True, observe=True),
    Place("ResNet-50 residual, observed, channels-last", (8, 256, 56, 56), 1, residual=True, observe=True),
)


def cases(device: str) -> Iterator[Case]:
    """List every place and pass."""
    dtypes = ("float32",) if device == "cpu" else ("float32", "bfloat16")
    for place, dtype, which in product(PLACES, dtypes, PASSES):
        yield case(place, dtype, which)


def case(place: Place, dtype: str, which: str) -> Case:
    """Build one case; the rivals do the same with one op after another."""
    bind = BINDERS[which]
    rest = {"qmin": 0, "qmax": 15, "axis": place.axis, "before": place.before, "eps": 1e-6}

    def make(generator, device):
        def draw():
            return drawn(place.shape, generator, device, dtype, place.name).requires_grad_()

        grid = torch.full((), 0.25, device=device).requires_grad_(), torch.full((), 7, dtype=torch.int32, device=device)
        channels = torch.ones(place.shape[place.axis], device=device)
        aligned = (
            (channels.requires_grad_(), torch.zeros_like(channels).requires_grad_()) if place.aligned else (None, None)
        )
        args = (draw(), draw() if place.residual else None, *aligned, *grid)
        grads = [draw().detach() for _ in range(2 if place.residual else 1)]
        return Inputs(args, tuple(t for t in args[:5] if t is not None), tuple(grads))

    def ours(x, residual, gain, shift, scale, zero):
        y, u, seen = ops.prologue_fake_quant(
            x, scale, zero, residual=residual, gain=gain, shift=shift, observe=place.observe, **rest
        )
        return ((y, u) if place.residual else (y,)) + ((seen,) if place.observe and which == "forward" else ())

    def raw(inputs):
        x, residual, *held = (None if t is None else t.detach() for t in inputs.args)
        grid, codes = (place.before, rest["eps"]), (0, 15, place.axis)
        if which == "forward":
            return x, residual, *held, *grid, place.observe, *codes
        u, du = (x, None) if residual is None else (x + residual, inputs.grads[1])
        return inputs.grads[0], du, u, *held, *grid, *codes

    def exact(inputs):
        if which == "forward":
            y, u, seen = pg.reference(*raw(inputs))
            return (y, *((u,) if place.residual else ()), *((seen,) if place.observe else ()))
        dx, dgain, dshift, dscale, _ = pg.reference_backward(*raw(inputs))
        return (dx, *((dx,) if place.residual else ()), *((dgain, dshift) if place.aligned else ()), dscale)

    composed = partial(rivals.prologue, observe=place.observe and which == "forward", **rest)
    separate = partial(rivals.prologue, observe=place.observe and which == "forward", quantise=ops.fake_quant, **rest)
    tensors = {"forward": 2, "backward": 3, "both": 5}[which] + (2 if place.residual else 0)
    moved = torch.Size(place.shape).numel() * DTYPES[dtype].itemsize * tensors
    against = {"composed eager": bind(composed), "torch, then fake_quant": bind(separate)}
    if which == "both":
        against["torch.compile"] = bind(rivals.compiled(composed))
    return Case(
        op="prologue_fake_quant" if which == "forward" else "prologue_fake_quant_backward",
        name=f"{place.name}, {'forward + backward' if which == 'both' else which}",
        dtype=dtype,
        make=make,
        raw=raw,
        ours=bind(ours),
        rivals=against,
        ceiling=copy_bytes(moved),
        exact=exact,
        bytes=moved,
        quick=place is PLACES[0],
    )
