import copy

import pytest
import torch
from tiny import BUILDERS, Tied, assert_unchanged, calibrated, input_of, resnet, settle, snapshot
from torch import nn

import ttaq
from ttaq import PackedConv2d, PackedLinear, QuantConv2d, QuantLinear, Recipe
from ttaq.quantizers import Quantizer

WIDTHS = ["w2a4", "w3a3", "w4a4", "w8a8", "w4a16", "w2a2"]


@pytest.mark.parametrize("recipe", WIDTHS)
@pytest.mark.parametrize("name", list(BUILDERS))
def test_packed_equals_fake_quantised_bit_for_bit(name, recipe):
    model = calibrated(name, recipe)
    packed = ttaq.pack(model)
    x = input_of(name, seed=2)
    with torch.no_grad():
        wanted = model(x)
        assert torch.equal(packed(x), wanted)
        x = x.to(memory_format=torch.channels_last)
        assert torch.equal(packed(x), model(x))
    assert not any(isinstance(m, (QuantLinear, QuantConv2d)) for m in packed.modules())
    assert wanted.std() > 0.01


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("w4a8", {"group": 8}),
        ("w3a4", {"group": 4}),
        ("w4a4", {"token": True}),
        ("w2a8", {"group": 8, "token": True}),
        ("w4a16", {"group": 16}),
        ("w4a4", {"first_last": None}),
    ],
)
@pytest.mark.parametrize("name", ["vit", "timm_vit"])
def test_packed_equals_fake_quantised_with_groups_and_tokens(name, recipe, options):
    model = calibrated(name, recipe, **options)
    packed = ttaq.pack(model)
    x = input_of(name, seed=2)
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))
        assert torch.equal(packed(x[:1]), model(x[:1]))


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_packed_equals_reconstructed(name):
    model = calibrated(name, "w3a4")
    ttaq.reconstruct(model, [input_of(name)], steps=6, batch_size=4, rounding_lr=0.1, progress=False)
    nearest = calibrated(name, "w3a4")
    x = input_of(name, seed=2)
    with torch.no_grad():
        assert torch.equal(ttaq.pack(model)(x), model(x))
        assert not torch.equal(nearest(x), model(x))


@pytest.mark.parametrize("name", ["resnet", "vit", "variety"])
@pytest.mark.parametrize("recipe", ["w4a4", "w4a16"])
def test_the_gradient_of_the_input_is_that_of_the_fake_quantised_model(name, recipe):
    model = calibrated(name, recipe)
    packed = ttaq.pack(model)
    grads = []
    for net in (model, packed):
        x = input_of(name, seed=2).requires_grad_()
        net(x).square().sum().backward()
        grads.append(x.grad)
    assert grads[0].abs().sum() > 0
    assert torch.equal(grads[0], grads[1])
    norms = {n: m for n, m in model.named_modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm))}
    assert norms
    for name, old in norms.items():
        new = packed.get_submodule(name)
        assert new.weight.grad.abs().sum() > 0
        assert torch.equal(old.weight.grad, new.weight.grad)


def test_norms_stay_ordinary_modules_and_the_model_stays_as_it_was():
    model = calibrated("resnet", "w4a4")
    model.train()
    before = snapshot(model)
    packed = ttaq.pack(model)
    assert_unchanged(model, before)
    assert "packed" not in model.ttaq_report
    norms = [m for m in packed.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 7
    assert not any(m.training for m in packed.modules())
    first = packed.get_submodule("bn1")
    assert first.weight is not model.bn1.weight
    assert torch.equal(first.running_mean, model.bn1.running_mean)
    # what adapts in the one does not reach the other
    with torch.no_grad():
        packed.bn1.weight.add_(1.0)
        packed.conv1.input_quantizer.scale.mul_(2.0)
    assert_unchanged(model, before)


def test_no_float_weight_is_left_and_the_words_are_small():
    packed = ttaq.pack(calibrated("resnet", "w4a4", first_last=None))
    assert not [n for n, p in packed.named_parameters() if p.ndim > 1]
    report = packed.ttaq_report["packed"]
    assert report["layer2.0.conv1"] == 8 * 4 * 9 // 2 == packed.get_submodule("layer2.0.conv1").words.numel()
    assert packed.conv1.words.shape == (4, 14)  # 27 codes of 4 bits fill 13.5 bytes


def test_pack_in_place():
    model = calibrated("resnet", "w4a4")
    x = input_of("resnet", seed=2)
    with torch.no_grad():
        wanted = model(x)
    assert ttaq.pack(model, inplace=True) is model
    assert isinstance(model.conv1, PackedConv2d)
    with torch.no_grad():
        assert torch.equal(model(x), wanted)


def test_shared_modules_stay_shared():
    model = ttaq.prepare(settle(Tied(), torch.randn(8, 12)), "w4a8")
    ttaq.calibrate(model, [torch.randn(8, 12)])
    packed = ttaq.pack(model)
    assert packed.first is packed.inner["again"]
    assert packed.second is not packed.first
    x = torch.randn(5, 12)
    assert torch.equal(packed(x), model(x))
    assert model.second.weight is model.first.weight


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_odd_widths_are_simulated_and_refused(bits):
    model = calibrated("resnet", f"w{bits}a8", first_last=None)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"^pack: layer conv1: .*2, 3, 4 or 8 bits, got {bits}; .*choose 4 or 8"):
        ttaq.pack(model)
    with pytest.raises(ValueError, match="pack: layer conv1"):
        ttaq.pack(model, inplace=True)
    assert_unchanged(model, before)
    assert torch.isfinite(model(input_of("resnet"))).all()


def test_a_model_that_is_not_calibrated_is_refused():
    model = ttaq.prepare(resnet(), "w4a4")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^pack: layer conv1: .*no calibrated ranges; run ttaq.calibrate"):
        ttaq.pack(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("recipe", ["w4a4", "w4a16", Recipe.parse("w4a4", token=True)], ids=str)
def test_a_layer_that_calibration_never_reached_is_refused_by_name(recipe):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.aside, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(x).relu())

    model = ttaq.prepare(Idle(), recipe)
    assert ttaq.calibrate(model, [torch.randn(8, 4)])["calibration"]["unseen"] == ["aside"]
    with pytest.raises(ValueError, match=r"^pack: layer aside: "):
        ttaq.pack(model)
    with pytest.raises(
        ValueError, match=r"^reconstruct: layer aside has no ranges, .*; exclude such layers in the recipe$"
    ):
        ttaq.reconstruct(model, [torch.randn(8, 4)], steps=1, progress=False)
    kept = ttaq.prepare(Idle(), Recipe.parse("w4a4", exclude="aside"))
    ttaq.calibrate(kept, [torch.randn(8, 4)])
    assert type(ttaq.pack(kept).aside) is nn.Linear


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Sequential(nn.Linear(4, 4))])
def test_a_model_without_quantised_layers_is_refused(model):
    with pytest.raises(ValueError, match=r"^pack: the model has no layer with quantised weights; call ttaq.quantize"):
        ttaq.pack(model)


def test_a_lone_layer_is_refused_with_its_remedy():
    layer = QuantLinear(8, 4).eval()
    x = torch.randn(3, 8)
    wanted = layer(x)
    with pytest.raises(ValueError, match=r"^pack: the model is one layer by itself; use PackedLinear.from_quantized"):
        ttaq.pack(layer)
    assert torch.equal(PackedLinear.from_quantized(layer)(x), wanted)


def test_a_packed_model_is_not_packed_twice():
    with pytest.raises(ValueError, match="no layer with quantised weights"):
        ttaq.pack(ttaq.pack(calibrated("resnet", "w4a4")))


def test_a_copy_of_a_packed_model_is_independent():
    packed = ttaq.pack(calibrated("resnet", "w4a4"))
    x = input_of("resnet", seed=2)
    with torch.no_grad():
        wanted = packed(x)
        twin = copy.deepcopy(packed)
        for module in twin.modules():
            if isinstance(module, Quantizer):
                module.scale.mul_(2.0)
        twin.bn1.bias.add_(1.0)
        assert not torch.equal(twin(x), wanted)
        assert torch.equal(packed(x), wanted)


def test_layers_kept_in_float_stay_float():
    model = calibrated(
        "resnet", "w4a4", exclude=("layer1.*",), overrides={"layer2.*.conv2": "w16a8", "linear": "w8a16"}
    )
    packed = ttaq.pack(model)
    assert type(packed.get_submodule("layer1.0.conv1")) is nn.Conv2d
    assert type(packed.get_submodule("layer2.0.conv2")) is QuantConv2d
    assert packed.linear.input_quantizer is None
    x = input_of("resnet", seed=2)
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))


def test_a_packed_layer_counts_inputs_that_codes_hide():
    packed = ttaq.pack(calibrated("resnet", "w4a4"))
    x = input_of("resnet")
    packed(x)
    assert packed.conv1.nonfinite == 0
    x[0, 0, 0, 0], x[1, 0, 2, 2] = torch.nan, torch.inf
    packed(x)
    packed(x)
    assert packed.conv1.nonfinite == 4
