import copy

import pytest
import torch
from tiny import BUILDERS, Tied, assert_unchanged, input_of, resnet, snapshot, vit
from torch import nn
from torch.nn.utils import parametrizations

import ttaq
from ttaq import MatMul, QuantConv2d, QuantLinear, Recipe, prepare


@pytest.mark.parametrize("recipe", ["w4a4", "w2a16", "w16a8", Recipe.parse("w4a8", token=True)], ids=str)
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("name", list(BUILDERS))
def test_prepare_changes_no_output_bit_and_not_the_caller(name, mode, recipe):
    model = BUILDERS[name]().train(mode)
    before, twin = snapshot(model), copy.deepcopy(model)
    prepared = prepare(model, recipe)
    assert_unchanged(model, before)
    assert not hasattr(model, "ttaq_report")
    x = input_of(name, seed=2)
    assert torch.equal(prepared(x), twin(x))
    assert prepared.training == mode


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_gradients_are_those_of_the_float_model(name):
    model = BUILDERS[name]().double()  # in float32 a BLAS may sum in another order where operands lie otherwise
    prepared = prepare(model)
    x = input_of(name).double()
    for net in (model, prepared):
        net(x).square().sum().backward()
    grads = dict(prepared.named_parameters())
    for key, p in model.named_parameters():
        assert (p.grad - grads[key].grad).abs().max() <= 1e-13 * p.grad.abs().max(), key


def test_copies_share_nothing_and_in_place_everything():
    model = resnet()
    prepared = prepare(model)
    assert {p.data_ptr() for p in model.parameters()}.isdisjoint(p.data_ptr() for p in prepared.parameters())
    weight = model.conv1.weight
    assert prepare(model, inplace=True) is model
    assert model.conv1.weight is weight
    assert isinstance(model.conv1, QuantConv2d)


def test_the_report():
    report = prepare(vit(), Recipe.parse("w2a4", exclude="layers.0.attention.proj")).ttaq_report
    assert report["layers"]["patches"] == {"kind": "Conv2d", "weight_bits": 8, "activation_bits": 8}
    assert report["layers"]["head"] == {"kind": "Linear", "weight_bits": 8, "activation_bits": 8}
    assert report["layers"]["layers.1.mlp.0"] == {"kind": "Linear", "weight_bits": 2, "activation_bits": 4}
    assert report["layers"]["layers.0.attention.scores"]["activation_bits"] == 4
    assert report["left_out"] == {"layers.0.attention.proj": "kept in float by the recipe"}
    assert Recipe.from_json(report["recipe"]).exclude == ("layers.0.attention.proj",)
    assert len(report["layers"]) == 2 + 2 * 6 - 1


def test_the_recipe_is_followed():
    overrides = {"*.mlp.2": "w3a16", "layers.1.attention.qkv": "w16a8", "*scores": "w4a8", "head": "w4a4"}
    model = prepare(vit(), Recipe.parse("w2a4", group=8, token=True, overrides=overrides, exclude=("*mix",)))
    block = model.layers[1]
    assert block.mlp[2].weight_quantizer.spec.bits == 3
    assert block.mlp[2].input_quantizer is None
    assert block.attention.qkv.weight_quantizer is None
    assert block.attention.qkv.input_quantizer.spec == ttaq.QuantSpec(8, "token")
    assert block.attention.scores.left_quantizer.spec == ttaq.QuantSpec(8)
    assert type(block.attention.mix) is MatMul
    assert model.head.weight_quantizer.spec == ttaq.QuantSpec(4, "group", 8)
    # convolutions have neither groups of inputs nor tokens
    assert model.patches.weight_quantizer.spec == ttaq.QuantSpec(8, "channel")
    assert model.patches.input_quantizer.spec == ttaq.QuantSpec(8)


def test_norms_and_unserved_layers_stay_and_are_named():
    model = nn.Sequential(nn.ConvTranspose2d(3, 3, 2), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv1d(4, 4, 1))
    prepared = prepare(model)
    assert prepared.ttaq_report["left_out"] == {"0": "ConvTranspose2d is not served", "3": "Conv1d is not served"}
    assert type(prepared[2]) is nn.BatchNorm2d


def test_shared_modules_stay_shared_and_tied_weights_tied():
    model = prepare(Tied())
    assert model.first is model.inner["again"]
    assert isinstance(model.first, QuantLinear)
    assert model.second is not model.first
    assert model.second.weight is model.first.weight


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Renamed(nn.Linear):
    """A subclass that computes as nn.Linear does."""


def test_layers_that_compute_otherwise_are_left_out():
    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4), Renamed(4, 4))
    hooked = nn.Linear(4, 4)
    hooked.forward = lambda x: x * 2
    parametrised = parametrizations.weight_norm(nn.Linear(4, 4))
    model.extend([hooked, parametrised])
    x = torch.randn(3, 4)
    wanted = model(x)
    prepared = prepare(model)
    assert prepared.ttaq_report["left_out"] == {
        "1": "Own has a forward of its own",
        "3": "Linear has a forward of its own",
        "4": "its weight is parametrised; remove the parametrisation first",
    }
    assert isinstance(prepared[2], QuantLinear)
    assert torch.equal(prepared(x), wanted)


@pytest.mark.parametrize("mode", [True, False])
def test_attention_that_reads_past_its_layers_is_left_out(mode):
    """torch's encoder layer hands its weights to one fused function in eval mode, MultiheadAttention always does."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.Sequential(layer, nn.Linear(16, 4)).train(mode)
    prepared = prepare(model, "w2a2")
    assert list(prepared.ttaq_report["layers"]) == ["1"]
    assert "reads its weights past its layers" in prepared.ttaq_report["left_out"]["0"]
    ttaq.calibrate(prepared, [torch.randn(8, 5, 16)])
    packed = ttaq.pack(prepared)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        assert torch.equal(packed(x), prepared.eval()(x))


def test_hooks_come_along():
    model, calls = resnet(), []
    model.linear.register_forward_hook(lambda *_: calls.append(1))
    prepare(model)(input_of("resnet"))
    assert calls == [1]


# What cannot be prepared


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.ReLU()), "Sequential has no nn.Linear or nn.Conv2d that can be quantised; write its layers"),
        (nn.Sequential(nn.Conv1d(3, 3, 1)), r"has no nn.Linear or nn.Conv2d .*; 0: Conv1d is not served; write"),
        (
            nn.Linear(4, 4),
            "the model is one Linear by itself; use its twin QuantLinear, or put it into a nn.Sequential",
        ),
        (nn.Conv2d(4, 4, 1), "the model is one Conv2d by itself; use its twin QuantConv2d"),
        (nn.MultiheadAttention(4, 2), "MultiheadAttention reads its weights past its layers"),
        (nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)), "lazy layers without weights; run it on a batch first"),
    ],
)
def test_nothing_to_quantise(model, message):
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=rf"^prepare: .*{message}"):
        prepare(model, inplace=True)
    assert [type(m) for m in model.modules()] == kinds


def test_a_recipe_that_leaves_nothing():
    model = resnet()
    before = snapshot(model)
    for recipe in ("w16a16", Recipe.parse("w4a4", exclude="*")):
        with pytest.raises(ValueError, match=r"^prepare: the recipe keeps every layer in float; loosen its exclude"):
            prepare(model, recipe, inplace=True)
    assert_unchanged(model, before)


def test_a_prepared_model_is_not_prepared_twice():
    model = prepare(resnet())
    with pytest.raises(ValueError, match=r"^prepare: the model holds quantised layers already; start from the float"):
        prepare(model)


@pytest.mark.parametrize("group", [5, 7, 32])
def test_groups_that_do_not_fit_name_the_layer(group):
    model = vit()
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=rf"^prepare: layer layers.0.attention.qkv: weights: groups of {group} .* use a group"
    ):
        prepare(model, Recipe.parse("w4a8", group=group), inplace=True)
    assert_unchanged(model, before)


def test_granularities_that_do_not_fit_name_the_layer():
    model = nn.ModuleDict({"body": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r'^prepare: layer body: weights: granularity must be "channel" or "group"'):
        prepare(model, Recipe(ttaq.QuantSpec(4, "tensor"), None))
    with pytest.raises(ValueError, match=r'^prepare: layer body: activations: granularity must be "tensor" or "token"'):
        prepare(model, Recipe(None, ttaq.QuantSpec(4, "channel")))


@pytest.mark.parametrize("recipe", ["w1a4", "w4a9", "4bit", None])
def test_recipes_that_cannot_be_read(recipe):
    with pytest.raises(ValueError, match="recipe"):
        prepare(resnet(), recipe)
