"""activation_codes: the bits of the reference everywhere, the ranges of dynamic_range, and sums that are exact."""

from itertools import product

import pytest
import torch
from activation_cases import special_rows
from backends import assert_same, device, everywhere, parameters, run
from cases import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from ttaq.kernels import _native
from ttaq.kernels import activation_codes as ac

from ttaq import QuantSpec, ops
from ttaq.observers import EPSILON, dynamic_range

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = _native.LEVELS[: _native.LEVELS.index(_native.cpu_level() or "base") + 1]


@pytest.mark.parametrize(("backend", "case"), parameters("activation_codes"))
def test_every_output_is_that_of_the_reference(backend, case, poison):
    args = case.on(device(backend))
    got = run("activation_codes", backend, args)
    for mine, wanted in zip(got, ac.reference(*args), strict=True):
        assert_same(mine, wanted)
    for first, second in zip(got, run("activation_codes", backend, args), strict=True):
        assert_same(second, first)


def test_triton_takes_every_case():
    pytest.importorskip("triton", reason="needs Triton")
    assert {ac.refuses(*case.args) for case in cases("activation_codes")} == {None}


@pytest.mark.parametrize("case", [c for c in cases("activation_codes") if c.args[1] is None], ids=lambda c: c.name)
def test_measured_grids_are_those_of_dynamic_range(case):
    x, _, _, bits, _, _ = case.args
    if not x.shape[-1]:
        pytest.skip("dynamic_range has no range for empty rows")
    for _, (_, scale, zero, _, _) in everywhere("activation_codes", *case.args):
        wanted = dynamic_range(x, QuantSpec(bits, "token"))
        for mine, expected in zip((scale, zero), wanted, strict=True):
            assert_same(mine, expected.contiguous())


@pytest.mark.parametrize("case", cases("activation_codes"), ids=lambda c: c.name)
def test_codes_words_and_sums_are_those_of_the_ops_that_make_one_of_them(case):
    x, scale, zero, bits, packed, _ = case.args
    codes, scale, zero, sums, nonfinite = ops.activation_codes(x, scale, zero, bits=bits)
    if x.shape[-1]:
        grid = {} if scale.ndim == 0 else {"group": x.shape[-1]}
        origin = (scale, zero) if scale.ndim == 0 else (scale[..., None], zero[..., None])
        wanted, count = ops.quantize_codes(x, *origin, qmax=(1 << bits) - 1, **grid)
        assert torch.equal(codes, wanted)
        assert nonfinite == count
    assert torch.equal(sums.long(), codes.long().sum(-1))
    if packed:
        words = ops.activation_codes(x, *case.args[1:3], bits=bits, packed=True)[0]
        assert_same(words, ops.pack_codes(codes, bits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_spoils_its_row_alone(dtype):
    x = special_rows(dtype)["not_finite"]
    for name, (codes, scale, zero, sums, nonfinite) in everywhere("activation_codes", x, None, None, 8, False, True):
        spoilt = ~scale.isfinite()
        overflows = dtype != torch.float16  # the largest float16 is far below that of float32
        assert spoilt.tolist() == [True, False, True, True, True, True, True, overflows], name
        assert nonfinite == 13, name
        assert not codes[spoilt].any()
        assert not zero[spoilt].any()
        assert not sums[spoilt].any()
        assert ((codes.float() - zero[:, None]) * scale[:, None])[spoilt].isnan().all()
        assert codes[1].tolist() == [170, 85, 0, 85, 255]


def test_a_nan_gets_the_code_of_zero_on_a_given_grid():
    x = torch.tensor([[torch.nan, torch.inf, 0.0], [-torch.inf, torch.nan, 1.0]])
    grid = torch.tensor(0.5), torch.tensor(5, dtype=torch.int32)
    for name, (codes, _, _, sums, nonfinite) in everywhere("activation_codes", x, *grid, 4, False, True):
        assert codes.tolist() == [[5, 15, 5], [0, 5, 7]], name
        assert sums.tolist() == [25, 12], name
        assert (nonfinite.dtype, nonfinite.shape, nonfinite.item()) == (torch.int32, (), 4), name


def test_the_least_scale_is_that_of_observers():
    assert ac.EPSILON == EPSILON
    codes, scale, zero, _, _ = ops.activation_codes(torch.zeros(2, 3), bits=8)
    assert (scale == EPSILON).all()
    assert not codes.any()
    assert not zero.any()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(2, 8),
    st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=24),
    st.sampled_from(DTYPES),
)
def test_any_row_is_quantised_within_a_step(bits, values, dtype):
    x = torch.tensor([values]).clamp(-torch.finfo(dtype).max / 4, torch.finfo(dtype).max / 4).to(dtype)
    reference = ac.reference(x, None, None, bits, False, True)
    for name, got in everywhere("activation_codes", x, None, None, bits, False, True):
        for mine, wanted in zip(got, reference, strict=True):
            assert torch.equal(mine, wanted), name
        codes, scale, zero, _, _ = got
        error = ((codes.double() - zero) * scale.double() - x.double()).abs() / scale.double()
        assert error.max() <= 1.0 + 1e-4, name  # half of it for x, and up to half for the zero at the ends


@pytest.mark.skipif(_native.library("cpu") is None, reason=str(_native.reason("cpu")))
@pytest.mark.parametrize("shape", [(1, 1), (9, 5), (70, 768), (3, 8195), (1200, 16), (2, 0)], ids=str)
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(shape):
    random = torch.Generator().manual_seed(5)
    before = torch.get_num_threads()
    try:
        for dtype, (bits, packed) in product(DTYPES, ((8, False), (4, True), (2, True), (5, False))):
            x = (torch.randn(shape, generator=random) * 20).to(dtype)
            if x.numel() > 100:
                x.view(-1)[[17, 40, 63]] = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
            wanted = ac.reference(x, None, None, bits, packed, True)
            for level, threads in product(LEVELS, (1, 2, 5)):
                torch.set_num_threads(threads)
                got = [torch.full_like(t, 99) for t in wanted]
                _native.activation_codes(x, *got, bits, packed=packed, measure=True, level=level)
                for mine, expected in zip(got, wanted, strict=True):
                    assert_same(mine, expected)
    finally:
        torch.set_num_threads(before)


def test_what_does_not_fit_is_refused_with_a_remedy():
    x, one, whole = torch.zeros(2, 6), torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)
    for arguments, message in (
        ((x[0, 0],), r"x wants shape \(\.\.\., K\), got a scalar"),
        ((x, one.expand(3), whole.expand(3)), r"shape \(\) or \(2,\), got \(3,\) and \(3,\); use one for all"),
        ((x, one, whole.expand(2)), r"got \(\) and \(2,\)"),
        ((x, one, None), "scale and zero, or neither"),
        ((x, one, torch.tensor(0.0)), r"zero wants int32, got torch\.float32; use zero\.round\(\)\.int\(\)"),
        ((torch.zeros(1).expand(1, 9_000_000),), r"9000000 codes of 8 bits can pass 2\^31; use shorter rows"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.activation_codes(*arguments, bits=8)
    with pytest.raises(ValueError, match=r"bits must be 2 to 8 to fit a byte, got 9"):
        ops.activation_codes(x, bits=9)
    with pytest.raises(ValueError, match=r"packed codes want 2, 4 or 8 bits, got 3; pack_codes packs 3"):
        ops.activation_codes(x, bits=3, packed=True)


def test_other_dtypes_are_left_to_the_reference():
    x, scale = torch.zeros(2, 6, dtype=torch.float64), torch.tensor(1.0)
    for refuses in (ac.refuses, ac.refuses_cpu):
        assert "float64" in refuses(x, None, None, 8, False, True)
        assert "zero torch.float32" in refuses(x.float(), scale, scale, 8, False, True)
    assert "packs 2, 4 and 8" in ac.refuses(x.float(), None, None, 3, True, True)
    assert ops.activation_codes(x, bits=8)[0].shape == x.shape


def test_a_measured_grid_has_no_gradient():
    _, scale, _, _, _ = ops.activation_codes(torch.randn(3, 8, requires_grad=True), bits=8)
    assert not scale.requires_grad
