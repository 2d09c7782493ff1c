"""Codes in closed form: against the paper's loop written out, and against rounding to nearest on the same objective."""

import pytest
import torch
from tiny import Variety, calibrated, images, settle
from torch import nn

import ttaq
from ttaq.closed_form import feed_back, solve
from ttaq.layers import QuantConv2d, QuantLinear
from ttaq.moments import patches_of
from ttaq.perturbation import PEM
from ttaq.quantizers import dequantise

QUIET = {"progress": False}


def covariance(width, seed, groups=1):
    """Make inputs whose channels depend on each other, and their second moments."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, width, width, generator=generator, dtype=torch.float64)
    spread = torch.linspace(0.1, 3, width, dtype=torch.float64)
    return mix @ torch.diag_embed(spread.expand(groups, -1)) @ mix.mT / width + 0.01 * torch.eye(width)


def quantizer_of(weight, bits, group=0):
    recipe = ttaq.Recipe.parse(f"w{bits}a8", group=group)
    layer = QuantLinear.from_float(nn.Linear(weight.shape[1], weight.shape[0]), recipe)
    layer.weight_quantizer.fit(weight)
    return layer.weight_quantizer


def by_hand(weight, hessian, quantizer):
    """Round the dearest column first, and move all later ones by the paper's equation (2), one inverse a step."""
    weight, codes = weight.double().clone(), torch.zeros_like(weight)
    group = quantizer.spec.group or weight.shape[1]
    scale, zero = (v.detach().double().reshape(len(weight), -1).repeat_interleave(group, 1)[:, : weight.shape[1]]
                   for v in (quantizer.scale, quantizer.zero))  # fmt: skip
    left = hessian.diagonal().argsort(descending=True).tolist()
    while left:
        j = left[0]
        inverse = torch.linalg.inv(hessian[left][:, left])
        code = (weight[:, j] / scale[:, j]).round().add(zero[:, j]).clamp(0, quantizer.spec.qmax)
        error = (weight[:, j] - (code - zero[:, j]) * scale[:, j]) / inverse[0, 0]
        weight[:, left] -= error[:, None] * inverse[0]
        codes[:, j] = code
        left = left[1:]
    return codes.to(torch.uint8)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [0, 8])
def test_columns_are_rounded_as_the_paper_rounds_them(bits, group, monkeypatch):
    monkeypatch.setattr("ttaq.closed_form.COLUMNS", 7)
    weight, hessian = torch.randn(6, 24, generator=torch.Generator().manual_seed(bits)), covariance(24, bits)
    quantizer = quantizer_of(weight, bits, group)
    codes = feed_back(weight[None], hessian, quantizer, weight)
    assert torch.equal(codes, by_hand(weight, hessian[0], quantizer))


def test_without_dependence_columns_are_rounded_to_nearest():
    weight = torch.randn(5, 16)
    quantizer = quantizer_of(weight, 3)
    nearest, *_ = quantizer.integer(weight)
    assert torch.equal(feed_back(weight[None], torch.eye(16, dtype=torch.float64)[None], quantizer, weight), nearest)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_objective_is_lower_than_that_of_rounding_to_nearest(bits):
    for seed in range(5):
        weight, hessian = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)), covariance(64, seed)
        quantizer = quantizer_of(weight, bits)
        nearest, *_ = quantizer.integer(weight)

        def cost(codes, weight=weight, hessian=hessian, quantizer=quantizer):
            error = (dequantise(codes, quantizer.scale.detach(), quantizer.zero, 0) - weight).double()
            return torch.einsum("ok,kl,ol->", error, hessian[0], error).item()

        assert cost(feed_back(weight[None], hessian, quantizer, weight)) < 0.8 * cost(nearest)


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"groups": 8}, {"stride": 2, "padding_mode": "reflect"}])
def test_patches_are_what_a_convolution_multiplies(options):
    layer = QuantConv2d.from_float(nn.Conv2d(8, 16, 3, padding=1, bias=False, **options), "w4a8")
    x = torch.randn(2, 8, 5, 5)
    rows = patches_of(layer, x)
    weight = layer.weight.detach().flatten(1).unflatten(0, (layer.groups, -1))
    float_conv = nn.Conv2d(8, 16, 3, padding=1, bias=False, **options)
    float_conv.weight = layer.weight
    y = float_conv(x)
    expected = y.transpose(0, 1).flatten(1).unflatten(0, (layer.groups, -1))
    torch.testing.assert_close(weight @ rows, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", ["w2a8", "w4a4", "w3a16"])
@pytest.mark.parametrize("build", ["resnet", "vit"])
def test_blocks_end_nearer_to_their_targets_than_rounding_leaves_them(build, recipe):
    model = calibrated(build, recipe)
    report = solve(model, [images(32, seed=3), images(16, seed=4)], **QUIET)
    assert sum(row["after"] for row in report["blocks"]) < sum(row["before"] for row in report["blocks"])
    assert all(
        layer.weight_quantizer.codes is not None for layer in model.modules() if hasattr(layer, "weight_quantizer")
    )
    x = images(8, seed=9)
    with torch.no_grad():
        assert torch.equal(ttaq.pack(model)(x), model(x))


def test_convolutions_of_every_kind_are_solved():
    torch.manual_seed(0)
    model = ttaq.prepare(settle(Variety(), images(32)), "w4a8").eval()
    ttaq.calibrate(model, [images(32)])
    report = solve(model, [images(32)], **QUIET)
    assert sum(row["after"] for row in report["blocks"]) < sum(row["before"] for row in report["blocks"])


def test_equal_images_give_equal_codes_and_the_float_weights_stay():
    models = [calibrated("resnet", "w3a8") for _ in range(2)]
    before = {name: p.clone() for name, p in models[0].named_parameters() if name.endswith("weight")}
    for model in models:
        solve(model, [images(32, seed=3)], **QUIET)
    for (name, one), other in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert all(torch.equal(p, before[name]) for name, p in models[0].named_parameters() if name in before)


def test_the_ridge_of_pem_makes_weights_smaller_in_noisy_channels():
    model, plain = calibrated("resnet", "w8a8"), calibrated("resnet", "w8a8")
    solve(plain, [images(32, seed=3)], **QUIET)
    solve(model, [images(32, seed=3)], pem=PEM(strength=1.0, snr=0.0), **QUIET)

    def energy(net):  # of the first layer: those behind it make up for what it lost
        return net.conv1.weight_quantizer(net.conv1.weight).square().sum().item()

    assert energy(model) < 0.5 * energy(plain)


def test_wrong_calls_get_a_remedy():
    with pytest.raises(ValueError, match=r"solve: the model is not calibrated; call ttaq.prepare and ttaq.calibrate"):
        solve(ttaq.prepare(ttaq.models.ResNet(depth=8)), [images(4)], **QUIET)
    with pytest.raises(ValueError, match=r"no rule chooses the strength of PEM here; give it, as PEM\(strength=0.1\)"):
        solve(calibrated("resnet", "w4a4"), [images(4)], pem=PEM(), **QUIET)
    with pytest.raises(ValueError, match=r"damping must be above 0, got 0; use 0\.01"):
        solve(calibrated("resnet", "w4a4"), [images(4)], damping=0, **QUIET)


def test_an_interrupted_solve_leaves_the_model_as_it_was(monkeypatch):
    model = calibrated("resnet", "w4a4")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []

    def stop(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    original = ttaq.closed_form._solve_layer
    monkeypatch.setattr("ttaq.closed_form._solve_layer", stop)
    with pytest.raises(KeyboardInterrupt):
        solve(model, [images(16)], **QUIET)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_quantize_takes_it_as_a_method_and_refuses_what_needs_steps():
    model, batches = ttaq.models.ResNet(depth=8, classes=6, width=4).eval(), [images(16, seed=3)]
    quantised = ttaq.quantize(model, batches, "w3a8", method="gptq", damping=0.05, progress=False)
    assert quantised.ttaq_report["method"] == "gptq"
    assert quantised.ttaq_report["damping"] == 0.05
    refined = ttaq.quantize(
        model, batches, "w3a8", method="gptq", refinement=ttaq.Refinement(steps=2, batch_size=4), progress=False
    )
    assert "refinement" in refined.ttaq_report
    with pytest.raises(ValueError, match=r"quantize: codes in closed form takes no steps, budget; use method='ttaq'"):
        ttaq.quantize(model, batches, "w3a8", method="gptq", steps=5, budget="5min")


def test_a_small_cache_gives_the_same_codes():
    one, other = calibrated("resnet", "w3a8"), calibrated("resnet", "w3a8")
    solve(one, [images(32, seed=3)], **QUIET)
    solve(other, [images(32, seed=3)], cache=1000, **QUIET)
    for (name, value), same in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, same), name
