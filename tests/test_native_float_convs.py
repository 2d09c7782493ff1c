"""The native convolutions of floats with packed weights, on every instruction set, against float64."""

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_native_floats import assert_small
from test_native_products import BITS, LEVELS, drawn_weight
from torch.nn import functional as F
from torch.nn.grad import conv2d_input
from ttaq.kernels import _native, _products
from ttaq.kernels import packed_conv2d as pc

# Input shape, outputs, kernel, stride, padding, dilation, groups.
GEOMETRIES = {
    "3x3": ((2, 5, 7, 6), 8, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3x3-strided": ((2, 20, 8, 7), 70, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "1x1": ((3, 33, 9, 9), 50, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1-strided": ((2, 16, 5, 6), 20, (1, 1), (2, 3), (0, 0), (1, 1), 1),
    "3x2-uneven": ((1, 3, 7, 9), 5, (3, 2), (2, 1), (1, 0), (1, 2), 1),
    "dilated-groups": ((2, 12, 9, 7), 6, (3, 3), (1, 1), (2, 2), (2, 2), 2),
    "5x1-groups": ((1, 6, 8, 5), 9, (5, 1), (1, 3), (3, 1), (1, 1), 3),
    "many-inputs": ((1, 90, 5, 4), 3, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "more-inputs-than-a-tile": ((1, 130, 3, 3), 4, (3, 3), (2, 1), (1, 1), (1, 1), 1),
    "stem": ((1, 3, 23, 20), 67, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    "padding-beyond-the-kernel": ((1, 4, 3, 3), 4, (2, 2), (1, 2), (3, 4), (1, 1), 1),
    "depthwise": ((2, 21, 6, 5), 21, (3, 3), (2, 1), (1, 1), (1, 1), 21),
    "depthwise-dilated": ((1, 300, 9, 9), 300, (3, 3), (1, 1), (2, 2), (2, 2), 300),
    "two-outputs-an-input": ((1, 6, 6, 6), 12, (3, 3), (1, 1), (1, 1), (1, 1), 6),
    "stride-beyond-the-input": ((1, 2, 2, 5), 3, (1, 2), (4, 3), (0, 1), (1, 1), 1),
    "one_of_each": ((1, 1, 1, 1), 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
}

pytestmark = pytest.mark.skipif(_native.library("cpu") is None, reason=str(_native.reason("cpu")))


def innermost(x):
    return x.contiguous(memory_format=torch.channels_last)


def poisoned(shape, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, memory_format=layout).fill_(float("nan"))


def forward(x, words, scale, zero, bias, shape, bits, geometry, channels_last=False, level=None):
    y = poisoned(shape, channels_last)
    _products.packed_conv2d_floats(innermost(x), words, scale, zero, bias, y, bits, geometry, channels_last, level)
    return y


def backward(grad, words, scale, zero, shape, bits, geometry, channels_last=False, level=None):
    dx = poisoned(shape, channels_last)
    _products.packed_conv2d_backward(innermost(grad), words, scale, zero, dx, bits, geometry, channels_last, level)
    return dx


def drawn(random, shape, outputs, kernel, stride, padding, dilation, groups, bits):
    """Draw (x, grad, codes, words, scale, zero, bias) and give the geometry that the kernels read."""
    per_group = shape[1] // groups
    sizes = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    weight = drawn_weight(random, outputs, per_group * kernel[0] * kernel[1], bits)
    x, grad = torch.randn(shape, generator=random), torch.randn((shape[0], outputs, *sizes), generator=random)
    return x, grad, *weight, torch.randn(outputs, generator=random), (*kernel, *stride, *padding, *dilation, groups)


def assert_convolutions(case, bits, seed=0):
    x, grad, codes, words, scale, zero, bias, geometry = drawn(torch.Generator().manual_seed(seed), *case, bits)
    r, s, *numbers, groups = geometry
    rest = (numbers[:2], numbers[2:4], numbers[4:], groups)
    weight = ((codes.double() - zero[:, None]) * scale[:, None]).unflatten(1, (r, s, -1)).permute(0, 3, 1, 2)
    wide, absolute = bias.double(), weight.abs()
    plain, plain_dx = F.conv2d(x, weight.float(), bias, *rest), conv2d_input(x.shape, weight.float(), grad, *rest)
    exact, exact_dx = F.conv2d(x.double(), weight, wide, *rest), conv2d_input(x.shape, weight, grad.double(), *rest)
    terms = F.conv2d(x.double().abs(), absolute, wide.abs(), *rest)
    dx_terms = conv2d_input(x.shape, absolute, grad.double().abs(), *rest)
    for level, channels_last in itertools.product(LEVELS, (False, True)):
        y = forward(x, words, scale, zero, bias, grad.shape, bits, geometry, channels_last, level)
        assert_small(y, plain, exact, terms)
        dx = backward(grad, words, scale, zero, x.shape, bits, geometry, channels_last, level)
        assert_small(dx, plain_dx, exact_dx, dx_terms)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_both_convolutions_are_as_good_as_plain_torch_on_every_level(name, bits):
    assert_convolutions(GEOMETRIES[name], bits)


@st.composite
def geometries(draw):
    """Draw sizes, of which some have a padding wider than the kernel and a stride wider than the image."""
    pair = lambda low, high: draw(st.tuples(st.integers(low, high), st.integers(low, high)))  # noqa: E731
    kernel, stride, padding, dilation = pair(1, 4), pair(1, 3), pair(0, 3), pair(1, 2)
    size = [
        draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), 9)) for k, p, d in zip(kernel, padding, dilation, strict=True)
    ]
    groups = draw(st.integers(1, 3))
    inputs, outputs = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    if draw(st.booleans()):
        inputs = outputs = 1
    return (
        (draw(st.integers(1, 2)), groups * inputs, *size),
        groups * outputs,
        kernel,
        stride,
        padding,
        dilation,
        groups,
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(geometries(), st.sampled_from(BITS), st.integers(0, 99))
def test_any_geometry(case, bits, seed):
    assert_convolutions(case, bits, seed)


@pytest.mark.parametrize("name", ["3x3-strided", "stem", "depthwise-dilated", "dilated-groups"])
def test_threads_and_one_code_a_byte_give_the_same_bits(name):
    random, before = torch.Generator().manual_seed(1), torch.get_num_threads()
    x, grad, codes, words, scale, zero, bias, geometry = drawn(random, *GEOMETRIES[name], 4)
    results = []
    try:
        for threads, stored, bits in ((1, words, 4), (2, words, 4), (5, words, 4), (2, codes, 8)):
            torch.set_num_threads(threads)
            y = forward(x, stored, scale, zero, bias, grad.shape, bits, geometry)
            results.append((y, backward(grad, stored, scale, zero, x.shape, bits, geometry)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


MEMORY = """
import resource, torch
from ttaq import ops
words = torch.zeros(2048, 3 * 3 * 2048 // 4, dtype=torch.uint8)
scale, zero = torch.ones(2048), torch.ones(2048, dtype=torch.int32)
def run(x, words, scale, zero):
    x.requires_grad_()
    y, _ = ops.packed_conv2d(x, words, scale, zero, bits=2, kernel_size=(3, 3), padding=(1, 1))
    y.sum().backward()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(torch.ones(1, 16, 5, 5), words[:16, :36], scale[:16], zero[:16])
before = peak()
run(torch.ones(1, 2048, 5, 5), words, scale, zero)
print(peak() - before)
"""


def test_no_more_of_the_weight_than_tiles_is_ever_float():
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 24 << 10, "KiB; the weight as float32 would be 144 MiB, its codes a byte each 36"


def test_layouts_dtypes_and_empty_batches_of_the_op():
    random = torch.Generator().manual_seed(2)
    x, grad, _, words, scale, zero, bias, _ = drawn(random, *GEOMETRIES["many-inputs"], 4)
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1], 1)

    def op(x, dtype=torch.float32):
        return pc.launch_cpu(x, words, scale, zero, bias, 4, None, None, 8, *geometry, dtype)[0]

    def back(grad):
        shape = [grad.shape[0], *x.shape[1:]]
        return pc.launch_cpu_backward(grad, words, scale, zero, 4, shape, *geometry)

    wanted, wanted_dx = op(x), back(grad)
    wide, wide_grad = torch.randn(1, 90, 5, 8, generator=random), torch.randn(1, 6, 5, 4, generator=random)
    wide[..., 2:6], wide_grad[:, ::2] = x, grad
    for view in (innermost(x), wide[..., 2:6], x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(op(view), wanted)
    for view in (innermost(grad), wide_grad[:, ::2], grad.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(back(view), wanted_dx)
        assert back(view).is_contiguous()
    assert op(innermost(x)).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(op(x.half().float(), torch.float16), op(x.half(), torch.float16))
    assert torch.equal(back(grad.bfloat16()), back(grad.bfloat16().float()).bfloat16())
    assert op(x[:0]).shape == (0, *wanted.shape[1:])
    assert back(grad[:0]).shape == (0, *x.shape[1:])


def test_what_the_kernels_cannot_take_is_refused_by_name():
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1])
    x, grad = torch.zeros(1, 32, 4, 4), torch.zeros(1, 6, 4, 4)
    words, scale, zero = torch.zeros(6, 144, dtype=torch.uint8), torch.ones(6), torch.zeros(6, dtype=torch.int32)

    def why(x, grad, words, bits, groups):
        rest = (None, None, 8, *geometry, groups, torch.float32)
        back = (bits, list(x.shape), *geometry, groups)
        return pc.refuses_cpu(x, words, scale, zero, None, bits, *rest), pc.refuses_cpu_backward(
            grad, words, scale, zero, *back
        )

    assert why(x, grad, words, 4, 1) == (None, None)
    for sentences, wanted in (
        (why(x.double(), grad.double(), words, 4, 1), "torch.float64"),
        (why(x, grad, words[:, :36], 2, 2), None),
        (why(x[:, :24], grad, words, 4, 2), "12 inputs a group"),
        (why(x[:, :6], grad, words[:, :5], 4, 6), None),
        (why(x, grad, torch.zeros(6, 180, dtype=torch.uint8), 5, 1), "5 bits"),
    ):
        for sentence in sentences:
            assert sentence is None if wanted is None else wanted in sentence
