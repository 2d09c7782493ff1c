"""The evaluation law against an independent int64 computation, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ttaq
from ttaq import PackedConv2d, PackedLinear, QuantConv2d, QuantLinear, QuantMatMul, QuantSpec

F32 = np.float32


def codes_of(x, scale, zero, qmax):
    """Quantise float32 numpy values: divide, round half to even, add the zero, clamp."""
    return np.clip(np.rint(x.astype(F32) / scale.astype(F32)) + zero, 0, qmax).astype(np.int64)


def grid_of(quantizer, x):
    scale, zero = quantizer.grid(x)
    return scale.detach().numpy(), zero.numpy().astype(np.int64)


def weight_of(layer):
    q, w = layer.weight_quantizer, layer.weight.detach().numpy()
    scale, zero = q.scale.detach().numpy(), q.zero.numpy().astype(np.int64)
    if q.codes is not None:
        codes = q.codes.numpy().astype(np.int64)
    elif q.spec.group:
        codes = codes_of(w, scale.repeat(q.spec.group, 1), zero.repeat(q.spec.group, 1), q.spec.qmax)
    else:
        shape = (-1, *[1] * (w.ndim - 1))
        codes = codes_of(w, scale.reshape(shape), zero.reshape(shape), q.spec.qmax)
    return codes, scale, zero


def linear_law(layer, x):
    x_scale, x_zero = grid_of(layer.input_quantizer, x)
    cx = codes_of(x.numpy(), x_scale[..., None], x_zero[..., None], layer.input_quantizer.spec.qmax)
    cx = cx - x_zero[..., None]
    codes, scale, zero = weight_of(layer)
    group = layer.weight_quantizer.spec.group
    if group:
        y = np.zeros((*x.shape[:-1], len(codes)), F32)
        for g in range(codes.shape[1] // group):
            part = slice(g * group, (g + 1) * group)
            total = cx[..., part] @ (codes[:, part] - zero[:, g : g + 1]).T
            y = (y + total.astype(F32) * (x_scale[..., None] * scale[:, g]).astype(F32)).astype(F32)
    else:
        total = cx @ (codes - zero[:, None]).T
        y = total.astype(F32) * (x_scale[..., None] * scale).astype(F32)
    return y if layer.bias is None else y + layer.bias.detach().numpy()


def conv_law(layer, x, padding):
    """Walk over every output position; what lies outside is the value 0.0, code minus zero equal to 0."""
    x_scale, x_zero = grid_of(layer.input_quantizer, x)
    cx = codes_of(x.numpy(), x_scale, x_zero, layer.input_quantizer.spec.qmax) - x_zero
    cx = np.pad(cx, [(0, 0), (0, 0), *padding])
    codes, scale, zero = weight_of(layer)
    weight = codes - zero[:, None, None, None]
    (sh, sw), (dh, dw), groups = layer.stride, layer.dilation, layer.groups
    outputs, per_group, r, s = weight.shape
    height = (cx.shape[2] - dh * (r - 1) - 1) // sh + 1
    width = (cx.shape[3] - dw * (s - 1) - 1) // sw + 1
    total = np.zeros((len(cx), outputs, height, width), np.int64)
    for o in range(outputs):
        first = o // (outputs // groups) * per_group
        for i in range(height):
            for j in range(width):
                rows = slice(i * sh, i * sh + dh * (r - 1) + 1, dh)
                columns = slice(j * sw, j * sw + dw * (s - 1) + 1, dw)
                patch = cx[:, first : first + per_group, rows, columns]
                total[:, o, i, j] = (patch * weight[o]).sum((1, 2, 3))
    y = total.astype(F32) * (x_scale * scale).astype(F32)[:, None, None]
    return y if layer.bias is None else y + layer.bias.detach().numpy()[:, None, None]


def assert_bits(got, wanted):
    wanted = torch.from_numpy(np.ascontiguousarray(wanted))
    assert got.dtype == wanted.dtype == torch.float32
    assert torch.equal(got, wanted)
    assert got.abs().max() > 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("group", "token"), [(0, False), (0, True), (8, False), (8, True)])
@pytest.mark.parametrize("recipe", ["w2a2", "w2a8", "w3a5", "w4a4", "w5a6", "w8a8"])
@torch.no_grad()
def test_linear(recipe, group, token, bias):
    recipe = ttaq.Recipe.parse(recipe, group=group, token=token)
    layer = QuantLinear(40, 7, bias, recipe=recipe).eval()
    x = torch.randn(3, 5, 40) * 3 + 0.5
    y = layer(x)
    assert_bits(y, linear_law(layer, x))
    if layer.weight_quantizer.spec.bits in (2, 3, 4, 8):
        assert torch.equal(PackedLinear.from_quantized(layer)(x), y)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((4, 6, 3), {}),
        ((4, 6, 3), {"padding": 1, "stride": 2}),
        ((4, 6, (3, 2)), {"padding": (2, 1), "dilation": (2, 1), "bias": False}),
        ((4, 6, 3), {"padding": 2, "groups": 2}),
        ((4, 8, 3), {"padding": 1, "groups": 4, "stride": (1, 2)}),
        ((4, 6, 1), {}),
        ((4, 6, 5), {"padding": "same"}),
        ((4, 6, 2), {"padding": "same"}),
        ((4, 6, 3), {"padding": "valid"}),
    ],
)
@pytest.mark.parametrize("recipe", ["w2a4", "w3a3", "w8a8"])
@torch.no_grad()
def test_conv2d(recipe, arguments, options):
    layer = QuantConv2d(*arguments, recipe=recipe, **options).eval()
    x = torch.randn(2, 4, 8, 7) * 2 + 0.3
    y = layer(x)
    if options.get("padding") == "same":
        left, right, top, bottom = layer._reversed_padding_repeated_twice
        padding = [(top, bottom), (left, right)]
    else:
        padding = [(p, p) for p in ((0, 0) if isinstance(layer.padding, str) else layer.padding)]
    assert_bits(y, conv_law(layer, x, padding))
    assert torch.equal(PackedConv2d.from_quantized(layer)(x), y)


@torch.no_grad()
def test_matmul():
    for bits in (2, 4, 8):
        layer = QuantMatMul(QuantSpec(bits)).eval()
        a, b = torch.randn(2, 3, 5, 24) + 0.2, torch.randn(2, 3, 24, 4) * 2
        y = layer(a, b)
        (a_scale, a_zero), (b_scale, b_zero) = grid_of(layer.left_quantizer, a), grid_of(layer.right_quantizer, b)
        qmax = 2**bits - 1
        total = codes_of(a.numpy(), a_scale, a_zero, qmax) - a_zero
        total = total @ (codes_of(b.numpy(), b_scale, b_zero, qmax) - b_zero)
        assert_bits(y, total.astype(F32) * F32(a_scale * b_scale))


@torch.no_grad()
def test_sums_beyond_what_float32_holds_are_exact():
    """8 bits times 8 bits over 4,096 inputs of one sign pass 2^24 by far."""
    layer = QuantLinear(4096, 3, recipe="w8a8").eval()
    layer.weight.copy_(torch.rand(3, 4096) + 0.7)
    x = torch.rand(4, 4096) + 0.7
    y = layer(x)
    codes, _, zero = weight_of(layer)
    assert (codes - zero[:, None]).sum(1).min() * 100 > 2**24
    assert_bits(y, linear_law(layer, x))
    assert torch.equal(PackedLinear.from_quantized(layer)(x), y)


@torch.no_grad()
def test_the_order_of_a_batch_and_its_size_change_no_bit():
    layer = QuantLinear(300, 20, recipe="w4a8").eval()
    x = torch.randn(64, 300)
    y = layer(x)
    order = torch.randperm(64)
    assert torch.equal(layer(x[order]), y[order])
    assert torch.equal(torch.cat([layer(row[None]) for row in x]), y)


@torch.no_grad()
def test_autocast_changes_no_bit():
    for layer, x in (
        (QuantLinear(512, 8, recipe="w4a4").eval(), torch.randn(5, 512)),
        (QuantConv2d(64, 8, 3, recipe="w3a4").eval(), torch.randn(1, 64, 8, 8)),
        (QuantLinear(512, 8, recipe="w4a16").eval(), torch.randn(5, 512)),
    ):
        y = layer(x)
        packed = (PackedLinear if isinstance(layer, nn.Linear) else PackedConv2d).from_quantized(layer)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), y)
            assert torch.equal(packed(x), y)
    product = QuantMatMul(QuantSpec(4)).eval()
    a, b = torch.randn(2, 7, 300), torch.randn(2, 300, 7)
    y = product(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(product(a, b), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_rounds_the_law_once(dtype):
    linear, conv = QuantLinear(64, 9, recipe="w4a8").eval(), QuantConv2d(4, 6, 3, padding=1, recipe="w3a4").eval()
    for layer, x in ((linear, torch.randn(6, 64)), (conv, torch.randn(2, 4, 6, 6))):
        y = layer(x)
        x = x.to(dtype)
        assert torch.equal(layer(x), layer(x.float()).to(dtype))
        scale = layer.weight_quantizer.scale.clone()
        layer.to(dtype)
        assert layer.weight_quantizer.scale.dtype == layer.input_quantizer.scale.dtype == torch.float32
        assert torch.equal(layer.weight_quantizer.scale, scale)
        packed = (PackedLinear if layer is linear else PackedConv2d).from_quantized(layer)
        assert packed(x).dtype == dtype
        assert torch.equal(packed(x), layer(x))
        assert (layer(x).float() - y).abs().max() < 0.5 * y.std()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 70), st.integers(1, 9), st.integers(2, 8), st.integers(2, 8), st.integers(0, 99))
@torch.no_grad()
def test_linear_of_any_size_and_width(k, n, w_bits, a_bits, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = QuantLinear(k, n, recipe=f"w{w_bits}a{a_bits}").eval()
    layer.weight.copy_(torch.randn(n, k, generator=generator))
    x = torch.randn(3, k, generator=generator) * 4
    y = layer(x)
    assert torch.equal(y, torch.from_numpy(linear_law(layer, x)))


@torch.no_grad()
def test_zero_comes_out_as_the_bias():
    for recipe in ("w2a2", "w4a8", "w3a4"):
        layer = QuantLinear(30, 5, recipe=recipe).eval()
        layer(torch.randn(8, 30) + 1)
        assert torch.equal(layer(torch.zeros(2, 30)), layer.bias.expand(2, 5))
