"""What follows a packed product in the same pass: every backend against the reference, which equals its parts."""

import pytest
import torch
from backends import assert_as_good, assert_same, device, everywhere, parameters, run
from cases import cases
from torch.nn import functional as F
from ttaq.kernels import _epilogue as ep
from ttaq.kernels import codes as cd
from ttaq.kernels import packed_conv2d as pc
from ttaq.kernels import packed_linear as pl

from ttaq import ops
from ttaq.declarations import RAW

OPS = {"packed_linear": (pl, -1), "packed_conv2d": (pc, 1)}
FOLLOWED = [p for p in parameters(*OPS) if p.values[1].name.startswith("after")]


def parts(case):
    """Return (arguments of the bare op, the epilogue)."""
    bare = [a.name for a in getattr(RAW, case.op).default._schema.arguments].index("gain")
    return case.args[:bare], ep.Epilogue(*case.args[bare:])


def on_codes(case):
    return case.args[0].dtype == torch.uint8


def apart(y, end, axis):
    """Return what follows `y`, by torch's own ops one after the other, and how many values its codes hide."""
    shape = [-1 if d == axis % y.ndim else 1 for d in range(y.ndim)]
    if end.gain is not None:
        y = y * end.gain.reshape(shape) + end.shift.reshape(shape)
    y = y if end.residual is None else y + end.residual.float()
    y = {"none": lambda y: y, "relu": F.relu, "relu6": F.relu6, "gelu": F.gelu}[end.after](y)
    if end.y_scale is None:
        return y, None
    return RAW.quantize_codes(y, end.y_scale, end.y_zero, 0, (1 << end.y_bits) - 1, None, 0)


def exact_product(case):
    """Return what the epilogue follows, float64: the exact sums of codes, or the product of floats in float64."""
    (x, *rest, _), _ = parts(case)
    if on_codes(case):
        return OPS[case.op][0].reference(x, *rest, torch.float32)[0].double()
    return OPS[case.op][0].reference(x.double(), *rest, torch.float64)[0]


@pytest.mark.parametrize(("backend", "case"), FOLLOWED)
def test_what_follows_equals_the_reference(backend, case, poison):
    args, (kernel, axis) = case.on(device(backend)), OPS[case.op]
    found, wanted = run(case.op, backend, args), kernel.reference(*args)
    assert [(t.dtype, t.shape, t.stride()) for t in found] == [(t.dtype, t.shape, t.stride()) for t in wanted]
    _assert_output(found[0].cpu(), wanted[0].cpu(), case, axis)
    _assert_moments(found[1].cpu(), wanted[1].cpu(), case, axis)
    assert_same(found[2], wanted[2])
    for first, second in zip(found, run(case.op, backend, args), strict=True):
        assert_same(second, first)


def _assert_output(y, wanted, case, axis):
    bare, end = parts(case)
    if on_codes(case) and end.after != "gelu":
        assert_same(y, wanted)  # exact sums, then float32 without contraction: every bit
        return
    followed = end._replace(y_scale=None, y_zero=None)
    exact, _ = apart(exact_product(case), followed, axis)
    plain = OPS[case.op][0].reference(*bare, *followed)[0]
    if end.y_scale is None:
        assert_as_good(y, plain, exact)
        return
    slack = 2 * (plain.double() - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    place = (exact / end.y_scale + end.y_zero).clamp(0, (1 << end.y_bits) - 1)  # a value between two codes gets either
    assert ((y.double() - place).abs() <= 0.5 + slack / end.y_scale).all()


def _assert_moments(seen, wanted, case, axis):
    if not seen.numel() or not case.args[0].numel():
        assert_same(seen, wanted)
        return
    y = exact_product(case).movedim(axis, 0)
    for row, terms in enumerate((y.reshape(len(y), -1), y.reshape(len(y), -1).square())):
        exact, size = terms.sum(1), terms.abs().sum(1)
        bound = 2 * (wanted[row] - exact).abs().max() + 1e-5 * size.max()
        assert ((seen[row] - exact).abs() <= bound).all()


@pytest.mark.parametrize("op", OPS)
def test_it_equals_the_parts_one_after_the_other(op):
    for case in (c for c in cases(op) if c.name.startswith("after") and on_codes(c)):
        bare, end = parts(case)
        for name, (y, _, nonfinite) in everywhere(op, *case.args):
            plain = next(found for other, found in everywhere(op, *bare[:-1], torch.float32) if other == name)[0]
            wanted, count = apart(plain, end, OPS[op][1])
            if end.after != "gelu" or name != "triton":
                assert torch.equal(y, wanted if end.y_scale is not None else wanted.to(y.dtype)), (case.name, name)
            assert nonfinite.numel() == 0 if count is None else torch.equal(nonfinite, count)


def test_gelu_gives_the_codes_of_the_reference():
    found = [c for op in OPS for c in cases(op) if "gelu#" in c.name and on_codes(c)]
    assert found
    for case in found:
        wanted = OPS[case.op][0].reference(*case.args)[0]
        for _, (y, *_) in everywhere(case.op, *case.args):
            assert_same(y, wanted)


def test_relu_gives_no_negative_zero_and_keeps_a_nan():
    y = torch.tensor([-0.0, -1.0, torch.nan, 2.0, 7.0])
    for kind, most in (("relu", 7.0), ("relu6", 6.0)):
        got, *_ = ep.finish(y, ep.Epilogue(after=kind), -1)
        assert_same(got, torch.tensor([0.0, 0.0, torch.nan, 2.0, most]))


def test_values_that_are_not_finite_are_counted_and_a_nan_gets_the_code_of_zero():
    case = next(c for c in cases("packed_linear") if c.name == "after_+-4_bits-8_bit_codes")
    bare, end = parts(case)
    residual = end.residual.clone()
    residual[0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    grid = (torch.tensor(0.5), torch.tensor(7, dtype=torch.int32), 4)
    wanted = cd.reference(pl.reference(*bare)[0] + residual, *grid[:2], 0, 15, None, 0)
    for _, (y, _, nonfinite) in everywhere("packed_linear", *bare, None, None, residual, "none", *grid):
        assert y[0, 0, :3].tolist() == [7, 15, 0]
        assert nonfinite == 3
        assert_same(y, wanted[0])


def _weight(random, n, k, bits=4):
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=random)
    zero = torch.full((n,), 1 << (bits - 1), dtype=torch.int32)
    return cd.pack_reference(codes, bits), torch.rand(n, generator=random) * 0.02 + 0.01, zero


def _chain(name, random):
    """Return (x, first layer, second layer, channels between): each a function of its input and what follows it."""
    if name == "linear":
        first, second = _weight(random, 16, 24), _weight(random, 9, 16)
        return (
            torch.randn(3, 5, 24, generator=random),
            lambda x, **rest: ops.packed_linear(x, *first, bits=4, **rest),
            lambda x, **rest: ops.packed_linear(x, *second, bits=4, **rest),
        )
    first, second = _weight(random, 16, 4 * 9), _weight(random, 6, 16)
    return (
        torch.randn(2, 4, 6, 5, generator=random),
        lambda x, **rest: ops.packed_conv2d(x, *first, bits=4, kernel_size=(3, 3), padding=(1, 1), **rest),
        lambda x, **rest: ops.packed_conv2d(x, *second, bits=4, kernel_size=(1, 1), **rest),
    )


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_a_chain_of_codes_equals_the_layers_apart(name):
    random = torch.Generator().manual_seed(5)
    x, first, second = _chain(name, random)
    entering = {"x_scale": torch.tensor(0.02), "x_zero": torch.tensor(128, dtype=torch.int32)}
    between = (torch.tensor(0.015), torch.tensor(3, dtype=torch.int32))
    x[0, 0, 0] = torch.nan
    affine = {"gain": torch.rand(16, generator=random), "shift": torch.randn(16, generator=random)}
    y, entered = first(x, **entering)
    y, _ = apart(y, ep.Epilogue(**affine, after="relu"), -1 if name == "linear" else 1)
    wanted, counted = second(y, x_scale=between[0], x_zero=between[1], x_bits=6)
    codes, count = first(x, **entering, **affine, after="relu", y_scale=between[0], y_zero=between[1], y_bits=6)
    assert codes.dtype == torch.uint8
    got, none = second(codes, x_scale=between[0], x_zero=between[1], x_bits=6)
    assert none is None
    assert count == entered + counted > 0
    assert_same(got, wanted)
    half, _ = second(codes, x_scale=between[0], x_zero=between[1], x_bits=6, dtype=torch.bfloat16)
    assert_same(half, wanted.bfloat16())


@pytest.mark.parametrize("name", ["linear", "conv2d"])
@pytest.mark.parametrize("grid", [{}, {"x_scale": torch.tensor(0.02), "x_zero": torch.tensor(128, dtype=torch.int32)}])
def test_moments_come_beside_the_gradients_and_have_none(name, grid):
    x, first, _ = _chain(name, torch.Generator().manual_seed(6))
    results = []
    for moments in (False, True):
        leaf = x.clone().requires_grad_()
        y, _, *seen = first(leaf, **grid, moments=moments)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
        assert len(seen) == moments
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    rows = y.detach().double().movedim(-1 if name == "linear" else 1, 0).flatten(1)
    torch.testing.assert_close(seen[0], torch.stack([rows.sum(1), rows.square().sum(1)]).float(), rtol=1e-4, atol=1e-3)
    assert not seen[0].requires_grad


@pytest.mark.parametrize("op", OPS)
def test_it_compiles_in_one_graph(op):
    case = next(c for c in cases(op) if c.name.startswith("after_*+relu#4?"))
    names = [a.name for a in getattr(RAW, op).default._schema.arguments]
    keywords = dict(zip(names, case.args, strict=True))
    x = keywords.pop("x").float()

    def call(x):
        return getattr(ops, op)(x, **keywords)

    torch._dynamo.reset()
    for got, wanted in zip(torch.compile(call, fullgraph=True)(x), call(x), strict=True):
        assert_same(got, wanted)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    case = next(c for c in cases(op) if c.name.startswith("after_*+gelu#8?"))
    torch.library.opcheck(getattr(RAW, op).default, case.args)


def test_wrong_calls_are_refused_with_a_remedy():
    random = torch.Generator().manual_seed(7)
    x, first, _ = _chain("linear", random)
    one, zero = torch.tensor(0.1), torch.tensor(1, dtype=torch.int32)
    for message, wrong in (
        ("after must be one of none, relu, gelu, relu6, got 'tanh'; use one of these", {"after": "tanh"}),
        ("gain and shift go together, got one of them; pass both", {"gain": torch.ones(16)}),
        (r"gain and shift want shape \(16,\) on cpu, got \(4,\)", {"gain": torch.ones(4), "shift": torch.ones(4)}),
        ("y_scale and y_zero go together", {"y_scale": one}),
        (r"y_scale and y_zero want shape \(\) on cpu, got \(1,\)", {"y_scale": one[None], "y_zero": zero[None]}),
        ("codes of y want y_bits from 2 to 8", {"y_scale": one, "y_zero": zero, "y_bits": 9}),
        ("codes of y want .* got 8 and torch.float32; use y_zero.round", {"y_scale": one, "y_zero": one}),
        (r"residual wants the shape, dtype and device of y, \(3, 5, 16\) torch.float32", {"residual": torch.ones(3)}),
        ("y has the dtype of x, torch.float32, got dtype=torch.float16", {"dtype": torch.float16}),
    ):
        with pytest.raises(ValueError, match=f"^packed_linear: {message}"):
            first(x, **wrong)
    with pytest.raises(ValueError, match="x holds codes, and no x_scale says of what; pass the x_scale and x_zero"):
        first(x.to(torch.uint8))
    for wrong in ({"after": "relu"}, {"residual": torch.ones(3, 5, 16)}, {"y_scale": one, "y_zero": zero}):
        with pytest.raises(ValueError, match="are for inference, got a tensor that requires a gradient; call it under"):
            first(x.requires_grad_(), **wrong)
        with torch.no_grad():
            first(x, **wrong)
