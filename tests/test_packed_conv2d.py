"""packed_conv2d: exact on codes, as good as half precision on floats, and its gradient is autograd's."""

import pytest
import torch
from backends import assert_as_good, assert_same, device, everywhere, parameters, run
from cases import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from ttaq.kernels import codes as cd
from ttaq.kernels import packed_conv2d as pc

from ttaq import ops


def on_codes(case):
    return case.args[6] is not None and not case.name.startswith("after")  # test_epilogue.py has what follows


def on_floats(case):
    return case.args[6] is None and not case.name.startswith("after")


def weight64(words, scale, zero, bits, channels, kernel_size):
    """Dequantise in float64: (O, channels, R, S)."""
    codes = cd.stored_codes(words, bits, channels * kernel_size[0] * kernel_size[1]).double()
    weight = (codes - zero.unsqueeze(-1)) * scale.double().unsqueeze(-1)
    return weight.unflatten(-1, (*kernel_size, channels)).movedim(-1, 1)


def integer_law(x, words, scale, zero, bias, bits, x_scale, x_zero, x_bits, *geometry, dtype):
    """Compute the convolution on codes with int64 sums over unfolded patches."""
    kernel_size, stride, padding, dilation, groups = geometry
    patches = F.unfold((x.long() - x_zero).double(), kernel_size, dilation, padding, stride).long()
    patches = patches.unflatten(1, (groups, x.shape[1] // groups, -1)).transpose(2, 3).flatten(2, 3)  # channels last
    weight = cd.stored_codes(words, bits, patches.shape[2]).long() - zero.unsqueeze(-1)
    sums = torch.einsum("bgkp,gok->bgop", patches, weight.unflatten(0, (groups, -1))).flatten(1, 2)
    y = sums.float() * (x_scale * scale).unsqueeze(-1)
    y = y if bias is None else y + bias.unsqueeze(-1)
    return y.to(dtype).unflatten(2, (-1, _width(x, kernel_size, stride, padding, dilation))).contiguous()


def _width(x, kernel_size, stride, padding, dilation):
    return (x.shape[3] + 2 * padding[1] - dilation[1] * (kernel_size[1] - 1) - 1) // stride[1] + 1


@pytest.mark.parametrize(("backend", "case"), [p for p in parameters("packed_conv2d") if on_codes(p.values[1])])
def test_codes_give_the_bits_of_the_reference(backend, case, poison):
    args = case.on(device(backend))
    y, *nothing = run("packed_conv2d", backend, args)
    assert_same(y, pc.reference(*args)[0])
    assert_same(run("packed_conv2d", backend, args)[0], y)
    assert [t.shape for t in nothing] == [(0,), (0,)]


@pytest.mark.parametrize(
    "case", [c for c in cases("packed_conv2d") if on_codes(c) and c.args[0].numel()], ids=lambda c: c.name
)
def test_the_reference_sums_exactly(case):
    *args, dtype = case.args
    assert_same(pc.reference(*case.args)[0].contiguous(), integer_law(*args, dtype=dtype))


@pytest.mark.parametrize(("backend", "case"), [p for p in parameters("packed_conv2d") if on_floats(p.values[1])])
def test_floats_are_as_good_as_plain_torch(backend, case, poison):
    args = case.on(device(backend))
    x, words, scale, zero, bias, bits, _, _, _, kernel_size, *geometry, _ = args
    y, plain = run("packed_conv2d", backend, args)[0], pc.reference(*args)[0]
    assert y.stride() == plain.stride() or y.numel() == 0
    weight = weight64(words, scale, zero, bits, x.shape[1] // geometry[-1], kernel_size)
    bias = None if bias is None else bias.double()
    exact = F.conv2d(x.double(), weight, bias, *geometry)
    terms = F.conv2d(x.double().abs(), weight.abs(), None if bias is None else bias.abs(), *geometry)
    assert_as_good(y, plain, exact, terms if x.dtype == torch.float32 else None)


@pytest.mark.parametrize(("backend", "case"), parameters("packed_conv2d_backward"))
def test_the_gradient_is_as_good_as_plain_torch(backend, case, poison):
    args = case.on(device(backend))
    grad, words, scale, zero, bits, shape, kernel_size, *geometry = args
    dx, plain = run("packed_conv2d_backward", backend, args), pc.reference_backward(*args)
    assert dx.stride() == plain.stride() or dx.numel() == 0
    weight = weight64(words, scale, zero, bits, shape[1] // geometry[-1], kernel_size)
    exact = torch.nn.grad.conv2d_input(shape, weight, grad.double(), *geometry)
    terms = torch.nn.grad.conv2d_input(shape, weight.abs(), grad.double().abs(), *geometry)
    assert_as_good(dx, plain, exact, terms if grad.dtype == torch.float32 else None)


def test_the_gradient_is_that_of_autograd_through_the_dequantised_weight():
    for case in cases("packed_conv2d"):
        if not on_floats(case) or case.args[-1] != torch.float32:
            continue
        x, words, scale, zero, bias, bits, _, _, _, kernel_size, *geometry, _ = case.args
        names = dict(zip(("stride", "padding", "dilation"), map(tuple, geometry), strict=False), groups=geometry[-1])
        weight = pc.dequantise(words, scale, zero, bits, (words.shape[0], x.shape[1] // geometry[-1], *kernel_size))
        mine, plain, exact, terms = (t.clone().requires_grad_() for t in (x, x, x.double(), x.double().abs()))
        y, _ = ops.packed_conv2d(mine, words, scale, zero, bias, bits=bits, kernel_size=tuple(kernel_size), **names)
        wide = None if bias is None else bias.double()
        ys = [
            F.conv2d(plain, weight, bias, **names),
            F.conv2d(exact, weight.double(), wide, **names),
            F.conv2d(terms, weight.double().abs(), None if bias is None else wide.abs(), **names),
        ]
        grad = torch.randn_like(y)
        for made, by in zip((y, *ys), (grad, grad, grad.double(), grad.double().abs()), strict=True):
            made.backward(by)
        assert_as_good(y, *ys)
        assert_as_good(mine.grad, plain.grad, exact.grad, terms.grad)


def test_words_keep_their_channels_last():
    weight = torch.arange(2 * 3 * 2 * 4, dtype=torch.uint8).reshape(2, 3, 2, 4)
    rows = ops.to_rows(weight)
    assert rows[1].tolist() == [int(weight[1, c, r, s]) for r in range(2) for s in range(4) for c in range(3)]
    assert_same(ops.from_rows(rows, weight.shape), weight)
    assert_same(ops.from_rows(ops.to_rows(weight[:, :1]), (2, 1, 2, 4)), weight[:, :1].contiguous())


_pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.sampled_from((2, 3, 4, 8)),
    st.integers(2, 8),
    _pairs,
    _pairs,
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    _pairs,
    st.sampled_from((1, 2, 3)),
    st.sampled_from(("random", "lowest", "highest")),
)
def test_any_codes_sum_exactly(bits, x_bits, kernel_size, stride, padding, dilation, groups, extreme):
    random = torch.Generator().manual_seed(bits * 10 + x_bits)

    def draw(shape, width, dtype=torch.uint8):
        if extreme == "random":
            return torch.randint(0, 1 << width, shape, dtype=dtype, generator=random)
        highest = (extreme == "highest") == (dtype == torch.uint8)  # zeros at the other end
        return torch.full(shape, (1 << width) - 1 if highest else 0, dtype=dtype)

    x = draw((1, 2 * groups, 8, 7), x_bits)
    words = cd.pack_reference(draw((3 * groups, 2 * kernel_size[0] * kernel_size[1]), bits), bits)
    scale, x_scale = torch.rand(3 * groups, generator=random), torch.rand((), generator=random)
    zero, x_zero = draw((3 * groups,), bits, torch.int32), draw((), x_bits, torch.int32)
    geometry = (list(kernel_size), list(stride), list(padding), list(dilation), groups)
    args = (x, words, scale, zero, None, bits, x_scale, x_zero, x_bits, *geometry)
    wanted = integer_law(*args, dtype=torch.float32)
    for _, (y, *_) in everywhere("packed_conv2d", *args, torch.float32):
        assert_same(y, wanted)


def test_autocast_does_not_touch_the_sums():
    case = next(c for c in cases("packed_conv2d") if c.name == "3x3-codes")
    wanted = pc.reference(*case.args)[0]
    with torch.autocast("cpu", torch.bfloat16):
        for _, (y, *_) in everywhere("packed_conv2d", *case.args):
            assert_same(y, wanted)


def test_large_tiles_agree(monkeypatch):
    monkeypatch.setattr(pc, "_tiles", lambda *_: (128, 128, 64, 8, 3))
    for case in cases("packed_conv2d"):
        if case.name in ("3x3-deep-codes-channels_last", "5x5-stem-codes", "3x3-dilated-groups-f16"):
            args = case.on(device("triton"))
            y, *_ = run("packed_conv2d", "triton", args)
            torch.testing.assert_close(y, pc.reference(*args)[0], atol=0 if on_codes(case) else 0.02, rtol=0)


def test_large_tiles_are_chosen_where_they_fill_a_gpu_and_hold():
    images = torch.empty((64, 256, 14, 14), dtype=torch.uint8, device="meta")
    near, large = images.to(memory_format=torch.channels_last), (128, 128, 64, 8, 3)
    assert pc._tiles(256, 256, 12_544, near, True) == large
    assert pc._tiles(256, 256, 12_544, near.bfloat16(), False) == large
    for wrong in ((images, False), (near.bfloat16(), True), (near.float(), False)):
        assert pc._tiles(256, 256, 12_544, *wrong) != large
    assert pc._tiles(256, 256, 196, near, False) == pc._tiles(256, 48, 12_544, near, False) == (64, 64, 32, 4, 2)


def test_what_the_kernel_cannot_do_is_refused_by_name():
    x, *rest = next(c.args for c in cases("packed_conv2d") if c.name == "3x3-f32")
    assert pc.refuses(x, *rest) is None
    assert "torch.float64" in pc.refuses(x.double(), *rest)
    far = torch.empty(1, 1, device="meta").as_strided((1, 4, 7, 6), (0, 1 << 30, 1, 1))
    assert "2^31" in pc.refuses(far, *rest)
    grad, *rest = next(c.args for c in cases("packed_conv2d_backward") if c.name == "3x3-f32")
    assert "torch.int32" in pc.refuses_backward(grad.int(), *rest)
