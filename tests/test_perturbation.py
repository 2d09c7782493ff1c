import copy
import math

import pytest
import torch
from tiny import Tied, calibrated, images, input_of, settle
from torch import nn
from torch.nn import functional as F

import ttaq
from ttaq import objectives, perturbation, reconstruct
from ttaq.blocks import find_blocks
from ttaq.caching import BlockCache
from ttaq.consistency import PCR
from ttaq.layers import QuantConv2d, QuantLinear
from ttaq.moments import depth_weights, measure_noise
from ttaq.objectives import Objectives
from ttaq.perturbation import FORMS, PEM, STRENGTHS, Propagation, preconditioned
from ttaq.quantizers import ActivationQuantizer, broadcast, disabled
from ttaq.roundings import AdaRound, StraightThrough

QUICK = {"steps": 4, "batch_size": 4, "rounding_lr": 0.05, "progress": False}

LAYERS = {
    "linear": lambda: nn.Linear(12, 6),
    "conv": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "grouped": lambda: nn.Conv2d(8, 6, 3, padding=1, groups=2, bias=False),
    "depthwise": lambda: nn.Conv2d(6, 12, 3, stride=2, groups=6),
}
INPUTS = {"linear": (5, 7, 12), "conv": (4, 4, 6, 6), "grouped": (4, 8, 6, 6), "depthwise": (4, 6, 7, 7)}


def made(kind, recipe="w3a3", rounding=AdaRound, shape=None):
    """Build a calibrated layer whose rounding has begun, and an input of it with channels of unequal size."""
    layer = (QuantLinear if kind == "linear" else QuantConv2d).from_float(LAYERS[kind](), ttaq.Recipe.parse(recipe))
    x = torch.randn(shape or INPUTS[kind])
    x = (x.movedim(channels(layer), -1) * torch.linspace(0.3, 2, x.shape[channels(layer)])).movedim(-1, channels(layer))
    with torch.no_grad():
        layer.eval()(x)
    begin(layer, rounding)
    return layer, x


def begin(layer, rounding=AdaRound):
    quantizer = layer.weight_quantizer
    quantizer.rounding = rounding(layer.weight, quantizer)
    quantizer.rounding.v.data += 0.3 * torch.randn_like(quantizer.rounding.v) * quantizer.scale.mean()


def channels(layer):
    return 1 if isinstance(layer, QuantConv2d) else -1


def term_of(layer, x, pem, noise=None, weights=None):
    """Return R of a block of one layer, made by a pass of its own, and what its quantiser gave on perturbed inputs."""
    model = nn.Sequential(layer)
    seen = []
    hooks = [q.register_forward_hook(lambda q, args, y: seen.append(y)) for q in [layer.input_quantizer] if q]
    term = Propagation(model, {"0": layer}, pem, noise or {}, lambda coded: model(x), weights or {})
    for hook in hooks:
        hook.remove()
    model(x)
    return term, seen[-1].detach() if seen else None


def columns(x, layer):
    return x.detach().double().movedim(channels(layer), 0).flatten(1)


def output_energy(layer, x):
    weight = layer.weight.detach().double()
    if isinstance(layer, QuantLinear):
        return F.linear(x.double(), weight).square().sum(-1).mean()
    y = F.conv2d(x.double(), weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return y.square().sum(1).mean()


def by_hand(layer, x, weight, arriving):
    """Sum |W^[:, j]|^2 arriving_j over the input channels one by one, over E|W x|^2."""
    groups = getattr(layer, "groups", 1)
    outputs, inputs = len(weight) // groups, weight.shape[1]
    total = 0.0
    for j in range(groups * inputs):
        g, i = divmod(j, inputs)
        total = total + weight[g * outputs : (g + 1) * outputs, i].double().square().sum() * arriving[j]
    return total / output_energy(layer, x)


# The identity (1)


def moments(x, seen, weight, quantised):
    """Return both sides of (1) in float64, the sides' standard error, and the three terms."""
    e, d = seen - x, quantised - weight
    errors = (seen @ quantised.t() - x @ weight.t()).square().sum(1)
    sx, se, c = (a.t() @ b / len(x) for a, b in ((x, x), (e, e), (e, x)))
    terms = [(d @ sx @ d.t()).trace(), (quantised @ se @ quantised.t()).trace(), 2 * (quantised @ c @ d.t()).trace()]
    return errors.mean().item(), (errors.std() / len(x) ** 0.5).item(), [t.item() for t in terms]


@pytest.mark.parametrize("recipe", ["w3a3", "w2a2", "w4a8"])
def test_the_identity_holds_for_the_real_quantiser(recipe):
    layer, _ = made("linear", recipe)
    layer.weight_quantizer.harden()
    mixing = torch.randn(12, 12)

    def sample(count=40000):
        x = torch.randn(count, 12) @ mixing / 3
        with torch.no_grad():
            seen = layer.input_quantizer(x + 0.2 * torch.randn_like(x))
            quantised = layer.weight_quantizer(layer.weight)
        return moments(*(t.detach().double() for t in (x, seen, layer.weight, quantised)))

    layer.input_quantizer.fit(torch.randn(2000, 12) @ mixing / 3)
    error, spread, terms = sample()
    assert sum(terms) == pytest.approx(error, rel=1e-12)
    assert min(abs(t) for t in terms) > 0
    other, its_spread, _ = sample()
    assert abs(sum(terms) - other) < 4 * math.hypot(spread, its_spread)


def test_the_measured_form_is_the_second_and_third_term_of_the_identity():
    layer, x = made("linear", shape=(400, 12))
    term, seen = term_of(layer, x, PEM(1, form="measured", snr=12.0))
    weight = layer.weight_quantizer.rounding.weight.detach().double()
    error, _, terms = moments(x.double(), seen.double(), layer.weight.detach().double(), weight)
    energy = output_energy(layer, x).item()
    assert term().item() == pytest.approx((terms[1] + terms[2]) / energy, rel=1e-5)
    assert term().item() == pytest.approx((error - terms[0]) / energy, rel=1e-4)
    assert not torch.equal(seen, layer.input_quantizer(x))


def test_the_measured_form_foretells_the_error_on_fresh_noise():
    layer, x = made("linear", "w3a4", shape=(40000, 12))
    term, _ = term_of(layer, x, PEM(1, form="measured", snr=12.0))
    weight, floats = layer.weight_quantizer.rounding.weight.detach(), layer.weight.detach()
    with torch.no_grad():
        moved = x + torch.randn_like(x) * x.square().mean(0).sqrt() * 10 ** (-12 / 20)
        errors = (layer.input_quantizer(moved) @ weight.t() - x @ floats.t()).square().sum(1)
    first = (x @ (weight - floats).t()).square().sum(1).mean()
    wanted = (errors.mean() - first) / output_energy(layer, x)
    slack = 6 * errors.std() / len(x) ** 0.5 / output_energy(layer, x)
    assert abs(term() - wanted) < slack < 0.05 * wanted


@pytest.mark.parametrize("kind", list(LAYERS))
def test_the_measured_diagonal_is_a_sum_over_channels(kind, monkeypatch):
    monkeypatch.setattr(perturbation, "FULL", 4)
    layer, x = made(kind)
    term, seen = term_of(layer, x, PEM(1, form="measured", snr=12.0))
    values, errors = columns(x, layer), columns(seen, layer) - columns(x, layer)
    see, cross = errors.square().mean(1), (errors * values).mean(1)
    weight, floats = (w.detach().double() for w in (layer.weight_quantizer.rounding.weight, layer.weight))
    groups, total = getattr(layer, "groups", 1), 0.0
    for j in range(len(values)):
        g, i = divmod(j, weight.shape[1])
        rows = slice(g * len(weight) // groups, (g + 1) * len(weight) // groups)
        w, d = weight[rows, i], weight[rows, i] - floats[rows, i]
        total += w.square().sum() * see[j] + 2 * (w * d).sum() * cross[j]
    assert term().item() == pytest.approx((total / output_energy(layer, x)).item(), rel=1e-5)


@pytest.mark.parametrize("count", [5, 12, 40])
def test_the_measured_form_knows_scales_by_token(count):
    layer = QuantLinear.from_float(LAYERS["linear"](), ttaq.Recipe.parse("w4a4", token=True)).eval()
    x = torch.randn(count, 12) * torch.linspace(0.1, 3, count)[:, None]
    with torch.no_grad():
        layer(x)
    begin(layer)
    term, seen = term_of(layer, x, PEM(1, form="measured", snr=300.0))  # noise too small to see
    torch.testing.assert_close(seen.reshape(x.shape), layer.input_quantizer(x), rtol=1e-4, atol=1e-5)
    weight = layer.weight_quantizer.rounding.weight.detach().double()
    floats, quantised = layer.weight.detach().double(), layer.input_quantizer(x).double()
    _, _, terms = moments(x.double(), quantised, floats, weight)
    assert term().item() == pytest.approx((terms[1] + terms[2]) / output_energy(layer, x).item(), rel=1e-3)


def test_what_was_measured_receives_no_gradient():
    layer, x = made("linear")
    term, _ = term_of(layer, x, PEM(1, form="measured", snr=12.0))
    assert layer.input_quantizer.scale.requires_grad
    for _ in range(2):  # a graph that reached into the first pass would be gone the second time
        layer(x)
        term().backward()
    assert layer.input_quantizer.scale.grad is None or layer.input_quantizer.scale.grad == 0


# (2)


@pytest.mark.parametrize("measured", [False, True], ids=["snr", "noise"])
@pytest.mark.parametrize("rounding", [AdaRound, StraightThrough])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_the_analytic_value(kind, rounding, measured):
    layer, x = made(kind, rounding=rounding)
    power = columns(x, layer).square().mean(1)
    inverse = torch.linspace(0.01, 0.2, len(power)) if measured else torch.full((), 10**-1.5)
    pem = PEM(1, form="analytic", snr=None if measured else 15.0)
    term, _ = term_of(layer, x, pem, {"0": inverse}, {"0": 1.5})
    arriving = power * inverse + layer.input_quantizer.scale.detach().double() ** 2 / 12
    wanted = 1.5 * by_hand(layer, x, layer.weight_quantizer.rounding.weight.detach(), arriving)
    assert term().item() == pytest.approx(wanted.item(), rel=1e-5)


def test_float_activations_and_scales_by_token_have_no_granular_part():
    for options in ({"text": "w4a16"}, {"text": "w4a4", "token": True}):
        layer = QuantLinear.from_float(LAYERS["linear"](), ttaq.Recipe.parse(**options)).eval()
        x = torch.randn(9, 12)
        layer(x)
        begin(layer)
        for form in ("analytic", "clipped"):
            term, _ = term_of(layer, x, PEM(1, form=form, snr=15.0))
            arriving = columns(x, layer).square().mean(1) * 10**-1.5
            wanted = by_hand(layer, x, layer.weight_quantizer.rounding.weight.detach(), arriving)
            assert term().item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["linear", "grouped"])
def test_no_unit_of_inputs_or_weights_matters(kind, form):
    layer, x = made(kind)
    inputs, weights = copy.deepcopy(layer), copy.deepcopy(layer)
    inputs.input_quantizer.scale.data *= 8
    for tensor in (weights.weight.data, weights.weight_quantizer.scale.data, weights.weight_quantizer.rounding.base):
        tensor *= 4
    values = []
    for one, given in ((layer, x), (inputs, 8 * x), (weights, x)):
        torch.manual_seed(5)
        values.append(term_of(one, given, PEM(1, form=form, snr=15.0))[0]().item())
    assert values[1:] == pytest.approx(values[:1] * 2, rel=1e-5)


# Gradients


def in_float64(layer, x, inverse, sample=None):
    """Write R of AdaRound anew in float64; return it with its v and the activation scale."""
    quantizer = layer.weight_quantizer
    step, origin = (broadcast(t.detach().double(), layer.weight, 0) for t in (quantizer.scale, quantizer.zero))
    v = quantizer.rounding.v.detach().double().requires_grad_()
    scale = layer.input_quantizer.scale.detach().double().requires_grad_()
    h = (1.2 * torch.sigmoid(v) - 0.1).clamp(0, 1)
    code = (torch.floor(layer.weight.detach() / step.float()).double() + h + origin).clamp(0, quantizer.spec.qmax)
    arriving = columns(x, layer).square().mean(1) * inverse + scale**2 / 12
    if sample is not None:
        zero = layer.input_quantizer.zero.double()
        beyond = sample - sample.clamp(-zero * scale, (layer.input_quantizer.spec.qmax - zero) * scale)
        arriving = arriving + beyond.square().mean(1)
    return by_hand(layer, x, (code - origin) * step, arriving), v, scale


@pytest.mark.parametrize("form", ["analytic", "clipped"])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_gradients_are_those_of_float64(kind, form):
    layer, x = made(kind)
    layer.input_quantizer.scale.data *= 0.5  # something lies beyond the range
    term, _ = term_of(layer, x, PEM(1, form=form, snr=15.0))
    value = term()
    value.backward()
    sample = term.terms["0"].sample.double() if form == "clipped" else None
    wanted, v, scale = in_float64(layer, x, 10**-1.5, sample)
    wanted.backward()
    assert value.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(layer.weight_quantizer.rounding.v.grad.double(), v.grad, rtol=1e-4, atol=1e-8)
    assert layer.input_quantizer.scale.grad.item() == pytest.approx(scale.grad.item(), rel=1e-4)
    assert v.grad.abs().max() > 0


def test_values_beyond_the_range_widen_it():
    gradients = {}
    for form in ("analytic", "clipped"):
        for share in (0.5, 4.0):
            torch.manual_seed(1)
            layer, x = made("conv", "w4a4")
            layer.input_quantizer.scale.data *= share
            term_of(layer, x, PEM(1, form=form, snr=20.0))[0]().backward()
            gradients[form, share] = layer.input_quantizer.scale.grad.item()
    assert gradients["clipped", 0.5] < 0  # a step against the gradient widens
    assert gradients["clipped", 4.0] == pytest.approx(gradients["analytic", 4.0], rel=1e-6)
    assert gradients["analytic", 0.5] > 0
    assert gradients["analytic", 4.0] > 0


@pytest.mark.parametrize("form", FORMS)
def test_products_of_activations_reach_the_scales_of_both(form):
    model = calibrated("vit", "w4a4")
    product = model.layers[0].attention.scores
    left, right = product.left_quantizer, product.right_quantizer
    a, b = 2 * torch.randn(3, 2, 16, 8), torch.randn(3, 2, 8, 16)
    for q, x in ((left, a), (right, b)):  # nothing lies beyond these ranges
        q.zero.fill_(8)
        q.scale.data.fill_(2 * x.abs().max().item() / 7)
    term = Propagation(model, {"p": product}, PEM(1, form=form, snr=15.0), {}, lambda coded: product(a, b), {})
    term().backward()
    energies = [t.double().square().mean().item() for t in (a, b, a @ b)]
    steps = [q.scale.item() for q in (left, right)]
    arriving = [e / 10**1.5 + s**2 / 12 for e, s in zip(energies, steps, strict=False)]
    wanted = 8 * (energies[1] * arriving[0] + energies[0] * arriving[1]) / energies[2]
    assert term().item() == pytest.approx(wanted, rel=1e-5)
    for q, other, step in ((left, energies[1], steps[0]), (right, energies[0], steps[1])):
        assert q.scale.grad.item() == pytest.approx(8 * other * step / 6 / energies[2], rel=1e-5)


def test_the_sum_over_a_block_with_products_and_layers():
    model, x = calibrated("vit", "w4a4"), torch.randn(4, 16, 16)
    attention = model.layers[0].attention
    layers = {n: m for n, m in attention.named_modules() if n in ("qkv", "proj", "scores", "mix")}
    for name in ("qkv", "proj"):
        begin(layers[name])
    weights = {"qkv": 2.0, "proj": 0.5}
    term = Propagation(model, layers, PEM(1, form="analytic", snr=15.0), {}, lambda coded: attention(x), weights)
    attention(x)
    assert list(term.terms) == ["qkv", "scores", "mix", "proj"]
    assert term().item() == pytest.approx(sum(t().item() for t in term.terms.values()))
    term().backward()
    assert all(q.scale.grad > 0 for q in attention.modules() if isinstance(q, ActivationQuantizer))


# What is measured


def test_pure_noise_is_measured_as_it_is(monkeypatch):
    monkeypatch.setattr("ttaq.moments.change_light", lambda x, generator: x)
    model = nn.Sequential(QuantLinear(16, 4), nn.Flatten()).eval()
    batches = [images(64), images(64, seed=2)]
    batches = [torch.cat([x[..., :-1], 0 * x[..., -1:]], -1) for x in batches]
    model(batches[0])
    noise = measure_noise(model, batches, None, 0)["0"]
    assert noise.shape == (16,)
    assert noise[:-1].mean().item() == pytest.approx(
        15 / 16 / 100, rel=0.03
    )  # 20 dB below an image a sixteenth of which is black
    assert noise[:-1].numpy() == pytest.approx(15 / 16 / 100, rel=0.15)
    assert noise[-1] == 0  # a silent channel


@pytest.mark.parametrize("name", ["resnet", "vit", "variety"])
def test_noise_is_measured_in_every_layer_of_the_float_model(name):
    model, x = calibrated(name, "w2a2"), input_of(name)
    noise = measure_noise(model, [x, x + 1], None, 3)
    assert {n: len(r) for n, r in noise.items()} == {
        n: m.in_channels if isinstance(m, QuantConv2d) else m.in_features
        for n, m in model.named_modules()
        if isinstance(m, (QuantLinear, QuantConv2d))
    }
    assert all((r > 0).any() and torch.isfinite(r).all() for r in noise.values())
    other = measure_noise(calibrated(name, "w8a8"), [x, x + 1], None, 3)
    assert all(torch.equal(noise[n], other[n]) for n in noise)  # quantisers play no part
    third = measure_noise(model, [x, x + 1], None, 4)
    assert any(not torch.equal(noise[n], third[n]) for n in noise)


def test_inputs_that_are_no_images_want_an_snr():
    x = torch.randn(16, 12)
    model = ttaq.prepare(settle(Tied(), x), "w4a4")
    ttaq.calibrate(model, [x])
    with pytest.raises(ValueError, match=r"^PEM: the inputs hold no images \(N, C, H, W\) to perturb; give snr in dB$"):
        reconstruct(model, [x], pem=PEM(0.1), **QUICK)
    report = reconstruct(model, [x], pem=PEM(0.1, snr=20.0), **QUICK)
    assert report["pem"]["snr"] == 20


def test_dicts_are_counted_by_their_images(monkeypatch):
    looked = []
    monkeypatch.setattr("ttaq.objectives.measure_noise", lambda model, inputs, *_: looked.append(len(inputs)) or {})
    for entry in (images(), {"x": images()}):
        Objectives(calibrated("resnet", "w4a4"), [entry] * 50, None, PEM(0.1), None)
    assert looked == [32, 32]


def test_depth_weights_are_gains_to_the_last_layer_and_1_on_average():
    weights = depth_weights({"a": torch.tensor([0.01, 0.01]), "b": torch.tensor([0.02, 0.06]), "c": torch.tensor(0.02)})
    assert weights == pytest.approx({"a": 2 / (3.5 / 3), "b": 0.5 / (3.5 / 3), "c": 1 / (3.5 / 3)})
    noise = measure_noise(calibrated("resnet", "w4a4"), [images()], None, 0)
    assert sum(depth_weights(noise).values()) / len(noise) == pytest.approx(1)
    assert depth_weights({"silent": torch.zeros(3)}) == {"silent": 1}


# Preconditioning


@pytest.mark.parametrize("kind", list(LAYERS))
def test_preconditioned_weights_solve_the_ridge_problem(kind):
    layer, x = made(kind)
    inverse = torch.linspace(0.01, 0.3, x.shape[channels(layer)])
    solved = preconditioned({"0": layer}, lambda coded: layer(x), PEM(1), {"0": inverse})["0"]
    assert solved.shape == layer.weight.shape
    groups = getattr(layer, "groups", 1)
    patches = x.flatten(0, -2).t() if kind == "linear" else F.unfold(x, 3, 1, layer.padding, layer.stride)
    patches = (patches if kind == "linear" else patches.transpose(0, 1).flatten(1)).double().chunk(groups)
    taps = layer.weight[0, 0].numel() if kind != "linear" else 1
    for p, w, found, share in zip(patches, *(t.detach().double().chunk(groups) for t in (layer.weight, solved)),
                                  inverse.double().chunk(groups), strict=True):  # fmt: skip
        rows, n = w.flatten(1), p.shape[1]
        power = p.square().mean(1)
        ridge = power * share.repeat_interleave(taps) + layer.input_quantizer.scale.item() ** 2 / 12
        a = torch.cat([p.t(), torch.diag((n * ridge).sqrt())])
        b = torch.cat([p.t() @ rows.t(), torch.zeros(len(ridge), len(rows), dtype=torch.float64)])
        wanted = torch.linalg.lstsq(a, b).solution.t()
        torch.testing.assert_close(found.flatten(1), wanted, rtol=1e-4, atol=1e-6)

        def loss(v, p=p, rows=rows, n=n, ridge=ridge):
            return ((v - rows) @ p).square().sum() / n + (v.square() * ridge).sum()

        assert loss(found.flatten(1)) < loss(rows)


def test_large_layers_are_not_preconditioned(monkeypatch):
    monkeypatch.setattr(perturbation, "SOLVED", 36)
    small, x = made("conv")  # 36 inputs an output
    large = QuantLinear(37, 6)
    y = torch.randn(5, 37)
    large(y)
    found = preconditioned({"small": small, "large": large}, lambda coded: (small(x), large(y)), PEM(1, snr=20.0), {})
    assert list(found) == ["small"]
    monkeypatch.setattr(perturbation, "SOLVED", 35)
    assert preconditioned({"small": small}, lambda coded: small(x), PEM(1, snr=20.0), {}) == {}


def test_preconditioning_looks_at_the_float_model():
    model, x = calibrated("resnet", "w2a2"), input_of("resnet")
    block = next(b for b in find_blocks(model, x) if b.name == "layer2.0")
    _, floats, _ = BlockCache(model, [x], None).advance(block)
    objectives = Objectives(model, [x], None, PEM(0.1, snr=20.0, precondition=True), None)
    found = objectives.bases(block, floats)["layer2.0.conv2"]
    layer = model.layer2[0].conv2
    with disabled(model), torch.no_grad():
        given = F.relu(model.layer2[0].bn1(model.layer2[0].conv1(floats)))
        wanted = preconditioned({"l": layer}, lambda coded: layer(given), objectives.pem, {})["l"]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


# Within reconstruct


@pytest.mark.parametrize(
    ("name", "recipe", "options"),
    [
        ("resnet", "w2a2", {"form": "analytic", "depth": True}),
        ("resnet", "w2a2", {"form": "measured", "snr": 20.0}),
        ("vit", "w4a4", {"form": "clipped", "precondition": True}),
        ("vit", "w4a4", {"form": "measured", "depth": True, "snr": 15.0}),
        ("variety", "w4a16", {"form": "clipped"}),
        ("variety", "w3a4", {"form": "measured", "precondition": True}),
    ],
)
def test_every_form_learns_and_repeats_itself(name, recipe, options):
    states = []
    for strength in (0.5, 0.5, 0.0):
        model = calibrated(name, recipe)
        report = reconstruct(model, [input_of(name)], pem=PEM(strength, **options), **QUICK)
        states.append(model.state_dict())
        assert report["pem"]["form"] == options["form"]
    one, other, without = states
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert any(not torch.equal(one[k], without[k]) for k in one)


@pytest.mark.parametrize("form", FORMS)
def test_the_rule_chooses_a_strength_and_says_how(form):
    model = calibrated("resnet", "w3a4")
    report = reconstruct(model, [input_of("resnet", 16)], pem=PEM(form=form), **QUICK | {"steps": 10})
    errors = report["pem"]["errors"]
    assert tuple(errors) == STRENGTHS
    best = min(errors, key=errors.get)
    assert report["pem"]["strength"] == (best if errors[best] <= 0.98 * errors[0.0] else 0.0)
    assert report["pem"]["pilot"] in [row["name"] for row in report["blocks"]]
    assert len(set(errors.values())) == len(STRENGTHS)


def test_a_strength_that_gains_less_than_chance_is_none_and_leaves_no_trace(monkeypatch):
    states = []
    for pem, margin in ((None, 0.0), (PEM(), 0.9), (PEM(), -1.0)):
        monkeypatch.setattr(objectives, "_MARGIN", margin)
        monkeypatch.setattr(objectives, "STRENGTHS", (0.0, 0.1))
        model = calibrated("resnet", "w3a4")
        report = reconstruct(model, [input_of("resnet", 16)], pem=pem, **QUICK)
        assert pem is None or report["pem"]["strength"] in ((0.0,) if margin > 0 else (0.0, 0.1))
        states.append(model.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("kind", ["input", "gauss"])
def test_the_rule_goes_with_consistency(kind):
    model = calibrated("resnet", "w3a4")
    pcr = PCR(perturbation=kind, objective="feature")
    report = reconstruct(model, [input_of("resnet", 16)], pem=PEM(), pcr=pcr, **QUICK)
    assert report["pem"]["strength"] in STRENGTHS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "exact"}, "form must be one of analytic, clipped, measured, got 'exact'"),
        ({"strength": -1.0}, "strength must be 0 or more, got -1.0; None lets the rule choose"),
        ({"strength": math.nan}, "strength must be 0 or more, got nan"),
    ],
)
def test_what_pem_refuses(options, message):
    with pytest.raises(ValueError, match=rf"^PEM: {message}"):
        PEM(**options)
