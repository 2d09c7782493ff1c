"""The cases of each op; a new op brings a generator of cases and one entry in CASES.

Shapes are those of real networks.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from ttaq.kernels import codes as cd
from ttaq.kernels import fake_quant as fq
from ttaq.kernels import soft_round as sr
from ttaq.kernels._tiles import expand, reduce

from ttaq import ops
from ttaq.declarations import RAW

from . import activation, log2, packed, perturb, prologue, rivals
from .case import BINDERS, DTYPES, PASSES, Case, Inputs, copy_bytes, drawn, forward


def cases(op: str, device: str) -> Iterator[Case]:
    """List the cases of `python -m bench run <op>` on a device."""
    yield from CASES[op](device)


def _fake_quant(device):
    large = ((1 << 20, "float32"), (1 << 22, "float32"), (1 << 24, "float32"), (1 << 22, "bfloat16"))
    if device == "cuda":
        large = (*large, (1 << 24, "bfloat16"), (1 << 28, "bfloat16"))
    for size, dtype in ((64, "float32"), (1 << 12, "float32"), (1 << 16, "float32"), *large):
        for which in PASSES:
            compiles = (device == "cpu" or dtype == "bfloat16") and size >= 1 << 16
            yield _fq_case((size,), None, 0, dtype, which, quick=size == 1 << 22, compiles=compiles)
    dtypes = ("float32",) if device == "cpu" else ("float32", "bfloat16")
    for layout, shape, axis, group in _FQ_SHAPES:
        for dtype, which in product(dtypes, PASSES):
            yield _fq_case(shape, axis, group, dtype, which, layout)
    if device == "cuda":
        for size, which in product((64, 1 << 16, 1 << 20, 1 << 24), PASSES):
            yield _as_graph(_fq_case((size,), None, 0, "bfloat16", which, compiles=True))


def _as_graph(case):
    """Time the replays of a CUDA graph; torch's learnable op waits for the host and cannot be captured."""
    against = {name: bind for name, bind in case.rivals.items() if name not in ("torch learnable", "brevitas")}
    return replace(case, name=f"{case.name}, graph", rivals=against, graph=True)


_FQ_SHAPES = (
    ("weight of ResNet-50 layer4", (512, 512, 3, 3), 0, 0),
    ("ResNet-50 layer1, NCHW", (8, 256, 56, 56), 1, 0),
    ("ResNet-50 layer1, channels-last", (8, 256, 56, 56), 1, 0),
    ("ViT-S tokens", (32, 197, 384), None, 0),
    ("ViT-L tokens", (32, 197, 1024), None, 0),
    ("ViT-g tokens", (8, 257, 1536), None, 0),
    ("ViT-B tokens", (32, 197, 768), None, 0),
    ("ViT-B tokens", (32, 197, 768), 2, 0),
    ("ViT-B tokens", (32, 197, 768), None, 768),
    ("ViT-B tokens", (32, 197, 768), None, 128),
)


def _fq_case(shape, axis, group, dtype, which, layout="", *, quick=False, compiles=False):
    count, bind = _count(shape), BINDERS[which]
    grid = {"qmin": 0, "qmax": 15, "axis": axis, "group": group}
    against = {"composed eager LSQ": partial(rivals.lsq, **grid), "torch learnable": partial(rivals.learnable, **grid)}
    against["torch fixed, no scale gradient"] = partial(rivals.fixed, **grid)
    if rivals.installed("brevitas"):
        against["brevitas"] = partial(rivals.brevitas, **grid)
    if compiles:
        against["torch.compile"] = rivals.compiled(against["composed eager LSQ"])

    def make(generator, device):
        x, grad = (drawn(shape, generator, device, dtype, layout) for _ in range(2))
        scale = torch.rand(_scales(shape, axis, group), generator=generator, device=device) * 0.1 + 0.2
        zero = torch.full(scale.shape, 7, dtype=torch.int32, device=device)
        leaves = (x.requires_grad_(), scale.requires_grad_())
        return Inputs((*leaves, zero), leaves, (grad,))

    def exact(inputs):
        args = (*(t.detach() for t in inputs.args), *grid.values())
        return (fq.reference(*args),) if which == "forward" else _lsq_gradients(inputs.grads[0], *args)

    return Case(
        op="fake_quant_backward" if which == "backward" else "fake_quant",
        name=f"{layout or _size(count)}, {_granularity(shape, axis, group)}, {_PASS_NAMES[which]}",
        dtype=dtype,
        make=make,
        raw=lambda i: (*(i.grads if which == "backward" else ()), *i.args, *grid.values()),
        ours=bind(partial(ops.fake_quant, **grid)),
        rivals={name: bind(f) for name, f in against.items()},
        ceiling=_COPIES[which],
        exact=exact,
        bytes=count * DTYPES[dtype].itemsize * {"forward": 2, "backward": 3, "both": 5}[which],
        quick=quick,
    )


_PASS_NAMES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}


def _lsq_gradients(grad, x, scale, zero, qmin, qmax, axis, group):
    """Return (dx, dscale): the float32 terms of the reference, summed in float64."""
    every = (expand(t, x, axis, group).expand(x.shape) for t in (scale, zero))
    dx, terms, _ = fq.reference_backward(grad, x, *every, qmin, qmax, None, 1)
    return dx, reduce(terms.double(), axis, group)


def _copy_forward(inputs):
    return _flat(inputs.args[0]).clone


def _copy_backward(inputs):
    x, grad = _flat(inputs.args[0]), _flat(inputs.grads[0])
    return lambda: torch.add(grad, x)


def _copy_both(inputs):
    first, second = _copy_forward(inputs), _copy_backward(inputs)
    return lambda: (first(), second())


_COPIES = dict(zip(PASSES, (_copy_forward, _copy_backward, _copy_both), strict=True))


def _flat(x):
    """View the memory of a dense tensor as int32, whatever its dtype and layout."""
    return x.detach().as_strided((x.numel(),), (1,)).view(torch.int32)


def _soft_round(device):
    for name, shape in (("weight of ViT-B fc1", (3072, 768)), ("weight of ResNet-50 layer4", (512, 512, 3, 3))):
        for groups, which in product((0, 1), PASSES):
            yield _soft_round_case(name, shape, groups, which, quick=name.endswith("fc1"))


def _soft_round_case(name, shape, conv_groups, which, quick):
    kept = 3 if conv_groups else 2  # outputs: without groups there is no energy
    rival = partial(rivals.soft_round, energy=conv_groups > 0)

    def make(generator, device):
        w, v, grad = (drawn(shape, generator, device, "float32") for _ in range(3))
        scale = torch.rand(shape[0], generator=generator, device=device) * 0.1 + 0.2
        zero, beta, dpenalty = torch.full_like(scale, 7.0), scale.new_tensor(8.0), scale.new_tensor(0.01)
        denergy = torch.rand(shape[1], generator=generator, device=device)
        return Inputs((w, v.requires_grad_(), scale, zero, beta), (v,), (grad, dpenalty, denergy)[:kept])

    def grads_of(inputs):
        return *inputs.grads, *[inputs.args[0].new_empty(0)] * (3 - kept)

    def exact(inputs):
        args = (*(t.detach() for t in inputs.args), 0, 15, 0, 0, conv_groups)
        return sr.reference(*args)[:kept] if which == "forward" else (sr.reference_backward(*grads_of(inputs), *args),)

    def raw(inputs):
        return *(grads_of(inputs) if which == "backward" else ()), *inputs.args, 0, 15, 0, 0, conv_groups

    bind = BINDERS[which]
    moved = _count(shape) * 4 * {"forward": 3, "backward": 4, "both": 7}[which]
    return Case(
        op="soft_round_backward" if which == "backward" else "soft_round",
        name=f"{name}, per channel, {'energy, ' if conv_groups else ''}{_PASS_NAMES[which]}",
        dtype="float32",
        make=make,
        raw=raw,
        ours=bind(lambda *args: ops.soft_round(*args, qmax=15, axis=0, conv_groups=conv_groups)[:kept]),
        rivals={"composed eager": bind(rival), "torch.compile": bind(rivals.compiled(rival))},
        ceiling=copy_bytes(moved),
        exact=exact,
        bytes=moved,
        quick=quick,
    )


def _codes(device):
    for layout, shape, axis, group in (
        ("ViT-B tokens", (32, 197, 768), None, 0),
        ("ViT-B tokens", (32, 197, 768), None, 768),
        ("ResNet-50 layer1, channels-last", (8, 256, 56, 56), None, 0),
    ):
        for dtype in ("float32",) if device == "cpu" else ("float32", "bfloat16"):
            yield _quantize_case(layout, shape, axis, group, dtype)
    for bits in cd.PACKABLE:
        yield _pack_case("weight of ViT-B fc1", (3072, 768), bits)
        yield _unpack_case("weight of ViT-B fc1", (3072, 768), bits)


def _quantize_case(layout, shape, axis, group, dtype):
    grid = {"qmax": 255, "axis": axis, "group": group}

    def make(generator, device):
        x = drawn(shape, generator, device, dtype, layout)
        scale = torch.rand(_scales(shape, axis, group), generator=generator, device=device) * 0.01 + 0.02
        return Inputs((x, scale, torch.full(scale.shape, 128, dtype=torch.int32, device=device)))

    against = {"composed eager": partial(rivals.codes, **grid)}
    if not group:
        against["torch.quantize_per_tensor"] = rivals.quantize_per_tensor
    moved = _count(shape) * (DTYPES[dtype].itemsize + 1)
    return Case(
        op="quantize_codes",
        name=f"{layout}, {_granularity(shape, axis, group)}, 8 bits",
        dtype=dtype,
        make=make,
        raw=lambda i: (*i.args, 0, 255, axis, group),
        ours=forward(partial(ops.quantize_codes, **grid)),
        rivals={name: forward(f) for name, f in against.items()},
        ceiling=copy_bytes(moved),
        exact=lambda i: cd.reference(*i.args, 0, 255, axis, group),
        bytes=moved,
        quick=layout == "ViT-B tokens",
    )


def _pack_case(name, shape, bits):
    def make(generator, device):
        return Inputs((torch.randint(0, 1 << bits, shape, generator=generator, device=device, dtype=torch.uint8),))

    moved = shape[0] * (shape[1] + cd.row_bytes(shape[1], bits))
    return Case(
        op="pack_codes",
        name=f"{name}, {bits} bits",
        dtype="uint8",
        make=make,
        raw=lambda i: (*i.args, bits),
        ours=forward(lambda codes: ops.pack_codes(codes, bits)),
        rivals={"plain torch": forward(lambda codes: cd.pack_reference(codes, bits))},
        ceiling=copy_bytes(moved),
        exact=lambda i: (cd.pack_reference(*i.args, bits),),
        bytes=moved,
        quick=bits == 4,
    )


def _unpack_case(name, shape, bits):
    packed, k = _pack_case(name, shape, bits), shape[1]

    def make(generator, device):
        return Inputs((RAW.pack_codes(*packed.make(generator, device).args, bits),))

    return replace(
        packed,
        op="unpack_codes",
        make=make,
        raw=lambda i: (*i.args, bits, k),
        ours=forward(lambda words: ops.unpack_codes(words, bits, k)),
        rivals={"plain torch": forward(lambda words: cd.unpack_reference(words, bits, k))},
        exact=lambda i: (cd.unpack_reference(*i.args, bits, k),),
    )


def _scales(shape, axis, group):
    if group:
        return (*shape[:-1], shape[-1] // group)
    return () if axis is None else (shape[axis],)


def _granularity(shape, axis, group):
    if group:
        return "per token" if group == shape[-1] else f"groups of {group}"
    return "per tensor" if axis is None else f"per channel of axis {axis}"


def _count(shape):
    return torch.Size(shape).numel()


def _size(count):
    if count < 1 << 10:
        return str(count)
    return f"{count >> 20}M" if count >= 1 << 20 else f"{count >> 10}K"


CASES: dict[str, Callable[[str], Iterator[Case]]] = {
    "fake_quant": _fake_quant,
    "perturb": perturb.cases,
    "prologue": prologue.cases,
    "log2": log2.cases,
    "soft_round": _soft_round,
    "codes": _codes,
    "activation_codes": activation.cases,
    "packed_linear": packed.linear,
    "skinny_linear": packed.skinny,
    "packed_conv2d": packed.conv2d,
}
