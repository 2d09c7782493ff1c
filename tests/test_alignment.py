"""Alignment against its formula written out, on floats, on fake-quantised and on packed layers."""

import copy

import pytest
import torch
from tiny import calibrated, images, resnet, vit
from torch import nn
from torch.nn import functional as F

import ttaq
from ttaq.adaptation import adapt
from ttaq.adaptation.alignment import aligned
from ttaq.adaptation.features import moments_of
from ttaq.layers import QuantConv2d, QuantLinear

ANCHOR = [images(16, seed=90), images(8, seed=91)]
SIZES = [8, 8, 1, 5, 8]


def shifted(n, seed):
    return 2 * images(n, seed=seed) + 1


class Net(nn.Module):
    """A convolution, two linear layers and nothing else."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(F.relu(self.conv(x)).mean((2, 3)))))


def net():
    torch.manual_seed(0)
    return Net().eval()


def by_hand(model, batches, strength, ratio, share):
    """Align the inputs of both linear layers, with running moments that follow the batches; yield logits."""

    def affine(h, moments, source):
        (m, v), (ms, vs) = moments, source
        r = (vs.sqrt() / (v.sqrt() + 1e-6)).clamp(max=ratio)
        return (1 - strength) * h + strength * ((h - m) * r + ms)

    def mixed(moments, h, s):
        (m, v), n, w = moments, h.mean(0), h.var(0, correction=0)
        return (1 - s) * m + s * n, (1 - s) * v + s * w + s * (1 - s) * (n - m) ** 2

    def first(x):
        return F.relu(model.conv(x)).mean((2, 3))

    anchor = first(torch.cat(ANCHOR))
    anchors = [anchor, F.gelu(model.fc1(anchor))]
    source = [(h.mean(0), h.var(0, correction=0)) for h in anchors]
    running = list(source)
    for x in batches:
        s, h = share(len(x)), first(x)
        running[0] = mixed(running[0], h, s)
        g = F.gelu(model.fc1(affine(h, running[0], source[0])))
        running[1] = mixed(running[1], g, s)
        yield model.fc2(affine(g, running[1], source[1]))


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({}, lambda b: b / (64 + b)),
        ({"prior": 0}, lambda b: 1),
        ({"momentum": 0.1}, lambda b: 0.1),
        ({"strength": 0.9, "ratio": 1.5, "prior": 16}, lambda b: b / (16 + b)),
        ({"strength": 0}, lambda b: 0.5),
    ],
)
@torch.no_grad()
def test_follows_its_formula(options, share):
    model = net()
    adapter = adapt(model, "align", anchor=ANCHOR, layers=["fc*"], **options)
    batches = [shifted(n, i) for i, n in enumerate(SIZES)]
    expected = by_hand(model, batches, options.get("strength", 0.5), options.get("ratio", 3.0), share)
    for x, logits in zip(batches, expected, strict=True):
        torch.testing.assert_close(adapter(x), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["fake-quantised", "packed"])
@pytest.mark.parametrize("recipe", ["w4a4", "w8a8"])
@pytest.mark.parametrize("build", ["vit", "resnet"])
@torch.no_grad()
def test_quantised_layers_get_what_a_plain_affine_gives(form, recipe, build):
    """The fused pass and the layer's own quantiser agree bit for bit with the affine alone before the layer."""
    model = calibrated(build, recipe)
    model = ttaq.pack(model) if form == "packed" else model
    adapter = adapt(model, "align", anchor=ANCHOR)
    plain = copy.deepcopy(adapter.model)
    for i, n in enumerate(SIZES):
        x, hooks = shifted(n, i), []
        for name, layer in adapter.method.layers.items():

            def align(module, args, name=name, layer=layer, x=x):
                target = adapter.method.running[name].mixed(moments_of(layer, args[0]), len(x) / (64 + len(x)))
                gain, shift = adapter.method.affine(name, target)
                along = [-1, 1, 1] if args[0].dim() == 4 and not isinstance(layer, nn.Linear) else [-1]
                return (args[0] * gain.view(along) + shift.view(along),)

            hooks.append(plain.get_submodule(name).register_forward_pre_hook(align))
        expected = plain(x)
        for hook in hooks:
            hook.remove()
        assert torch.equal(adapter(x), expected)
    assert not torch.equal(plain(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 4, 8])
@torch.no_grad()
def test_one_pass_gives_the_codes(dtype, bits):
    x = (2 * torch.randn(9, 12, 7, generator=torch.Generator().manual_seed(0)) + 3).to(dtype)
    layer = QuantLinear(7, 3, recipe=(ttaq.QuantSpec(4, granularity="channel"), ttaq.QuantSpec(bits))).eval()
    layer.input_quantizer.fit(x)
    gain, shift = torch.linspace(0.6, 2, 7), torch.linspace(-1, 1, 7)
    y = aligned(layer, x, gain, shift)
    wide = x.float() * gain + shift
    scale, zero = layer.input_quantizer.grid(x)
    if dtype == torch.bfloat16 and bits == 8:  # whose rounding would move codes: the affine alone
        assert torch.equal(y, wide.to(dtype))
        wide = y
    codes, _ = ttaq.ops.quantize_codes(wide, scale, zero, qmax=2**bits - 1)
    again, _ = ttaq.ops.quantize_codes(y, scale, zero, qmax=2**bits - 1)
    assert y.dtype == dtype
    assert torch.equal(codes, again)


@torch.no_grad()
def test_scales_by_token_and_images_take_the_plain_way():
    x = 2 * torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0)) + 3
    token = QuantLinear(8, 3, recipe=(None, ttaq.QuantSpec(4, granularity="token"))).eval()
    gain, shift = torch.linspace(0.6, 2, 8), torch.linspace(-1, 1, 8)
    assert torch.equal(aligned(token, x, gain, shift), x * gain + shift)
    x = x.reshape(4, 8, 5, 1)
    conv = QuantConv2d(8, 3, 1, recipe=(None, ttaq.QuantSpec(8))).eval()
    conv.input_quantizer.fit(x * 3)
    y = aligned(conv, x, gain, shift)
    assert torch.equal(y, conv.input_quantizer(x * gain[:, None, None] + shift[:, None, None]))


@pytest.mark.parametrize("form", ["float", "fake-quantised", "packed"])
@torch.no_grad()
def test_the_moments_move_to_where_they_should_be(form):
    """Once a shifted stream is known, what enters a layer has the mean and the spread of the formula."""
    model = vit() if form == "float" else calibrated("vit", "w8a8")
    model = ttaq.pack(model) if form == "packed" else model
    adapter = adapt(model, "align", anchor=ANCHOR, strength=0.9, ratio=1e6, prior=0, layers=["head"])
    x, found = 3 * images(64, seed=5) + 2, []
    adapter(x)
    (layer,), source, given = (
        adapter.method.layers.values(),
        adapter.method.source["head"],
        adapter.method.running["head"],
    )
    hook = layer.register_forward_hook(lambda module, args, output: found.append(moments_of(module, args[0])))
    adapter.predict(x)
    hook.remove()
    (after,) = found
    if form == "float":
        torch.testing.assert_close(after.mean, 0.1 * given.mean + 0.9 * source.mean, rtol=1e-4, atol=1e-4)
        spread = 0.1 * given.var.sqrt() + 0.9 * source.var.sqrt()
        torch.testing.assert_close(after.var.sqrt(), spread, rtol=1e-3, atol=1e-4)
    assert (after.mean - source.mean).norm() < 0.15 * (given.mean - source.mean).norm()
    assert (after.var.sqrt() - source.var.sqrt()).norm() < 0.4 * (given.var.sqrt() - source.var.sqrt()).norm()


def test_all_that_quantise_are_aligned_unless_layers_are_named():
    packed = ttaq.pack(calibrated("vit", "w4a4"))
    names = list(adapt(packed, "align", anchor=ANCHOR).method.layers)
    assert names == list(adapt(packed, "align", anchor=ANCHOR, layers=["*"]).method.layers)
    assert (names[0], names[-1]) == ("patches", "head")
    chosen = adapt(resnet(), "align", anchor=ANCHOR, layers=lambda name, module: isinstance(module, nn.Linear))
    assert list(chosen.method.layers) == ["linear"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"strength": 1.0}, "strength must lie in 0 to below 1, got 1.0; use 0.5"),
        ({"ratio": 0}, "ratio must be above 0, got 0; use 3"),
        ({"momentum": 1.5}, "momentum must lie above 0 and up to 1, got 1.5"),
        ({"prior": -1}, "prior must be a number of images from 0, got -1; use 64"),
        ({"layers": ["nothing"]}, r"matches none of the layers that can be aligned \(there are conv1, "),
        ({"anchor": None}, "align needs batches of source images, got anchor=None"),
    ],
)
def test_wrong_calls_get_a_remedy(options, says):
    with pytest.raises(ValueError, match=says):
        adapt(resnet(), "align", **{"anchor": ANCHOR} | options)


def test_states_of_other_layers_are_refused_and_change_nothing():
    adapter = adapt(vit(), "align", anchor=ANCHOR)
    adapter(shifted(8, 0))
    before = adapter.method.running
    other = adapt(vit(), "align", anchor=ANCHOR, layers=["head"]).state_dict()
    with pytest.raises(ValueError, match="adapt the same model with the same layers first"):
        adapter.load_state_dict(other)
    assert adapter.method.running is before
