"""BatchNorm that follows the test data, against plain formulas and plain layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ttaq.adaptation import AdaptiveBatchNorm, adapt
from ttaq.adaptation.statistics import adapt_statistics, commit, discard


def bn(channels=5, kind=nn.BatchNorm2d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    norm = kind(channels).eval()
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        tensor.copy_(torch.randn(channels, generator=generator))
    norm.running_var.copy_(torch.rand(channels, generator=generator) + 0.5)
    return norm


def images(n=6, channels=5, size=4, seed=1):
    return 2 * torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed)) + 1


def mixed(x, norm, share):
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    mean, var = (1 - share) * norm.running_mean + share * mean, (1 - share) * norm.running_var + share * var
    return F.batch_norm(x, mean, var, norm.weight, norm.bias, False, 0, norm.eps), mean, var


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"statistics": "batch"}, 1.0),
        ({"statistics": "blend"}, 6 / 22),
        ({"statistics": "blend", "prior": 2}, 6 / 8),
        ({"statistics": "blend", "alpha": 0.3}, 0.3),
        ({"statistics": "blend", "alpha": 0.0}, 0.0),
        ({"statistics": "ema", "momentum": 0.05}, 0.05),
    ],
)
def test_mixes_stored_and_batch_moments(options, share):
    norm, x = bn(), images()
    expected, mean, var = mixed(x, norm, share)
    model = nn.Sequential(copy.deepcopy(norm))
    (layer,) = adapt_statistics(model, **options).values()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.running_mean, norm.running_mean)
    commit([layer])
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var, var, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("statistics", ["batch", "blend", "ema"])
def test_gradients_flow_through_the_moments(statistics):
    model = nn.Sequential(bn(3)).double()
    adapt_statistics(model, statistics)
    x = images(3, 3, 2).double().requires_grad_()

    def normalise(x, weight, bias):
        discard([model[0]])
        return torch.func.functional_call(model, {"0.weight": weight, "0.bias": bias}, x)

    assert torch.autograd.gradcheck(normalise, (x, model[0].weight, model[0].bias))


def test_moving_average_walks_from_batch_to_batch_and_blend_does_not():
    norm = bn()
    layers = {s: nn.Sequential(copy.deepcopy(norm)) for s in ("ema", "blend")}
    mean = norm.running_mean.clone()
    for s, model in layers.items():
        adapt_statistics(model, s, alpha=0.1, momentum=0.1)
    for seed in range(4):
        x = images(seed=seed)
        mean = 0.9 * mean + 0.1 * x.mean((0, 2, 3))
        for model in layers.values():
            model(x)
            commit([model[0]])
    torch.testing.assert_close(layers["ema"][0].running_mean, mean, rtol=1e-5, atol=1e-6)
    blended = 0.9 * norm.running_mean + 0.1 * images(seed=3).mean((0, 2, 3))
    torch.testing.assert_close(layers["blend"][0].running_mean, blended, rtol=1e-5, atol=1e-6)


def test_a_layer_used_twice_in_one_pass_averages_both_uses():
    norm = bn()
    model = nn.Sequential(norm, nn.Identity(), norm)
    layers = adapt_statistics(model, "ema", momentum=0.5)
    assert len(layers) == 1
    assert model[0] is model[2]
    start, x = norm.running_mean.clone(), images()
    first = (start + x.mean((0, 2, 3))) / 2
    discard(layers.values())
    middle = copy.deepcopy(model[0])(x)
    model(x)
    commit(layers.values())
    torch.testing.assert_close(model[0].running_mean, (first + middle.mean((0, 2, 3))) / 2)


@pytest.mark.parametrize("statistics", ["batch", "blend", "ema"])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_a_single_value_a_channel_keeps_the_stored_variance(statistics, kind):
    norm = bn(5, kind)
    x = torch.randn(1, 5, *([1, 1] if kind is nn.BatchNorm2d else []), generator=torch.Generator().manual_seed(3)) + 2
    model = nn.Sequential(copy.deepcopy(norm))
    (layer,) = adapt_statistics(model, statistics).values()
    y = model(x)
    share = 0.1 if statistics == "ema" else 1 / 17
    mean = (1 - share) * norm.running_mean + share * x.flatten()
    expected = F.batch_norm(x, mean, norm.running_var, norm.weight, norm.bias, False, 0, norm.eps)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    commit([layer])
    assert torch.equal(layer.running_var, norm.running_var)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("statistics", ["batch", "blend"])
def test_half_precision_keeps_its_dtype_and_float32_moments(dtype, statistics):
    norm, x = bn(), images()
    model = nn.Sequential(copy.deepcopy(norm))
    adapt_statistics(model, statistics)
    y = model(x.to(dtype))
    assert y.dtype == dtype
    assert model[0].running_mean.dtype == torch.float32
    torch.testing.assert_close(
        y.float(), mixed(x, norm, 1.0 if statistics == "batch" else 6 / 22)[0], rtol=0.02, atol=0.04
    )


def test_state_dict_keys_stay_and_restored_gives_the_plain_layer():
    model = nn.Sequential(bn(), nn.ReLU())
    keys, plain = list(model.state_dict()), model[0]
    (layer,) = adapt_statistics(model, "batch").values()
    assert isinstance(model[0], AdaptiveBatchNorm)
    assert list(model.state_dict()) == keys
    y = layer(images())
    commit([layer])
    back = layer.restored()
    assert back is plain
    torch.testing.assert_close(back(images()), y, rtol=1e-5, atol=1e-5)


def test_a_norm_with_its_own_tail_keeps_it():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv2_035", num_classes=4).eval()
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    adapter = adapt(model, "norm", statistics="blend", alpha=0.0)
    torch.testing.assert_close(adapter(x), model(x), rtol=1e-4, atol=1e-4)
    exported = adapter.export()
    assert [type(m) for m in exported.modules()] == [type(m) for m in model.modules()]


class Own(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class Net(nn.Sequential):
    def __init__(self, norm):
        super().__init__(nn.Conv2d(3, 4, 3), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("norm", "options", "says"),
    [
        (Own(4), {}, "1 is a Own whose forward"),
        (nn.GroupNorm(2, 4), {}, "norm needs BatchNorm layers.*Net has none.*tent"),
        (nn.BatchNorm2d(4, track_running_stats=False), {}, "with running statistics"),
        (nn.BatchNorm2d(4), {"statistics": "mean"}, "one of source, batch, blend, ema"),
        (nn.BatchNorm2d(4), {"statistics": "source"}, 'method="source"'),
        (nn.BatchNorm2d(4), {"statistics": "blend", "alpha": 2}, "alpha must lie in 0 to 1, got 2"),
        (nn.BatchNorm2d(4), {"prior": 0}, "prior must be"),
        (nn.BatchNorm2d(4), {"momentum": 0}, "momentum must lie"),
    ],
)
def test_refusals(norm, options, says):
    with pytest.raises(ValueError, match=says):
        adapt(Net(norm), "norm", **options)
