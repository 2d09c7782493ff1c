"""Learned rounding: every backend against the reference, the reference against float64 and autograd."""

import pytest
import torch
from backends import assert_as_good, assert_same, device, parameters, run
from cases import cases
from ttaq.kernels import soft_round as sr
from ttaq.kernels._tiles import expand

from ttaq import ops


@pytest.mark.parametrize(("backend", "case"), parameters("soft_round"))
def test_forward_is_as_good_as_the_reference(backend, case, poison):
    args = case.on(device(backend))
    got, plain, exact = run("soft_round", backend, args), sr.reference(*args), sr.reference(*_wide(args))
    assert got[0].stride() == torch.empty_like(args[0]).stride()
    assert_as_good(got[0], plain[0], exact[0])
    assert_as_good(got[1], plain[1], exact[1], torch.tensor(args[0].numel()))
    assert_as_good(got[2], plain[2], exact[2])
    for first, second in zip(got, run("soft_round", backend, args), strict=True):
        assert_same(second, first)


@pytest.mark.parametrize(("backend", "case"), parameters("soft_round_backward"))
def test_backward_is_as_good_as_the_reference(backend, case, poison):
    args = case.on(device(backend))
    got = run("soft_round_backward", backend, args)
    plain, exact = sr.reference_backward(*args), sr.reference_backward(*_wide(args))
    assert got.stride() == torch.empty_like(args[4]).stride()
    assert_as_good(got, plain, exact)
    assert_same(run("soft_round_backward", backend, args), got)


def _wide(args):
    return tuple(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)


MEASURED = [case for case in cases("soft_round") if case.name.startswith("energy")]


def _composed(w, v, scale, zero, beta, qmin, qmax, axis, group, conv_groups):
    """Soften in differentiable torch, and measure the columns of each group of a convolution one by one."""
    h = torch.clamp(torch.sigmoid(v) * 1.2 - 0.1, 0, 1)
    step, origin = expand(scale, w, axis, group), expand(zero, w, axis, group)
    y = (torch.clamp(torch.floor(w / step) + h + origin, qmin, qmax) - origin) * step
    groups = y.tensor_split(conv_groups)
    energy = [group[:, i].square().sum() for group in groups for i in range(w.shape[1])]
    return y, (1 - (2 * h - 1).abs() ** beta).sum(), torch.stack(energy)


@pytest.mark.parametrize("case", MEASURED, ids=lambda case: case.name)
def test_energies_and_their_gradients_are_those_of_autograd(case):
    w, v, scale, zero, beta, _, qmax, axis, group, conv_groups = args = _wide(case.args)
    v.requires_grad_()
    wanted = _composed(*args)
    options = {"qmax": qmax, "axis": axis, "group": group, "conv_groups": conv_groups}
    got = ops.soft_round(w, v, scale, zero, beta, **options)
    grads = [torch.randn_like(t) for t in wanted]
    for ours, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, exact)
    wanted = torch.autograd.grad(wanted, v, grads)[0]
    torch.testing.assert_close(torch.autograd.grad(got, v, grads)[0], wanted)
    plain = v.detach().float().requires_grad_()
    got = ops.soft_round(case.args[0], plain, *case.args[2:5], **options)
    dv = torch.autograd.grad(got, plain, [g.float() for g in grads])[0]
    torch.testing.assert_close(dv.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [c for c in MEASURED if c.args[0].numel()], ids=lambda case: case.name)
def test_measuring_changes_neither_the_weight_nor_the_penalty(case):
    for backend in ("triton", "cpu", "reference"):
        args = case.on(device(backend))
        y, penalty, energy = run("soft_round", backend, args)
        alone = run("soft_round", backend, (*args[:-1], 0))
        assert_same(alone[0], y)
        torch.testing.assert_close(alone[1], penalty)
        assert energy.shape == (args[-1] * args[0].shape[1],)
        assert alone[2].shape == (0,)


@pytest.mark.parametrize("name", ["energy-conv", "energy-linear-per_tensor", "energy-linear-groups"])
def test_programs_that_walk_several_tiles_agree(name, monkeypatch, poison):
    monkeypatch.setattr(sr, "TILE", 32)
    monkeypatch.setattr(sr, "WIDTH", 16)
    monkeypatch.setattr(sr, "ENOUGH_PROGRAMS", 2)
    case = next(c for c in MEASURED if c.name == name)
    args = case.on(device("triton"))
    got, plain, exact = run("soft_round", "triton", args), sr.reference(*args), sr.reference(*_wide(args))
    assert_as_good(got[0], plain[0], exact[0])
    assert_as_good(got[2], plain[2], exact[2])


@pytest.mark.parametrize(("shape", "conv_groups"), [((4,), 1), ((4, 3), 3), ((4, 3), -2)])
def test_a_weight_without_such_groups_is_refused(shape, conv_groups):
    w, scale = torch.ones(shape), torch.tensor(0.1)
    with pytest.raises(ValueError, match=rf"^soft_round: w wants shape \(O, I, ...\).*{conv_groups}.*; use 1 for"):
        ops.soft_round(w, w, scale, scale, scale, qmax=15, conv_groups=conv_groups)


def test_triton_takes_every_case():
    pytest.importorskip("triton", reason="needs Triton")
    for op, refuses in (("soft_round", sr.refuses), ("soft_round_backward", sr.refuses_backward)):
        assert {refuses(*case.args) for case in cases(op)} == {None}


def test_other_dtypes_are_refused_by_name():
    w, v, *rest = cases("soft_round")[0].args
    assert sr.refuses(w.half(), v, *rest) == "w is torch.float16; the kernel takes float32"
    assert "grad is torch.float16" in sr.refuses_backward(w.half(), torch.tensor(1.0), torch.ones(3), w, v, *rest)
    assert "denergy is torch.float64" in sr.refuses_backward(w, torch.tensor(1.0), torch.ones(3).double(), w, v, *rest)


def test_gradient_passes_gradcheck():
    w = torch.randn(4, 6, dtype=torch.float64)
    v = torch.linspace(-2, 2, 24, dtype=torch.float64).reshape(4, 6).requires_grad_()
    scale = torch.rand(4, dtype=torch.float64) * 0.2 + 0.3
    zero = torch.tensor([5.0, 6.0, 7.0, 8.0], dtype=torch.float64)
    beta = torch.tensor(3.0, dtype=torch.float64)
    for conv_groups in (0, 1, 2):
        options = {"qmax": 15, "axis": 0, "conv_groups": conv_groups}
        assert torch.autograd.gradcheck(lambda v: ops.soft_round(w, v, scale, zero, beta, **options), (v,))  # noqa: B023


def test_saturated_rounding_is_rounding_and_costs_nothing():
    w, scale, zero, beta = torch.randn(5, 8), torch.tensor(0.1), torch.tensor(8.0), torch.tensor(2.0)
    up = torch.rand(5, 8) < 0.5
    y, penalty, energy = ops.soft_round(w, torch.where(up, 50.0, -50.0), scale, zero, beta, qmax=15)
    code = torch.clamp(torch.floor(w / scale) + up + zero, 0, 15)
    assert_same(y, (code - zero) * scale)
    assert penalty.item() == 0.0
    assert (energy.shape, energy.dtype) == ((0,), torch.float32)


@pytest.mark.parametrize("beta", [2.0, 1.5, 20.0])
def test_undecided_rounding_pulls_nowhere_and_is_finite(beta):
    v = torch.zeros(3, 5, requires_grad=True)
    sharpness = torch.tensor(beta)
    w, scale, zero = torch.randn(3, 5), torch.tensor(0.3), torch.tensor(8.0)
    _, penalty, _ = ops.soft_round(w, v, scale, zero, sharpness, qmax=15)
    (dv,) = torch.autograd.grad(penalty, v)
    assert penalty.item() == pytest.approx(15.0)
    assert dv.abs().max() < 1e-5
