"""The domain bank: what opens a domain, what is stored, what a return brings back."""

import pytest
import torch
from test_adapter import cnn

from ttaq.adaptation import DomainBank, adapt
from ttaq.adaptation.bank import distance, signature_of


def domain(kind, seed, n=24):
    """Draw a batch of noisy pictures: plain, dark, or full of noise."""
    random = torch.Generator().manual_seed(seed)
    smooth = torch.nn.functional.interpolate(torch.randn(n, 3, 3, 3, generator=random), 12, mode="bilinear")
    return {
        "plain": smooth,
        "dark": 0.2 * smooth - 1.5,
        "noise": smooth + torch.randn(smooth.shape, generator=random),
    }[kind]


VISITS = [
    (kind, 10 * visit + i) for visit, kind in enumerate(["plain", "dark", "noise", "plain", "dark"]) for i in range(6)
]


def met(bank, visits=VISITS, live=None):
    live = {"w": torch.zeros(1)} if live is None else live
    events = []
    for step, (kind, seed) in enumerate(visits):
        changed, event = bank.turn(domain(kind, seed), live)
        events += [(step, changed, event, live["w"].item())] if event else []
        live["w"] += 1
    return events


def test_domains_are_told_apart_and_what_was_learned_in_one_comes_back():
    events = met(DomainBank())
    assert [(step, changed) for step, changed, *_ in events] == [(6, False), (12, False), (18, True), (24, True)]
    assert events[2][3] == 6  # the tensors at the end of the first visit of "plain"
    assert events[3][3] == 12
    assert "not met before" in events[0][2]
    assert "one returns" in events[2][2]


def test_a_bank_is_bounded_and_the_domain_unused_for_longest_goes():
    bank = DomainBank(1)
    events = met(bank)
    assert len(bank.entries) == 1
    assert not any(changed for _, changed, *_ in events)


def test_batches_that_are_not_finite_and_single_images_open_no_domain():
    bank = DomainBank()
    x = domain("plain", 0)
    for seed in range(4):
        bank.turn(domain("plain", seed), {})
    x[0, 0, 0, 0] = torch.nan
    assert bank.turn(x, {}) == (False, None)
    assert torch.isfinite(bank.signature).all()


def test_the_signature_tells_light_contrast_blur_and_noise():
    plain, dark, noise = (signature_of(domain(kind, 0)) for kind in ("plain", "dark", "noise"))
    again = signature_of(domain("plain", 1))
    near = distance(again, plain)
    assert min(distance(dark, plain), distance(noise, plain), distance(dark, noise)) > 4 * near
    assert signature_of(torch.randn(5, 7)).shape == (2, 7)


def test_a_bank_saves_and_resumes(tmp_path):
    one, two = DomainBank(), DomainBank()
    live, other = {"w": torch.zeros(1)}, {"w": torch.zeros(1)}
    met(one, VISITS[:15], live)
    two.load(one.save(tmp_path / "bank.pt"))
    other["w"].copy_(live["w"])
    assert met(one, VISITS[15:], live) == met(two, VISITS[15:], other)


@pytest.mark.parametrize("method", ["tent", "norm"])
def test_an_adapter_with_a_bank_resumes_bit_for_bit_and_says_what_it_met(method, tmp_path):
    one = adapt(cnn(), method, bank=4)
    for kind, seed in VISITS[:20]:
        one(domain(kind, seed)[..., :8, :8])
    two = adapt(cnn(), method, bank=4)
    two.resume(one.save(tmp_path / "state.pt"))
    for kind, seed in VISITS[20:]:
        x = domain(kind, seed)[..., :8, :8]
        assert torch.equal(one(x), two(x))
    said = [event for step in one.history for event in step.events if event.startswith("domain")]
    assert any("one returns" in event for event in said)
    one.reset()
    assert one.bank.entries == []
    with pytest.raises(ValueError, match="this Adapter guard; adapt with telemetry=0 and bank=4"):
        adapt(cnn(), method).load_state_dict(two.state_dict())


def test_wrong_arguments_are_refused():
    for wrong in ({"capacity": 0}, {"far": 1.0}, {"momentum": 0.0}):
        with pytest.raises(ValueError, match=r"^DomainBank: capacity must be at least 1"):
            DomainBank(**wrong)
