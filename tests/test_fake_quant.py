"""Fake quantisation: every backend against the reference, the reference against float64 and autograd."""

import pytest
import torch
from backends import assert_same, device, parameters, run
from cases import cases

from ttaq import dispatch, ops
from ttaq.kernels import fake_quant as fq
from ttaq.kernels._tiles import canonical, expand, reduce


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
        assert got.dtype == torch.float32
        _assert_as_good(got, plain, terms, case.args[-2], case.args[-1])
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


def _assert_as_good(got, plain, terms, axis, group):
    """Bound the error by twice that of plain float32 torch, plus one ulp of the terms' magnitude: they cancel."""
    exact = reduce(terms, axis, group)
    ulp = reduce(terms.abs(), axis, group) * torch.finfo(torch.float32).eps
    finite = exact.isfinite() & plain.isfinite()
    torch.testing.assert_close(got[~finite], plain[~finite], rtol=0, atol=0, equal_nan=True)
    error = (got.double() - exact).abs()[finite]
    assert (error <= 2 * (plain.double() - exact).abs()[finite] + ulp[finite]).all()
