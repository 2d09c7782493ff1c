"""Quantised layers while they learn: gradients against plain torch, half precision, compilation."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ttaq
from ttaq import PackedConv2d, PackedLinear, QuantConv2d, QuantLinear, QuantMatMul, QuantSpec


def settled(layer, *inputs):
    """Let the quantisers of a layer set themselves, in eval mode."""
    layer.eval()
    with torch.no_grad():
        layer(*inputs)
    return layer


def lsq(x, scale, zero, qmax, factor, axis=None):
    """Compose learned step size quantisation from plain torch (arXiv:1902.08153, section 2)."""
    scale = (scale - scale * factor).detach() + scale * factor
    if axis is not None:
        shape = [-1 if a == axis else 1 for a in range(x.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    t = x / scale
    t = torch.round(t).detach() + (t - t.detach()) + zero
    inside = (t >= 0) & (t <= qmax)  # both ends belong to the range, whatever torch.clamp holds of them
    return (torch.where(inside, t, t.detach().clamp(0, qmax)) - zero) * scale


@pytest.mark.parametrize("recipe", ["w2a3", "w4a4"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gradients_in_train_mode_are_those_of_plain_lsq(kind, recipe):
    if kind == "linear":
        layer, x = QuantLinear(24, 5, recipe=recipe), torch.randn(6, 24)
    else:
        layer, x = QuantConv2d(4, 6, 3, padding=1, recipe=recipe), torch.randn(3, 4, 5, 5)
    settled(layer, x).train()
    w_quant, x_quant = layer.weight_quantizer, layer.input_quantizer
    with torch.no_grad():
        x_quant.scale.mul_(0.6)  # so that some inputs are clipped
        w_quant.scale.mul_(0.7)
    x.requires_grad_()
    y = layer(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    got = [x.grad, layer.weight.grad, layer.bias.grad, x_quant.scale.grad, w_quant.scale.grad]

    leaves = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias, x_quant.scale, w_quant.scale)]
    inputs, weight, bias, x_scale, w_scale = leaves
    x_factor = (x[0].numel() * x_quant.spec.qmax) ** -0.5
    w_factor = (layer.weight[0].numel() * w_quant.spec.qmax) ** -0.5
    xq = lsq(inputs, x_scale, x_quant.zero.double(), x_quant.spec.qmax, x_factor)
    wq = lsq(weight, w_scale, w_quant.zero.double(), w_quant.spec.qmax, w_factor, axis=0)
    out = F.linear(xq, wq, bias) if kind == "linear" else F.conv2d(xq, wq, bias, padding=1)
    torch.testing.assert_close(y.double(), out, rtol=1e-4, atol=1e-4)
    out.backward(upstream.double())
    for mine, leaf in zip(got, leaves, strict=True):
        assert mine.abs().max() > 0
        torch.testing.assert_close(mine.double(), leaf.grad, rtol=1e-3, atol=1e-4)


def test_gradients_in_eval_mode_go_through_the_codes():
    """Straight through inside the range, nothing outside; the scale of the input learns as under fake quantisation."""
    layer = settled(QuantLinear(24, 5, recipe="w4a4"), torch.randn(6, 24))
    with torch.no_grad():
        layer.input_quantizer.scale.mul_(0.5)
    x = torch.randn(6, 24).requires_grad_()
    upstream = torch.randn(6, 5)
    layer(x).backward(upstream)
    weight = layer.weight_quantizer(layer.weight).detach()
    scale, zero = layer.input_quantizer.grid(x)
    leaf, step = x.detach().clone().requires_grad_(), scale.detach().clone().requires_grad_()
    F.linear(lsq(leaf, step, zero.float(), 15, 1.0), weight).backward(upstream)
    assert (leaf.grad == 0).any()
    torch.testing.assert_close(x.grad, leaf.grad)
    torch.testing.assert_close(layer.input_quantizer.scale.grad, step.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, upstream.sum(0))
    assert layer.weight.grad is None


def test_gradients_of_products():
    product = settled(QuantMatMul(QuantSpec(4)), torch.randn(3, 5, 6), torch.randn(3, 6, 4))
    grads = []
    for mode in (False, True):
        product.train(mode)
        torch.manual_seed(1)
        a, b = torch.randn(3, 5, 6).requires_grad_(), torch.randn(3, 6, 4).requires_grad_()
        (product(a, b) * torch.randn(3, 5, 4)).sum().backward()
        grads.append((a.grad, b.grad))
    for codes, floats in zip(*grads, strict=True):
        assert codes.abs().sum() > 0
        torch.testing.assert_close(codes, floats)


@pytest.mark.parametrize(("a", "b"), [((2, 3, 5, 6), (6, 4)), ((5, 6), (2, 6, 4)), ((2, 1, 5, 6), (1, 3, 6, 4))])
def test_products_that_broadcast(a, b):
    product = settled(QuantMatMul(QuantSpec(8)), torch.randn(5, 6), torch.randn(6, 4))
    x, y = torch.randn(a).requires_grad_(), torch.randn(b).requires_grad_()
    z = product(x, y)
    assert z.shape == (x @ y).shape
    z.sum().backward()
    assert (x.grad.shape, y.grad.shape) == (x.shape, y.shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("recipe", ["w4a4", "w4a16"])
def test_half_precision_in_train_and_eval(dtype, recipe):
    for layer, x in (
        (QuantLinear(32, 6, recipe=recipe), torch.randn(7, 32)),
        (QuantConv2d(4, 6, 3, recipe=recipe), torch.randn(2, 4, 6, 6)),
    ):
        settled(layer, x)
        wanted = layer(x)
        half = copy.deepcopy(layer).to(dtype)
        assert half.weight_quantizer.scale.dtype == torch.float32
        x = x.to(dtype).requires_grad_()
        for mode in (False, True):
            y = half.train(mode)(x)
            assert y.dtype == dtype
            assert (y.float() - wanted).abs().mean() < 0.1 * wanted.std()
            y.float().square().sum().backward()
        assert x.grad.dtype == half.weight.grad.dtype == dtype
        assert half.weight_quantizer.scale.grad.dtype == torch.float32
        assert torch.isfinite(half.weight_quantizer.scale.grad).all()


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (QuantLinear(16, 4), torch.randn(3, 16)),
        (QuantLinear(16, 4, recipe="w4a16"), torch.randn(3, 16)),
        (QuantLinear(16, 4, recipe=ttaq.Recipe.parse("w4a8", group=4, token=True)), torch.randn(2, 3, 16)),
        (QuantConv2d(4, 6, 3, padding=1), torch.randn(2, 4, 5, 5)),
        (QuantConv2d(4, 6, 3, padding="same", padding_mode="reflect"), torch.randn(2, 4, 5, 5)),
    ],
    ids=["linear", "weights", "groups", "conv", "reflect"],
)
def test_layers_compile_in_one_graph(layer, x):
    settled(layer, x)
    packed = (PackedLinear if isinstance(layer, nn.Linear) else PackedConv2d).from_quantized(layer)
    for net in (layer, packed, copy.deepcopy(layer).train()):
        torch._dynamo.reset()
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        grads = []
        for run in (net, compiled):
            leaf = x.clone().requires_grad_()
            y = run(leaf)
            y.square().sum().backward()
            grads.append((y.detach(), leaf.grad))
        assert torch.equal(grads[0][0], grads[1][0])
        torch.testing.assert_close(grads[0][1], grads[1][1])


def test_products_compile_in_one_graph():
    a, b = torch.randn(2, 5, 6), torch.randn(2, 6, 4)
    product = settled(QuantMatMul(QuantSpec(4)), a, b)
    assert torch.equal(torch.compile(product, fullgraph=True, backend="aot_eager")(a, b), product(a, b))
