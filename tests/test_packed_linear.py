"""packed_linear: exact on codes, as good as half precision on floats, and its gradient is autograd's."""

import pytest
import torch
from backends import assert_as_good, assert_same, device, everywhere, parameters, run
from cases import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from ttaq.kernels import codes as cd
from ttaq.kernels import packed_linear as pl

from ttaq import QuantSpec, ops
from ttaq.observers import dynamic_range


def on_codes(case):
    return case.args[7] is not None and not case.name.startswith("after")  # test_epilogue.py has what follows


def on_floats(case):
    return case.args[7] is None and not case.name.startswith("after")


def weight64(words, scale, zero, bits, group, k):
    """Dequantise in float64."""
    codes = cd.stored_codes(words, bits, k).double()
    if group:
        scale, zero = scale.repeat_interleave(group, -1), zero.repeat_interleave(group, -1)
    else:
        scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    return (codes - zero) * scale.double()


def integer_law(x, words, scale, zero, bias, bits, group, x_scale, x_zero, x_bits, dtype):
    """Compute the layer on codes with int64 sums."""
    k, n = x.shape[-1], words.shape[0]
    group = group or k
    left = (x.long() - x_zero.unsqueeze(-1)).unflatten(-1, (-1, group))
    right = (cd.stored_codes(words, bits, k).long().unflatten(-1, (-1, group)) - zero.reshape(n, -1, 1)).unbind(1)
    y = torch.zeros(*x.shape[:-1], n)
    for g, part in enumerate(right):
        y = y + (left[..., g, :] @ part.T).float() * (x_scale.unsqueeze(-1) * scale.reshape(n, -1)[:, g])
    return (y if bias is None else y + bias).to(dtype)


@pytest.mark.parametrize(("backend", "case"), [p for p in parameters("packed_linear") if on_codes(p.values[1])])
def test_codes_give_the_bits_of_the_reference(backend, case, poison):
    args = case.on(device(backend))
    y, *nothing = run("packed_linear", backend, args)
    assert_same(y, pl.reference(*args)[0])
    assert_same(run("packed_linear", backend, args)[0], y)
    assert [t.shape for t in nothing] == [(0,), (0,)]


@pytest.mark.parametrize("case", [c for c in cases("packed_linear") if on_codes(c)], ids=lambda c: c.name)
def test_the_reference_sums_exactly(case):
    assert_same(pl.reference(*case.args)[0], integer_law(*case.args))


@pytest.mark.parametrize(("backend", "case"), [p for p in parameters("packed_linear") if on_floats(p.values[1])])
def test_floats_are_as_good_as_plain_torch(backend, case, poison):
    args = case.on(device(backend))
    x, words, scale, zero, bias, bits, group, *_ = args
    y, *_ = run("packed_linear", backend, args)
    weight = weight64(words, scale, zero, bits, group, x.shape[-1])
    exact, terms = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    if bias is not None:
        exact, terms = exact + bias, terms + bias.abs()
    assert_as_good(y, pl.reference(*args)[0], exact, terms if x.dtype == torch.float32 else None)


@pytest.mark.parametrize(("backend", "case"), parameters("packed_linear_backward"))
def test_the_gradient_is_as_good_as_plain_torch(backend, case, poison):
    args = case.on(device(backend))
    grad, words, scale, zero, bits, group, k = args
    dx = run("packed_linear_backward", backend, args)
    weight = weight64(words, scale, zero, bits, group, k)
    exact, terms = grad.double() @ weight, grad.double().abs() @ weight.abs()
    assert_as_good(dx, pl.reference_backward(*args), exact, terms if grad.dtype == torch.float32 else None)


def test_the_gradient_is_that_of_autograd_through_the_dequantised_weight():
    for case in cases("packed_linear"):
        if not on_floats(case) or case.args[-1] != torch.float32:
            continue
        x, words, scale, zero, bias, bits, group, *_ = case.args
        weight = pl.dequantise(words, scale, zero, bits, group, x.shape[-1])
        mine, plain = (x.clone().requires_grad_() for _ in range(2))
        y, _ = ops.packed_linear(mine, words, scale, zero, bias, bits=bits, group=group)
        wanted = torch.nn.functional.linear(plain, weight, bias)
        grad = torch.randn_like(wanted)
        y.backward(grad)
        wanted.backward(grad)
        torch.testing.assert_close(y, wanted)
        torch.testing.assert_close(mine.grad, plain.grad)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.sampled_from((2, 3, 4, 8)),
    st.integers(2, 8),
    st.integers(1, 80),
    st.integers(0, 4),
    st.booleans(),
    st.sampled_from(("random", "lowest", "highest")),
    st.integers(0, 99),
)
def test_any_codes_sum_exactly(bits, x_bits, k, m, tokens, extreme, seed):
    random = torch.Generator().manual_seed(seed)

    def draw(shape, width, dtype=torch.uint8):
        if extreme == "random":
            return torch.randint(0, 1 << width, shape, dtype=dtype, generator=random)
        highest = (extreme == "highest") == (dtype == torch.uint8)  # zeros at the other end
        return torch.full(shape, (1 << width) - 1 if highest else 0, dtype=dtype)

    x, words = draw((m, k), x_bits), cd.pack_reference(draw((5, k), bits), bits)
    scale, x_scale = torch.rand(5, generator=random), torch.rand((m,) if tokens else (), generator=random)
    zero, x_zero = draw((5,), bits, torch.int32), draw(x_scale.shape, x_bits, torch.int32)
    args = (x, words, scale, zero, None, bits, 0, x_scale, x_zero, x_bits, torch.float32)
    wanted = integer_law(*args)
    for _, (y, *_) in everywhere("packed_linear", *args):
        assert_same(y, wanted)


def test_sums_near_the_bound_of_int32_are_exact():
    k = 33_024
    x = torch.full((2, k), 255, dtype=torch.uint8)
    zero, x_zero = torch.tensor([0, 255, 128], dtype=torch.int32), torch.tensor(0, dtype=torch.int32)
    words = torch.tensor([[255], [0], [255]], dtype=torch.uint8).expand(3, k).contiguous()
    args = (x, words, torch.rand(3), zero, None, 8, 0, torch.tensor(0.3), x_zero, 8, torch.float32)
    wanted = integer_law(*args)
    assert wanted.abs().max() > 1e5
    for _, (y, *_) in everywhere("packed_linear", *args):
        assert_same(y, wanted)


def test_autocast_does_not_touch_the_sums():
    case = next(c for c in cases("packed_linear") if c.name == "4_bits-8_bit_codes-tokens")
    wanted = pl.reference(*case.args)[0]
    with torch.autocast("cpu", torch.bfloat16):
        for _, (y, *_) in everywhere("packed_linear", *case.args):
            assert_same(y, wanted)


def test_what_the_kernel_cannot_read_is_refused_by_name():
    named = {c.name: c.args for c in cases("packed_linear")}
    assert "multiples of 8" in pl.refuses(*named["groups_within_bytes-f32"])
    assert "multiples of 4" in pl.refuses(*named["codes-groups_within_bytes"])
    x, *rest = named["4_bits-f32"]
    assert "torch.float64" in pl.refuses(x.double(), *rest)
    long = torch.empty(1, 40_000, dtype=torch.uint8)
    scale, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    assert "int32" in pl.refuses(long, long, scale, zero, None, 8, 0, scale[0], zero[0], 8, torch.float32)
    words = torch.empty(1, 25, dtype=torch.uint8)
    assert "5 bits" in pl.refuses(torch.ones(2, 40), words, scale, zero, None, 5, 0, None, None, 8, torch.float32)


def test_large_tiles_agree(monkeypatch):
    monkeypatch.setattr(pl, "_tiles", lambda *_: (128, 128, 64, 8, 3))
    for case in cases("packed_linear"):
        if case.name in ("4_bits-8_bit_codes", "8_bits-8_bit_codes", "whole_tiles-bf16", "groups_of_8-f16"):
            args = case.on(device("triton"))
            y, *_ = run("packed_linear", "triton", args)
            torch.testing.assert_close(y, pl.reference(*args)[0], atol=0.02 if "codes" not in case.name else 0, rtol=0)


@pytest.mark.parametrize(("bits", "group", "x_bits"), [(4, 0, 8), (2, 8, 4), (8, 0, 5)])
def test_a_grid_a_token_is_measured_in_the_pass_that_makes_the_codes(bits, group, x_bits):
    random = torch.Generator().manual_seed(9)
    words = cd.pack_reference(torch.randint(0, 1 << bits, (6, 24), generator=random, dtype=torch.uint8), bits)
    scale = torch.rand((6, 24 // group) if group else (6,), generator=random)
    weight = (words, scale, torch.full(scale.shape, 1, dtype=torch.int32), torch.randn(6, generator=random))
    x = torch.randn(2, 5, 24, generator=random).requires_grad_()
    measured = dict(zip(("x_scale", "x_zero"), dynamic_range(x, QuantSpec(x_bits, "token")), strict=True))
    results = []
    for grid in (measured, {"token": True}):
        y, nonfinite = ops.packed_linear(x, *weight, bits=bits, group=group, x_bits=x_bits, **grid)
        results.append((y, nonfinite, *torch.autograd.grad(y.square().sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with pytest.raises(ValueError, match="wanted x_scale or token, got both; leave x_scale out"):
        ops.packed_linear(x, *weight, bits=bits, group=group, x_bits=x_bits, token=True, **measured)


def test_a_token_that_is_not_finite_spoils_itself_alone():
    words, scale = torch.full((3, 4), 200, dtype=torch.uint8), torch.ones(3)
    x = torch.ones(4, 4)
    x[1, 2], x[2, 0] = torch.nan, torch.inf
    y, nonfinite = ops.packed_linear(x, words, scale, torch.full((3,), 7, dtype=torch.int32), bits=8, token=True)
    assert y.isnan().all(1).tolist() == [False, True, True, False]
    assert y[[0, 3]].isfinite().all()
    assert nonfinite == 2
