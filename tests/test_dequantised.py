"""Packed linear layers by way of a weight dequantised for the call: the bits of the reference, and when it is tried."""

import pytest
import torch
from backends import assert_as_good, assert_same, device
from cases import cases
from ttaq.kernels import dequantised as dq
from ttaq.kernels import packed_linear as pl

import ttaq
from ttaq import dispatch
from ttaq.declarations import RAW
from ttaq.dispatch import Implementation, Op, never


def plain(case):
    """Tell whether a case is a product of floats whose words Triton reads and which nothing follows."""
    return case.args[7] is None and not case.name.startswith("after_") and "groups_within" not in case.name


FLOATS = [pytest.param(case, id=case.name) for case in cases("packed_linear") if plain(case)]


@pytest.mark.parametrize("case", FLOATS)
def test_the_weight_and_the_product_are_those_of_the_reference(case, poison):
    args = case.on(device("triton"))
    x, words, scale, zero, _, bits, group, *_ = args
    weight = dq.dequantise(words, scale, zero, bits, group, x.shape[-1], x.dtype)
    assert_same(weight, pl.dequantise(words, scale, zero, bits, group, x.shape[-1]).to(x.dtype))
    for mine, wanted in zip(dq.launch(*args), pl.reference(*args), strict=True):
        assert_same(mine, wanted)


@pytest.mark.parametrize("case", [case for case in cases("packed_linear_backward") if case.args[0].ndim == 2])
def test_the_gradient_is_that_of_the_reference(case, poison):
    args = case.on(device("triton"))
    if pl.refuses_backward(*args) is None:
        assert_same(dq.launch_backward(*args), pl.reference_backward(*args))


def test_it_is_for_many_rows_of_floats_that_nothing_follows():
    named = {case.name: case.args for case in cases("packed_linear")}
    x, *rest = named["4_bits-bf16"]
    many = x.new_empty(dq.LEAST_ROWS, x.shape[-1])
    assert dq.refuses(many, *rest) is None
    assert dq.refuses_backward(many, *rest[:3], 4, 0, x.shape[-1]) is None
    assert f"there are {dq.LEAST_ROWS - 1} rows; below {dq.LEAST_ROWS}" in dq.refuses(many[1:], *rest)
    assert "float64" in dq.refuses(many.double(), *rest)
    assert "codes" in dq.refuses(*named["4_bits-8_bit_codes"])
    assert "follows" in dq.refuses(*named["after_?-whole_tiles-f32"])


def test_explain_says_why_it_is_tried_first(monkeypatch):
    first, second = (Implementation(name, None, never, why) for name, why in (("one", "so it is"), ("two", "")))
    monkeypatch.setitem(dispatch.OPS, "made_up", Op("made_up", (first, second)))
    assert ttaq.explain("made_up").splitlines() == ["one: runs", "two: could run, but one is tried before it: so it is"]
    for op in ("packed_linear", "packed_linear_backward"):
        chosen = next(i for i in dispatch.OPS[op].implementations if i.name == "dequantised")
        assert str(dq.LEAST_ROWS) in chosen.why


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_rows_on_a_gpu_hold_no_float_weight_afterwards(dtype):
    args = next(case for case in cases("packed_linear") if case.name == "4_bits-bf16").on("cuda")
    x = torch.randn(dq.LEAST_ROWS, args[0].shape[-1], device="cuda", dtype=dtype)
    args = (x, *args[1:-1], dtype) if len(args) == 11 else (x, *args[1:10], dtype, *args[11:])
    lines = ttaq.explain("packed_linear", *args).splitlines()
    assert "dequantised: runs" in lines
    assert any(dq.WHY in line for line in lines)
    RAW.packed_linear(*args)
    before = torch.cuda.memory_allocated()
    y, *_ = RAW.packed_linear(*args)
    assert torch.cuda.memory_allocated() - before <= 2 * y.numel() * y.element_size() + 4096
    weight = pl.dequantise(*args[1:4], args[5], args[6], x.shape[-1]).double()
    exact = torch.nn.functional.linear(x.double(), weight, args[4].double())
    assert_as_good(y, pl.reference(*args)[0], exact)
