import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ttaq
from ttaq import MatMul, PackedConv2d, PackedLinear, QuantConv2d, QuantLinear, QuantMatMul, QuantSpec, ops

CONVS = [
    ((4, 6, 3), {}),
    ((4, 8, (3, 1), (2, 1), (1, 0), 2, 2, False), {}),
    ((4, 4, 3), {"padding": "same", "groups": 4}),
    ((4, 6, 3), {"padding": 2, "padding_mode": "reflect"}),
    ((4, 6, 2), {"padding": "same", "padding_mode": "circular"}),
    ((4, 6, 3), {"padding": 1, "padding_mode": "replicate", "stride": 2}),
]


def settled(layer, *inputs):
    """Let the quantisers of a layer set themselves, in eval mode."""
    layer.eval()
    with torch.no_grad():
        layer(*inputs)
    return layer


# In the place of the float layers


def test_linear_takes_the_arguments_of_nn_linear():
    layer = QuantLinear(5, 3, False, device="cpu", dtype=torch.float64)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.bias) == (5, 3, None)
    assert layer.weight.dtype == torch.float64
    assert QuantLinear(5, 3, recipe="w2a16").input_quantizer is None
    assert QuantLinear(5, 3, recipe="w16a4").weight_quantizer is None
    assert PackedLinear(5, 3, False).bias is None


@pytest.mark.parametrize(("arguments", "options"), CONVS)
def test_conv_takes_the_arguments_of_nn_conv2d(arguments, options):
    plain, quantised, packed = (kind(*arguments, **options) for kind in (nn.Conv2d, QuantConv2d, PackedConv2d))
    x = torch.randn(2, 4, 9, 8)
    wanted = plain(x).shape
    assert isinstance(quantised, nn.Conv2d)
    assert quantised.eval()(x).shape == packed.eval()(x).shape == wanted
    for name in ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size"):
        assert getattr(quantised, name) == getattr(packed, name) == getattr(plain, name)
    assert (packed.bias is None) == (plain.bias is None)


@pytest.mark.parametrize(
    ("plain", "twin", "x"),
    [
        (nn.Linear(6, 4), QuantLinear(6, 4), torch.randn(3, 6)),
        (nn.Linear(6, 4, bias=False), QuantLinear(6, 4, bias=False), torch.randn(3, 6)),
        (nn.Conv2d(4, 6, 3, groups=2), QuantConv2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5)),
    ],
)
def test_a_float_state_dict_loads_strictly(plain, twin, x):
    assert str(twin.load_state_dict(plain.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(twin.weight, plain.weight)
    assert not twin.weight_quantizer.ready
    y = settled(twin, x)(x)
    assert (y - plain(x)).abs().max() < 2 * plain(x).std()
    # the other way round the scales have no place: a float layer takes the rest when it is not strict
    state = twin.state_dict()
    grid = {"weight_quantizer.scale", "weight_quantizer.zero", "input_quantizer.scale", "input_quantizer.zero"}
    assert set(state) - set(plain.state_dict()) == grid
    with pytest.raises(RuntimeError, match="Unexpected key"):
        plain.load_state_dict(state)
    missing, unexpected = plain.load_state_dict(state, strict=False)
    assert not missing
    assert set(unexpected) == grid


def test_a_state_that_lacks_the_weight_is_refused():
    with pytest.raises(RuntimeError, match=r"Missing key.*bias"):
        QuantLinear(6, 4).load_state_dict({"weight": torch.randn(4, 6)})


def test_from_float_shares_parameters_and_keeps_hooks_and_modes():
    plain = nn.Linear(6, 4).eval()
    plain.weight.requires_grad_(False)
    calls = []
    plain.register_forward_hook(lambda *_: calls.append(1))
    twin = QuantLinear.from_float(plain, "w4a4")
    assert twin.weight is plain.weight
    assert not twin.training
    twin(torch.randn(2, 6))
    assert calls == [1]
    twin.register_buffer("own", torch.ones(1))
    assert not hasattr(plain, "own")
    assert "weight_quantizer" not in plain._modules


@pytest.mark.parametrize("recipe", ["w4a4", "w2a8", "w4a16"])
def test_calibrated_states_travel_between_layers(recipe):
    x = torch.randn(5, 16)
    one = settled(QuantLinear(16, 4, recipe=recipe), x)
    other = QuantLinear(16, 4, recipe=recipe).eval()
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(x), one(x))
    packed, empty = PackedLinear.from_quantized(one), PackedLinear(16, 4, recipe=recipe).eval()
    empty.load_state_dict(packed.state_dict())
    assert torch.equal(empty(x), one(x))


# What they compute


def test_auto_layers_set_themselves_from_the_first_input():
    layer = QuantLinear(16, 4)
    x = torch.randn(8, 16)
    y = layer(x)
    assert layer.weight_quantizer.ready
    assert layer.input_quantizer.ready
    scale = layer.input_quantizer.scale.clone()
    layer(100 * x)
    assert torch.equal(layer.input_quantizer.scale, scale)
    assert not torch.equal(y, F.linear(x, layer.weight, layer.bias))


def test_waiting_layers_compute_as_the_float_layers():
    plain, x = nn.Linear(16, 4), torch.randn(8, 16)
    layer = QuantLinear.from_float(plain, "w2a2", auto=False)
    for mode in (True, False):
        assert torch.equal(layer.train(mode)(x), plain(x))
    conv, image = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), torch.randn(2, 3, 6, 6)
    assert torch.equal(QuantConv2d.from_float(conv, "w2a2", auto=False)(image), conv(image))
    product = QuantMatMul(QuantSpec(2), auto=False).eval()
    assert torch.equal(product(x, x.T), x @ x.T)


@pytest.mark.parametrize("recipe", ["w2a4", "w4a4", "w8a8", "w4a16", "w16a4"])
def test_train_and_eval_mode_agree_but_for_rounding(recipe):
    for layer, x in (
        (QuantLinear(32, 6, recipe=recipe), torch.randn(7, 32)),
        (QuantConv2d(4, 6, 3, recipe=recipe), torch.randn(2, 4, 6, 6)),
    ):
        settled(layer, x)
        torch.testing.assert_close(layer.train()(x), layer.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("arguments", "options"), CONVS)
@pytest.mark.parametrize("recipe", ["w4a4", "w3a16"])
def test_packed_conv_equals_the_quantised_one(arguments, options, recipe):
    x = torch.randn(2, 4, 9, 8)
    layer = settled(QuantConv2d(*arguments, recipe=recipe, **options), x)
    packed = PackedConv2d.from_quantized(layer)
    assert torch.equal(packed(x), layer(x))
    torch.testing.assert_close(layer.train()(x), packed(x), rtol=1e-5, atol=1e-5)


def test_drift_from_the_float_layer_shrinks_with_the_bits():
    torch.manual_seed(4)
    plain, x = nn.Linear(64, 32), torch.randn(50, 64)
    errors = [
        (settled(QuantLinear.from_float(plain, f"w{b}a{b}"), x)(x) - plain(x)).square().mean().item()
        for b in range(2, 9)
    ]
    assert all(a > 2 * b for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("shape", [(16,), (1, 16), (0, 16), (2, 3, 16), (2, 1, 3, 16)])
@pytest.mark.parametrize("options", [{}, {"token": True}, {"group": 4}])
def test_any_number_of_leading_axes(shape, options):
    layer = settled(QuantLinear(16, 4, recipe=ttaq.Recipe.parse("w4a8", **options)), torch.randn(9, 16))
    packed = PackedLinear.from_quantized(layer)
    for net in (layer, packed):
        x = torch.randn(shape).requires_grad_()
        y = net(x)
        assert y.shape == (*shape[:-1], 4)
        y.square().sum().backward()
        assert x.grad.shape == shape
    layer.train()(torch.randn(shape))


@pytest.mark.parametrize("symmetric", [False, True])
def test_tokens_have_the_grids_that_their_quantiser_gives(symmetric):
    recipe = (QuantSpec(4, "channel"), QuantSpec(8, "token", symmetric=symmetric))
    layer, x = QuantLinear(16, 4, recipe=recipe).eval(), torch.randn(3, 5, 16)
    codes, scale, zero = layer.weight_quantizer.integer(layer.weight)
    grid = dict(zip(("x_scale", "x_zero"), layer.input_quantizer.grid(x), strict=True))
    wanted, _ = ops.packed_linear(x, codes, scale, zero, layer.bias, bits=4, **grid)
    assert torch.equal(layer(x), wanted)
    assert torch.equal(PackedLinear.from_quantized(layer)(x), wanted)


def test_empty_batches_of_images():
    layer = settled(QuantConv2d(3, 4, 3, padding=1), torch.randn(2, 3, 5, 5))
    assert layer(torch.randn(0, 3, 5, 5)).shape == (0, 4, 5, 5)
    assert PackedConv2d.from_quantized(layer)(torch.randn(0, 3, 5, 5)).shape == (0, 4, 5, 5)


def test_inputs_in_any_memory_order():
    layer = settled(QuantConv2d(3, 4, 3), torch.randn(2, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    y = layer(x)
    assert torch.equal(layer(x.to(memory_format=torch.channels_last)), y)
    assert torch.equal(layer(torch.stack([x, -x], -1)[..., 0]), y)
    linear = settled(QuantLinear(8, 4), torch.randn(5, 8))
    x = torch.randn(8, 5)
    assert torch.equal(linear(x.T), linear(x.T.contiguous()))


# Moves, copies


def test_moves_keep_the_grid_in_float32():
    layer = settled(QuantLinear(8, 4), torch.randn(3, 8))
    packed = PackedLinear.from_quantized(layer)
    scale, zero = packed.scale.clone(), packed.zero.clone()
    for net in (packed.half(), packed.bfloat16(), packed.double(), packed.to(torch.float16).float()):
        assert torch.equal(net.scale, scale)
        assert torch.equal(net.zero, zero)
        assert net.scale.dtype == torch.float32
        assert net.words.dtype == torch.uint8
    assert packed.half().bias.dtype == torch.float16
    assert copy.deepcopy(layer).to("meta").weight_quantizer.scale.is_meta
    assert PackedLinear(8, 4, device="meta").to_empty(device="cpu").scale.shape == (4,)


@pytest.mark.parametrize("options", [{}, {"group": 4}])
def test_a_packed_layer_shows_the_weight_behind_its_codes(options):
    """Some models ask a layer for its weight's dtype before they call it."""
    layer = settled(QuantLinear(8, 4, recipe=ttaq.Recipe.parse("w3a8", **options)), torch.randn(3, 8))
    packed = PackedLinear.from_quantized(layer)
    assert torch.equal(packed.weight, layer.weight_quantizer(layer.weight))
    assert "weight" not in packed.state_dict()
    conv = settled(QuantConv2d(4, 6, (3, 2), groups=2, bias=False), torch.randn(2, 4, 5, 5))
    assert torch.equal(PackedConv2d.from_quantized(conv).weight, conv.weight_quantizer(conv.weight))
    assert packed.bfloat16().weight.dtype == torch.bfloat16


def test_a_deep_copy_is_its_own():
    layer = settled(QuantLinear(8, 4), torch.randn(3, 8))
    x = torch.randn(3, 8)
    wanted = layer(x)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.mul_(-1)
        twin.input_quantizer.scale.mul_(3)
    assert not torch.equal(twin(x), wanted)
    assert torch.equal(layer(x), wanted)


def test_calls_count_what_codes_hide_without_gradients_too():
    layer = settled(QuantLinear(8, 4), torch.randn(3, 8))
    x = torch.randn(3, 8)
    x[1, 2] = torch.nan
    with torch.inference_mode():
        layer(x)
    layer(x)
    assert layer.nonfinite == 2
    assert "nonfinite" not in layer.state_dict()


# What does not fit


def test_another_device_is_refused():
    linear = settled(QuantLinear(8, 4), torch.randn(3, 8))
    packed = PackedLinear.from_quantized(linear)
    conv = settled(QuantConv2d(3, 4, 3), torch.randn(2, 3, 5, 5))
    product = settled(QuantMatMul(QuantSpec(4)), torch.randn(3, 4), torch.randn(4, 3))
    row, image = torch.randn(3, 8, device="meta"), torch.randn(2, 3, 5, 5, device="meta")
    sentence = r"^\w+: x is on meta, what it meets on cpu; move one with .to\('meta'\)$"
    for call in (
        lambda: linear(row),
        lambda: packed(row),
        lambda: copy.deepcopy(linear).train()(row),
        lambda: conv(image),
        lambda: PackedConv2d.from_quantized(conv)(image),
        lambda: product(row, row.T),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()


def test_inputs_that_do_not_fit_are_refused():
    linear = settled(QuantLinear(8, 4), torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"^packed_linear: 4 inputs of 4 bits .*does not fit this weight$"):
        linear(torch.randn(3, 4))
    conv = settled(QuantConv2d(4, 4, 3), torch.randn(2, 4, 5, 5))
    with pytest.raises(ValueError, match=r"^packed_conv2d: x wants \(B, C, H, W\).*; add the batch axis or check"):
        conv(torch.randn(4, 5, 5))
    with pytest.raises(ValueError, match=r"^packed_conv2d: 18 inputs of 4 bits"):
        conv(torch.randn(2, 2, 5, 5))
    with pytest.raises(ValueError, match=r"^packed_conv2d: the kernel \(3, 3\) must fit .*pass larger images$"):
        conv(torch.randn(2, 4, 2, 5))
    product = settled(QuantMatMul(QuantSpec(4)), torch.randn(3, 4), torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"^quantized_matmul: wanted .* got \(3, 4\) and \(3, 4\); transpose one"):
        product(torch.randn(3, 4), torch.randn(3, 4))


def test_a_packed_row_is_never_read_as_a_shorter_row_of_bytes():
    """8 codes of 4 bits fill 4 bytes, as 4 codes of a byte each would."""
    packed = PackedLinear.from_quantized(settled(QuantLinear(8, 3), torch.randn(3, 8)))
    with pytest.raises(ValueError, match=r"^PackedLinear: axis -1 of the input must hold 8, got \(2, 4\)"):
        packed(torch.randn(2, 4))
    conv = PackedConv2d.from_quantized(settled(QuantConv2d(8, 3, 1), torch.randn(1, 8, 2, 2)))
    with pytest.raises(ValueError, match=r"^PackedConv2d: axis -3 of the input must hold 8"):
        conv(torch.randn(2, 4, 2, 2))


@pytest.mark.parametrize("recipe", ["w5a8", "w6a4", "w7a7", "w16a8"])
def test_widths_that_cannot_be_packed(recipe):
    layer = settled(QuantLinear(8, 4, recipe=recipe), torch.randn(3, 8))
    with pytest.raises(ValueError, match="pack: "):
        PackedLinear.from_quantized(layer)
    with pytest.raises(ValueError, match="pack: weights must have 2, 3, 4 or 8 bits"):
        PackedLinear(8, 4, recipe=recipe)


def test_a_matmul_module_is_the_product():
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    assert torch.equal(MatMul()(a, b), a @ b)
