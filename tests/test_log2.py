"""Fake quantisation on the logarithmic grid: every backend against the reference, the reference against float64."""

import math

import pytest
import torch
from backends import assert_as_good, assert_same, device, parameters, run
from cases import cases
from ttaq.kernels import _native
from ttaq.kernels import log2 as lg

from ttaq import ops

LEVELS = _native.LEVELS[: _native.LEVELS.index(_native.cpu_level() or "base") + 1]


@pytest.mark.parametrize(("backend", "case"), parameters("log2_fake_quant"))
def test_forward_has_the_bits_of_the_reference(backend, case, poison):
    args = case.on(device(backend))
    y = run("log2_fake_quant", backend, args)
    assert_same(y, lg.reference(*args))
    assert_same(run("log2_fake_quant", backend, args), y)


@pytest.mark.parametrize(("backend", "case"), parameters("log2_codes"))
def test_codes_are_those_of_the_reference(backend, case, poison):
    args = case.on(device(backend))
    for got, wanted in zip(run("log2_codes", backend, args), lg.codes_reference(*args), strict=True):
        assert_same(got, wanted)


@pytest.mark.parametrize(("backend", "case"), parameters("log2_fake_quant_backward"))
def test_backward_is_exact_in_x_and_close_in_the_scale(backend, case, poison):
    args = case.on(device(backend))
    gradients = run("log2_fake_quant_backward", backend, args)
    _assert_gradients(gradients, args)
    for first, second in zip(gradients, run("log2_fake_quant_backward", backend, args), strict=True):
        assert_same(second, first)


def _assert_gradients(gradients, args):
    wanted = lg.reference_backward(*args)
    assert_same(gradients[0], wanted[0])
    grad, x, scale, _, roots = args
    ratio = lg._ratio(x, scale)
    terms = torch.where(lg._raw_code(ratio, roots) < 0, grad.double(), 0.0)
    terms = torch.where(ratio.isnan(), ratio.double(), terms)
    assert_as_good(gradients[1], wanted[1], terms.sum(), terms.abs().sum())


def test_programs_that_walk_several_tiles_agree(monkeypatch, poison):
    monkeypatch.setattr(lg, "TILE", 64)
    monkeypatch.setattr(lg, "ENOUGH_PROGRAMS", 2)
    case = next(c for c in cases("log2_fake_quant_backward") if c.name == "per_tensor-4100-f32-2")
    args = case.on(device("triton"))
    _assert_gradients(run("log2_fake_quant_backward", "triton", args), args)


@pytest.mark.skipif(_native.library("cpu") is None, reason=str(_native.reason("cpu")))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("roots", [1, 2])
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(roots, dtype, threads):
    generator, scale = torch.Generator().manual_seed(0), torch.tensor(0.9)
    x, grad = (torch.randn(40_001, generator=generator).mul(0.5).to(dtype) for _ in range(2))
    wanted = lg.reference_backward(grad, x, scale, 15, roots)
    sums = set()
    for level in LEVELS:
        for count in (1, 2, 5):
            threads(count)
            y, dx, dscale = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan), torch.empty(())
            _native.log2_fake_quant(x, y, scale, 15, roots, level=level)
            _native.log2_fake_quant_backward(grad, x, dx, scale, dscale, 15, roots, level=level)
            assert_same(y, lg.reference(x, scale, 15, roots))
            assert_same(dx, wanted[0])
            sums.add((level, dscale.item()))
    assert len(sums) == len(LEVELS)


@pytest.mark.parametrize("roots", [1, 2])
def test_codes_are_the_nearest_on_a_logarithmic_axis(roots):
    x = torch.rand(50_000, generator=torch.Generator().manual_seed(3)).pow(12)
    codes, nonfinite = ops.log2_codes(x, torch.tensor(1.0), qmax=15, roots=roots)
    exact = [min(15, max(0, round(-roots * math.log2(v)))) if v > 0 else 15 for v in x.tolist()]
    assert codes.tolist() == exact
    assert nonfinite == 0


@pytest.mark.parametrize("roots", [1, 2])
def test_zero_is_exact_and_one_is_exact_and_quantising_twice_changes_nothing(roots):
    scale = torch.tensor(1.0)
    y = ops.log2_fake_quant(torch.tensor([0.0, -1.0, 1.0, 5.0, 1e-30]), scale, qmax=7, roots=roots)
    assert y.tolist() == [0.0, 0.0, 1.0, 1.0, 0.0]
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(4)).pow(6)
    y = ops.log2_fake_quant(x, scale, qmax=15, roots=roots)
    assert torch.equal(ops.log2_fake_quant(y, scale, qmax=15, roots=roots), y)
    kept = y > 0
    error = (torch.log2(y[kept].double()) - torch.log2(x[kept].double())).abs().max()
    assert error <= 0.5 / roots + 1e-6


@pytest.mark.parametrize("roots", [1, 2])
def test_gradients_are_those_of_straight_through_autograd(roots):
    x = torch.rand(4000, generator=torch.Generator().manual_seed(5), dtype=torch.float64).pow(3) * 2
    leaves = [t.requires_grad_() for t in (x, torch.tensor(0.8, dtype=torch.float64))]
    raw = -roots * torch.log2(leaves[0] / leaves[1])
    code = raw + (raw.round() - raw).detach()
    code = torch.where(raw.round() < 0, 0.0, code)
    y = torch.where(raw.round() < 7, leaves[1] * 2 ** (-code / roots), 0.0)
    grad = torch.randn(4000, dtype=torch.float64)
    wanted = torch.autograd.grad(y, leaves, grad)
    for got, exact in zip(lg.reference_backward(grad, *leaves, 7, roots), wanted, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-6)
    single = [t.detach().float().requires_grad_() for t in leaves]
    y = ops.log2_fake_quant(*single, qmax=7, roots=roots)
    for got, exact in zip(torch.autograd.grad(y, single, grad.float()), wanted, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)


def test_four_bits_keep_what_a_uniform_grid_of_four_bits_zeroes():
    p = torch.randn(8, 197, 197, generator=torch.Generator().manual_seed(6)).mul(2).softmax(-1)
    uniform = ops.fake_quant(p, p.max() / 15, torch.tensor(0.0), qmin=0, qmax=15)
    logarithmic = ops.log2_fake_quant(p, torch.tensor(1.0), qmax=15)
    assert (uniform == 0).float().mean() > 0.9
    assert (logarithmic == 0).float().mean() < 0.1


def test_wrong_calls_are_refused_with_a_remedy():
    x = torch.rand(3)
    for grid in ({"qmax": 64}, {"qmax": 0}, {"qmax": 15, "roots": 3}):
        with pytest.raises(ValueError, match=r"^log2_fake_quant: wanted qmax from 1 to 63 .* use 15 and 1 for 4 bits$"):
            ops.log2_fake_quant(x, torch.tensor(1.0), **grid)
    with pytest.raises(ValueError, match=r"^log2_codes: scale wants shape \(\), got \(3,\); use"):
        ops.log2_codes(x, torch.ones(3), qmax=15)
    assert "torch.float64" in lg._refuses_tensors(x.double(), torch.tensor(1.0))
    assert "scale is torch.float64" in lg._refuses_tensors(x, torch.tensor(1.0).double())
