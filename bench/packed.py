"""The cases of packed_linear and packed_conv2d: layers of ViT-B and ResNet-50 against torch's float and int8 layers."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch.nn import functional as F
from ttaq.kernels import packed_conv2d as pc
from ttaq.kernels import packed_linear as pl

from ttaq import dispatch, ops
from ttaq.declarations import RAW

from .case import DTYPES, Case, Inputs, backward, copy_bytes, drawn, forward

_LAYERS = {"qkv": (2304, 768), "proj": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)}
_CONVS = {  # output channels, input channels, kernel, image, stride
    "ResNet-50 stem 7x7": (64, 3, 7, 224, 2),
    "ResNet-50 layer1 3x3": (64, 64, 3, 56, 1),
    "ResNet-50 layer2 3x3": (128, 128, 3, 28, 1),
    "ResNet-50 layer3 3x3": (256, 256, 3, 14, 1),
    "ResNet-50 layer4 3x3": (512, 512, 3, 7, 1),
    "ResNet-50 layer3 1x1": (1024, 256, 1, 14, 1),
}


def linear(device: str) -> Iterator[Case]:
    """List linear layers at M = 197 and M = 1, and the gradient of their input."""
    for layer, m in product(("fc1", "fc2"), (197, 1)):
        for bits, x_bits in product((2, 4, 8), (8, None)):
            quick = (layer, bits) == ("fc1", 4)
            yield _linear_case(f"ViT-B {layer}", m, *_LAYERS[layer], bits, x_bits, device, quick=quick)
    for layer, m in product(("qkv", "proj"), (197, 1)):
        yield _linear_case(f"ViT-B {layer}", m, *_LAYERS[layer], 4, 8, device)
    for bits, x_bits in product((2, 4), (8, None)):
        yield _linear_case("4096x4096", 1, 4096, 4096, bits, x_bits, device)
    for layer in ("fc1", "fc2"):
        yield _linear_case(f"ViT-B {layer}", 197, *_LAYERS[layer], 4, None, device, gradient=True)
    if device == "cuda":
        for bits, x_bits in product((2, 4, 8), (8, None)):
            yield _linear_case("ViT-B fc1", 64 * 197, *_LAYERS["fc1"], bits, x_bits, device)


def skinny(device: str) -> Iterator[Case]:
    """List products of few rows, which read little but words; on a GPU replays of graphs, against the Triton kernel."""
    for (n, k), m, bits, x_bits in product(((4096, 4096), (1024, 4096)), (1, 4, 8), (2, 3, 4, 8), (None, 8)):
        case = _linear_case(f"few rows, {n}x{k}", m, n, k, bits, x_bits, device, quick=(n, m, bits) == (1024, 1, 4))
        against = {name: bind for name, bind in case.rivals.items() if name != "torch float32"}
        if device == "cuda":
            against["triton"] = partial(_on_triton, case.ours)
        yield replace(case, rivals=against, graph=device == "cuda")


def _on_triton(bind, inputs):
    call = bind(inputs)

    def forced():
        with dispatch.backend("triton"):
            return call()

    return forced


def conv2d(device: str) -> Iterator[Case]:
    """List convolutions of ResNet-50 on one image, or 64 on a GPU, channels-last."""
    for name, shape in _CONVS.items():
        for bits, x_bits in ((4, 8), (8, 8), (4, None)):
            yield _conv_case(name, 1 if device == "cpu" else 64, *shape, bits, x_bits, device)


def _linear_case(name, m, n, k, bits, x_bits, device, *, quick=False, gradient=False):
    dtype = "float32" if device == "cpu" else "bfloat16"

    def make(generator, device):
        x = drawn((m, k), generator, device, dtype).requires_grad_(gradient)
        args = (x, *_weight(n, k, bits, generator, device), *_input_grid(x_bits, device))
        return Inputs(args, (x,), (drawn((m, n), generator, device, dtype),))

    def ours(x, words, scale, zero, bias, *grid):
        return ops.packed_linear(x, words, scale, zero, bias, bits=bits, **_grid(grid, x_bits))[0]

    bind = backward if gradient else forward
    raw = partial(_gradient_arguments if gradient else _linear_arguments, bits=bits, x_bits=x_bits)
    moved = n * k * bits // 8 + (m * k + m * n) * DTYPES[dtype].itemsize
    against = {
        "torch float32": lambda i: bind(F.linear)(_float_linear(i, bits, torch.float32)),
        "torch bfloat16": lambda i: bind(F.linear)(_float_linear(i, bits, torch.bfloat16)),
    }
    if device == "cpu" and not gradient:
        against["torch dynamic int8"] = lambda i: forward(_dynamic_int8)(_int8_linear(i, bits))
    return Case(
        op="packed_linear_backward" if gradient else "packed_linear",
        name=f"{name}, M={m}, W{bits}{f'A{x_bits}' if x_bits else ', float input'}"
        + (", gradient of the input" if gradient else ""),
        dtype=dtype,
        make=make,
        raw=raw,
        ours=bind(ours),
        rivals=against,
        ceiling=copy_bytes(moved),
        exact=partial(_exact_linear, bits=bits, raw=raw, gradient=gradient),
        bytes=moved,
        flops=2 * m * n * k,
        integer=x_bits is not None,
        quick=quick,
    )


def _linear_arguments(i, bits, x_bits):
    x, *weight = i.args[:5]
    return (_codes(i, x_bits), *weight, bits, 0, *(i.args[5:] or (None, None)), x_bits or 8, x.dtype)


def _gradient_arguments(i, bits, x_bits):
    return (i.grads[0], *i.args[1:4], bits, 0, i.args[0].shape[-1])


def _exact_linear(i, bits, raw, gradient):
    """Return what the integer law gives, or a product in float64."""
    x, bias = i.args[0], i.args[4]
    if len(i.args) > 5:
        return pl.reference(*raw(i))[:1]
    weight = pl.dequantise(*i.args[1:4], bits, 0, x.shape[-1]).double()
    return (i.grads[0].double() @ weight if gradient else F.linear(x.double(), weight, bias.double()),)


def _conv_case(name, batch, n, c, size, image, stride, bits, x_bits, device):
    dtype = "float32" if device == "cpu" else "bfloat16"
    geometry = ([size, size], [stride] * 2, [size // 2] * 2, [1, 1], 1)
    keywords = dict(zip(("kernel_size", "stride", "padding", "dilation", "groups"), geometry, strict=True))
    out = (image + 2 * (size // 2) - size) // stride + 1

    def make(generator, device):
        x = drawn((batch, c, image, image), generator, device, dtype, "channels-last")
        return Inputs((x, *_weight(n, c * size * size, bits, generator, device), *_input_grid(x_bits, device)))

    def ours(x, words, scale, zero, bias, *grid):
        return ops.packed_conv2d(x, words, scale, zero, bias, bits=bits, **keywords, **_grid(grid, x_bits))[0]

    def raw(i):
        grid = (*(i.args[5:] or (None, None)), x_bits or 8)
        return (_codes(i, x_bits), *i.args[1:5], bits, *grid, *geometry, i.args[0].dtype)

    def exact(i):
        if x_bits:
            return pc.reference(*raw(i))[:1]
        return (_conv(i, bits, geometry, torch.float64)(),)

    moved = n * c * size * size * bits // 8 + batch * (c * image**2 + n * out**2) * DTYPES[dtype].itemsize
    return Case(
        op="packed_conv2d",
        name=f"{name}, batch {batch}, W{bits}{f'A{x_bits}' if x_bits else ', float input'}",
        dtype=dtype,
        make=make,
        raw=raw,
        ours=forward(ours),
        rivals={
            "torch float32": lambda i: _conv(i, bits, geometry, torch.float32),
            "torch bfloat16": lambda i: _conv(i, bits, geometry, torch.bfloat16),
        },
        ceiling=copy_bytes(moved),
        exact=exact,
        bytes=moved,
        flops=2 * batch * n * out**2 * c * size**2,
        integer=x_bits is not None,
        quick="layer3 3x3" in name and bits == 4,
    )


def _weight(n, k, bits, generator, device):
    """Draw words, scale, zero and bias of a layer."""
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator, device=device, dtype=torch.uint8)
    scale = torch.rand(n, generator=generator, device=device) * 0.01 + 0.01
    zero = torch.full((n,), 1 << (bits - 1), dtype=torch.int32, device=device)
    return RAW.pack_codes(codes, bits), scale, zero, torch.randn(n, generator=generator, device=device)


def _input_grid(x_bits, device):
    if x_bits is None:
        return ()
    return torch.tensor(0.03, device=device), torch.tensor(1 << (x_bits - 1), dtype=torch.int32, device=device)


def _grid(grid, x_bits):
    return {"x_scale": grid[0], "x_zero": grid[1], "x_bits": x_bits} if grid else {}


def _codes(i, x_bits):
    """Give what the raw op takes: the codes of the input, or the input."""
    if x_bits is None:
        return i.args[0]
    return RAW.quantize_codes(i.args[0], *i.args[5:], 0, (1 << x_bits) - 1, None, 0)[0]


def _float_linear(i, bits, dtype):
    """Give the float layer as a user holds it: weight and input in one dtype already."""
    x, words, scale, zero, bias = i.args[:5]
    weight = pl.dequantise(words, scale, zero, bits, 0, x.shape[-1]).to(dtype)
    x = x.detach().to(dtype).requires_grad_(x.requires_grad)
    return Inputs((x, weight, bias.to(dtype)), (x,), tuple(g.to(dtype) for g in i.grads))


def _int8_linear(i, bits):
    x, words, scale, zero, bias = i.args[:5]
    weight = pl.dequantise(words, scale, zero, bits, 0, x.shape[-1])
    rows = weight.abs().amax(1).double() / 127
    weight = torch.quantize_per_channel(weight, rows, torch.zeros_like(rows, dtype=torch.long), 0, torch.qint8)
    return Inputs((x, torch.ops.quantized.linear_prepack(weight, bias)))


def _dynamic_int8(x, weight):
    return torch.ops.quantized.linear_dynamic(x, weight, True)


def _conv(i, bits, geometry, dtype):
    """Bind the float convolution as a user holds it: weight and input in one dtype already, channels-last."""
    x, words, scale, zero, bias = i.args[:5]
    size, stride, padding, dilation, groups = geometry
    weight = pc.dequantise(words, scale, zero, bits, (words.shape[0], x.shape[1] // groups, *size)).to(dtype)
    args = (x.to(dtype), weight.to(memory_format=torch.channels_last), bias.to(dtype))
    return forward(lambda *a: F.conv2d(*a, stride, padding, dilation, groups))(Inputs(args))
