"""ROID's weights, losses, statistics and correction, and the views and the optimizer, as the teachers have them."""

import math

import pytest
import torch
from tiny import calibrated, images, resnet, vit

import ttaq
from ttaq.adaptation import adapt
from ttaq.adaptation.ensemble import likelihood_ratio, symmetric_cross_entropy
from ttaq.adaptation.views import numbered


def test_roid_gives_equal_images_a_weight_of_one():
    adapter = adapt(vit(), "roid")
    weight, kept = adapter.method.weigh(torch.tensor([[1.0, 0, 0, 2, 0, 0]]).expand(4, -1))
    assert weight.tolist() == [1.0] * 4
    assert kept.all()
    assert adapter.method.frequency.sum().item() == pytest.approx(1)
    adapter.reset()
    weight, kept = adapter.method.weigh(torch.tensor([[0.0] * 6, [9.0, 0, 0, 0, 0, 0]]))
    assert weight.tolist() == pytest.approx([1.0, math.exp(3)])
    assert kept.tolist() == [False, True]


def test_roid_corrects_for_the_prior_of_the_images_that_are_finite():
    method = adapt(vit(), "roid").method
    logits = torch.tensor([[2.0, 0, 0], [1.0, 0, 0.5], [math.nan, 0, 0]])
    given, how = method.answer(logits)
    prior = logits[:2].softmax(1).mean(0)
    gamma = 0.5 / prior.max()
    expected = logits[:2].softmax(1) * (prior + gamma) / (1 + 3 * gamma)
    torch.testing.assert_close(given[:2].softmax(1), expected / expected.sum(1, keepdim=True))
    assert how == "corrected for the class prior of the batch"
    assert method.answer(logits[2:])[1] == ""
    assert method.answer(logits[:0])[0].shape == (0, 3)
    assert adapt(vit(), "roid", correct=False).method.answer(logits[:2])[0] is not None
    adapter = adapt(vit(), "roid")
    adapter(images(4))
    assert adapter.history[-1].returned == "logits, corrected for the class prior of the batch"


def test_losses_of_known_predictions_and_of_certain_ones():
    p = torch.tensor([[0.5, 0.25, 0.25]])
    expected = -(0.5 * math.log(3) * -2 * 0.25 / 0.5) + 0.0
    assert likelihood_ratio(p.log()).item() == pytest.approx(expected, abs=1e-6)
    q = torch.tensor([[0.25, 0.5, 0.25]])
    cross = -(0.5 * math.log(0.25) + 0.25 * math.log(0.5) + 0.25 * math.log(0.25))
    assert symmetric_cross_entropy(p.log(), q.log()).item() == pytest.approx(cross, abs=1e-6)
    certain = torch.tensor([[500.0, 0, 0]], requires_grad=True)
    loss = likelihood_ratio(certain) + symmetric_cross_entropy(certain, certain)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(certain.grad).all()


def test_views_are_seeded_and_leave_the_global_generator_alone():
    x, state = images(4), torch.get_rng_state()
    one, again, other = (adapt(vit(), "roid", seed=seed).method for seed in (3, 3, 4))
    a, b = one.view(x), one.view(x)
    assert not torch.equal(a, b)
    assert torch.equal(a, again.view(x))
    assert torch.equal(b, again.view(x))
    assert not torch.equal(a, other.view(x))
    assert torch.equal(state, torch.get_rng_state())
    assert len({numbered(seed, draw).initial_seed() for seed in range(9) for draw in range(99)}) == 9 * 99


def test_the_statistics_kept_are_those_of_the_images_not_of_their_views():
    roid, norm = (adapt(resnet(), method, statistics="ema", guard="finite") for method in ("roid", "norm"))
    roid.method.lr = 0.0
    roid.reset()
    for seed in range(4):
        roid(images(8, seed=seed))
        norm(images(8, seed=seed))
    tensors = roid.method.tensors()
    for name, moment in norm.method.tensors().items():
        torch.testing.assert_close(tensors[name], moment)


@pytest.mark.parametrize("method", ["cotta", "rotta"])
def test_a_students_scales_learn_at_rates_of_their_own(method):
    model = ttaq.pack(calibrated("resnet", "w4a4"))
    chosen = adapt(model, method, parameters="norm+activation_scales", lr=1e-2).method
    rates = {p: group["lr"] for group in chosen.optimizer.param_groups for p in group["params"]}
    assert rates.keys() == set(chosen.parameters.values())
    for name, parameter in chosen.parameters.items():
        expected = 1e-2 * parameter.item() if name.endswith("input_quantizer.scale") else 1e-2
        assert rates[parameter] == pytest.approx(expected)
