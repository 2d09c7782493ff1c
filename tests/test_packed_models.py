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


def prepared(name, recipe, form):
    """Give a packed network on the GPU, fused where that is asked, and the images that it was not calibrated on."""
    packed, x = ttaq.pack(calibrated(name, recipe)).cuda(), [input_of(name, seed=seed).cuda() for seed in (2, 3)]
    return (ttaq.fuse(packed, x[0]) if form == "fused" else packed), x


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["packed", "fused", "compiled"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", list(BUILDERS))
def test_a_cuda_graph_replays_the_bits_of_eager_mode(name, recipe, form):
    packed, (first, second) = prepared(name, recipe, form)
    model = torch.compile(packed, fullgraph=True, backend="aot_eager") if form == "compiled" else packed
    x, stream = first.clone(), torch.cuda.Stream()
    with torch.no_grad():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles the kernels: nothing may be compiled within a capture
            for _ in range(3):
                model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        for images in (second, first):
            x.copy_(images)
            graph.replay()
            assert torch.equal(y, packed(images))


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(BUILDERS))
def test_inductor_and_its_own_cuda_graphs_stay_within_the_rounding_of_eager_mode(name):
    packed, images = prepared(name, "w4a8", "packed")
    compiled = torch.compile(packed, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for x in [*images, *images]:
            wanted = packed(x)  # Inductor may contract between the ops, so that a code may fall to the other side
            assert (compiled(x) - wanted).abs().max() <= 0.1 * wanted.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["vit_small_patch16_224", "resnet18"])
def test_a_network_of_real_size_replays_in_a_cuda_graph(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, pretrained=False).eval()
    x = torch.randn(2, 3, 224, 224)
    packed = ttaq.pack(ttaq.quantize(model, [x], "w4a8", method="rtn", progress=False)).cuda()
    taken, fresh = x.cuda(), torch.randn(2, 3, 224, 224, device="cuda")
    with torch.no_grad():
        for _ in range(3):
            packed(taken)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = packed(taken)
        taken.copy_(fresh)
        graph.replay()
        assert torch.equal(y, packed(fresh))
