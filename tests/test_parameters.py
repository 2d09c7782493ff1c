"""What adapts: groups, lists, exceptions; activation scales; and a model made ready for a loop of one's own."""

import functools
import math

import pytest
import torch
from tiny import calibrated, images, resnet, snapshot, vit
from torch import nn

import ttaq
from ttaq.adaptation import adapt, collect_params, configure_model, entropy
from ttaq.adaptation.parameters import choose
from ttaq.adaptation.statistics import AdaptiveBatchNorm
from ttaq.quantizers import ActivationQuantizer

QUANTISED = {
    "fake-quantised resnet": lambda: calibrated("resnet", "w4a4"),
    "packed resnet": lambda: ttaq.pack(calibrated("resnet", "w4a4")),
    "packed vit": lambda: ttaq.pack(calibrated("vit", "w4a4")),
}


def scale_names(model):
    return [f"{name}.scale" for name, m in model.named_modules() if isinstance(m, ActivationQuantizer)]


@pytest.mark.parametrize("model", QUANTISED)
@pytest.mark.parametrize("together", ["activation_scales", "norm+activation_scales", "norm+bias+activation_scales"])
def test_activation_scales_learn_on_quantised_models(model, together):
    model = QUANTISED[model]()
    before = snapshot(model)["tensors"]
    adapter = adapt(model, "tent", parameters=together, full_batch=0)
    assert set(scale_names(model)) <= adapter.method.parameters.keys()
    for seed in range(3):
        adapter(images(16, seed=seed))
    assert (adapter.steps, adapter.skipped) == (3, 0)
    after = dict(adapter.model.named_parameters())
    moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
    assert moved == adapter.method.parameters.keys()
    for name in scale_names(model):
        change = (after[name] / before[name] - 1).abs().item()
        assert 0 < change < 4e-3  # Adam moves each by lr times its own size a step
    assert all(torch.equal(t, before[n]) for n, t in snapshot(model)["tensors"].items())
    adapter.reset()
    assert all(torch.equal(p, before[name]) for name, p in adapter.model.named_parameters())


@pytest.mark.parametrize("model", QUANTISED)
def test_the_gradient_of_an_activation_scale_is_that_of_straight_through_rounding(model):
    model, seen = configure_model(QUANTISED[model](), parameters="activation_scales", statistics="source"), []
    name = [name for name in scale_names(model) if name.endswith("input_quantizer.scale")][-1]
    layer = model.get_submodule(name.removesuffix(".input_quantizer.scale"))
    layer.register_forward_hook(lambda m, args, y: seen.append((args[0].detach(), y)))
    loss = model(images(4)).square().mean()
    (x, y), quantizer = seen[0], layer.input_quantizer
    dy, found = torch.autograd.grad(loss, [y, quantizer.scale])
    scale = quantizer.scale.detach().double().requires_grad_()
    levels = x.double() / scale
    codes = levels + (levels.round() - levels).detach()  # to the last bits
    codes = codes.clamp(-quantizer.zero - 1e-9, quantizer.spec.qmax - quantizer.zero + 1e-9)
    weight = layer.weight_quantizer(layer.weight) if hasattr(layer, "weight_quantizer") else layer.weight
    product = (codes * scale) @ weight.detach().double().T
    (expected,) = torch.autograd.grad((product * dy.double()).sum(), scale)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("make", [torch.optim.Adam, functools.partial(torch.optim.SGD, momentum=0.9)])
def test_scales_stay_positive_and_their_rates_follow_their_size(make):
    adapter = adapt(QUANTISED["packed resnet"](), "tent", parameters="norm+activation_scales", lr=50.0, optimizer=make)
    rates = [group["lr"] for group in adapter.method.optimizer.param_groups]
    assert rates[0] == 50.0
    assert rates[1:] == pytest.approx([50.0 * q.scale.item() for q in adapter.method._scales])
    adapter(images(16))
    assert all(q.scale > 0 for q in adapter.method._scales)


def test_scales_keep_their_dtype_and_bits_when_the_adapter_changes_its_own():
    adapter = adapt(QUANTISED["packed resnet"](), "tent", parameters="norm+activation_scales")
    first = {q: q.scale.detach().clone() for q in adapter.method._scales}
    adapter(images(16))
    adapter.bfloat16()
    adapter(images(16).bfloat16())
    assert adapter.skipped == 0
    assert all(q.scale.dtype == torch.float32 for q in first)
    adapter.reset()
    assert all(torch.equal(q.scale, scale) for q, scale in first.items())
    adapter(images(16).bfloat16())
    assert adapter.steps == 1


def test_scales_of_tokens_and_of_layers_without_a_range_are_no_choice():
    waiting = ttaq.prepare(resnet(), "w4a4")
    for model in (resnet(), waiting):
        with pytest.raises(ValueError, match="'activation_scales' matches no parameter of ResNet"):
            adapt(model, "tent", parameters="norm+activation_scales")


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("bias", {"patches.bias", "layers.0.norm1.bias"}),
        ("norm", {"layers.0.norm1.weight", "layers.0.norm1.bias"}),
        ("norm+bias", {"patches.bias", "layers.0.norm1.weight", "layers.0.norm1.bias"}),
        (["norm", "!layers.0.*"], set()),
        (["!*.bias", "norm", "patches.*"], {"patches.weight", "layers.0.norm1.weight"}),
    ],
)
def test_groups_lists_and_exceptions(parameters, expected):
    names = set(choose(vit(), parameters))
    assert {name for name in names if name.startswith(("patches", "layers.0.norm1"))} == expected
    assert any(name.startswith("layers.1.norm1") for name in names)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        (["norm", "!layer9.*"], "parameters='!layer9.*' matches no parameter"),
        (["norm", "!*"], "matches no parameter of ResNet"),
        ([], "matches no parameter of ResNet"),
        ("norm+weight", "parameters='norm.weight' matches no parameter"),
        (lambda name, p: False, "matches no parameter of ResNet"),
    ],
)
def test_a_choice_that_finds_nothing_is_refused(parameters, says):
    with pytest.raises(ValueError, match=says):
        choose(resnet(), parameters)


# the escape hatches


@pytest.mark.parametrize("make", [resnet, vit, QUANTISED["fake-quantised resnet"], QUANTISED["packed resnet"]])
def test_a_loop_of_ones_own_is_tent(make):
    model = make()
    before = snapshot(model)
    mine = configure_model(model)
    parameters, names = collect_params(mine)
    assert len(parameters) == len(names) > 0
    assert [name for name, p in mine.named_parameters() if p.requires_grad] == names
    optimizer, adapter = torch.optim.Adam(parameters, lr=1e-3), adapt(model, "tent", full_batch=0)
    assert names == list(adapter.method.parameters)
    for seed in range(3):
        x = images(8, seed=seed)
        logits = mine(x)
        assert torch.equal(logits.detach(), adapter(x))
        optimizer.zero_grad()
        entropy(logits).mean().backward()
        optimizer.step()
    after = snapshot(model)
    assert all(torch.equal(t, before["tensors"][n]) for n, t in after["tensors"].items())
    assert after["flags"] == before["flags"]


def test_configure_works_in_place_and_with_other_statistics():
    model = resnet()
    assert configure_model(model, inplace=True) is model
    assert any(isinstance(m, AdaptiveBatchNorm) for m in model.modules())
    assert not any(m.training for m in model.modules())
    plain = resnet()
    mine = configure_model(plain, parameters="bias", statistics="source")
    assert not any(isinstance(m, AdaptiveBatchNorm) for m in mine.modules())
    assert torch.equal(mine(images()), plain(images()))
    assert all(name.endswith("bias") for name in collect_params(mine, "bias")[1])
    with pytest.raises(ValueError, match="statistics must be one of"):
        configure_model(plain, statistics="median")
    with pytest.raises(ValueError, match='use method="source"'):
        configure_model(nn.Sequential(nn.Linear(3, 3)))


def test_parameters_of_the_last_part_can_stay_as_they_are():
    adapter = adapt(resnet(), "sar", parameters=["norm", "!layer3.*"], margin=math.inf, full_batch=0)
    before = adapter.state_dict()["tensors"]
    adapter(images(8))
    after = adapter.state_dict()["tensors"]
    moved = {name for name in after if "running" not in name and not torch.equal(after[name], before[name])}
    assert any(name.startswith("layer2") for name in moved)
    assert not any(name.startswith("layer3") for name in moved)
