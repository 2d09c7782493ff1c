import pytest
import torch

from ttaq.distances import softened_divergence, squared_distance


@pytest.mark.parametrize(("shape", "channels"), [((3, 4, 5, 6), 1), ((3, 7, 4), 2), ((5, 4), 1), ((2, 3, 4, 5, 6), 4)])
def test_squared_errors_are_summed_over_channels_and_averaged_over_the_rest(shape, channels):
    output, target = torch.randn(2, *shape)
    by_hand = (output.double() - target.double()) ** 2
    wanted = by_hand.sum().item() / (output.numel() // shape[channels])
    assert squared_distance(output, target).item() == pytest.approx(wanted, rel=1e-6)
    assert squared_distance(output, output).item() == 0


def test_half_precision_is_compared_in_float32():
    output, target = (200 * torch.randn(2, 4, 8, 3, 3)).half()
    distance = squared_distance(output, target)
    assert distance.dtype == torch.float32
    assert distance.item() == pytest.approx(squared_distance(output.double(), target.double()).item(), rel=1e-6)


def softened(v, temperature):
    e = (v.double() / temperature).exp()
    return e / e.sum(-1, keepdim=True)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_divergence_is_that_of_the_softened_predictions(temperature):
    target, logits = 3 * torch.randn(2, 5, 7)
    p, q = softened(target, temperature), softened(logits, temperature)
    wanted = temperature**2 * (p * (p / q).log()).sum(1).mean().item()
    assert softened_divergence(target, logits, temperature).item() == pytest.approx(wanted, rel=1e-5)
    assert softened_divergence(target + 2, logits - 1, temperature).item() == pytest.approx(wanted, rel=1e-4)
    assert softened_divergence(logits, logits, temperature).item() == 0


def test_only_the_logits_learn_from_the_divergence():
    target, logits = (v.requires_grad_() for v in 3 * torch.randn(2, 5, 7))
    softened_divergence(target, logits, 4.0).backward()
    assert target.grad is None
    wanted = 4 * (softened(logits.detach(), 4) - softened(target.detach(), 4)) / 5
    torch.testing.assert_close(logits.grad.double(), wanted, rtol=1e-5, atol=1e-7)


def test_the_divergence_survives_logits_that_are_far_apart():
    target, logits = torch.tensor([[1e4, 0.0, -1e4]]), torch.tensor([[-1e4, 0.0, 1e4]])
    assert softened_divergence(target, logits, 1.0).item() == pytest.approx(2e4)
    assert softened_divergence(target.half(), logits.half(), 1.0).dtype == torch.float32
