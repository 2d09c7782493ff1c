"""Perturbed fake quantisation: every backend against the reference, the numbers against their laws, the gradients."""

import pytest
import torch
from backends import assert_as_good, assert_same, device, everywhere, parameters, run
from cases import cases
from ttaq.kernels import _native
from ttaq.kernels import fake_quant as fq
from ttaq.kernels import perturb as pt
from ttaq.kernels._tiles import expand

from ttaq import ops
from ttaq.declarations import RAW

FINE = (torch.tensor(2.0**-12), torch.tensor(2.0**20))  # a grid so fine that the perturbation can be read off it
GRID = {"qmin": 0, "qmax": 15}
LEVELS = _native.LEVELS[: _native.LEVELS.index(_native.cpu_level() or "base") + 1]


@pytest.mark.parametrize(("backend", "case"), parameters("perturbed_fake_quant"))
def test_forward_has_the_bits_of_the_reference(backend, case, poison):
    args = case.on(device(backend))
    y = run("perturbed_fake_quant", backend, args)
    assert_same(y, pt.reference(*args))
    assert_same(run("perturbed_fake_quant", backend, args), y)


@pytest.mark.parametrize(("backend", "case"), parameters("perturbed_fake_quant_backward"))
def test_backward_is_exact_in_x_and_close_in_the_scale(backend, case, poison):
    args = case.on(device(backend))
    gradients = run("perturbed_fake_quant_backward", backend, args)
    _assert_gradients(gradients, args)
    for first, second in zip(gradients, run("perturbed_fake_quant_backward", backend, args), strict=True):
        assert_same(second, first)


def _assert_gradients(gradients, args):
    wanted = pt.reference_backward(*args)
    assert_same(gradients[0], wanted[0])
    for got, plain, terms in zip(gradients[1:], wanted[1:], _terms(*args), strict=True):
        assert_as_good(got, plain, terms.sum(), terms.abs().sum())


def _terms(grad, x, scale, zero, spread, seed, qmin, qmax, axis, kind):
    """Return the float64 terms of dscale and dzero: the products of the exact float32 factors."""
    wide, kept = pt._perturbed(x, scale, spread, seed, axis, kind)
    ratio, origin = wide / scale, torch.round(zero).float()
    code = torch.round(ratio) + origin
    inside = (code >= qmin) & (code <= qmax)
    factor = torch.where(inside, torch.round(ratio) - ratio, torch.clamp(code, qmin, qmax) - origin).double()
    terms = grad.double() * factor, torch.where(inside, 0.0, -grad.double() * scale.double())
    return [torch.where(kept, 0.0, t) for t in terms]


@pytest.mark.parametrize("kind", pt.KINDS)
def test_programs_that_walk_several_tiles_agree(kind, monkeypatch, poison):
    monkeypatch.setattr(pt, "CALLS", 32)
    monkeypatch.setattr(pt, "ENOUGH_PROGRAMS", 2)
    case = next(c for c in cases("perturbed_fake_quant_backward") if c.name == f"{kind}-per_tensor-4100-f32")
    args = case.on(device("triton"))
    _assert_gradients(run("perturbed_fake_quant_backward", "triton", args), args)


def test_every_kernel_takes_every_case():
    for op, refusals in (
        ("perturbed_fake_quant", [pt.refuses, pt.refuses_cpu]),
        ("perturbed_fake_quant_backward", [pt.refuses_backward, pt.refuses_cpu_backward]),
    ):
        whys = (pt.refuses_triton(), _native.reason("cpu"))
        for refuses, why in zip(refusals, whys, strict=True):
            assert {refuses(*case.args) for case in cases(op)} == {why}


def test_other_dtypes_are_refused_by_name():
    x, scale, seed = torch.ones(3), torch.tensor(0.1), torch.tensor(1)
    assert "x is torch.float64" in pt._refuses_tensors(x.double(), scale, scale, scale, seed)
    assert "zero is torch.int64" in pt._refuses_tensors(x, scale, seed, scale, seed)
    assert "spread is torch.float64" in pt._refuses_tensors(x, scale, scale, scale.double(), seed)
    assert "seed is torch.int32; the kernel takes torch.int64" in pt._refuses_tensors(x, *[scale] * 3, seed.int())


# The numbers


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    assert pt.philox(counter, key) == words  # of Python's integers, and of int64, which wraps
    wide = [tuple(torch.tensor(v) for v in values) for values in (counter, key)]
    assert tuple(int(w) for w in pt.philox(*wide)) == words


def test_an_element_has_the_number_that_the_docstring_gives_it():
    seed = torch.tensor((5 << 32) + 7)
    for kind, slots in (("drop", 8), ("gauss", 4)):
        found = pt.numbers(seed, 600, kind)
        for e in (0, 31, 32, 255, 256, 599):
            slot = e // 32 % slots
            word = pt.philox((e // (32 * slots) * 32 + e % 32, 0, 0, 0), (7, 5))[slot * 4 // slots]
            wanted = sum(word.to_bytes(4)) if kind == "gauss" else word >> 16 * (slot % 2) & 0xFFFF
            assert found[e] == wanted


def _fast(*args):
    """Give the outputs of the reference and of what runs here by itself, which is not the interpreter."""
    return pt.reference(*args), RAW.perturbed_fake_quant(*args)


def test_gauss_has_mean_0_and_variance_1():
    count = 1 << 20
    spread = torch.tensor(1.0)
    for n in _fast(torch.zeros(count), *FINE, spread, torch.tensor(11), 0, 1 << 21, None, "gauss"):
        assert abs(n.mean()) < 4 / count**0.5
        assert abs(n.var() - 1) < 4 * (2 / count) ** 0.5
        kurtosis = (n**4).mean()  # of a sum of four uniform numbers: 3 - 1.2 / 4
        assert 2.68 < kurtosis < 2.72
        assert abs((n[1:] * n[:-1]).mean()) < 4 / count**0.5
        assert abs((n[128:] * n[:-128]).mean()) < 4 / count**0.5
    assert abs(pt.UNIT * 21845**0.5 - 1) < 2**-24
    assert torch.tensor(pt.UNIT).item() == pt.UNIT


def test_step_is_uniform_over_one_step():
    count, scale = 1 << 20, torch.tensor(1.0)
    number = pt.numbers(torch.tensor(4), count, "step")
    assert (number.min(), number.max()) == (0, 65535)
    u = number.double() / 65536 - 0.5
    assert abs(u.mean()) < 4 * (1 / 12 / count) ** 0.5
    assert abs(u.var() - 1 / 12) < 4 * (1 / 180 / count) ** 0.5
    x = torch.full((count,), 0.25)  # a quarter above 0: rounds up where u reaches a quarter
    for y in _fast(x, scale, scale, scale, torch.tensor(4), 0, 3, None, "step"):
        assert torch.equal(y, (u > 0.25).float())


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.5, 0.99, 1.0])
def test_drop_drops_a_share(spread):
    x, count = torch.full((1 << 20,), 0.1), 1 << 20
    scale, seed = torch.tensor(1.0), torch.tensor(9)
    for y in _fast(x, scale, scale, torch.tensor(spread), seed, 0, 3, None, "drop"):
        share = (y == x).double().mean().item()
        assert abs(share - spread) <= 4 * (spread * (1 - spread) / count) ** 0.5 + 2**-16 * (0 < spread < 1)


def test_dropping_nothing_is_fake_quant_and_dropping_all_is_nothing():
    scale, zero, seed = torch.tensor(0.1), torch.tensor(7.0), torch.tensor(5)
    x = torch.cat([torch.randn(5000), torch.tensor([torch.nan, torch.inf, -torch.inf])])
    grad = torch.randn_like(x)
    plain = (x, scale, zero, 0, 15, None, 0)
    for spread, kind in ((0.0, "drop"), (0.0, "step"), (0.0, "gauss"), (1.0, "drop")):
        rest = (scale, zero, torch.tensor(spread), seed, 0, 15, None, kind)
        for _, y in everywhere("perturbed_fake_quant", x, *rest):
            assert_same(y, fq.reference(*plain) if spread == 0 else x)
        for _, gradients in everywhere("perturbed_fake_quant_backward", grad, x, *rest):
            if spread == 0:
                assert_same(gradients[0], fq.reference_backward(grad, *plain)[0])
            else:
                assert_same(gradients[0], grad)
                assert gradients[1] == gradients[2] == 0


@pytest.mark.parametrize("kind", pt.KINDS)
def test_a_seed_repeats_and_other_seeds_differ(kind):
    seeds = (0, 1, -1, 1 << 32, (1 << 63) - 1)
    first = [pt.numbers(torch.tensor(seed), 4096, kind) for seed in seeds]
    for i, one in enumerate(first):
        assert torch.equal(one, pt.numbers(torch.tensor(seeds[i]), 4096, kind))
        assert all((one == other).float().mean() < 0.01 for other in first[:i])
    x, scale = torch.randn(500), torch.tensor(0.1)
    seed = torch.tensor(3)
    rest = {"kind": kind, "spread": torch.tensor(0.7), "seed": seed, **GRID}
    y = ops.perturbed_fake_quant(x, scale, scale, **rest)
    assert_same(ops.perturbed_fake_quant(x, scale, scale, **rest), y)
    seed.add_(1)  # as a CUDA graph would advance it
    assert not torch.equal(ops.perturbed_fake_quant(x, scale, scale, **rest), y)


def test_numbers_follow_memory():
    x, scale, seed = torch.randn(3, 5, 7, 9), torch.tensor(0.1), torch.tensor(5)
    rest = {"kind": "gauss", "spread": torch.rand(5), "seed": seed, "axis": 1, **GRID}
    y = ops.perturbed_fake_quant(x, scale, scale, **rest)
    turned = ops.perturbed_fake_quant(x.permute(2, 3, 1, 0), scale, scale, **rest | {"axis": -2})
    assert_same(turned.permute(3, 2, 0, 1), y)
    assert not torch.equal(ops.perturbed_fake_quant(x.mT.contiguous().mT, scale, scale, **rest), y)


# Gradients


def _straight_through(x, scale, zero, perturbation, kept):
    """Fake-quantise what is perturbed in differentiable torch; the perturbation is a constant."""

    def rounded(value):
        return torch.round(value).detach() + (value - value.detach())

    origin = rounded(zero)
    code = rounded((x + perturbation) / scale) + origin
    code = torch.where(code < 0, 0, torch.where(code > 15, 15, code))
    return torch.where(kept, x, (code - origin) * scale)


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("kind", pt.KINDS)
def test_gradients_are_those_of_straight_through_autograd(kind, axis):
    x, scale, zero, seed = torch.randn(4, 6, 50), torch.tensor(0.21), torch.tensor(6.3), torch.tensor(77)
    spread = torch.tensor(0.4) if axis is None else torch.rand(6)
    number, amount = pt.numbers(seed, x.numel(), kind).reshape(x.shape), expand(spread.double(), x, axis, 0)
    moves = {"drop": 0 * number, "step": amount * 0.21 * (number / 65536 - 0.5)}
    moves["gauss"] = amount * (number - 510) / 21845**0.5
    kept = number < amount * 65536 if kind == "drop" else torch.zeros_like(x, dtype=torch.bool)
    leaves = [t.double().requires_grad_() for t in (x, scale, zero)]
    grad = torch.randn(x.shape, dtype=torch.float64)
    y = _straight_through(*leaves, moves[kind], kept)
    wanted = torch.autograd.grad(y, leaves, grad)
    leaves = [t.clone().requires_grad_() for t in (x, scale, zero)]
    got = ops.perturbed_fake_quant(*leaves, kind=kind, spread=spread, seed=seed, axis=axis, **GRID)
    torch.testing.assert_close(got.double(), y, rtol=1e-6, atol=1e-6)
    for ours, exact in zip(torch.autograd.grad(got, leaves, grad.float()), wanted, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_an_integer_zero_and_a_fixed_scale_receive_no_gradient():
    x = torch.randn(9, requires_grad=True)
    rest = {"kind": "drop", "spread": torch.tensor(0.5), "seed": torch.tensor(1), **GRID}
    y = ops.perturbed_fake_quant(x, torch.tensor(0.1), torch.tensor(7, dtype=torch.int32), **rest)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    with torch.no_grad():
        assert ops.perturbed_fake_quant(x, torch.tensor(0.1), torch.tensor(7.0), **rest).grad_fn is None


# The native loops


@pytest.mark.skipif(_native.library("cpu") is None, reason=str(_native.reason("cpu")))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", pt.KINDS)
def test_every_instruction_set_and_any_number_of_threads_give_the_same_bits(kind, dtype, request):
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    x, grad = (torch.randn(3, 70, 331).to(dtype) for _ in range(2))
    scale, zero, spread, seed = torch.tensor(0.1), torch.tensor(7.0), torch.rand(70), torch.tensor(-3)
    args, form = (scale, zero, spread, seed, 0, 15, 1, kind), (0, 15, 3, 70, 331)
    wanted = pt.reference(x, *args)
    sums = {}
    for level in LEVELS:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y, dx, dscale, dzero = (torch.full_like(t, torch.nan) for t in (x, x, scale, zero))
            _native.perturbed_fake_quant(x, y, scale, zero, spread, seed, kind, *form, level)
            assert_same(y, wanted)
            tensors = (grad, x, dx, scale, zero, spread, seed, dscale, dzero)
            _native.perturbed_fake_quant_backward(*tensors, kind, *form, level)
            _assert_gradients((dx, dscale, dzero), (grad, x, *args))
            assert sums.setdefault(level, (dscale.item(), dzero.item())) == (dscale.item(), dzero.item())


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "salt"}, "kind must be one of drop, step, gauss, got 'salt'"),
        ({"seed": torch.tensor([1])}, r"seed wants shape \(\) and int64, got \(1,\) and torch.int64"),
        ({"seed": torch.tensor(1.0)}, r"seed wants shape \(\) and int64, got \(\) and torch.float32"),
        ({"axis": 1}, r"spread wants shape \(5,\) for axis=1, got \(\)"),
        ({"spread": torch.ones(5)}, r"spread wants shape \(\) for axis=None, got \(5,\)"),
        ({"axis": 2}, "axis must lie in the 2 axes of x, got 2"),
        ({"scale": torch.ones(5)}, r"scale and zero want shape \(\)"),
        ({"spread": torch.ones((), device="meta")}, "x is on cpu, what it meets on meta"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    tensors = {"x": torch.ones(4, 5), "scale": torch.tensor(0.1), "zero": torch.tensor(7.0)}
    rest = {"kind": "drop", "spread": torch.tensor(0.5), "seed": torch.tensor(1), **GRID}
    with pytest.raises(ValueError, match=f"^perturbed_fake_quant: {message}"):
        ops.perturbed_fake_quant(**tensors | rest | options)
