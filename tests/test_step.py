"""The benchmark of a reconstruction step: both variants compute the same, and the row says so."""

import pytest
import torch
from torch import nn

from ttaq import ops
from ttaq.models import Layer


@pytest.fixture
def step(bench):
    return bench("step")


def _convolutions():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


@pytest.fixture(params=["attention", "convolutions"])
def subject(request, step):
    build, shape = {
        "attention": (lambda: nn.Sequential(Layer(16, 2)), (5, 16)),
        "convolutions": (_convolutions, (3, 6, 6)),
    }[request.param]
    return step.Subject(request.param, build, shape)


def test_both_variants_have_the_same_first_loss(step, subject):
    assert step.difference(subject, 4) < 1e-5


def test_both_variants_learn_alike(step, subject):
    stages = [step.Stage(subject, 4, drop=0.0) for _ in range(2)]
    for ours, theirs in zip(*_losses(stages[0].ours(), stages[1].composed()), strict=True):
        assert ours == pytest.approx(
            theirs, rel=1e-2
        )  # LSQ as published passes no gradient half a step beyond the range


def _losses(*variants):
    found = []
    for steps in variants:
        torch.manual_seed(3)
        found.append([next(steps).item() for _ in range(8)])
    return found


def test_a_row_names_the_rival_the_float_step_and_the_difference(step, subject, bench):
    names = ("commit", "dirty", "machine", "driver", "cuda", "torch", "triton")
    row = step.measure(subject, dict.fromkeys(names, "x"), batch=4, seconds=0.0)
    assert (row.op, row.rival) == ("reconstruction_step", "composed eager step")
    assert row.case == f"{subject.name}, W4A4, batch 4"
    assert row.ratio > 0
    assert row.percent_of_roofline > 0
    assert row.max_error < 1e-5
    assert "of the ceiling" in bench("tables").summary([row])


def test_the_composition_is_undone(step):
    before = ops.fake_quant, ops.perturbed_fake_quant, ops.soft_round
    with step.composed_ops():
        assert ops.fake_quant is not before[0]
    assert (ops.fake_quant, ops.perturbed_fake_quant, ops.soft_round) == before


def test_products_take_a_share(step, subject):
    assert 0 < step.products_share(subject, 4) < 1


def test_subjects_are_those_of_real_networks(step):
    for subject in step.subjects():
        assert subject.build()(torch.randn(1, *subject.shape)).ndim == len(subject.shape) + 1


def test_a_pass_is_timed_compiled_and_not(step, subject, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    assert list(step.compiled(subject, 4, 0.01)) == [
        f"{how}, {what}" for what in ("opaque", "composed") for how in ("eager", "compiled")
    ]
