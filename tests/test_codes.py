"""Codes: every backend gives the bits of the reference, the packed order is the one on disk, and nothing is lost."""

import pytest
import torch
from backends import assert_same, device, everywhere, parameters, run
from cases import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from ttaq.kernels import codes as cd

from ttaq import ops


@pytest.mark.parametrize(("backend", "case"), parameters("quantize_codes"))
def test_codes_and_count_are_those_of_the_reference(backend, case, poison):
    args = case.on(device(backend))
    got = run("quantize_codes", backend, args)
    for mine, wanted in zip(got, cd.reference(*args), strict=True):
        assert_same(mine, wanted)
    for first, second in zip(got, run("quantize_codes", backend, args), strict=True):
        assert_same(second, first)


@pytest.mark.parametrize(("backend", "case"), parameters("pack_codes"))
def test_packed_words_are_those_of_the_reference(backend, case, poison):
    args = case.on(device(backend))
    assert_same(run("pack_codes", backend, args), cd.pack_reference(*args))


@pytest.mark.parametrize(("backend", "case"), parameters("unpack_codes"))
def test_unpacked_codes_are_those_of_the_reference(backend, case, poison):
    args = case.on(device(backend))
    assert_same(run("unpack_codes", backend, args), cd.unpack_reference(*args))


def test_triton_takes_every_case():
    pytest.importorskip("triton", reason="needs Triton")
    for op, refuses in (
        ("quantize_codes", cd.refuses),
        ("pack_codes", cd.pack_refuses),
        ("unpack_codes", cd.unpack_refuses),
    ):
        assert {refuses(*case.args) for case in cases(op)} == {None}


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (2, [1, 2, 3, 0, 2], [0b00111001, 0b10]),
        (3, [1, 2, 3, 4, 5, 6, 7, 1, 5], [0b11010001, 0b01011000, 0b00111111, 0b101]),
        (4, [1, 2, 15], [0x21, 0x0F]),
        (8, [200, 7], [200, 7]),
    ],
)
def test_the_order_on_disk_never_changes(bits, codes, words):
    codes, words = torch.tensor(codes, dtype=torch.uint8), torch.tensor(words, dtype=torch.uint8)
    for name, got in everywhere("pack_codes", codes, bits):
        assert torch.equal(got, words), name
    for name, got in everywhere("unpack_codes", words, bits, len(codes)):
        assert torch.equal(got, codes), name


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(cd.PACKABLE), st.lists(st.integers(0, 5), max_size=2), st.integers(0, 70), st.integers(0, 99))
def test_packing_loses_nothing(bits, leading, k, seed):
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (*leading, k), dtype=torch.uint8, generator=random)
    packed = dict(everywhere("pack_codes", codes, bits))
    words = packed["reference"]
    assert words.shape == (*leading, (k * bits + 7) // 8)
    for name, got in packed.items():
        assert torch.equal(got, words), name
    for name, got in everywhere("unpack_codes", words, bits, k):
        assert torch.equal(got, codes), name


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 8), st.floats(1e-3, 10), st.integers(0, 255), st.sampled_from((None, 0, 1)), st.integers(0, 99))
def test_the_error_is_half_a_step_inside_the_range(bits, step, zero, axis, seed):
    random, qmax = torch.Generator().manual_seed(seed), (1 << bits) - 1
    x = torch.randn(7, 9, generator=random) * step * qmax
    shape = () if axis is None else (x.shape[axis],)
    scale, zero = torch.full(shape, step), torch.full(shape, zero & qmax, dtype=torch.int32)
    for name, (codes, nonfinite) in everywhere("quantize_codes", x, scale, zero, 0, qmax, axis, 0):
        assert codes.max() <= qmax
        assert nonfinite == 0
        ratio = x.double() / step + zero.flatten()[0]
        inside = (ratio >= 0) & (ratio <= qmax)
        error = (ratio - codes.double()).abs()
        assert error[inside].max() <= 0.5 + qmax * 1e-6, name
        assert (codes[ratio < 0] == 0).all()
        assert (codes[ratio > qmax] == qmax).all()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.sampled_from((2, 3, 4, 8)), st.floats(1e-2, 3), st.integers(0, 255))
def test_quantising_what_was_quantised_changes_nothing(bits, step, zero):
    qmax = (1 << bits) - 1
    scale, zero = torch.tensor(step), torch.tensor(zero & qmax, dtype=torch.int32)
    codes = torch.arange(qmax + 1, dtype=torch.uint8)
    x = (codes.float() - zero) * scale
    for name, (again, _) in everywhere("quantize_codes", x, scale, zero, 0, qmax, None, 0):
        assert torch.equal(again, codes), name


def test_what_is_not_finite_is_counted_and_a_nan_is_zero():
    x = torch.tensor([[torch.nan, torch.inf, 0.0], [-torch.inf, torch.nan, 1.0]])
    scale, zero = torch.tensor(0.5), torch.tensor(5, dtype=torch.int32)
    for name, (codes, nonfinite) in everywhere("quantize_codes", x, scale, zero, 0, 15, None, 0):
        assert codes.tolist() == [[5, 15, 5], [0, 5, 7]], name
        assert (nonfinite.dtype, nonfinite.shape, nonfinite.item()) == (torch.int32, (), 4), name


def test_codes_that_do_not_fit_are_refused_with_a_remedy():
    codes = torch.zeros(2, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"bits must be 2, 3, 4 or 8, got 5; .* use 4 or 8"):
        ops.pack_codes(codes, 5)
    with pytest.raises(ValueError, match=r"wanted uint8, got torch\.int64"):
        ops.pack_codes(codes.long(), 4)
    with pytest.raises(ValueError, match=r"9 codes of 3 bits fill rows of 4 bytes, got 3"):
        ops.unpack_codes(codes, 3, 9)


def test_sums_beyond_int32_are_refused():
    assert cd.refuses_sum(33025, 8, 8) is None
    assert "int32" in cd.refuses_sum(33026, 8, 8)
    assert cd.refuses_sum(33026, 4, 8) is None


@pytest.mark.parametrize(
    ("terms", "x_bits", "bits"), [(258, 8, 8), (259, 8, 8), (4112, 8, 8), (4113, 8, 8), (70000, 4, 4)]
)
def test_exact_product_rounds_the_largest_sums_once(terms, x_bits, bits):
    x = torch.full((2, terms), float((1 << x_bits) - 1))
    weight = torch.full((3, terms), float((1 << bits) - 1))
    weight[1] = -weight[1]
    weight[2, 1::2] -= 1
    x[1, ::3] -= 1
    wanted = (x.double() @ weight.double().T).float()
    assert torch.equal(cd.exact_product(torch.nn.functional.linear, x, weight, terms, x_bits, bits), wanted)
