"""Export: ONNX files that onnxruntime runs to the same predictions, what is refused, and programs of torch.export."""

import collections
import copy
import functools

import numpy as np
import pytest
import torch
from test_cli import folder, invoke, refused  # noqa: F401
from tiny import BUILDERS, calibrated, images, input_of, settle
from torch import nn

import ttaq
from ttaq import Recipe, export_onnx, export_torch
from ttaq.adaptation import Adapter

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def session(path, optimised=True):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def agrees(path, model, x, ways=(False, True)):
    """Check onnxruntime, as the file stands and optimised, on several numbers of images against the model."""
    onnx.checker.check_model(str(path), full_check=True)
    for optimised in ways:
        runs = session(path, optimised)
        for part in (x, x[:1]):
            with torch.no_grad():
                wanted = model(part)
            found = torch.from_numpy(runs.run(None, {"images": part.numpy()})[0])
            assert (found - wanted).abs().max() <= 1e-3 * wanted.abs().max()
            assert torch.equal(found.argmax(1), wanted.argmax(1))


def kinds(path):
    """Count the operators of a file, and the types of its initialisers that are integers."""
    graph = onnx.load(path).graph
    types = {i.name: onnx.TensorProto.DataType.Name(i.data_type) for i in graph.initializer}
    return collections.Counter(node.op_type for node in graph.node), types


@functools.cache
def small(recipe="w4a4", **options):
    """Give two convolutions with ReLU6 between them, calibrated, and gains of every sign."""
    parts = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = settle(nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)), images())
    with torch.no_grad():
        for norm in (model[1], model[4]):
            norm.weight[:3] = torch.tensor([-0.7, 0.0, -1.3])
    model = ttaq.prepare(model, Recipe.parse(recipe, first_last=None, **options))
    ttaq.calibrate(model, [images()])
    return model


@pytest.mark.parametrize(("name", "recipe"), [("resnet", "w4a4"), ("vit", "w2a8")])
def test_onnxruntime_agrees_with_the_packed_model(name, recipe, tmp_path):
    model = ttaq.pack(calibrated(name, recipe))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    said = export_onnx(model, input_of(name)[:1], tmp_path / "model.onnx")
    agrees(tmp_path / "model.onnx", model, input_of(name, seed=2))
    assert said["bytes"] == (tmp_path / "model.onnx").stat().st_size
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    operators, types = kinds(tmp_path / "model.onnx")
    assert "UINT4" in types.values()
    assert operators["BatchNormalization"] == 0
    if name == "resnet":
        assert (said["folded"], said["kept"]) == (7, {})
        assert said["layers"]["layer1.0.conv1"] == {"input": "uint4", "weight": "uint4"}
    else:
        assert said["layers"]["layers.0.attention.scores"] == {"left": "uint8", "right": "uint8"}


def test_a_kept_norm_stays_an_operator_and_a_prepared_model_serves(tmp_path):
    model = small()
    said = export_onnx(model, images(), tmp_path / "model.onnx", fold=False)
    agrees(tmp_path / "model.onnx", model, images(seed=2))
    assert said["folded"] == 0
    assert kinds(tmp_path / "model.onnx")[0]["BatchNormalization"] == 2


def test_folding_mirrors_the_codes_of_negative_gains(tmp_path):
    model = ttaq.pack(small("w4a4"))
    said = export_onnx(model, images(), tmp_path / "model.onnx")
    agrees(tmp_path / "model.onnx", model, images(seed=2))
    assert (said["folded"], said["kept"]) == (2, {})
    scales = [i for i in onnx.load(tmp_path / "model.onnx").graph.initializer if i.name.endswith("scale")]
    assert all((onnx.numpy_helper.to_array(scale) > 0).all() for scale in scales)


def test_an_adapted_model_serves_tensorrt(tmp_path):
    adapter = ttaq.adapt(ttaq.pack(small("w4a8", symmetric=True)), "tent")
    adapter(images(seed=4))
    model = adapter.export()
    said = export_onnx(model, images(), tmp_path / "model.onnx", target="tensorrt")
    agrees(tmp_path / "model.onnx", model, images(seed=2), ways=(False,))
    assert said["folded"] == 2
    graph = onnx.load(tmp_path / "model.onnx").graph
    integers = [i for i in graph.initializer if i.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)]
    assert {i.data_type for i in integers} == {onnx.TensorProto.INT8}
    used = [node.input[2] for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    zeros = {i.name: onnx.numpy_helper.to_array(i) for i in integers}
    assert used
    assert not any(zeros[name].any() for name in used)


def test_groups_and_tokens_are_exported_or_refused_by_opset(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 5))
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    model = ttaq.prepare(model, Recipe.parse("w3a8", group=8, token=True))
    ttaq.calibrate(model, [x])
    said = export_onnx(model, x, tmp_path / "model.onnx")
    agrees(tmp_path / "model.onnx", model.eval(), x)
    assert said["layers"]["0"] == {"input": "a grid a token, in float", "weight": "uint8"}  # the first layer, at 8 bits
    with pytest.raises(ValueError, match=r"onnx cannot take these layers: 0, 2: groups of 8 .* use opset=21"):
        export_onnx(model, x, tmp_path / "model.onnx", opset=20)
    with pytest.raises(ValueError, match=r"tensorrt .* 0, 2: its input has one scale a token; .*symmetric=True"):
        export_onnx(model, x, tmp_path / "model.onnx", target="tensorrt")


def test_two_and_three_bits_are_cut_off_exactly_without_4_bit_types(tmp_path):
    model = ttaq.pack(small("w3a2"))
    said = export_onnx(model, images(), tmp_path / "model.onnx", opset=20)
    agrees(tmp_path / "model.onnx", model, images(seed=2))
    assert said["layers"]["3"] == {"input": "uint8", "weight": "uint8"}


@pytest.mark.parametrize(
    ("recipe", "options", "sentence"),
    [
        ("w8a8", {}, "0, 3, 7: the zero of its input is not in the middle; quantise with Recipe.parse"),
        ("w4a4", {"symmetric": True}, "0, 3, 7: its input has 4 bits and not 8; quantise with"),
        ("w8a16", {}, "the zeros of its weight are not in the middle; quantise with"),
    ],
)
def test_tensorrt_refuses_by_name(recipe, options, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence) as caught:
        export_onnx(small(recipe, **options), images(), tmp_path / "model.onnx", target="tensorrt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model.onnx").exists()


def test_tensorrt_refuses_groups_but_of_4_bits_on_floats(tmp_path):
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    groups = "groups are read of 64 or 128"
    for recipe, group, wanted in (("w4a16", 64, None), ("w4a16", 32, groups), ("w4a8", 64, groups)):
        spec = Recipe.parse(recipe, group=group, symmetric=True, first_last=None)
        model = ttaq.prepare(nn.Sequential(nn.Linear(64, 5)), spec)
        ttaq.calibrate(model, [x])
        if wanted is None:
            said = export_onnx(model, x, tmp_path / "model.onnx", target="tensorrt")
            assert said["layers"]["0"] == {"weight": "int4"}
            agrees(tmp_path / "model.onnx", model.eval(), x, ways=(False,))  # optimised, its inputs get 8 bits
        else:
            with pytest.raises(ValueError, match=wanted):
                export_onnx(model, x, tmp_path / "model.onnx", target="tensorrt")


def test_what_cannot_be_exported_is_said_in_a_sentence(tmp_path):
    path, x = tmp_path / "model.onnx", images()
    fresh = ttaq.prepare(BUILDERS["resnet"](), "w4a4")
    packed = ttaq.pack(small())
    hooked = ttaq.pack(small())
    hooked[3].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    for model, options, sentence in (
        (fresh, {}, "conv1, .*linear: without calibrated ranges; run ttaq.calibrate first"),
        (BUILDERS["resnet"](), {}, "holds no quantised layer; call ttaq.quantize"),
        (ttaq.adapt(packed, "source"), {}, "pass adapter.export"),
        (ttaq.fuse(packed, x), {}, "is fused; export the packed model"),
        (hooked, {}, "these layers: 3: it has hooks, which a file cannot hold; remove them"),
        (packed, {"target": "coreml"}, "target must be one of onnx, tensorrt, got 'coreml'"),
        (packed, {"opset": 17}, "opset must be 18 to 23, got 17; use 21"),
        (packed, {"batch": 0}, "batch must be a number of images from 1, got 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            export_onnx(model, x, path, **options)
    with pytest.raises(ValueError, match=r"images must be a batch \(B, ...\), got list"):
        export_onnx(packed, [x], path)
    assert not path.exists()


def test_a_fixed_number_of_images(tmp_path):
    model = ttaq.pack(small())
    export_onnx(model, images(), tmp_path / "model.onnx", batch=1)
    [given] = onnx.load(tmp_path / "model.onnx").graph.input
    assert [d.dim_value for d in given.type.tensor_type.shape.dim] == [1, 3, 16, 16]


def test_a_branch_on_data_is_refused_with_the_reason(tmp_path):
    class Branching(nn.Sequential):
        def forward(self, x):
            return super().forward(x if x.mean() > 0 else -x)

    model = ttaq.prepare(Branching(nn.Flatten(), nn.Linear(768, 5)), "w8a8")
    ttaq.calibrate(model, [images()])
    with pytest.raises(ValueError, match=r"torch\.export cannot follow Branching"):
        export_onnx(model, images(), tmp_path / "model.onnx")


@pytest.mark.parametrize("form", ["prepared", "packed"])
@pytest.mark.parametrize("name", ["resnet", "vit", "timm_vit"])
def test_a_program_of_torch_export_gives_the_same_bits(name, form):
    model = calibrated(name, "w4a8")
    model = ttaq.pack(model) if form == "packed" else model.eval()
    x = input_of(name, seed=2)
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=False)
        assert torch.equal(program.module()(x), model(x))


def test_export_torch_writes_a_program_for_any_number_of_images(tmp_path):
    model = ttaq.pack(calibrated("resnet", "w4a4"))
    path = export_torch(model, images()[:1], tmp_path / "model.pt2")
    program = torch.export.load(path).module()
    for x in (images(seed=2), images(seed=2)[:3]):
        with torch.no_grad():
            assert torch.equal(program(x), model(x))


def test_the_command_writes_a_file_for_each_target(folder, tmp_path):  # noqa: F811
    file = folder / "model.safetensors"
    assert "pass --size" in refused("export", file, "--model", "test_cli:tiny", "--out", tmp_path / "t")
    written = invoke("export", file, "--size", 32, "--model", "test_cli:tiny", "--out", tmp_path / "m.onnx")
    assert written.exit_code == 0, written.output
    assert written.stdout.startswith(f"wrote {tmp_path / 'm.onnx'}")
    x = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)
    assert session(tmp_path / "m.onnx").run(None, {"images": x})[0].shape == (3, 3)
    tensorrt = "--target", "tensorrt"
    sentence = refused("export", file, "--model", "test_cli:tiny", "--size", 32, "--out", tmp_path / "t", *tensorrt)
    assert "quantise with --bits w8a8 --symmetric" in sentence
    assert "target must be" in refused("export", file, "--size", 32, "--model", "test_cli:tiny", "--target", "coreml")
    torch_file = tmp_path / "m.pt2"
    done = invoke("export", file, "--size", 32, "--model", "test_cli:tiny", "--out", torch_file, "--target", "torch")
    assert done.exit_code == 0, done.output
    assert torch_file.is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reference", "recipe", "form"),
    [
        ("torchvision:resnet18", "w8a8", "packed"),
        ("torchvision:mobilenet_v2", "w4a4", "adapted"),
        ("timm:vit_tiny_patch16_224", "w4a4", "packed"),
    ],
)
def test_networks_of_libraries(reference, recipe, form, tmp_path):
    pytest.importorskip(reference.partition(":")[0])
    size = {"img_size": 64} if reference.startswith("timm") else {}
    model = settle(ttaq.zoo.build_model(reference, num_classes=10, **size), images(4, 64))
    model = ttaq.prepare(model, recipe)
    ttaq.calibrate(model, [images(4, 64)])
    model = ttaq.pack(model)
    if form == "adapted":
        adapter: Adapter = ttaq.adapt(model, "tent")
        adapter(images(4, 64, seed=3))
        model = adapter.export()
    x = images(4, 64, seed=2)
    export_onnx(model, x, tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    with torch.no_grad():
        wanted = model(x)
    for optimised in (False, True):
        found = torch.from_numpy(session(tmp_path / "model.onnx", optimised).run(None, {"images": x.numpy()})[0])
        assert (found - wanted).abs().max() <= 0.1 * wanted.abs().max()  # a code that falls the other way goes far


def test_a_shared_convolution_keeps_its_norms(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.first, self.second = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.second(self.conv(self.first(self.conv(x)))).mean((2, 3))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = settle(Twice(), images())
    model = ttaq.prepare(model, "w8a8")
    ttaq.calibrate(model, [images()])
    packed = ttaq.pack(copy.deepcopy(model))
    said = export_onnx(packed, images(), tmp_path / "model.onnx")
    agrees(tmp_path / "model.onnx", packed, images(seed=2))
    assert said["folded"] + len(said["kept"]) == 2
