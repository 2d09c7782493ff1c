"""The native loops of learned rounding on every instruction set of this processor."""

import pytest
import torch
from backends import assert_as_good, assert_same, run
from cases import cases
from ttaq.kernels import _library, _native
from ttaq.kernels import soft_round as sr

LEVELS = _native.LEVELS[: _native.LEVELS.index(_native.cpu_level() or "base") + 1]

pytestmark = pytest.mark.skipif(_native.library("cpu") is None, reason=str(_native.reason("cpu")))


@pytest.fixture(params=LEVELS, autouse=True)
def level(request, monkeypatch):
    monkeypatch.setattr(_library, "cpu_level", lambda: request.param)
    return request.param


def _wide(args):
    return tuple(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)


@pytest.mark.parametrize("case", cases("soft_round"), ids=lambda case: case.name)
def test_values_and_sums_are_as_good_as_those_of_the_reference(case, poison):
    got, plain = run("soft_round", "cpu", case.args), sr.reference(*case.args)
    exact = sr.reference(*_wide(case.args))
    assert_as_good(got[0], plain[0], exact[0])
    assert_as_good(got[1], plain[1], exact[1], torch.tensor(case.args[0].numel()))
    assert_as_good(got[2], plain[2], exact[2])


@pytest.mark.parametrize("case", cases("soft_round_backward"), ids=lambda case: case.name)
def test_gradients_are_as_good_as_those_of_the_reference(case, poison):
    plain, exact = sr.reference_backward(*case.args), sr.reference_backward(*_wide(case.args))
    assert_as_good(run("soft_round_backward", "cpu", case.args), plain, exact)


def test_decided_roundings_give_the_bits_of_the_reference():
    w, scale = torch.randn(40, 3000), torch.rand(40) * 0.2 + 0.05
    w[:, ::5] = (torch.round(w[:, ::5] * 9) * scale[:, None]).float()
    w[0, :4] = torch.tensor([torch.inf, -torch.inf, 3e38, -0.0])
    v = torch.where(torch.rand_like(w) < 0.5, 9.0, -9.0) * (1 + 10 * torch.rand_like(w))
    args = (w, v, scale, torch.randint(0, 16, (40,)).float(), torch.tensor(4.0), 0, 15, 0, 0, 0)
    y, penalty, _ = run("soft_round", "cpu", args)
    assert_same(y, sr.reference(*args)[0])
    assert penalty == 0


def _grid():
    """Every kind of v: the softer part densely, the clipped ends, and beyond where the exponential overflows."""
    return torch.cat([torch.linspace(-3, 3, 60_001), torch.linspace(-120, 120, 2401), torch.tensor([0.0, -0.0, 1e-30])])


@pytest.mark.parametrize("beta", [1.0, 2.0, 3.7, 20.0])
def test_the_functions_err_by_some_ulp_at_most(beta):
    v = _grid()
    one, none = torch.ones(()), torch.zeros(0)
    args = (torch.zeros_like(v), v, one, one * 0, one * beta, 0, 15, None, 0, 0)  # y = h
    h = sr.reference(*_wide(args))[0]
    assert (run("soft_round", "cpu", args)[0] - h).abs().max() <= 2e-7
    exact = sr.reference_backward(torch.zeros_like(v).double(), one.double(), none.double(), *_wide(args))
    plain = sr.reference_backward(torch.zeros_like(v), one, none, *args)
    got = run("soft_round_backward", "cpu", (torch.zeros_like(v), one, none, *args))
    assert_as_good(got, plain, exact)
    for i in range(0, len(v), 997):
        penalty = run("soft_round", "cpu", (args[0][i : i + 1], v[i : i + 1], *args[2:]))[1]
        assert abs(penalty - (1 - (2 * h[i] - 1).abs() ** beta)) <= 3e-7 * max(1, beta)


@pytest.mark.parametrize(("shape", "conv_groups"), [((3, 50_001), 0), ((70, 1500), 1), ((66, 20, 3, 3), 3)], ids=str)
def test_results_have_the_same_bits_for_any_number_of_threads(shape, conv_groups, level):
    w, v, grad = (torch.randn(shape) for _ in range(3))
    scale, one = torch.rand(shape[0]) * 0.2 + 0.05, torch.ones(())
    args = (w, v, scale, torch.full_like(scale, 7.0), one * 4, 0, 15, 0, 0, conv_groups)
    denergy, before, results = torch.randn(shape[1] * conv_groups), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            dv = run("soft_round_backward", "cpu", (grad, one, denergy, *args))
            results.append((*run("soft_round", "cpu", args), dv))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert_same(second, first)


def test_a_nan_stays_one_and_harms_no_other_element():
    w, v, grad = (torch.randn(2, 40) for _ in range(3))
    w[0, 3] = v[1, 5] = torch.nan
    scale, one = torch.full((2,), 0.1), torch.ones(())
    args = (w, v, scale, scale * 70, one * 2, 0, 15, 0, 0, 1)
    y, penalty, energy = run("soft_round", "cpu", args)
    assert y.isnan().nonzero().tolist() == [[0, 3], [1, 5]]
    assert penalty.isnan()
    assert energy.isnan().nonzero().flatten().tolist() == [3, 5]
    denergy = torch.zeros(40)
    got = run("soft_round_backward", "cpu", (grad, one, denergy, *args))
    torch.testing.assert_close(got, sr.reference_backward(grad, one, denergy, *args), equal_nan=True)


def test_what_the_kernel_does_not_take_is_refused_by_name():
    w, v, *rest = cases("soft_round")[0].args
    assert sr.refuses_cpu(w.half(), v, *rest) == "w is torch.float16; the kernel takes float32"
    assert "negated" in sr.refuses_cpu(torch._neg_view(w), v, *rest)
    sums = (torch.tensor(1.0), torch.ones(3))
    assert "negated" in sr.refuses_cpu_backward(torch._neg_view(w), *sums, w, v, *rest)
    assert "denergy is torch.float64" in sr.refuses_cpu_backward(w, sums[0], sums[1].double(), w, v, *rest)
