"""Fake quantisation with what stands before it: every backend against the reference, the reference against autograd."""

from types import SimpleNamespace

import pytest
import torch
from backends import assert_same, device, everywhere, parameters, run
from cases import cases
from torch.nn import functional as F
from ttaq.kernels import _native
from ttaq.kernels import prologue as pg
from ttaq.kernels._tiles import expand, reduce

from ttaq import ops
from ttaq.declarations import RAW

LEVELS = _native.LEVELS[: _native.LEVELS.index(_native.cpu_level() or "base") + 1]
OP, BACKWARD = "prologue_fake_quant", "prologue_fake_quant_backward"


def _named(op, args):
    return SimpleNamespace(**dict(zip((a.name for a in getattr(RAW, op).default._schema.arguments), args, strict=True)))


def _aligned(a, u):
    """Return (n, v), float64."""
    n = pg._normal(u.double(), a.before, a.eps)
    return n, pg._aligned(n, *(None if t is None else t.double() for t in (a.gain, a.shift)), a.axis)


@pytest.mark.parametrize(("backend", "case"), parameters(OP))
def test_values_are_those_of_the_reference(backend, case, poison):
    args = case.on(device(backend))
    y, u, seen = run(OP, backend, args)
    a, wanted = _named(OP, args), pg.reference(*args)
    assert_same(u, wanted[1])
    if a.before == "none":
        assert_same(y, wanted[0])
    else:  # GELU and LayerNorm differ by some ulp, so a value that lies between two codes may get either
        ratio = _aligned(a, a.x if a.residual is None else u)[1] / a.scale.double()
        clear = (ratio - ratio.floor() - 0.5).abs() > 1e-4
        assert_same(torch.where(clear, y, 0.0), torch.where(clear, wanted[0], 0.0))
        step = a.scale + 2 * torch.finfo(y.dtype).eps * wanted[0].float().abs()
        assert ((y.float() - wanted[0].float()).abs() <= step * 1.01).all()
        assert clear.double().mean() > 0.99 or clear.numel() < 1000
    _assert_seen(seen, wanted[2], a, u)
    for first, second in zip((y, u, seen), run(OP, backend, args), strict=True):
        assert_same(second, first)


def _assert_seen(seen, wanted, a, u):
    assert (seen.dtype, seen.shape) == (wanted.dtype, wanted.shape)
    if not a.observe or not a.x.numel():
        assert_same(seen, wanted)
        return
    _, v = _aligned(a, a.x if a.residual is None else u)
    for row, terms in ((0, v), (1, v.square())):
        exact, size = (reduce(t, a.axis, 0).reshape(-1) for t in (terms, terms.abs() + 0.01))  # v may cancel
        finite = exact.float().isfinite() & wanted[row].isfinite()
        assert ((seen[row] - exact).abs() <= 1e-5 * size)[finite].all()
        assert torch.equal(seen[row].isnan()[~finite], wanted[row].isnan()[~finite])
    exact = a.before == "none"
    torch.testing.assert_close(seen[2:4], wanted[2:4], rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5)
    assert ((seen[4] - wanted[4]).abs() <= (0 if exact else 1)).all()


@pytest.mark.parametrize(("backend", "case"), [p for p in parameters(BACKWARD) if "not_finite" not in p.values[1].name])
def test_gradients_are_those_of_the_reference(backend, case, poison):
    args = case.on(device(backend))
    gradients = run(BACKWARD, backend, args)
    _assert_gradients(gradients, args)
    for first, second in zip(gradients, run(BACKWARD, backend, args), strict=True):
        assert_same(second, first)


def _assert_gradients(gradients, args):
    a, plain = _named(BACKWARD, args), pg.reference_backward(*args)
    if a.before == "none":
        assert_same(gradients[0], plain[0])
    exact = pg.reference_backward(*(t.double() if isinstance(t, torch.Tensor) else t for t in args))
    ulp = max(torch.finfo(a.u.dtype).eps, 1e-5)
    assert [g.shape for g in gradients] == [e.shape for e in exact]
    largest = exact[0].abs().max() if exact[0].numel() else 0
    assert ((gradients[0] - exact[0]).abs() <= 4 * ulp * largest).all()
    n, size = _aligned(a, a.u)[0], a.grad.double().abs()
    sizes = (size * (n.abs() + 0.01), size, 15 * size, a.scale * size)  # 0.01: far below zero a GELU is a difference
    for at, (got, total, terms) in enumerate(zip(gradients[1:], exact[1:], sizes, strict=True)):
        size = terms.sum() if at > 1 else reduce(terms, a.axis, 0).reshape(-1)
        if got.numel():
            assert ((got - total).abs() <= 1e-5 * size + 2 * (plain[at + 1] - total).abs() + 1e-12).all()


@pytest.mark.parametrize("layout", ["long_rows", "columns", "images", "images-channels_last", "per_tensor-4100"])
def test_programs_that_walk_several_tiles_agree(layout, monkeypatch, poison):
    monkeypatch.setattr(pg, "TILE", 64)
    monkeypatch.setattr(pg, "ENOUGH_PROGRAMS", 2)
    forward, backward = (next(c for c in cases(op) if c.name == f"all-{layout}-f32") for op in (OP, BACKWARD))
    args = forward.on(device("triton"))
    y, u, seen = run(OP, "triton", args)
    wanted = pg.reference(*args)
    assert_same(y, wanted[0])
    _assert_seen(seen, wanted[2], _named(OP, args), u)
    args = backward.on(device("triton"))
    _assert_gradients(run(BACKWARD, "triton", args), args)


def test_every_kernel_takes_every_case_but_a_layer_norm_of_one():
    whys = {pg.refuses_triton(), *([] if pg.refuses_triton() else ["the LayerNorm is over 1 values; "])}
    for case in cases(OP):
        assert pg.refuses_cpu(*case.args) == _native.reason("cpu")
        assert any((pg.refuses(*case.args) or "").startswith(why or "") for why in whys)
        if "-one-" not in case.name:
            assert pg.refuses(*case.args) == pg.refuses_triton()
    for case in cases(BACKWARD):
        assert pg.refuses_cpu_backward(*case.args) == _native.reason("cpu")


@pytest.mark.skipif(_native.library("cpu") is None, reason=str(_native.reason("cpu")))
@pytest.mark.parametrize("form", [(1, 1, 40_001), (2, 3, 17_000), (7, 3, 200), (70, 1025, 1), (131, 6, 4)], ids=str)
def test_every_instruction_set_and_number_of_threads_agrees(form, threads):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(form, generator=generator) for _ in range(2))
    gain, shift = (torch.rand(form[1], generator=generator) for _ in range(2))
    scale, zero = torch.tensor(0.2), torch.tensor(3.0)
    args = (x, None, gain, shift, scale, zero, "none", 0.0, True, 0, 15, 1)
    wanted, found = pg.reference(*args), {}
    for level in LEVELS:
        for count in (1, 2, 5):
            threads(count)
            y, seen = torch.full_like(x, torch.nan), torch.full((5, form[1]), torch.nan)
            _native.aligned_fake_quant(x, y, gain, shift, scale, zero, seen, 0, 15, *form, level)
            dx, sums = (
                torch.full_like(x, torch.nan),
                [torch.empty(form[1]), torch.empty(form[1]), torch.empty(()), torch.empty(())],
            )
            _native.aligned_fake_quant_backward(grad, x, dx, gain, shift, scale, zero, *sums, 0, 15, *form, level)
            assert_same(y, wanted[0])
            _assert_seen(seen, wanted[2], _named(OP, args), None)
            _assert_gradients((dx, *sums), (grad, None, x, gain, shift, scale, zero, "none", 0.0, 0, 15, 1))
            assert all(
                torch.equal(a, b) for a, b in zip([seen, *sums], found.setdefault(level, [seen, *sums]), strict=True)
            )


def _composed(x, residual, gain, shift, scale, zero, before, eps, axis):
    """Compose the op of differentiable torch, rounding straight through."""

    def rounded(value):
        return torch.round(value).detach() + (value - value.detach())

    u = x if residual is None else x + residual
    n = F.gelu(u) if before == "gelu" else F.layer_norm(u, u.shape[-1:], eps=eps) if before == "layer_norm" else u
    v = n if gain is None else n * expand(gain, n, axis, 0) + expand(shift, n, axis, 0)
    code = rounded(v / scale) + rounded(zero)
    code = torch.where(code < 0, 0.0, torch.where(code > 15, 15.0, code))
    return u, (code - rounded(zero)) * scale


@pytest.mark.parametrize(
    "name", ["all-images-f32", "gelu-all-tokens-f32", "norm-all-tokens-f32", "norm-affine-odd-f32"]
)
def test_gradients_are_those_of_straight_through_autograd(name):
    x, residual, gain, shift, scale, zero, before, eps, observe, _, _, axis = next(
        c.args for c in cases(OP) if c.name == name
    )
    given = (x, residual, gain, shift, scale, zero.float())
    leaves = [None if t is None else t.double().requires_grad_() for t in given]
    u, y = _composed(*leaves, before, eps, axis)
    grad, du = (torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    loss = (y * grad).sum() + (0.0 if residual is None else (u * du).sum())
    wanted = torch.autograd.grad(loss, [t for t in leaves if t is not None])
    single = [None if t is None else t.clone().requires_grad_() for t in given]
    names = dict(zip(("x", "residual", "gain", "shift", "scale", "zero"), single, strict=True))
    y, u, _ = ops.prologue_fake_quant(**names, qmin=0, qmax=15, axis=axis, before=before, eps=eps, observe=observe)
    loss = (y * grad).sum() + (0.0 if residual is None else (u * du).sum())
    for got, exact in zip(torch.autograd.grad(loss, [t for t in single if t is not None]), wanted, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())


def test_bare_it_is_fake_quant():
    x = torch.randn(6, 130, generator=torch.Generator().manual_seed(1))
    scale, zero = torch.tensor(0.2), torch.tensor(7, dtype=torch.int32)
    for name, (y, u, seen) in everywhere(OP, x, None, None, None, scale, zero, "none", 0.0, False, 0, 15, 1):
        assert torch.equal(y, ops.fake_quant(x, scale, zero, qmin=0, qmax=15)), name
        assert u.numel() == seen.numel() == 0


def test_what_is_seen_is_what_torch_measures():
    x = torch.randn(64, 197, 96, generator=torch.Generator().manual_seed(2))
    gain, shift = torch.linspace(0.5, 2, 96), torch.linspace(-1, 1, 96)
    scale, zero = torch.tensor(0.2), torch.tensor(7, dtype=torch.int32)
    _, _, seen = ops.prologue_fake_quant(x, scale, zero, qmin=0, qmax=15, gain=gain, shift=shift, observe=True)
    v, count = (x * gain + shift).flatten(0, 1), 64 * 197
    torch.testing.assert_close(seen[0] / count, v.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        seen[1] / count - (seen[0] / count).square(), v.var(0, correction=0), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(seen[2:4], torch.stack([v.amin(0), v.amax(0)]))
    assert torch.equal(seen[4], ((v / 0.2).round() + 7).clamp(0, 15).ne((v / 0.2).round() + 7).sum(0).float())
    assert seen[4].sum() > 0


def test_wrong_calls_are_refused_with_a_remedy():
    x, scale, zero, grid = torch.randn(2, 3, 4), torch.tensor(0.1), torch.tensor(0.0), {"qmin": 0, "qmax": 15}
    for message, wrong in (
        ("before must be one of none, gelu, layer_norm, got 'relu'", {"before": "relu"}),
        ("axis must lie in the 3 axes of x, got 3; use -1 for tokens", {"axis": 3}),
        ("a LayerNorm is over the last axis, got axis=1; use axis=-1", {"before": "layer_norm", "axis": 1}),
        ("residual wants the shape, dtype and device of x", {"residual": x[0]}),
        ("gain and shift go together", {"gain": torch.ones(4)}),
        (
            r"shift wants shape \(4,\) for axis=2, got \(3,\); pass one a channel",
            {"gain": torch.ones(4), "shift": torch.ones(3)},
        ),
    ):
        with pytest.raises(ValueError, match=f"^prologue_fake_quant: {message}"):
            ops.prologue_fake_quant(x, scale, zero, **grid, **wrong)
    assert "gain is torch.float64" in pg._refuses_tensors(x, scale, zero, None, scale.double(), scale)
