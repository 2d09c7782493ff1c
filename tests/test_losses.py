"""Losses of logits alone: ABL and DOT against straight lines of float64, evidence, and the prior of a batch."""

import math

import pytest
import torch

from ttaq.adaptation import ABL, DOT, Loss, entropy
from ttaq.adaptation.losses import batch_prior, choose_loss, evidence

FORMS = ["entropy", "pseudo", "debiased"]


def skewed(seed=0, n=64, classes=10, strength=4.0):
    """Make logits whose first class comes too often and whose last is unsure."""
    z = 2 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))
    z[:, 0] += strength
    return z


def gaussian(labels, classes, distance, seed=0):
    """Make the logits of the best classifier, under equal priors, of points about one corner for each class."""
    points = torch.randn(len(labels), classes, generator=torch.Generator().manual_seed(seed))
    points[torch.arange(len(labels)), labels] += distance
    return distance * points


def straight_shift(pi, kappa, seen, tau, beta):
    """Follow METHOD section 5 with the evidence of imbalance: (shift, clipped or not)."""
    classes = len(pi)
    times = 2 * seen * sum(p * math.log(classes * p) for p in pi.tolist()) / (classes - 1)
    weight = min(max((times - 2) / 2, 0), 1)
    a = tau * weight * torch.log(classes * pi) - beta * torch.log(kappa / kappa.mean())
    a = a - a.mean()
    return a.clip(-3, 3), bool((a.abs() > 3).any()), weight


def straight_terms(z, a, form):
    p = torch.exp(z) / torch.exp(z).sum(1, keepdim=True)
    if form == "debiased":
        q = torch.exp(z - a) / torch.exp(z - a).sum(1, keepdim=True)
        return -(q * torch.log(q)).sum(1)
    q = torch.exp(z + a) / torch.exp(z + a).sum(1, keepdim=True)
    return -((p.detach() if form == "pseudo" else p) * torch.log(q)).sum(1)


def straight_averages(pi, kappa, z, m):
    p = z.softmax(1)
    h = -(p * p.log()).sum(1)
    new = kappa.clone()
    for c in range(len(pi)):
        if p[:, c].sum() > 0.5:
            new[c] = m * kappa[c] + (1 - m) * (p[:, c] * h).sum() / p[:, c].sum() / math.log(len(pi))
    return m * pi + (1 - m) * p.mean(0), new


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("tau", "beta", "momentum"), [(1.0, 0.5, 0.95), (6.0, 1.0, 0.8), (0.0, 2.0, 0.9)])
def test_abl_equals_its_formulas_over_eight_batches(form, tau, beta, momentum):
    loss = ABL(form, tau=tau, beta=beta, momentum=momentum)
    pi, kappa, seen = torch.full((10,), 0.1).double(), torch.ones(10).double(), 0
    weights, clipped = [], []
    for seed in range(8):
        z = skewed(seed, n=64 if seed else 7).requires_grad_()
        exact = z.detach().double().requires_grad_()
        a, over, weight = straight_shift(pi, kappa, seen, tau, beta)
        expected, terms = straight_terms(exact, a, form), loss.terms(z)
        assert (terms.shape, terms.dtype) == ((len(z),), torch.float32)
        torch.testing.assert_close(loss.shift(z).double(), a, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(terms.double(), expected, rtol=1e-4, atol=1e-5)
        expected.mean().backward()
        terms.mean().backward()
        torch.testing.assert_close(z.grad.double(), exact.grad, rtol=1e-3, atol=1e-6)
        loss.observe(z.detach())
        pi, kappa = straight_averages(pi, kappa, exact.detach(), momentum)
        seen = min(seen + len(z), len(z) * (1 + momentum) / (1 - momentum))
        weights.append(weight)
        clipped.append(over)
    assert weights[0] == 0
    assert weights[-1] > 0
    assert any(clipped) == (tau == 6)
    memory = loss.state_dict()
    torch.testing.assert_close(memory["frequency"].double(), pi, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(memory["complexity"].double(), kappa, rtol=1e-5, atol=1e-7)
    assert memory["seen"].item() == pytest.approx(seen)


def test_dot_equals_deltas_formula():
    loss, pi = DOT(), torch.full((10,), 0.1).double()
    for seed in range(5):
        z = skewed(seed).requires_grad_()
        exact = z.detach().double().requires_grad_()
        weight = torch.stack([1 / pi[c] for c in exact.argmax(1)])
        expected = straight_terms(exact, torch.zeros(10), "debiased") * weight * len(z) / weight.sum()
        terms = loss.terms(z)
        torch.testing.assert_close(terms.double(), expected, rtol=1e-4, atol=1e-5)
        expected.mean().backward()
        terms.mean().backward()
        torch.testing.assert_close(z.grad.double(), exact.grad, rtol=1e-3, atol=1e-6)
        loss.observe(z.detach())
        pi = 0.95 * pi + 0.05 * exact.detach().softmax(1).mean(0)
    torch.testing.assert_close(loss.frequency.double(), pi, rtol=1e-5, atol=1e-7)
    assert loss.frequency[0] > 0.15  # so that the weights differed


@pytest.mark.parametrize("make", [*[lambda form=form: ABL(form) for form in FORMS], DOT, Loss], ids=[*FORMS, "dot", ""])
def test_the_first_batch_meets_plain_entropy(make):
    z = skewed()
    torch.testing.assert_close(make().terms(z), entropy(z))


def remembering(form, frequent=0.5, classes=10):
    """Make an ABL that has seen its first class too often."""
    loss = ABL(form)
    frequency = torch.full((classes,), (1 - frequent) / (classes - 1))
    frequency[0] = frequent
    loss.load_state_dict({"frequency": frequency, "complexity": torch.ones(classes), "seen": torch.tensor(5000.0)})
    return loss


def gradient(loss, z):
    z = z.clone().requires_grad_()
    loss.terms(z).sum().backward()
    return z.grad


@pytest.mark.parametrize("form", FORMS)
def test_a_step_makes_the_frequent_class_rarer_than_entropy_does(form):
    z = 0.5 * torch.randn(200, 10)
    loss = remembering(form)
    assert loss.shift(z)[0] > 1.5
    after, plain = (z - 0.5 * gradient(of, z) for of in (loss, Loss()))
    rarer = (plain.softmax(1) - after.softmax(1)).mean(0)
    assert rarer[0] > 1e-3
    assert rarer[0] > rarer[1:].max()


def test_the_frequent_class_loses_even_where_entropy_raises_it():
    """Entropy alone makes a class that leads lead by more; debiased, the runner-up is the leader."""
    z = torch.zeros(50, 10)
    z[:, 0], z[:, 1] = 2.0, 1.8
    before = z.softmax(1)[:, 0].mean()
    assert (z - gradient(Loss(), z)).softmax(1)[:, 0].mean() > before
    assert (z - gradient(remembering("debiased"), z)).softmax(1)[:, 0].mean() < before
    assert (z - gradient(remembering("pseudo"), z)).softmax(1)[:, 0].mean() < before


def test_the_gradient_of_the_entropy_form_is_its_formula_and_of_second_order():
    """Through p and through the logarithm the shift cancels to first order: a small one does next to nothing."""
    z, a = skewed().double(), straight_shift(*remembering("entropy").state_dict().values(), 1, 0.5)[0].double()
    p, q, u = z.softmax(1), (z + a).softmax(1), z + a
    expected = q - p - p * (u - (p * u).sum(1, keepdim=True))
    torch.testing.assert_close(gradient(remembering("entropy"), z.float()).double(), expected, rtol=1e-3, atol=1e-5)
    moved = {}
    for form in FORMS:
        for size in (1e-2, 1e-3):
            at = z.clone().requires_grad_()
            straight_terms(at, size * a, form).sum().backward()
            plain = z.clone().requires_grad_()
            straight_terms(plain, 0 * a, "pseudo" if form == "pseudo" else "entropy").sum().backward()
            moved[form, size] = (at.grad - plain.grad).norm().item()
    ratios = {form: moved[form, 1e-2] / moved[form, 1e-3] for form in FORMS}
    assert ratios["entropy"] == pytest.approx(100, rel=0.1)
    assert ratios["debiased"] == pytest.approx(10, rel=0.1)
    assert ratios["pseudo"] == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize("form", FORMS)
def test_terms_are_one_an_image_so_that_weights_and_masks_multiply_in(form):
    loss, z = remembering(form), skewed(3)
    mask, weight = torch.arange(64) % 3 == 0, torch.rand(64)
    assert torch.equal(loss.terms(z)[mask], loss.terms(z[mask]))
    at = z.clone().requires_grad_()
    (loss.terms(at) * weight * mask).sum().backward()
    torch.testing.assert_close(at.grad, gradient(loss, z) * (weight * mask)[:, None])


@pytest.mark.parametrize("classes", [5, 10, 100])
@pytest.mark.parametrize("images", [16, 64, 200, 2000])
def test_chance_is_hardly_ever_evidence(classes, images):
    draws = torch.randint(classes, (400, images))
    found = [evidence(torch.bincount(d, minlength=classes) / images, images).item() for d in draws]
    assert sum(e > 0.5 for e in found) <= 0.04 * len(found)
    assert sorted(found)[len(found) * 3 // 4] == 0


def test_skew_is_evidence_and_too_few_images_are_none():
    skew = torch.tensor([0.55, *[0.05] * 9])
    assert evidence(skew, 200).item() == 1
    assert evidence(skew, 2).item() == 0
    assert evidence(torch.eye(10)[3], 64).item() == 1
    assert evidence(torch.full((10,), 0.1), 1e6).item() == pytest.approx(0)
    for labels in (torch.randint(1000, (64,)), torch.randperm(1000)[:64]):
        assert evidence(torch.bincount(labels, minlength=1000) / 64, 64).item() == 0
        assert evidence(batch_prior(gaussian(labels, 1000, 5.0)), 64).item() == 0


def test_the_prior_of_a_batch_is_recovered():
    prior = torch.tensor([0.4, 0.2, 0.15, 0.1, 0.05, 0.04, 0.03, 0.02, 0.01, 0.0])
    labels = torch.multinomial(prior, 1000, replacement=True)
    found = batch_prior(gaussian(labels, 10, 3.5))
    assert evidence(found, 1000).item() == 1
    assert found.sum().item() == pytest.approx(1, abs=1e-5)
    assert (found - prior).abs().max() < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_balanced_batches_come_back_untouched_and_others_in_their_dtype(dtype):
    loss = ABL(correct=True)
    z = gaussian(torch.arange(200) % 10, 10, 2.5).to(dtype)
    given, how = loss.answer(z)
    assert torch.equal(given, z)
    assert how == ""
    given, how = loss.answer(z[z[:, :2].argmax(1) == 0][:100] + 4 * torch.eye(10)[0].to(dtype))
    assert (given.dtype, how) == (dtype, "adjusted to the class prior of the batch")
    assert ABL().answer(given)[0] is given


@pytest.mark.parametrize("seed", range(5))
def test_correction_helps_a_correlated_batch(seed):
    labels = torch.multinomial(torch.tensor([0.6, 0.3, 0.1, *[0.0] * 7]), 200, replacement=True)
    z = gaussian(labels, 10, 1.5, seed)
    given, _ = ABL(correct=True).answer(z)
    before, after = ((of.argmax(1) == labels).float().mean() for of in (z, given))
    assert after > before + 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_in_float32(dtype):
    for make in (lambda: ABL("entropy"), ABL, DOT):
        half, full = make(), make()
        for seed in range(3):
            z = skewed(seed).to(dtype)
            assert torch.equal(half.terms(z), full.terms(z.float()))
            half.observe(z)
            full.observe(z.float())
        assert all(v.dtype == torch.float32 for v in half.state_dict().values())
        assert all(torch.equal(v, full.state_dict()[k]) for k, v in half.state_dict().items())


@pytest.mark.parametrize("make", [lambda: ABL(correct=True), DOT, Loss])
def test_one_image_and_none(make):
    loss = make()
    for z in (skewed(n=1), skewed(n=0)):
        assert loss.terms(z).shape == (len(z),)
        given, how = loss.answer(z)
        assert torch.equal(given, z)
        assert how == ""
    loss.observe(skewed(n=1))
    assert torch.isfinite(loss.terms(skewed(n=1))).all()


def test_averages_follow_the_logits_to_another_device():
    for loss in (ABL(), DOT()):
        loss.observe(skewed())
        assert loss.terms(skewed().to("meta")).device.type == "meta"
        loss.observe(skewed().to("meta"))
        assert loss.frequency.device.type == "meta"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ABL("median"), "ABL: form must be one of entropy, pseudo, debiased, got 'median'"),
        (lambda: ABL(momentum=1.0), "ABL: momentum must lie in 0 to below 1, got 1.0"),
        (lambda: DOT(-0.1), "DOT: momentum must lie in 0 to below 1, got -0.1"),
        (lambda: choose_loss("able"), "one of entropy, abl, abl-corrected, dot or a Loss.*, got 'able'"),
        (lambda: choose_loss(ABL), "or a Loss such as ABL.*got <class"),
        (lambda: choose_loss(["abl"]), "got .'abl'"),
        (lambda: DOT().load_state_dict({"frequency": 0, "complexity": 0, "seen": 0}), "complexity, seen.*loss 'dot'"),
        (lambda: ABL().load_state_dict({"frequency": torch.ones(3)}), "remembers frequency, which the loss 'abl'"),
        (lambda: Loss().load_state_dict({"frequency": torch.ones(3)}), "the loss 'entropy' does not"),
    ],
)
def test_refusals(make, says):
    with pytest.raises(ValueError, match=says):
        make()
