"""Fake quantisation: every backend against the reference, the reference against float64 and autograd."""

import pytest
import torch
from backends import assert_as_good, assert_same, device, parameters, run
from cases import cases
from ttaq.kernels import fake_quant as fq
from ttaq.kernels._tiles import expand, reduce

from ttaq import dispatch, ops


@pytest.mark.parametrize(("backend", "case"), parameters("fake_quant"))
def test_forward_has_the_bits_of_the_reference(backend, case, poison):
    args = case.on(device(backend))
    y = run("fake_quant", backend, args)
    assert_same(y, fq.reference(*args))
    assert_same(run("fake_quant", backend, args), y)


@pytest.mark.parametrize(("backend", "case"), parameters("fake_quant_backward"))
def test_backward_is_exact_in_x_and_close_in_the_scales(backend, case, poison):
    args = case.on(device(backend))
    gradients = run("fake_quant_backward", backend, args)
    wanted = fq.reference_backward(*args)
    assert_same(gradients[0], wanted[0])
    for got, plain, terms in zip(gradients[1:], wanted[1:], _terms(*args), strict=True):
        axis, group = args[-2:]
        assert_as_good(got, plain, reduce(terms, axis, group), reduce(terms.abs(), axis, group))
    for first, second in zip(gradients, run("fake_quant_backward", backend, args), strict=True):
        assert_same(second, first)


def _terms(grad, x, scale, zero, qmin, qmax, axis, group):
    """Return the float64 terms of dscale and dzero: the products of the exact float32 factors."""
    step = expand(scale, x, axis, group)
    origin = torch.round(expand(zero, x, axis, group)).float()
    ratio = x.float() / step
    code = torch.round(ratio) + origin
    inside = (code >= qmin) & (code <= qmax)
    factor = torch.where(inside, torch.round(ratio) - ratio, torch.clamp(code, qmin, qmax) - origin)
    return grad.double() * factor.double(), torch.where(inside, 0.0, -grad.double() * step.double())


@pytest.mark.parametrize(
    "name", ["long_rows-f32", "rows-f32", "columns-f32", "images-channels_last-f32", "per_tensor-4100-f32"]
)
def test_programs_that_walk_several_tiles_agree(name, monkeypatch, poison):
    monkeypatch.setattr(fq, "BACKWARD_TILE", 64)
    monkeypatch.setattr(fq, "ENOUGH_PROGRAMS", 2)
    case = next(c for c in cases("fake_quant_backward") if c.name == name)
    args = case.on(device("triton"))
    wanted = fq.reference_backward(*args)
    gradients = run("fake_quant_backward", "triton", args)
    assert_same(gradients[0], wanted[0])
    for got, plain, terms in zip(gradients[1:], wanted[1:], _terms(*args), strict=True):
        assert_as_good(got, plain, reduce(terms, *args[-2:]), reduce(terms.abs(), *args[-2:]))


def test_triton_takes_every_case():
    pytest.importorskip("triton", reason="needs Triton")
    for op, refuses in (("fake_quant", fq.refuses), ("fake_quant_backward", fq.refuses_backward)):
        assert {refuses(*case.args) for case in cases(op)} == {None}


def test_other_dtypes_are_refused_by_name():
    x, scale, zero = torch.ones(3, dtype=torch.float64), torch.tensor(0.1), torch.tensor(0)
    assert "torch.float64" in fq._refuses_tensors(x, scale, zero.int())
    assert "torch.int64" in fq._refuses_tensors(x.float(), scale, zero)
    if "cpu" in [i.name for i in dispatch.OPS["fake_quant"].implementations]:
        with dispatch.backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu' is forced and refuses"):
            ops.fake_quant(x, scale, zero.int(), qmin=0, qmax=15)


def _straight_through(x, scale, zero, qmin, qmax, axis, group):
    """Fake-quantise in differentiable torch, letting gradients through what is rounded and not through what is cut."""

    def rounded(value):  # value + (round(value) - value).detach(), but exactly a whole number
        return torch.round(value).detach() + (value - value.detach())

    step, origin = expand(scale, x, axis, group), rounded(expand(zero, x, axis, group))
    code = rounded(x / step) + origin
    code = torch.where(code < qmin, qmin, torch.where(code > qmax, qmax, code))  # clamp has no gradient at its bounds
    return (code - origin) * step


@pytest.mark.parametrize(
    "name", ["per_tensor-f32", "rows-f32", "images-channels_last-f32", "groups-f32", "per_token-f32"]
)
def test_gradients_are_those_of_straight_through_autograd(name):
    x, scale, zero, *grid = next(c.args for c in cases("fake_quant") if c.name == f"{name}-learned_zero")
    leaves = [t.double().requires_grad_() for t in (x, scale, zero)]
    grad = torch.randn(x.shape, dtype=torch.float64)
    wanted = torch.autograd.grad(_straight_through(*leaves, *grid), leaves, grad)
    for got, exact in zip(fq.reference_backward(grad, *leaves, *grid), wanted, strict=True):
        torch.testing.assert_close(got, exact)
    leaves = [t.clone().requires_grad_() for t in (x, scale, zero)]
    y = ops.fake_quant(*leaves, qmin=grid[0], qmax=grid[1], axis=grid[2], group=grid[3])
    for got, exact in zip(torch.autograd.grad(y, leaves, grad.float()), wanted, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [c for c in cases("fake_quant") if "not_finite" not in c.name], ids=lambda c: c.name)
def test_quantising_twice_changes_nothing_and_the_error_is_half_a_step(case):
    x, scale, zero, qmin, qmax, axis, group = case.args
    y = fq.reference(x.float(), *case.args[1:])
    torch.testing.assert_close(fq.reference(y, *case.args[1:]), y)
    step, origin = expand(scale, x, axis, group), expand(zero, x, axis, group).round()
    inside = (x / step >= qmin - origin) & (x / step <= qmax - origin)
    assert ((y - x.float()).abs()[inside] <= (step * 0.5 * (1 + 1e-5)).expand_as(y)[inside]).all()


@pytest.mark.gpu
def test_addresses_go_beyond_four_gibibytes():
    x = torch.empty(2**31 + 4096, device="cuda", dtype=torch.bfloat16)
    x[-4096:] = torch.randn(4096, device="cuda")
    args = (torch.tensor(0.1, device="cuda"), torch.tensor(3.0, device="cuda"), 0, 15, None, 0)
    assert_same(run("fake_quant", "triton", (x, *args))[-4096:], fq.reference(x[-4096:], *args))
