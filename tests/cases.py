"""The sample inputs of every op; correctness, opcheck, compile and the bench gate all walk this one list.

An op joins with one generator of (name, arguments of the raw op) and one entry in SAMPLES. Tensors are built on the
CPU from fixed seeds; `Case.on` moves them with their strides.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from activation_cases import activation_codes
from packed_cases import (
    FLOATS,
    Samples,
    packed_conv2d,
    packed_conv2d_backward,
    packed_linear,
    packed_linear_backward,
)
from prologue_cases import prologue, prologue_backward
from ttaq.kernels import codes as cd
from ttaq.kernels import perturb as pt


@dataclass(frozen=True)
class Case:
    """One call of a raw op."""

    op: str
    name: str
    args: tuple

    def on(self, device: str) -> tuple:
        """Give the arguments on `device`, each tensor with the strides and the offset that it has here."""
        return tuple(_on(a, device) if isinstance(a, torch.Tensor) else a for a in self.args)


def cases(op: str) -> list[Case]:
    """List the cases of `op`."""
    return [Case(op, name, args) for name, args in SAMPLES[op]()]


def _on(tensor, device):
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return storage.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _layouts(draw) -> Iterator[tuple[str, torch.Tensor, int | None, int]]:
    """Yield (name, x, axis, group): every granularity over sizes and layouts that have caught kernels before.

    Odd sizes leave partial tiles, 2304 fills whole ones, 4100 needs two; channels-last and transposed tensors put the
    scales on the fastest axis; a slice and an expanded tensor do not fill their memory.
    """
    yield "per_tensor", draw(5, 7, 11), None, 0
    yield "per_tensor-whole_tiles", draw(18, 128), None, 0
    yield "per_tensor-4100", draw(4100), None, 0
    yield "scalar", draw(), None, 0
    yield "one_element", draw(1, 1), 0, 0
    yield "empty", draw(0, 5), None, 0
    yield "empty-per_channel", draw(0, 5), 1, 0
    yield "rows", draw(6, 130), 0, 0
    yield "long_rows", draw(2, 4099), 0, 0
    yield "columns", draw(9, 33), 1, 0
    yield "images", draw(2, 3, 7, 5), 1, 0
    yield "images-channels_last", draw(2, 6, 5, 7).to(memory_format=torch.channels_last), 1, 0
    yield "images-channels_last-axis_0", draw(3, 4, 5, 2).to(memory_format=torch.channels_last), 0, 0
    yield "images-channels_last-per_tensor", draw(2, 3, 4, 4).to(memory_format=torch.channels_last), None, 0
    yield "transposed", draw(20, 36).T, 1, 0
    yield "permuted", draw(4, 6, 10).permute(2, 0, 1), 1, 0
    yield "slice", draw(6, 40)[:, 3:20], 0, 0
    yield "slice-transposed", draw(12, 40)[:, ::2].T, 1, 0
    yield "expanded", draw(1, 9).expand(4, 9), 0, 0
    yield "per_token", draw(2, 13, 48), None, 48
    yield "groups", draw(7, 96), None, 32
    yield "groups-odd", draw(3, 21), None, 7
    yield "groups-one_a_row", draw(5, 64), None, 64
    yield "groups-channels_last", draw(2, 4, 3, 8).to(memory_format=torch.channels_last), None, 4


def _scale_shape(x, axis, group):
    if group:
        return (*x.shape[:-1], x.shape[-1] // group)
    return () if axis is None else (x.shape[axis],)


def fake_quant() -> Samples:
    for name, dtype in FLOATS.items():
        random = torch.Generator().manual_seed(11)
        for layout, x, axis, group in _layouts(lambda *shape, r=random, d=dtype: torch.randn(shape, generator=r).to(d)):
            shape = _scale_shape(x, axis, group)
            scale = torch.rand(shape, generator=random) * 0.2 + 0.05
            zero = torch.rand(shape, generator=random) * 16 - 0.5
            yield f"{layout}-{name}-learned_zero", (x, scale, zero, 0, 15, axis, group)
            if name == "f32":
                yield f"{layout}-{name}", (x, scale, zero.round().int(), -3, 12, axis, group)
        yield f"not_finite-{name}", (*_not_finite(dtype), 0, 15, 1, 0)
        ties = torch.arange(-40, 40).to(dtype) * 0.25
        yield f"ties-{name}", (ties, torch.tensor(0.5), torch.tensor(2, dtype=torch.int32), 0, 255, None, 0)


def _not_finite(dtype):
    """Rows of NaN, infinities, numbers that overflow once divided and the smallest ones, under plain and odd scales."""
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, largest, -largest, smallest, -0.0, 0.7, -0.7], dtype=dtype)
    scale = torch.tensor([0.1, 1e-30, 1e30, torch.inf, torch.nan])
    return x[:, None].repeat(1, 5), scale, torch.tensor([3.0, 0.0, 7.5, 2.0, 1.0])


def fake_quant_backward() -> Samples:
    random = torch.Generator().manual_seed(12)
    for name, (x, *rest) in fake_quant():
        grad = torch.randn(x.shape, generator=random).to(x.dtype)
        yield name, (torch.empty_like(x).copy_(grad), x, *rest)
        if name in ("images-channels_last-f32", "transposed-f32", "groups-f32"):
            yield f"{name}-grad_in_another_layout", (grad.mT.contiguous().mT, x, *rest)


def perturbed_fake_quant() -> Samples:
    random = torch.Generator().manual_seed(16)
    spreads, seeds = dict(zip(pt.KINDS, (0.5, 1.0, 0.3), strict=True)), (-1, 0, 7 << 40)
    for (name, dtype), (k, kind) in product(FLOATS.items(), enumerate(pt.KINDS)):
        for layout, x, axis, group in _layouts(lambda *shape, d=dtype: torch.randn(shape, generator=random).to(d)):
            if group:
                continue
            spread = torch.rand(_scale_shape(x, axis, 0), generator=random) * 2 * spreads[kind]
            scale, zero = torch.rand((), generator=random) * 0.2 + 0.05, torch.rand((), generator=random) * 16 - 0.5
            zero = zero.round().int() if name == "f32" and axis == 0 else zero
            yield f"{kind}-{layout}-{name}", (x, scale, zero, spread, torch.tensor(seeds[k]), 0, 15, axis, kind)
        x, _, zero = _not_finite(dtype)
        rest = (zero[0], torch.tensor(spreads[kind] / 2), torch.tensor(3), -3, 12, None, kind)
        yield f"{kind}-not_finite-{name}", (x, torch.tensor(0.1), *rest)


def perturbed_fake_quant_backward() -> Samples:
    random = torch.Generator().manual_seed(17)
    for name, (x, *rest) in perturbed_fake_quant():
        grad = torch.randn(x.shape, generator=random).to(x.dtype)
        yield name, (torch.empty_like(x).copy_(grad), x, *rest)
        if name == "gauss-images-channels_last-f32":
            yield f"{name}-grad_in_another_layout", (grad.mT.contiguous().mT, x, *rest)


def prologue_fake_quant() -> Samples:
    return prologue(_layouts, _not_finite)


def prologue_fake_quant_backward() -> Samples:
    return prologue_backward(prologue_fake_quant())


def log2_fake_quant() -> Samples:
    random = torch.Generator().manual_seed(18)
    for (name, dtype), roots in product(FLOATS.items(), (1, 2)):
        for layout, x, axis, group in _layouts(
            lambda *shape, d=dtype: torch.rand(shape, generator=random).pow(9).to(d)
        ):
            if not (axis or group):
                yield f"{layout}-{name}-{roots}", (x, torch.tensor(0.7), 15, roots)
        bounds = torch.tensor([2.0 ** (-k / 8) for k in range(-8, 40)])
        around = torch.cat([bounds, *(torch.nextafter(bounds, torch.tensor(end)) for end in (0.0, 9.0))])
        yield f"bounds-{name}-{roots}", (around.to(dtype), torch.tensor(1.0), 7, roots)
        yield f"not_finite-{name}-{roots}", (_not_finite(dtype)[0], torch.tensor(0.3), 63, roots)


def log2_fake_quant_backward() -> Samples:
    random = torch.Generator().manual_seed(19)
    for name, (x, *rest) in log2_fake_quant():
        grad = torch.randn(x.shape, generator=random).to(x.dtype)
        yield name, (torch.empty_like(x).copy_(grad), x, *rest)
        if name == "images-channels_last-per_tensor-f32-1":
            yield f"{name}-grad_in_another_layout", (grad.mT.contiguous().mT, x, *rest)


def soft_round() -> Samples:
    random = torch.Generator().manual_seed(13)
    layouts = [(*found, 0) for found in _layouts(lambda *shape: torch.randn(shape, generator=random))]
    for name, w, axis, group, conv_groups in [*layouts, *_measured(random)]:
        shape = _scale_shape(w, axis, group)
        scale = torch.rand(shape, generator=random) * 0.2 + 0.05
        zero = torch.randint(0, 16, shape, generator=random).float()
        v = torch.randn(w.shape, generator=random) * 2
        beta = torch.tensor(2.0 + 18 * torch.rand((), generator=random).item())
        yield name, (w, v, scale, zero.int() if group else zero, beta, 0, 15, axis, group, conv_groups)
    v = torch.tensor([[0.0, -0.0, 90.0, -90.0, 2.4, -2.4]])
    w = torch.randn(1, 6, generator=random)
    yield "clipped", (w, v, torch.tensor([0.1]), torch.tensor([8.0]), torch.tensor(2.0), 0, 15, 0, 0, 1)


def _measured(random):
    """Yield (name, w, axis, group, conv_groups): weights whose columns are measured, in every order of memory."""
    for name, shape, axis, group, conv_groups in (
        ("linear", (9, 130), 0, 0, 1),
        ("linear-groups", (21, 96), None, 32, 1),
        ("linear-per_tensor", (300, 7), None, 0, 1),
        ("linear-one_element", (1, 1), 0, 0, 1),
        ("linear-empty", (0, 5), 0, 0, 1),
        ("conv", (37, 5, 3, 2), 0, 0, 1),
        ("conv-grouped", (12, 5, 3, 3), 0, 0, 3),
        ("conv-depthwise", (10, 1, 3, 3), 0, 0, 10),
        ("conv-axis_1", (6, 4, 3, 3), 1, 0, 2),
    ):
        yield f"energy-{name}", torch.randn(shape, generator=random), axis, group, conv_groups
    channels_last = torch.randn(12, 5, 3, 3, generator=random).to(memory_format=torch.channels_last)
    yield "energy-conv-grouped-channels_last", channels_last, 0, 0, 2
    yield "energy-linear-transposed", torch.randn(20, 36, generator=random).T, 0, 0, 4
    yield "energy-linear-slice", torch.randn(6, 40, generator=random)[:, 3:20], 1, 0, 1


def soft_round_backward() -> Samples:
    random = torch.Generator().manual_seed(14)
    for name, (w, v, *rest) in soft_round():
        grad = torch.randn(w.shape, generator=random)
        denergy = torch.randn(rest[-1] * w.shape[1] if rest[-1] else 0, generator=random)
        yield name, (grad, torch.tensor(0.37), denergy, w, v, *rest)


def quantize_codes() -> Samples:
    for name, (x, scale, zero, _, _, axis, group) in fake_quant():
        yield name, (x, scale, zero, 0, 15, axis, group)
        if name in ("columns-f32", "groups-bf16-learned_zero"):
            yield f"{name}-8_bits", (x, scale / 16, zero * 16, 0, 255, axis, group)


def pack_codes() -> Samples:
    random = torch.Generator().manual_seed(15)
    for bits in cd.PACKABLE:
        for shape in ((3, 16), (5, 7), (2, 3, 11), (4, 1), (13,), (3, 0), (0, 5), (40, 67)):
            codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=random)
            yield f"{bits}_bits-{'x'.join(map(str, shape))}", (codes, bits)
        codes = torch.randint(0, 1 << bits, (9, 14), dtype=torch.uint8, generator=random)
        yield f"{bits}_bits-transposed", (codes.T, bits)
        yield f"{bits}_bits-slice", (codes[:, 1::2], bits)
        yield f"{bits}_bits-highest", (torch.full((2, 9), (1 << bits) - 1, dtype=torch.uint8), bits)


def unpack_codes() -> Samples:
    for name, (codes, bits) in pack_codes():
        words = cd.pack_reference(codes, bits)
        yield name, (words, bits, codes.shape[-1])
        if name.endswith("5x7"):
            wide = torch.full((words.shape[0], words.shape[1] + 3), 0xA5, dtype=torch.uint8)
            wide[:, 2:-1] = words
            yield f"{bits}_bits-words_in_a_slice", (wide[:, 2:-1], bits, codes.shape[-1])


SAMPLES: dict[str, Callable[[], Samples]] = {
    "fake_quant": fake_quant,
    "fake_quant_backward": fake_quant_backward,
    "perturbed_fake_quant": perturbed_fake_quant,
    "perturbed_fake_quant_backward": perturbed_fake_quant_backward,
    "prologue_fake_quant": prologue_fake_quant,
    "prologue_fake_quant_backward": prologue_fake_quant_backward,
    "log2_fake_quant": log2_fake_quant,
    "log2_fake_quant_backward": log2_fake_quant_backward,
    "log2_codes": log2_fake_quant,
    "soft_round": soft_round,
    "soft_round_backward": soft_round_backward,
    "quantize_codes": quantize_codes,
    "activation_codes": activation_codes,
    "pack_codes": pack_codes,
    "unpack_codes": unpack_codes,
    "packed_linear": packed_linear,
    "packed_linear_backward": packed_linear_backward,
    "packed_conv2d": packed_conv2d,
    "packed_conv2d_backward": packed_conv2d_backward,
}
