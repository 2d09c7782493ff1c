"""Bits a layer under a budget: the choice against brute force, the measurements against their definition."""

import itertools
import random

import pytest
import torch
from tiny import images, resnet, vit

import ttaq
from ttaq.allocation import Choice, allocate, choose

BATCHES = [images(8, seed=2), images(8, seed=3)]


def curves(seed, layers=4):
    """Make measured choices whose divergence falls with the bits, at random rates."""
    draw = random.Random(seed)
    made = []
    for number in range(layers):
        size, unrest = draw.randint(10, 100), draw.uniform(0.1, 10)
        made += [Choice(f"l{number}", bits, unrest * 4.0**-bits, size * bits) for bits in (2, 3, 4, 8)]
    return made


@pytest.mark.parametrize("seed", range(10))
def test_the_choice_is_the_best_of_all(seed):
    measured = curves(seed)
    by = [[one for one in measured if one.layer == f"l{n}"] for n in range(4)]
    least, most = (sum(f(c.cost for c in curve) for curve in by) for f in (min, max))
    for share in (0.1, 0.4, 0.8):
        budget = least + share * (most - least) + 0.01
        chosen = choose(measured, budget)
        best = min(
            sum(c.divergence for c in combination)
            for combination in itertools.product(*by)
            if sum(c.cost for c in combination) <= budget
        )
        assert sum(c.cost for c in chosen) <= budget
        assert sum(c.divergence for c in chosen) == pytest.approx(best)


def test_a_choice_that_costs_more_and_is_no_better_is_never_made():
    measured = [Choice("a", 2, 1.0, 1.0), Choice("a", 3, 1.2, 2.0), Choice("a", 4, 0.5, 3.0)]
    assert [choose(measured, budget)[0].bits for budget in (1.0, 2.5, 3.0, 9.0)] == [2, 2, 4, 4]


@pytest.mark.parametrize("build", [resnet, vit])
def test_a_larger_budget_buys_a_smaller_divergence(build):
    model = build()
    some = allocate(model, BATCHES, "w4a8", budget=10**9)
    costs = {one.layer: 0 for one in some.measured}
    for one in some.measured:
        costs[one.layer] = max(costs[one.layer], one.cost)
    total = sum(costs.values())
    small, large = (allocate(model, BATCHES, "w4a8", budget=share * total) for share in (0.6, 0.8))
    assert small.cost <= 0.6 * total
    assert large.cost <= 0.8 * total
    assert sum(c.divergence for c in large.chosen) < sum(c.divergence for c in small.chosen)
    assert {c.bits for c in some.chosen} == {8}
    report = ttaq.quantize(model, BATCHES, small.recipe, method="rtn").ttaq_report
    assert all(report["layers"][c.layer]["weight_bits"] == c.bits for c in small.chosen)


def test_bytes_are_those_of_the_packed_model():
    model = resnet()
    found = allocate(model, BATCHES, "w4a8", budget=10**9, widths=(4, 8))
    packed = ttaq.pack(ttaq.quantize(model, BATCHES, found.recipe, method="rtn"))
    words = sum(packed.ttaq_report["packed"].values())
    scales = sum(layer.scale.numel() * 8 for layer in packed.modules() if hasattr(layer, "words"))
    assert found.cost == words + scales


def test_divergence_is_that_of_one_rounded_layer():
    model = resnet()
    found = allocate(model, BATCHES, "w4a16", budget=10**9, widths=(3,))
    one = next(c for c in found.measured if c.layer == "layer2.0.conv1")
    recipe = ttaq.Recipe.parse("w3a16", overrides={"*": "w16a16", "layer2.0.conv1": "w3a16"})
    alone = ttaq.quantize(model, BATCHES, recipe, method="rtn")
    with torch.no_grad():
        p, q = (torch.cat([net(x) for x in BATCHES]).log_softmax(1) for net in (model, alone))
    assert one.divergence == pytest.approx((p.exp() * (p - q)).sum(1).mean().item(), rel=1e-4, abs=1e-7)


def test_seconds_are_measured_and_overrides_stay():
    recipe = ttaq.Recipe.parse("w4a8", overrides={"layer1.*": "w8a8"})
    found = allocate(resnet(), BATCHES, recipe, budget=60.0, cost="seconds", widths=(2, 8))
    assert all(one.cost > 0 for one in found.measured)
    assert not [one for one in found.measured if one.layer.startswith("layer1.")]
    assert found.recipe.specs("layer1.0.conv1")[0].bits == 8


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget": 10}, r"allocate: budget must be at least .* bytes, what the lowest widths take, got 10; raise it"),
        ({"budget": 1e9, "cost": "joules"}, r'allocate: cost must be "bytes" or "seconds", got \'joules\''),
        ({"budget": 1e9, "widths": (5,)}, r"allocate: widths must be among \(2, 3, 4, 8\), which pack, got \(5,\)"),
    ],
)
def test_wrong_calls_get_a_remedy(options, says):
    with pytest.raises(ValueError, match=says):
        allocate(resnet(), BATCHES, **options)
