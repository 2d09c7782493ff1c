import copy
import math
from collections import OrderedDict
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import pytest
import torch
from tiny import Tied, assert_unchanged, calibrated, images, input_of, resnet, settle, snapshot
from torch import nn
from torch.nn import functional as F

import ttaq
from ttaq import consistency as module
from ttaq import reconstruct, roundings
from ttaq.augment import add_noise, change_light
from ttaq.blocks import block_input, find_blocks, run_block
from ttaq.blockwise import BlockLearner, Schedule
from ttaq.caching import BlockCache
from ttaq.consistency import OBJECTIVES, PCR, PERTURBATIONS, Consistency
from ttaq.distances import squared_distance
from ttaq.quantizers import ActivationQuantizer, Quantizer
from ttaq.tracing import leaves

QUICK = {"steps": 3, "batch_size": 4, "rounding_lr": 0.05, "progress": False}
NONE = {"perturbation": "gauss", "snr": math.inf}  # noise of no size
WEAK = ("resnet", "layer2.0")


def at_work(pcr, name="resnet", recipe="w3a4", block="layer2.0", **schedule):
    """Begin a block; return its learner, the term, and (quantised inputs, float inputs, targets)."""
    model, x = calibrated(name, recipe), input_of(name)
    model.requires_grad_(False)
    found = next(b for b in find_blocks(model, x) if b.name == block)
    cached = BlockCache(model, [x], None).advance(found)
    learner = BlockLearner(model, found, Schedule(**{"drop": 0.0, "steps": 4, "batch_size": 4} | schedule))
    term = Consistency(model, [x], None, pcr)
    term.begin(found, cached[2])
    return learner, term, cached


def once(pcr, step=0, **options):
    """Evaluate the term once; return it with the block's output and what the images should give."""
    learner, term, (x, _, targets) = at_work(pcr, **options)
    picked = torch.tensor([5, 0, 3])
    output = run_block(learner.model, learner.block, x[picked])
    return term(step, x[picked], output, picked, learner.roundings), output, targets[picked], learner


def suffix(v):
    """Run what follows layer2.0 in the float network."""
    plain = resnet()
    return plain.linear(plain.layer3(v).mean((2, 3)))


SHARP = 0.2  # of this temperature the divergences of such small logits are large enough for float32


def divergence(target, logits, t=SHARP):
    p, q = ((v.double() / t).log_softmax(-1) for v in (target, logits))
    return t**2 * (p.exp() * (p - q)).sum(1).mean()


# The objectives


def test_features_that_are_not_perturbed_have_the_distance_of_reconstruction():
    value, output, target, _ = once(PCR(0.3, objective="feature", **NONE))
    assert value.item() == pytest.approx(0.3 * squared_distance(output, target).item(), rel=1e-6)


@pytest.mark.parametrize(("name", "block"), [WEAK, ("vit", "layers.0")])
def test_a_block_agrees_with_itself_where_nothing_is_perturbed(name, block):
    value, *_, learner = once(PCR(1.0, objective="self", **NONE), name=name, block=block)
    assert value.item() == pytest.approx(0, abs=1e-6)
    value.backward()
    assert all(r.v.grad.abs().max() < 1e-6 for r in learner.roundings)


def test_the_anchor_is_the_prediction_of_the_float_model():
    value, output, target, _ = once(PCR(0.5, objective="anchor", temperature=SHARP, **NONE))
    wanted = 0.5 * divergence(suffix(target), suffix(output)).item()
    assert value.item() == pytest.approx(wanted, rel=1e-3)
    assert value > 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_values_and_gradients_under_perturbation(objective, monkeypatch):
    given = []
    real = Consistency._distance
    monkeypatch.setattr(Consistency, "_distance", lambda *args: given.append(args[2]) or real(*args))
    value, output, target, learner = once(
        PCR(1.0, perturbation="step", objective=objective, temperature=SHARP), recipe="w3a2"
    )
    other = given[0]
    assert not torch.equal(other, output)
    forms = {
        "feature": lambda: (other.double() - target).square().sum(1).mean(),
        "self": lambda: divergence(suffix(output).detach(), suffix(other)),
        "anchor": lambda: divergence(suffix(target), suffix(other)),
    }
    wanted, weights = forms[objective](), [r.v for r in learner.roundings]
    assert value.item() == pytest.approx(wanted.item(), rel=1e-3)
    mine = torch.autograd.grad(value, weights, retain_graph=True)
    for one, two in zip(mine, torch.autograd.grad(wanted, weights), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-3 * two.abs().max().item())


@pytest.mark.parametrize("temperature", [0.05, 0.2])
def test_the_temperature_softens_both_predictions(temperature):
    value, output, target, _ = once(PCR(1.0, objective="anchor", temperature=temperature, **NONE))
    wanted = divergence(suffix(target), suffix(output), temperature).item()
    assert value.item() == pytest.approx(wanted, rel=1e-3)


# The perturbations


@pytest.mark.parametrize("kind", ["step", "gauss", "drop"])
def test_the_quantisers_of_the_block_are_perturbed_and_no_other(kind, monkeypatch):
    seen = {}

    def watching(model, block, x):
        seen.update({n: (q.drop, q.perturbation) for n, q in model.named_modules() if isinstance(q, Quantizer)
                     and isinstance(q, ActivationQuantizer)})  # fmt: skip
        return run_block(model, block, x)

    monkeypatch.setattr(module, "run_block", watching)
    *_, learner = once(PCR(perturbation=kind, snr=17.0))
    wanted = {"step": (0.0, ("step", 1.0)), "gauss": (0.0, ("gauss", 17.0)), "drop": (0.5, None)}[kind]
    inside = {n for n in seen if n.startswith("layer2.0.")}
    assert len(inside) == 2
    assert all(seen[n] == (wanted if n in inside else (0.0, None)) for n in seen)
    assert all(q.drop == 0 and q.perturbation is None for q in learner.activations)


def test_the_share_that_learning_drops_is_back_after_the_second_branch():
    learner, term, (x, _, _) = at_work(PCR(perturbation="gauss"))
    for quantizer in learner.activations:
        quantizer.drop = 0.3
    picked = torch.tensor([1])
    term(0, x[picked], run_block(learner.model, learner.block, x[picked]), picked, learner.roundings)
    assert [q.drop for q in learner.activations] == [0.3, 0.3]


def test_half_a_code_is_the_most_that_step_moves():
    quantizer = calibrated("resnet", "w4a4").layer2[0].conv1.input_quantizer
    scale = quantizer.scale.item()
    x = scale * torch.arange(16).repeat(200).float()  # on the grid
    clean = quantizer(x)
    quantizer.perturbation = ("step", 1.0)
    assert (quantizer(x) - clean).abs().max() < 0.01 * scale  # less than half a code never leaves a cell's centre
    between = quantizer(x + 0.4 * scale) - clean
    steps = (between / scale).round()
    assert set(steps.unique().tolist()) == {0.0, 1.0}
    assert steps[x < 14 * scale].mean().item() == pytest.approx(0.4, abs=0.03)


def test_perturbed_images_reach_the_block_through_the_quantised_prefix():
    torch.manual_seed(11)
    learner, term, _ = at_work(PCR(perturbation="input"))
    generator = torch.Generator().manual_seed(11)
    view = add_noise(change_light(input_of("resnet"), generator), generator)
    learner.model.eval()
    fresh = calibrated("resnet", "w3a4")
    wanted, _ = block_input(fresh, learner.block, view)
    assert torch.equal(term.perturbed, wanted)
    clean, _ = block_input(fresh, learner.block, input_of("resnet"))
    assert not torch.equal(term.perturbed, clean)


def test_perturbed_images_advance_with_the_blocks():
    model, x = calibrated("resnet", "w3a4"), input_of("resnet")
    term = Consistency(model, [x[:5], x[5:]], None, PCR(perturbation="input"))
    for block in find_blocks(model, x):
        term.begin(block, torch.zeros(8))
        given = [block_input(model, block, view)[0] for view in term.views.inputs]
        torch.testing.assert_close(term.perturbed, torch.cat(given), rtol=1e-5, atol=1e-5)
        kept = term.perturbed
        term.begin(block, torch.zeros(8))
        torch.testing.assert_close(term.perturbed, kept, rtol=1e-5, atol=1e-5)


# Within a step


@pytest.mark.parametrize("rounding", ["adaround", "ste"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_both_branches_of_a_step_share_one_rounded_weight(objective, rounding, monkeypatch):
    made, used = [], []
    name = "soft_round" if rounding == "adaround" else "fake_quant"
    monkeypatch.setattr(roundings, "ops", counting(roundings.ops, name, made))
    learner, term, cached = at_work(PCR(objective=objective), rounding=rounding)
    forward = roundings.Rounding.forward
    monkeypatch.setattr(
        roundings.Rounding, "forward", lambda self, *args: used.append((self, forward(self, *args))) or used[-1][1]
    )
    learner.learn(*cached, term)
    steps, layers = 4, 2
    assert len(made) == steps * layers
    assert len(used) == 2 * steps * layers
    for step in range(steps):
        first, second = (used[2 * layers * step :][k * layers : (k + 1) * layers] for k in range(2))
        for (one, weight), (other, again) in zip(first, second, strict=True):
            assert one is other
            assert weight is again
    assert not any(r.reused for r in learner.roundings)


def counting(ops, name, made):
    class Counted:
        def __getattr__(self, asked):
            found = getattr(ops, asked)
            return (lambda *a, **k: made.append(1) or found(*a, **k)) if asked == name else found

    return Counted()


def test_every_third_step_counts_three_times():
    options = {"objective": "feature"} | NONE
    one, *_ = once(PCR(0.2, **options))
    for step in range(7):
        value, *_ = once(PCR(0.2, every=3, **options), step=step)
        if step % 3:
            assert value == 0.0
        else:
            assert value.item() == pytest.approx(3 * one.item(), rel=1e-6)


def test_only_every_third_step_runs_the_second_branch(monkeypatch):
    runs = []
    monkeypatch.setattr(module, "run_block", lambda *args: runs.append(1) or run_block(*args))
    learner, term, cached = at_work(PCR(every=3), steps=7)
    learner.learn(*cached, term)
    assert len(runs) == 3


# Within reconstruct


@pytest.mark.parametrize(("perturbation", "objective"), [*product(PERTURBATIONS, OBJECTIVES)])
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_every_form_learns(name, perturbation, objective):
    model = calibrated(name, "w3a4")
    pcr = PCR(0.5, perturbation=perturbation, objective=objective)
    report = reconstruct(model, [input_of(name)], pcr=pcr, **QUICK)
    assert report["pcr"] == {"strength": 0.5, "perturbation": perturbation, "objective": objective, "every": 1,
                             "snr": 20.0, "temperature": 4.0}  # fmt: skip
    quantizers = [m for m in model.modules() if isinstance(m, Quantizer)]
    assert all(torch.isfinite(q.scale).all() and q.enabled for q in quantizers)
    assert all(q.perturbation is None and q.drop == 0 for q in quantizers if isinstance(q, ActivationQuantizer))
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(("perturbation", "objective"), [*zip(PERTURBATIONS, [*OBJECTIVES, "self"], strict=True)])
def test_the_same_seed_gives_the_same_model(perturbation, objective):
    pcr, states = PCR(2.0, perturbation=perturbation, objective=objective), []
    for seed, noise, given in ((0, 1, pcr), (0, 2, pcr), (5, 1, pcr), (0, 1, PCR(0.0))):
        model = calibrated("resnet", "w2a4")
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        reconstruct(model, [input_of("resnet")], pcr=given, seed=seed, **QUICK)
        assert torch.equal(torch.get_rng_state(), state)
        states.append(model.state_dict())
    one, other, *different = states
    assert all(torch.equal(one[k], other[k]) for k in one)
    for third in different:
        assert any(not torch.equal(one[k], third[k]) for k in one)


def test_batch_statistics_go_with_consistency():
    model, plain, x = calibrated("resnet", "w3a4"), resnet(), input_of("resnet")
    reconstruct(model, [x], pcr=PCR(objective="anchor"), statistics="batch", **QUICK)
    with module.disabled(model), torch.no_grad():
        assert torch.equal(model(x), plain(x))


class Answer(NamedTuple):
    hidden: torch.Tensor
    extra: None = None


@dataclass
class Reply:
    hidden: torch.Tensor


WRAPPERS = {
    "tuple": lambda y: (y, None),
    "list": lambda y: [y],
    "named": Answer,
    "dict": lambda y: {"hidden": y},
    "nested": lambda y: OrderedDict(hidden=(y,)),
    "dataclass": Reply,
}


class Part(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.wrap, self.first, self.second = wrap, nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        return WRAPPERS[self.wrap](self.second(F.relu(self.first(x))) + x)


class Chain(nn.Module):
    """Two blocks that wrap what they return, and a head that names its logits."""

    def __init__(self, wrap):
        super().__init__()
        self.one, self.two, self.head = Part(wrap), Part(wrap), nn.Linear(12, 5)

    def forward(self, x):
        for part in (self.one, self.two):
            x = next(leaves(part(x)))
        return {"logits": self.head(x)}


@pytest.mark.parametrize("wrap", list(WRAPPERS))
def test_blocks_that_wrap_what_they_return(wrap):
    model, x = ttaq.prepare(Chain(wrap), "w4a4"), torch.randn(16, 12)
    ttaq.calibrate(model, [x])
    block, other = find_blocks(model, x)[:2]
    term = Consistency(model, [x], None, PCR(objective="anchor"))
    term.begin(block, torch.zeros(16, 12))
    z = torch.randn(3, 12)
    with module.disabled(model), torch.no_grad():
        wanted = model.head(run_block(model, other, z))
    assert torch.allclose(term._rest(z, torch.arange(3)), wanted, atol=1e-6)
    report = reconstruct(model, [x], pcr=PCR(objective="self"), **QUICK)
    assert [row["name"] for row in report["blocks"]] == ["one", "two", "head"]


class Whole(Tied):
    def forward(self, x):
        return {"logits": super().forward(x)}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_whole_model_that_returns_a_dict_is_one_block(objective):
    model, x = ttaq.prepare(Whole(), "w4a4"), torch.randn(16, 12)
    ttaq.calibrate(model, [x])
    report = reconstruct(model, [x], pcr=PCR(objective=objective), **QUICK)
    assert [row["name"] for row in report["blocks"]] == ["model"]


# What goes wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"perturbation": "salt"}, "perturbation must be one of step, gauss, drop, input, got 'salt'"),
        ({"objective": "mean"}, "objective must be one of feature, self, anchor, got 'mean'"),
        ({"every": 0}, "every must be 1 or more and strength 0 or more, got 0 and 0.1"),
        ({"strength": -0.5}, "every must be 1 or more and strength 0 or more, got 1 and -0.5"),
        ({"strength": math.nan}, "every must be 1 or more and strength 0 or more, got 1 and nan"),
    ],
)
def test_what_pcr_refuses(options, message):
    with pytest.raises(ValueError, match=rf"^PCR: {message}"):
        PCR(**options)


def test_inputs_that_are_no_images_cannot_change_their_light():
    x = torch.randn(16, 12)
    model = ttaq.prepare(settle(Tied(), x), "w4a4")
    ttaq.calibrate(model, [x])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^PCR: the inputs hold no images \(N, C, H, W\) to perturb; choose another"):
        reconstruct(model, [x], pcr=PCR(perturbation="input"), **QUICK)
    assert_unchanged(model, before)
    for kind in ("step", "gauss", "drop"):
        reconstruct(copy.deepcopy(model), [x], pcr=PCR(perturbation=kind), **QUICK)


@pytest.mark.parametrize("when", [0, 4, 9])
@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_an_interrupt_leaves_no_perturbation(kind, when, monkeypatch):
    model, count = calibrated("resnet", "w3a4"), []
    before = snapshot(model)

    def interrupted(*args):
        count.append(1)
        if len(count) > when:
            raise KeyboardInterrupt
        return run_block(*args)

    monkeypatch.setattr(module, "run_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(model, [images()], pcr=PCR(perturbation=kind), statistics="batch", **QUICK)
    assert_unchanged(model, before)
    assert all(q.perturbation is None for q in model.modules() if isinstance(q, ActivationQuantizer))
