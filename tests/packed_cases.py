"""The sample inputs of the packed layers, for cases.py."""

import re
from collections.abc import Iterator

import torch
from ttaq.kernels import codes as cd
from ttaq.kernels import packed_conv2d as pc
from ttaq.kernels import packed_linear as pl

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
Samples = Iterator[tuple[str, tuple]]


def _packed(random, n, k, bits, group=0, whole_bytes=False):
    """Draw (words, scale, zero) of a weight; whole bytes hold one code each."""
    shape = (n, k // group) if group else (n,)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=random)
    scale = torch.rand(shape, generator=random) * 0.01 + 0.001
    zero = torch.randint(0, 1 << bits, shape, dtype=torch.int32, generator=random)
    return codes if whole_bytes else cd.pack_reference(codes, bits), scale, zero


def _grid(random, shape, x_bits):
    """Draw (x_scale, x_zero, x_bits) of activation codes."""
    scale = torch.rand(shape, generator=random) * 0.1 + 0.01
    return scale, torch.randint(0, 1 << x_bits, shape, dtype=torch.int32, generator=random), x_bits


NO_GRID = (None, None, 8)

# What follows a product: * gain and shift, + a residual, an activation, # codes of so many bits, ? moments.
AFTER = ("*", "+", "+relu", "+relu6", "gelu", "#8", "?", "*+relu#4?", "*+gelu#8?")


def _after(random, wanted, reference, args, channels_axis):
    """Add to the arguments of a product what `wanted` asks to follow it; its grid fits what the reference gives."""
    y = reference(*args)[0]
    n, plain = y.shape[channels_axis], (re.findall("[a-z]+6?", wanted) or ["none"])[0]
    affine = torch.rand(n, generator=random) + 0.5, torch.randn(n, generator=random)
    residual = (y.float() * torch.rand(y.shape, generator=random)).to(y.dtype) if "+" in wanted else None
    residual = residual.contiguous() if wanted == "+" else residual  # in an order that may be another than that of y
    bits, grid = 8, (None, None)
    if "#" in wanted:
        bits = int(wanted.partition("#")[2].rstrip("?"))
        scale = y.float().abs().max() / (1 << bits) if y.numel() else torch.tensor(0.1)
        grid = (scale, torch.randint(0, 1 << bits, (), dtype=torch.int32, generator=random))
    return (*args, *(affine if "*" in wanted else (None, None)), residual, plain, *grid, bits, "?" in wanted)


def packed_linear() -> Samples:
    yield from _linear_on_floats()
    yield from _linear_on_codes()
    random = torch.Generator().manual_seed(24)
    named = dict([*_linear_on_floats(), *_linear_on_codes()])
    for name in ("4_bits-8_bit_codes", "whole_tiles-f32", "2_bits-bf16"):
        for wanted in AFTER:
            yield f"after_{wanted}-{name}", _after(random, wanted, pl.reference, named[name], -1)
    for name in (
        "8_bits-8_bit_codes-tokens",
        "3_bits-8_bit_codes-groups",
        "codes-bf16",
        "codes-one_row",
        "codes-empty",
    ):
        yield f"after_*+relu#4?-{name}", _after(random, "*+relu#4?", pl.reference, named[name], -1)


def _linear_on_floats():
    random = torch.Generator().manual_seed(16)

    def case(shape, n, bits, dtype, group=0, bias=True, whole_bytes=False):
        x = torch.randn(shape, generator=random).to(dtype)
        b = torch.randn(n, generator=random) if bias else None
        return (x, *_packed(random, n, shape[-1], bits, group, whole_bytes), b, bits, group, *NO_GRID, dtype)

    for name, dtype in FLOATS.items():
        for bits in cd.PACKABLE:
            yield f"{bits}_bits-{name}", case((2, 9, 70), 67, bits, dtype)
        yield f"whole_tiles-{name}", case((64, 64), 64, 4, dtype, bias=False)
        yield f"one_row-{name}", case((37,), 5, 3, dtype)
        yield f"groups-{name}", case((17, 96), 20, 2, dtype, group=32)
        yield f"groups_of_8-{name}", case((3, 24), 9, 3, dtype, group=8)
    yield "one_of_each-f32", case((1, 1), 1, 4, torch.float32)
    yield "empty-f32", case((0, 8), 3, 4, torch.float32)
    yield "groups_within_bytes-f32", case((3, 21), 4, 3, torch.float32, group=7)
    yield "whole_bytes-f32", case((4, 33), 6, 5, torch.float32, whole_bytes=True)
    x, *rest = case((12, 40), 7, 4, torch.float32)
    yield "transposed-f32", (torch.empty(40, 12).copy_(x.T).T, *rest)
    yield "slice-f32", (torch.empty(12, 80)[:, 30:70].copy_(x), *rest)


def _linear_on_codes():
    random = torch.Generator().manual_seed(17)

    def case(shape, n, bits, x_bits, dtype=torch.float32, group=0, bias=True, tokens=False, whole_bytes=False):
        x = torch.randint(0, 1 << x_bits, shape, dtype=torch.uint8, generator=random)
        b = torch.randn(n, generator=random) if bias else None
        grid = _grid(random, shape[:-1] if tokens else (), x_bits)
        return (x, *_packed(random, n, shape[-1], bits, group, whole_bytes), b, bits, group, *grid, dtype)

    for bits, x_bits in ((2, 2), (2, 8), (3, 3), (3, 8), (4, 4), (4, 8), (8, 4), (8, 8)):
        yield f"{bits}_bits-{x_bits}_bit_codes", case((2, 9, 70), 67, bits, x_bits)
        yield f"{bits}_bits-{x_bits}_bit_codes-tokens", case((19, 64), 16, bits, x_bits, tokens=True)
        yield f"{bits}_bits-{x_bits}_bit_codes-groups", case((5, 96), 9, bits, x_bits, group=48, tokens=bits == 4)
    yield "codes-bf16", case((3, 40), 12, 4, 8, torch.bfloat16, tokens=True)
    yield "codes-f16-no_bias", case((3, 40), 12, 4, 8, torch.float16, bias=False)
    yield "codes-one_of_each", case((1, 1), 1, 8, 8)
    yield "codes-one_row", case((37,), 5, 3, 8, tokens=True)
    yield "codes-empty", case((0, 8), 3, 4, 4, tokens=True)
    yield "codes-groups_within_bytes", case((3, 21), 4, 2, 8, group=7)
    yield "codes-whole_bytes", case((4, 33), 6, 5, 7, whole_bytes=True)
    yield "codes-whole_bytes-groups", case((4, 33), 6, 6, 8, group=11, whole_bytes=True)
    for name, x, w, zero in (("highest", 255, 255, 0), ("lowest", 0, 0, 255), ("opposite", 255, 0, 255)):
        _, _, scale, zeros, *rest = case((3, 700), 4, 8, 8)
        codes = torch.full((3, 700), x, dtype=torch.uint8)
        words = torch.full((4, 700), w, dtype=torch.uint8)
        zeros = torch.full_like(zeros, zero)
        rest[4] = torch.full_like(rest[4], 255 - x)
        yield f"codes-{name}", (codes, words, scale, zeros, *rest)


def packed_linear_backward() -> Samples:
    random = torch.Generator().manual_seed(18)
    for name, (x, words, scale, zero, _, bits, group, *_, dtype) in _linear_on_floats():
        grad = torch.randn((*x.shape[:-1], words.shape[0]), generator=random).to(dtype)
        yield name, (grad, words, scale, zero, bits, group, x.shape[-1])
        if name == "2_bits-f32":
            wide = torch.empty((*grad.shape[:-1], 2 * grad.shape[-1]))
            yield f"{name}-slice", (wide[..., ::2].copy_(grad), words, scale, zero, bits, group, x.shape[-1])


CONVOLUTIONS = {  # input shape, outputs, kernel, stride, padding, dilation, groups
    "3x3": ((2, 4, 7, 6), 8, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3x3-strided": ((2, 5, 8, 7), 6, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "1x1-strided": ((2, 16, 5, 5), 20, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "3x2-uneven": ((1, 3, 7, 9), 5, (3, 2), (2, 1), (1, 0), (1, 2), 1),
    "3x3-dilated-groups": ((2, 4, 7, 7), 6, (3, 3), (1, 1), (2, 2), (2, 2), 2),
    "5x1-groups": ((1, 6, 8, 5), 9, (5, 1), (1, 3), (3, 1), (1, 1), 3),
    "depthwise": ((2, 6, 6, 5), 6, (3, 3), (2, 1), (1, 1), (1, 1), 6),
    "3x3-deep": ((2, 64, 5, 6), 24, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "1x1-uneven": ((2, 40, 4, 5), 9, (1, 1), (1, 1), (1, 0), (1, 1), 1),
    "5x5-stem": ((1, 3, 9, 9), 67, (5, 5), (2, 2), (2, 2), (1, 1), 1),
    "empty": ((0, 4, 5, 5), 3, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    "one_of_each": ((1, 1, 1, 1), 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "3x2-deep-groups": ((1, 34, 7, 6), 20, (3, 2), (2, 1), (1, 1), (1, 2), 2),
}


def _geometry(kernel, stride, padding, dilation, groups):
    return list(kernel), list(stride), list(padding), list(dilation), groups


def packed_conv2d() -> Samples:
    yield from _convolutions()
    random, named = torch.Generator().manual_seed(25), dict(_convolutions())
    for name in ("3x3-codes", "3x3-dilated-groups-codes-channels_last", "3x3-deep-bf16"):
        for wanted in AFTER:
            yield f"after_{wanted}-{name}", _after(random, wanted, pc.reference, named[name], 1)
    for name in ("depthwise-codes", "1x1-uneven-codes-bf16", "5x5-stem-codes-channels_last", "empty-codes"):
        yield f"after_*+relu#4?-{name}", _after(random, "*+relu#4?", pc.reference, named[name], 1)


def _convolutions() -> Samples:
    random = torch.Generator().manual_seed(19)
    for at, (name, (shape, outputs, kernel, *rest)) in enumerate(CONVOLUTIONS.items()):
        k = shape[1] // rest[-1] * kernel[0] * kernel[1]
        for turn, (what, dtype) in enumerate(
            (*FLOATS.items(), ("codes", torch.float32), ("codes-bf16", torch.bfloat16))
        ):
            bits, x_bits = cd.PACKABLE[(at + turn) % 4], (8, 4, 2)[(at + turn) % 3]
            x, grid = torch.randn(shape, generator=random).to(dtype), NO_GRID
            if what.startswith("codes"):
                x = torch.randint(0, 1 << x_bits, shape, dtype=torch.uint8, generator=random)
                grid = _grid(random, (), x_bits)
            bias = torch.randn(outputs, generator=random) if at % 3 else None
            args = (*_packed(random, outputs, k, bits), bias, bits, *grid, *_geometry(kernel, *rest), dtype)
            yield f"{name}-{what}", (x, *args)
            if what in ("f32", "codes"):
                yield f"{name}-{what}-channels_last", (x.to(memory_format=torch.channels_last), *args)
    x = torch.randint(0, 32, (2, 4, 9, 6), dtype=torch.uint8, generator=random)
    packed = _packed(random, 8, 36, 6, whole_bytes=True)
    rest = (None, 6, *_grid(random, (), 5), *_geometry((3, 3), (1, 1), (1, 1), (1, 1), 1), torch.float32)
    yield "whole_bytes-codes-slice", (x[:, :, 1:8], *packed, *rest)


def packed_conv2d_backward() -> Samples:
    random = torch.Generator().manual_seed(20)
    for name, (x, words, scale, zero, _, bits, *rest) in _convolutions():
        if x.dtype == torch.uint8:
            continue
        sizes = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in zip(x.shape[2:], *rest[3:7], strict=True)
        ]
        grad = torch.randn((x.shape[0], words.shape[0], *sizes), generator=random).to(x.dtype)
        if name.endswith("channels_last"):
            grad = grad.to(memory_format=torch.channels_last)
        yield name, (grad, words, scale, zero, bits, list(x.shape), *rest[3:8])
