"""The native products of codes, on every instruction set of this processor, against sums in int64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from ttaq.kernels import _native, _products
from ttaq.kernels import codes as cd
from ttaq.kernels._epilogue import Epilogue, finish

LEVELS = _native.LEVELS[: _native.LEVELS.index(_native.cpu_level() or "base") + 1]
BITS = (2, 3, 4, 8)

pytestmark = pytest.mark.skipif(_native.library("cpu") is None, reason=str(_native.reason("cpu")))


def drawn_weight(random, n, k, bits, group=0, code=None):
    """Draw (codes, words, scale, zero), with every code and zero the same where one is given."""
    shape = (n, k // group) if group else (n,)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=random)
    zero = torch.randint(0, 1 << bits, shape, dtype=torch.int32, generator=random)
    if code is not None:
        codes.fill_(code)
        zero.fill_((1 << bits) - 1 - code)
    return codes, cd.pack_reference(codes, bits), torch.rand(shape, generator=random) + 0.01, zero


def linear_law(x, codes, scale, zero, bias, x_scale, x_zero, group=0):
    """Compute the layer with sums in int64, rounded once."""
    n, k = codes.shape
    group = group or k
    left = (x.long() - x_zero.reshape(-1, 1)).unflatten(-1, (-1, group))
    right = codes.long().unflatten(-1, (-1, group)) - zero.reshape(n, -1, 1)
    y = torch.zeros(len(x), n)
    for g in range(k // group):
        y = y + (left[:, g] @ right[:, g].T).float() * (x_scale.reshape(-1, 1) * scale.reshape(n, -1)[:, g])
    return y if bias is None else y + bias


def linear(x, words, scale, zero, bias, x_scale, x_zero, bits, group=0, level=None, dtype=torch.float32):
    y = torch.full((len(x), len(words)), float("nan"), dtype=dtype)
    _products.packed_linear(x, words, scale, zero, bias, x_scale, x_zero, y, bits, group, level=level)
    return y


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 67, 70), (3, 5, 513), (4, 48, 64), (5, 17, 33), (37, 130, 257)])
def test_a_linear_layer_sums_exactly_on_every_level(m, n, k, bits):
    random = torch.Generator().manual_seed(m + bits)
    x = torch.randint(0, 256, (m, k), dtype=torch.uint8, generator=random)
    codes, words, scale, zero = drawn_weight(random, n, k, bits)
    bias = torch.randn(n, generator=random)
    for level, tokens in itertools.product(LEVELS, (False, True)):
        x_scale = torch.rand(m if tokens else 1, generator=random) + 0.1
        x_zero = torch.randint(0, 256, x_scale.shape, dtype=torch.int32, generator=random)
        y = linear(x, words, scale, zero, bias, x_scale, x_zero, bits, level=level)
        assert torch.equal(y, linear_law(x, codes, scale, zero, bias, x_scale, x_zero)), (level, tokens)


@pytest.mark.parametrize("bits", BITS)
def test_groups_and_strided_rows_on_every_level(bits):
    random = torch.Generator().manual_seed(bits)
    x = torch.randint(0, 256, (9, 200), dtype=torch.uint8, generator=random)[:, 7:135]
    codes, words, scale, zero = drawn_weight(random, 21, 128, bits, group=32)
    grid = torch.tensor([0.3]), torch.tensor([77], dtype=torch.int32)
    for level in LEVELS:
        y = linear(x, words, scale, zero, None, *grid, bits, 32, level)
        assert torch.equal(y, linear_law(x, codes, scale, zero, None, *grid, 32)), level


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", [2, 9])
def test_sums_up_to_the_bound_of_int32(m, bits):
    largest = ((1 << 31) - 1) // (255 * ((1 << bits) - 1))
    k = min(largest, 40_000)  # at 8 bits the bound itself: 33,025 products of 255 * 255 pass 2^31
    for code, x_code in itertools.product((0, (1 << bits) - 1), (0, 255)):
        random = torch.Generator().manual_seed(0)
        x = torch.full((m, k), x_code, dtype=torch.uint8)
        codes, words, scale, zero = drawn_weight(random, 17, k, bits, code=code)
        grid = torch.tensor([1.0]), torch.tensor([255 - x_code], dtype=torch.int32)
        wanted = linear_law(x, codes, scale, zero, None, *grid)
        assert wanted.abs().max() > 0
        for level in LEVELS:
            assert torch.equal(linear(x, words, scale, zero, None, *grid, bits, level=level), wanted), level


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype):
    random = torch.Generator().manual_seed(5)
    x = torch.randint(0, 256, (11, 96), dtype=torch.uint8, generator=random)
    codes, words, scale, zero = drawn_weight(random, 50, 96, 4)
    bias, grid = torch.randn(50, generator=random), (torch.tensor([0.01]), torch.tensor([99], dtype=torch.int32))
    wanted = linear_law(x, codes, scale, zero, bias, *grid).to(dtype)
    for level in LEVELS:
        assert torch.equal(linear(x, words, scale, zero, bias, *grid, 4, level=level, dtype=dtype), wanted), level


CONVS = [  # batch, channels, height, width, outputs, kernel, stride, padding, dilation, groups
    *((1, 3, 9, 9, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1), (2, 16, 7, 9, 20, (3, 3), (2, 2), (1, 1), (1, 1), 1)),
    *((1, 5, 6, 6, 7, (1, 1), (1, 1), (0, 0), (1, 1), 1), (2, 8, 8, 8, 16, (3, 3), (1, 1), (1, 1), (2, 2), 1)),
    *((1, 8, 8, 8, 16, (3, 3), (1, 1), (1, 1), (1, 1), 2), (2, 6, 7, 7, 6, (3, 3), (1, 1), (1, 1), (1, 1), 6)),
    *((1, 70, 9, 9, 70, (3, 3), (2, 2), (1, 1), (1, 1), 70), (1, 32, 14, 14, 50, (3, 3), (1, 1), (1, 1), (1, 1), 1)),
    *((1, 4, 5, 5, 8, (3, 3), (1, 1), (1, 1), (1, 1), 4), (3, 64, 1, 1, 33, (1, 1), (1, 1), (0, 0), (1, 1), 1)),
    *((1, 24, 6, 6, 18, (1, 3), (1, 2), (0, 1), (1, 3), 3), (1, 7, 33, 40, 5, (7, 5), (3, 2), (3, 0), (1, 1), 1)),
    *((1, 64, 12, 12, 9, (1, 1), (2, 3), (0, 0), (1, 1), 1), (1, 9, 20, 20, 9, (2, 2), (3, 3), (1, 1), (1, 1), 9)),
]


def convolution_law(x, codes, scale, zero, bias, x_scale, x_zero, stride, padding, dilation, groups):
    """Compute the layer with exact sums in float64, rounded once."""
    left = x.double() - x_zero
    right = codes.double() - zero.reshape(-1, 1, 1, 1)
    sums = F.conv2d(left, right, None, stride, padding, dilation, groups)
    return (sums.float() + 0.0) * (x_scale * scale).reshape(-1, 1, 1) + bias.reshape(-1, 1, 1)


def drawn_convolution(random, case, bits, channels_last):
    batch, c, h, w, outputs, kernel, *_, groups = case
    memory = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randint(0, 256, (batch, c, h, w), dtype=torch.uint8, generator=random).contiguous(memory_format=memory)
    codes = torch.randint(0, 1 << bits, (outputs, c // groups, *kernel), dtype=torch.uint8, generator=random)
    zero = torch.randint(0, 1 << bits, (outputs,), dtype=torch.int32, generator=random)
    scale, bias = torch.rand(outputs, generator=random) + 0.01, torch.randn(outputs, generator=random)
    grid = torch.tensor(0.1), torch.randint(0, 256, (), dtype=torch.int32, generator=random)
    return x, codes, scale, zero, bias, *grid


def check_convolution(case, bits, channels_last, seed=0):
    """Compare every level with the law."""
    kernel, stride, padding, dilation, groups = case[5:]
    random = torch.Generator().manual_seed(seed)
    x, codes, *rest = drawn_convolution(random, case, bits, channels_last)
    wanted = convolution_law(x, codes, *rest, stride, padding, dilation, groups)
    words = cd.pack_reference(codes.permute(0, 2, 3, 1).flatten(1).contiguous(), bits)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    for level in LEVELS:
        y = torch.full(wanted.shape, float("nan")).contiguous(memory_format=memory)
        geometry = (*kernel, *stride, *padding, *dilation, groups)
        _products.packed_conv2d(x, words, *rest, y, bits, geometry, channels_last, level=level)
        assert torch.equal(y, wanted), level


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_a_convolution_sums_exactly_on_every_level(case, bits, channels_last):
    check_convolution(case, bits, channels_last)


def endings(random, shape, dtype, axis):
    """Draw what may follow values of `shape`: all of it with an activation and codes, and a residual alone."""
    n = shape[axis]
    residual = (torch.randn(shape, generator=random) * 50).to(dtype)
    residual.flatten()[::7] = torch.nan
    grid = (torch.tensor(3.0), torch.tensor(5, dtype=torch.int32))
    affine = (torch.rand(n, generator=random) + 0.5, torch.randn(n, generator=random))
    yield Epilogue(*affine, residual, "relu", *grid, 4)
    yield Epilogue(*affine, None, "relu6")
    yield Epilogue(None, None, residual)


def check_ending(plain, dtype, axis, run):
    """Compare what follows natively with the specification; run(y, ending, level) writes y."""
    for end in endings(torch.Generator().manual_seed(3), plain.shape, dtype, axis):
        wanted, _, count = finish(plain, end, axis)
        for level in LEVELS:
            y = torch.full_like(plain, 99, dtype=end.dtype(dtype))
            nonfinite = torch.full((), 9, dtype=torch.int32)
            run(y, _products.Ending(end, y, nonfinite, dtype), level)
            torch.testing.assert_close(
                y, wanted.to(y.dtype), rtol=0, atol=0, equal_nan=True, msg=str((end.after, level))
            )
            assert count.numel() == 0 or torch.equal(count, nonfinite), level


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", [3, 11])
def test_what_follows_a_linear_layer_is_the_specification_on_every_level(m, dtype):
    random = torch.Generator().manual_seed(m)
    x = torch.randint(0, 256, (m, 70), dtype=torch.uint8, generator=random)
    _, words, scale, zero = drawn_weight(random, 67, 70, 4)
    args = (x, words, scale, zero, None, torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32))
    check_ending(linear(*args, 4), dtype, -1, lambda y, end, level: _products.packed_linear(*args, y, 4, 0, end, level))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_what_follows_a_convolution_is_the_specification_on_every_level(case, channels_last):
    kernel, stride, padding, dilation, groups = case[5:]
    x, codes, *rest = drawn_convolution(torch.Generator().manual_seed(4), case, 4, channels_last)
    words = cd.pack_reference(codes.permute(0, 2, 3, 1).flatten(1).contiguous(), 4)
    geometry = (*kernel, *stride, *padding, *dilation, groups)
    plain = convolution_law(x, codes, *rest, stride, padding, dilation, groups)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    for dtype in (torch.float32, torch.bfloat16):

        def run(y, end, level):
            _products.packed_conv2d(x, words, *rest, y, 4, geometry, channels_last, end, level)

        check_ending(plain.contiguous(memory_format=memory), dtype, 1, run)


sizes = st.integers(1, 9)
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3), groups=st.integers(1, 4), c=st.integers(1, 20), n=st.integers(1, 20), h=sizes, w=sizes,
    kernel=pairs, stride=pairs, padding=st.tuples(st.integers(0, 2), st.integers(0, 2)), dilation=pairs,
    bits=st.sampled_from(BITS), channels_last=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_convolutions_of_any_geometry(
    batch, groups, c, n, h, w, kernel, stride, padding, dilation, bits, channels_last, seed
):
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    h, w = (max(size, span - 2 * p) for size, span, p in zip((h, w), spans, padding, strict=True))
    case = (batch, c * groups, h, w, n * groups, kernel, stride, padding, dilation, groups)
    check_convolution(case, bits, channels_last, seed)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 20), n=st.integers(1, 70), k=st.integers(1, 300), bits=st.sampled_from(BITS),
    tokens=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_linear_layers_of_any_size(m, n, k, bits, tokens, seed):
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (m, k), dtype=torch.uint8, generator=random)
    codes, words, scale, zero = drawn_weight(random, n, k, bits)
    x_scale = torch.rand(m if tokens else 1, generator=random) + 0.1
    x_zero = torch.randint(0, 256, x_scale.shape, dtype=torch.int32, generator=random)
    wanted = linear_law(x, codes, scale, zero, None, x_scale, x_zero)
    for level in LEVELS:
        assert torch.equal(linear(x, words, scale, zero, None, x_scale, x_zero, bits, level=level), wanted), level


def test_threads_and_repetition_change_no_bit():
    random = torch.Generator().manual_seed(9)
    x = torch.randint(0, 256, (100, 200), dtype=torch.uint8, generator=random)
    _, words, scale, zero = drawn_weight(random, 150, 200, 4)
    grid = torch.tensor([0.3]), torch.tensor([7], dtype=torch.int32)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 2, 5):
        torch.set_num_threads(threads)
        results.append(linear(x, words, scale, zero, None, *grid, 4))
    torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)


def test_what_the_kernels_do_not_take_is_refused():
    random = torch.Generator().manual_seed(0)
    x = torch.zeros(2, 24, dtype=torch.uint8)
    _, words, scale, zero = drawn_weight(random, 3, 24, 2, group=8)
    grid = torch.tensor([0.3]), torch.tensor([7], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="the words of a group must fill whole dwords"):
        linear(x, words, scale, zero, None, *grid, 2, 8)
