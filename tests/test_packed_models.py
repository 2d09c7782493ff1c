"""Whole packed networks: one graph under torch.compile, on meta tensors too, and layers that say what runs."""

import pytest
import torch
from tiny import BUILDERS, calibrated, input_of
from torch._subclasses.fake_tensor import FakeTensorMode
from ttaq.kernels import _native

import ttaq

RECIPES = ["w4a8", "w2a4", "w4a16"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", list(BUILDERS))
def test_a_packed_network_is_one_graph_with_the_same_bits(name, recipe):
    packed, x = ttaq.pack(calibrated(name, recipe)), input_of(name, seed=2)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), packed(x))


@pytest.mark.parametrize("name", list(BUILDERS))
def test_a_packed_network_gives_its_shapes_without_data(name):
    packed, x = ttaq.pack(calibrated(name, "w4a8")), input_of(name, seed=2)
    with torch.no_grad():
        wanted = packed(x)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            found = packed(mode.from_tensor(x))
    assert (found.shape, found.dtype, found.stride()) == (wanted.shape, wanted.dtype, wanted.stride())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", list(BUILDERS))
def test_every_packed_layer_says_what_runs(name, recipe):
    packed, seen = ttaq.pack(calibrated(name, recipe)), {}
    for layer in packed.modules():
        if isinstance(layer, ttaq.PackedLinear | ttaq.PackedConv2d):
            layer.register_forward_pre_hook(lambda layer, args: seen.update({layer: layer.explain(args[0])}))
    with torch.no_grad():
        packed(input_of(name, seed=2))
    assert seen
    for layer, text in seen.items():
        lines = text.splitlines()
        assert lines[0].startswith("packed_linear" if isinstance(layer, ttaq.PackedLinear) else "packed_conv2d")
        assert [line.endswith(": runs") for line in lines].count(True) == 1
        if recipe == "w4a8" and _native.library("cpu"):
            assert "cpu: runs" in lines
