"""Learned rounding: every backend against the reference, the reference against float64 and autograd."""

import pytest
import torch
from backends import assert_as_good, assert_same, device, parameters, run
from cases import cases
from ttaq.kernels import soft_round as sr

from ttaq import ops


@pytest.mark.parametrize(("backend", "case"), parameters("soft_round"))
def test_forward_is_as_good_as_the_reference(backend, case, poison):
    args = case.on(device(backend))
    got, plain, exact = run("soft_round", backend, args), sr.reference(*args), sr.reference(*_wide(args))
    assert got[0].stride() == torch.empty_like(args[0]).stride()
    assert_as_good(got[0], plain[0], exact[0])
    assert_as_good(got[1], plain[1], exact[1], torch.tensor(args[0].numel()))
    for first, second in zip(got, run("soft_round", backend, args), strict=True):
        assert_same(second, first)


@pytest.mark.parametrize(("backend", "case"), parameters("soft_round_backward"))
def test_backward_is_as_good_as_the_reference(backend, case, poison):
    args = case.on(device(backend))
    got = run("soft_round_backward", backend, args)
    plain, exact = sr.reference_backward(*args), sr.reference_backward(*_wide(args))
    assert got.stride() == torch.empty_like(args[3]).stride()
    assert_as_good(got, plain, exact)
    assert_same(run("soft_round_backward", backend, args), got)


def _wide(args):
    return tuple(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)


def test_triton_takes_every_case():
    pytest.importorskip("triton", reason="needs Triton")
    for op, refuses in (("soft_round", sr.refuses), ("soft_round_backward", sr.refuses_backward)):
        assert {refuses(*case.args) for case in cases(op)} == {None}


def test_other_dtypes_are_refused_by_name():
    w, v, *rest = cases("soft_round")[0].args
    assert sr.refuses(w.half(), v, *rest) == "w is torch.float16; the kernel takes float32"
    assert "torch.float16" in sr.refuses_backward(w.half(), torch.tensor(1.0), w, v, *rest)


def test_gradient_passes_gradcheck():
    w = torch.randn(4, 6, dtype=torch.float64)
    v = torch.linspace(-2, 2, 24, dtype=torch.float64).reshape(4, 6).requires_grad_()
    scale = torch.rand(4, dtype=torch.float64) * 0.2 + 0.3
    zero = torch.tensor([5.0, 6.0, 7.0, 8.0], dtype=torch.float64)
    beta = torch.tensor(3.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: ops.soft_round(w, v, scale, zero, beta, qmax=15, axis=0), (v,))


def test_saturated_rounding_is_rounding_and_costs_nothing():
    w, scale, zero, beta = torch.randn(5, 8), torch.tensor(0.1), torch.tensor(8.0), torch.tensor(2.0)
    up = torch.rand(5, 8) < 0.5
    y, penalty = ops.soft_round(w, torch.where(up, 50.0, -50.0), scale, zero, beta, qmax=15)
    code = torch.clamp(torch.floor(w / scale) + up + zero, 0, 15)
    assert_same(y, (code - zero) * scale)
    assert penalty.item() == 0.0


@pytest.mark.parametrize("beta", [2.0, 1.5, 20.0])
def test_undecided_rounding_pulls_nowhere_and_is_finite(beta):
    v = torch.zeros(3, 5, requires_grad=True)
    sharpness = torch.tensor(beta)
    w, scale, zero = torch.randn(3, 5), torch.tensor(0.3), torch.tensor(8.0)
    _, penalty = ops.soft_round(w, v, scale, zero, sharpness, qmax=15)
    (dv,) = torch.autograd.grad(penalty, v)
    assert penalty.item() == pytest.approx(15.0)
    assert dv.abs().max() < 1e-5
