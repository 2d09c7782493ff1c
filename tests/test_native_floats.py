"""The native products of floats with packed weights, on every instruction set of this processor, against float64."""

import ctypes
import mmap
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_native_products import BITS, LEVELS, drawn_weight
from ttaq.kernels import _native, _products
from ttaq.kernels import codes as cd
from ttaq.kernels import packed_linear as pl

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One row, one block and several; outputs and inputs under, at and over a tile and a panel; more than one step in depth.
SHAPES = [(1, 67, 70), (2, 5, 513), (1, 3, 128), (7, 48, 64), (6, 49, 65), (193, 52, 31), (3, 300, 17), (13, 9, 1601)]

pytestmark = pytest.mark.skipif(_native.library("cpu") is None, reason=str(_native.reason("cpu")))


def forward(x, words, scale, zero, bias, bits, group=0, level=None, dtype=None):
    y = torch.full((len(x), len(words)), float("nan"), dtype=dtype or x.dtype)
    _products.packed_linear_floats(x, words, scale, zero, bias, y, bits, group, level)
    return y


def backward(grad, words, scale, zero, k, bits, group=0, level=None):
    dx = torch.full((len(grad), k), float("nan"), dtype=grad.dtype)
    _products.packed_linear_backward(grad, words, scale, zero, dx, bits, group, level)
    return dx


def weight64(codes, scale, zero, group):
    scale, zero = (t.repeat_interleave(group, 1) if group else t[:, None] for t in (scale, zero))
    return (codes.double() - zero) * scale


def assert_small(got, plain, exact, terms):
    """Bound errors against float64 by twice those of plain torch and an ulp, in units of the magnitudes a sum adds up.

    Largest errors and root mean squares are compared: of one sum alone, either error may be small by luck.
    """
    ours, torchs = ((y.double() - exact).abs() / terms.clamp_min(1e-30) for y in (got, plain))
    assert (got.dtype, got.shape) == (plain.dtype, plain.shape)
    for largest in (torch.max, lambda errors: errors.square().mean().sqrt()):
        assert largest(ours) <= 2 * largest(torchs) + torch.finfo(torch.float32).eps


def assert_products(x, grad, codes, words, scale, zero, bias, bits, group=0):
    """Hold both products, on every level, against float64 and plain torch in the same dtype."""
    k = x.shape[1]
    weight, wide = weight64(codes, scale, zero, group), bias.double()
    plain = pl.reference(x, words, scale, zero, bias, bits, group, None, None, 8, x.dtype)[0]
    plain_dx = pl.reference_backward(grad, words, scale, zero, bits, group, k)
    terms, dx_terms = x.double().abs() @ weight.abs().T + wide.abs(), grad.double().abs() @ weight.abs()
    for level in LEVELS:
        y = forward(x, words, scale, zero, bias, bits, group, level)
        assert_small(y, plain, x.double() @ weight.T + wide, terms)
        dx = backward(grad, words, scale, zero, k, bits, group, level)
        assert_small(dx, plain_dx, grad.double() @ weight, dx_terms)


def drawn(random, m, n, k, bits, group=0, dtype=torch.float32):
    """Draw (x, grad, codes, words, scale, zero, bias, bits, group)."""
    x, grad = (torch.randn(shape, generator=random).to(dtype) for shape in ((m, k), (m, n)))
    return x, grad, *drawn_weight(random, n, k, bits, group), torch.randn(n, generator=random), bits, group


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_both_products_are_as_good_as_plain_torch_on_every_level(m, n, k, bits, dtype):
    assert_products(*drawn(torch.Generator().manual_seed(m + bits), m, n, k, bits, dtype=dtype))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("k", "group"), [(96, 32), (21, 7), (40, 8), (1536, 128), (26, 13), (130, 65)])
@pytest.mark.parametrize("m", [1, 5])
def test_groups_wherever_they_begin_in_a_byte(m, k, group, bits):
    assert_products(*drawn(torch.Generator().manual_seed(k + bits), m, 19, k, bits, group))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(BITS),
    st.sampled_from(DTYPES),
    st.integers(1, 14),
    st.integers(1, 70),
    st.integers(1, 40),
    st.integers(1, 5),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_size_and_group(bits, dtype, m, n, group, groups, grouped, seed):
    random = torch.Generator().manual_seed(seed)
    assert_products(*drawn(random, m, n, group * groups, bits, group if grouped else 0, dtype))


@pytest.mark.parametrize("bits", BITS[:3])
@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("group", [0, 53])
def test_one_code_a_byte_gives_the_bits_of_packed_words(m, group, bits):
    x, grad, codes, words, scale, zero, bias, *_ = drawn(torch.Generator().manual_seed(bits), m, 70, 318, bits, group)
    for level in LEVELS:
        packed, plain = ((words, bits), (codes, 8))
        pairs = [
            [forward(x, w, scale, zero, bias, b, group, level) for w, b in (packed, plain)],
            [backward(grad, w, scale, zero, 318, b, group, level) for w, b in (packed, plain)],
        ]
        assert all(torch.equal(*pair) for pair in pairs), level


@pytest.mark.parametrize(("m", "group"), [(1, 0), (1, 64), (5, 0), (400, 32)])
def test_any_number_of_threads_gives_the_same_bits(m, group):
    x, grad, _, words, scale, zero, bias, *_ = drawn(torch.Generator().manual_seed(1), m, 150, 832, 4, group)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y = forward(x, words, scale, zero, bias, 4, group)
            results.append((y, backward(grad, words, scale, zero, 832, 4, group)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_rows_apart_and_an_output_of_another_dtype():
    random = torch.Generator().manual_seed(3)
    x, grad, _, words, scale, zero, bias, *_ = drawn(random, 7, 20, 48, 4)
    wide_x, wide_grad = torch.randn(7, 90, generator=random), torch.randn(7, 50, generator=random)
    wide_x[:, 11:59], wide_grad[:, 3:23] = x, grad
    for level in LEVELS:
        y = forward(x, words, scale, zero, bias, 4, level=level)
        assert torch.equal(forward(wide_x[:, 11:59], words, scale, zero, bias, 4, level=level), y)
        half = forward(x, words, scale, zero, bias, 4, level=level, dtype=torch.bfloat16)
        assert torch.equal(half, y.bfloat16())
        dx = backward(grad, words, scale, zero, 48, 4, level=level)
        assert torch.equal(backward(wide_grad[:, 3:23], words, scale, zero, 48, 4, level=level), dx)


def test_what_is_not_finite_stays_in_its_row():
    for m in (1, 3):
        x, grad, _, words, scale, zero, bias, *_ = drawn(torch.Generator().manual_seed(4), m, 20, 37, 4)
        x[0, 36], grad[0, 19] = torch.nan, torch.nan
        for level in LEVELS:
            for product in (
                forward(x, words, scale, zero, bias, 4, level=level),
                backward(grad, words, scale, zero, 37, 4, level=level),
            ):
                assert product[0].isnan().all(), level
                assert product[1:].isfinite().all(), level


@pytest.mark.parametrize("bits", BITS)
def test_nothing_beyond_the_words_is_read(bits):
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None).mprotect
    assert protect(ctypes.c_void_p(start + page), ctypes.c_size_t(page), 0) == 0  # to read there ends the process
    try:
        for m, n, k in ((1, 3, 128), (1, 5, 37), (4, 3, 64), (3, 2, 5), (2, 1, 1)):
            x, grad, codes, words, scale, zero, bias, *_ = drawn(torch.Generator().manual_seed(k), m, n, k, bits)
            size = words.numel()
            view = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=page - size).view(words.shape)
            view.copy_(words)
            assert_products(x, grad, codes, view, scale, zero, bias, bits)
    finally:
        protect(ctypes.c_void_p(start + page), ctypes.c_size_t(page), 3)


def test_an_unknown_width_and_level_are_refused():
    x, grad, _, words, scale, zero, bias, *_ = drawn(torch.Generator().manual_seed(5), 2, 3, 8, 4)
    with pytest.raises(RuntimeError, match="bits must be 2, 3, 4 or 8"):
        forward(x, words, scale, zero, bias, 5)
    with pytest.raises(ValueError, match="v9"):
        backward(grad, words, scale, zero, 8, 4, level="v9")


MEMORY = """
import resource, sys, torch
from ttaq import ops
n = k = 8192
words = torch.zeros(n, k // 4, dtype=torch.uint8)
scale, zero = torch.ones(n), torch.ones(n, dtype=torch.int32)
x = torch.ones(int(sys.argv[1]), k, requires_grad=True)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
small = torch.zeros(64, 2, dtype=torch.uint8)
ops.packed_linear(torch.ones(2, 8, requires_grad=True), small, scale[:64], zero[:64], bits=2)[0].sum().backward()
before = peak()
ops.packed_linear(x, words, scale, zero, bits=2)[0].sum().backward()
print(peak() - before)
"""


@pytest.mark.parametrize("m", [1, 48])
def test_no_more_of_the_weight_than_tiles_is_ever_float(m):
    run = subprocess.run([sys.executable, "-c", MEMORY, str(m)], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 32 << 10, "KiB; the weight as float32 would be 256 MiB"


def test_gradients_that_torch_expands_and_empty_inputs():
    random = torch.Generator().manual_seed(6)
    _, words, scale, zero = drawn_weight(random, 6, 24, 4)
    grad = torch.randn(1, 1, generator=random).expand(5, 6)
    for view in (grad, torch.randn(6, 5, generator=random).T, torch.randn(5, 12, generator=random)[:, ::2]):
        wanted = pl.launch_cpu_backward(view.contiguous(), words, scale, zero, 4, 0, 24)
        assert torch.equal(pl.launch_cpu_backward(view, words, scale, zero, 4, 0, 24), wanted)
    assert pl.launch_cpu_backward(grad[:0], words, scale, zero, 4, 0, 24).shape == (0, 24)
    empty = (None, 4, 0, None, None, 8, torch.float32)
    assert pl.launch_cpu(torch.empty(2, 0, 24), words, scale, zero, *empty)[0].shape == (2, 0, 6)
    nothing = cd.pack_reference(torch.empty(6, 0, dtype=torch.uint8), 4)
    bias = torch.randn(6, generator=random)
    y = pl.launch_cpu(torch.empty(3, 0), nothing, scale, zero, bias, *empty[1:])[0]
    assert torch.equal(y, bias.expand(3, 6))


def test_what_the_kernels_cannot_take_is_refused_by_name():
    x, grad, _, words, scale, zero, bias, *_ = drawn(torch.Generator().manual_seed(7), 2, 3, 40, 4)
    floats = (0, None, None, 8, torch.float32)
    assert pl.refuses_cpu(x, words, scale, zero, bias, 4, *floats) is None
    assert "torch.float64" in pl.refuses_cpu(x.double(), words, scale, zero, bias, 4, *floats)
    assert "torch.float64" in pl.refuses_cpu_backward(grad.double(), words, scale, zero, 4, 0, 40)
    assert "5 bits" in pl.refuses_cpu(x, torch.empty(3, 25, dtype=torch.uint8), scale, zero, bias, 5, *floats)
